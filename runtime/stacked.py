"""Stacked arrays that lie on several meshes: `StackedLayout`.

A step with scanned layers has stacked parameters, `[layers, ...]`. Cut into stages, every stage has
a piece of each. To the user such a leaf stays one array, on the devices of all its stages: its
sharding splits the stacked dim over one more mesh axis, `pp`. Pieces and whole share their memory,
so going from one to the other copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alpa_lite.errors import PlanError
from alpa_lite.passes.stages.split_scan import SplitStep
from alpa_lite.runtime.arrays import absent, is_local

STAGE_AXIS = "pp"


@dataclass(frozen=True, slots=True, eq=False)
class StackedLayout:
    """How one stacked array lies.

    Attributes:
      whole: its sharding.
      shape: its shape.
      pieces: sharding of each piece, as its stage has it.
      common: the same in the layout that all pieces share, which is that of the first piece.
      dim: along which the pieces follow each other.
    """

    whole: NamedSharding
    shape: tuple[int, ...]
    pieces: tuple[NamedSharding, ...]
    common: tuple[NamedSharding, ...]
    dim: int

    def split(self, array: jax.Array) -> list[jax.Array]:
        """The pieces of an array that lies as `whole` says.

        A piece whose stage has it in the common layout shares its memory with the array: donating
        the piece deletes the array.
        """
        by_device = {shard.device: shard.data for shard in array.addressable_shards}
        shape = self.piece_shape
        found = []
        for common, own in zip(self.common, self.pieces, strict=True):
            local = [d for d in common.mesh.devices.flat if d in by_device]
            piece = jax.make_array_from_single_device_arrays(
                shape, common, [by_device[d] for d in local], dtype=array.dtype
            )
            found.append(_relaid(piece, common, own))
        return found

    def join(self, pieces: Sequence[jax.Array]) -> jax.Array:
        """The array whose pieces these are."""
        shards = [
            shard.data
            for piece, common, own in zip(pieces, self.common, self.pieces, strict=True)
            for shard in _relaid(piece, own, common).addressable_shards
        ]
        return jax.make_array_from_single_device_arrays(
            self.shape, self.whole, shards, dtype=pieces[0].dtype
        )

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of every piece."""
        size = self.shape[self.dim] // len(self.pieces)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])


def stacked_layout(
    name: str, shape: Sequence[int], dim: int, pieces: Sequence[NamedSharding]
) -> StackedLayout:
    """Find one sharding for an array whose pieces lie on different meshes.

    Args:
      name: of the array, for messages.
      shape: of the whole array.
      dim: along which it is cut into equal pieces.
      pieces: how each piece lies.

    Raises:
      PlanError: the meshes have different numbers of devices or share some.
    """
    first = pieces[0].mesh
    sizes = {s.mesh.devices.size for s in pieces}
    devices = [d for s in pieces for d in s.mesh.devices.flat]
    if len(sizes) > 1 or len(set(devices)) < len(devices):
        raise PlanError(
            f"the stacked array {name} is cut over {len(pieces)} stages with "
            f"{sorted(sizes)} devices; stages of a scan over layers need submeshes of one size, a "
            "stage each. Use equal submeshes and one stage per submesh, or unroll the layers."
        )
    shape_of_mesh, names = first.devices.shape, first.axis_names
    spec = tuple(pieces[0].spec) + (None,) * (len(shape) - len(pieces[0].spec))
    common = tuple(
        s
        if s.mesh.devices.shape == shape_of_mesh
        and s.mesh.axis_names == names
        and tuple(s.spec) == tuple(pieces[0].spec)
        else NamedSharding(Mesh(s.mesh.devices.reshape(shape_of_mesh), names), PartitionSpec(*spec))
        for s in pieces
    )
    grid = np.stack([s.mesh.devices for s in common])
    inner = spec[dim]
    axes = () if inner is None else (inner,) if isinstance(inner, str) else tuple(inner)
    dims = (*spec[:dim], (STAGE_AXIS, *axes), *spec[dim + 1 :])
    taken = tuple(f"{n}_" if n == STAGE_AXIS else n for n in names)
    whole = NamedSharding(Mesh(grid, (STAGE_AXIS, *taken)), PartitionSpec(*dims))
    return StackedLayout(whole, tuple(shape), tuple(pieces), common, dim)


class LeafMap:
    """Between a step's leaves as a user has them and as its stages have them.

    Args:
      places: of the step.
      names: paths of the user's input leaves.
      shapes: of the user's input leaves, and of its outputs.
      pieces: how state leaves of the stages lie, by position among the stages' inputs.
    """

    def __init__(
        self, places: SplitStep, names: Sequence[str],
        shapes: tuple[Sequence[tuple[int, ...]], Sequence[tuple[int, ...]]],
        pieces: Mapping[int, NamedSharding],
    ) -> None:  # fmt: skip
        self.places = places
        self.inputs: dict[int, StackedLayout] = {}
        self._outputs: dict[int, StackedLayout] = {}
        self._output_shapes = shapes[1]
        for i, place in enumerate(places.inputs):
            if place.dim is not None:
                found = [pieces[p] for p in place.positions]
                self.inputs[i] = stacked_layout(names[i], shapes[0][i], place.dim, found)
        of_output = {place.positions: i for i, place in enumerate(places.outputs)}
        for i, layout in self.inputs.items():
            positions = tuple(places.aliases[p] for p in places.inputs[i].positions)
            self._outputs[of_output[positions]] = layout

    def split(self, leaf: int, array: jax.Array) -> dict[int, jax.Array]:
        """The arrays that stages read of a user's input leaf, by their positions."""
        positions = self.places.inputs[leaf].positions
        if leaf not in self.inputs:
            return {positions[0]: array}
        return dict(zip(positions, self.inputs[leaf].split(array), strict=True))

    def join(self, results: Sequence[jax.Array]) -> list[jax.Array]:
        """The user's outputs, from those of the stages."""
        return [self._joined(i, results) for i in range(len(self.places.outputs))]

    def _joined(self, output: int, results: Sequence[jax.Array]) -> jax.Array:
        place = self.places.outputs[output]
        if place.dim is None:
            return results[place.positions[0]]
        pieces = [results[p] for p in place.positions]
        if output not in self._outputs:  # not a state leaf: as the stages made it
            shardings = [x.sharding for x in pieces if isinstance(x.sharding, NamedSharding)]
            self._outputs[output] = stacked_layout(
                f"output {output}", self._output_shapes[output], place.dim, shardings
            )
        return self._outputs[output].join(pieces)


def _relaid(x: jax.Array, source: NamedSharding, target: NamedSharding) -> jax.Array:
    if source is target or source.is_equivalent_to(target, x.ndim):
        return x
    if not is_local(target):
        return absent(x, target)
    return _mover(target)(x)


def _mover(target: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=target)
