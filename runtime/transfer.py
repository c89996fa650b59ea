"""Values on their way from one submesh to another: `plan_transfer`, `Transfer`.

In: shape and dtype of a value, how it lies on the source's devices and how it shall lie on the
target's. Out: a `Transfer` whose programs are compiled. `Transfer.start` enqueues its steps and
returns; nothing waits for the program that makes the value, and nothing goes through the host.

If the submeshes belong to different processes, each of them plans the same transfer and compiles
its own side; a `transport` takes the tiles from one to the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from alpa_lite.compat import make_copier
from alpa_lite.runtime.lower import compiler_options
from alpa_lite.runtime.route import Route, devices_of, find_route
from alpa_lite.runtime.tiles import cut_of

Copier = Callable[[Sequence[jax.Array]], list[jax.Array]]


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """A planned way between two submeshes, for any number of values.

    Where a device belongs to both submeshes, results may share memory with their arguments, and
    neither is safe to donate. Otherwise a source may be deleted or donated right after `start`.

    Attributes:
      aval: shape and dtype of the value.
      route: the steps, on paper.
      prepare: the program of the source; None if there is none, or if it runs elsewhere.
      copy: takes what leaves the source to the target's devices: the one array, or tile by tile.
        None if there is nothing to do, or if it is for a transport.
      whole: which of the two; `Route.whole`, found once.
      finish: the program of the target; None as for `prepare`.
    """

    aval: jax.ShapeDtypeStruct
    route: Route
    prepare: Callable[[jax.Array], tuple[jax.Array, ...]] | None
    copy: Copier | None
    whole: bool
    finish: Callable[[jax.Array], jax.Array] | None

    @property
    def source(self) -> NamedSharding:
        """How the value lies."""
        return self.route.source

    @property
    def target(self) -> NamedSharding:
        """How it shall lie."""
        return self.route.target

    @property
    def wire_bytes(self) -> int:
        """Bytes that go from one device to another between the two programs."""
        return self.route.wire_bytes

    def start(self, x: jax.Array) -> jax.Array:
        """Enqueue the transfer of a value, finished or not, within this process.

        Args:
          x: the value, in the source's layout.

        Returns:
          It in the target's layout; ready when the transfer is done.

        Raises:
          TypeError, ValueError: it has another shape, dtype or layout, or was deleted.
          RuntimeError: some of the devices belong to other processes.
        """
        parts = self.start_source(x)
        if self.route.copies:
            if self.copy is None:
                raise RuntimeError(
                    "devices of this transfer belong to other processes: "
                    "send and receive it through a transport"
                )
            if not self.whole:
                return self.finish_target(self.copy(self.leaving_tiles(parts)))
            parts = tuple(self.copy(parts))
        (received,) = parts
        return received if self.finish is None else self.finish(received)

    def start_source(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The source's part of the work: the arrays that leave, one per part of the route."""
        self._check(x)
        return (x,) if self.prepare is None else self.prepare(x)

    def leaving_tiles(self, parts: Sequence[jax.Array]) -> list[jax.Array]:
        """The tile of every pair whose source device belongs to this process.

        Args:
          parts: as returned by `start_source`.
        """
        tiles = [{shard.device: shard.data for shard in part.addressable_shards} for part in parts]
        sources = devices_of(self.route.sent)
        return [
            tiles[pair.part][sources[pair.source]]
            for pair in self.route.pairs
            if sources[pair.source] in tiles[pair.part]
        ]

    def finish_target(self, tiles: Sequence[jax.Array]) -> jax.Array:
        """The target's part of the work.

        Args:
          tiles: one per target device of this process, in mesh order, on these devices.
        """
        received = jax.make_array_from_single_device_arrays(
            self.aval.shape, self.route.received, list(tiles)
        )
        return received if self.finish is None else self.finish(received)

    def describe(self) -> str:
        """The route in words, one line per step."""
        route = self.route
        lines = [f"{_array(self.aval.shape, self.aval.dtype)}: {_ends(route)}"]
        if route.prepares:
            arrays = f", as {route.num_parts} arrays" if route.num_parts > 1 else ""
            lines.append(f"prepare on the source: into {_tiles(route)}{arrays}")
        if route.wire_bytes:
            tile = _array(route.tile_shape, self.aval.dtype)
            moved = sum(a is not b for a, b in route.moves)
            lines.append(f"copy {moved} tiles of {tile}, {route.wire_bytes} bytes")
        if route.finishes:
            lines.append(f"finish on the target: from {_tiles(route)}")
        if len(lines) == 1:
            lines.append("nothing to do")
        return "\n".join(lines)

    def _check(self, x: jax.Array) -> None:
        if not isinstance(x, jax.Array):
            raise TypeError(f"a transfer takes a jax.Array, found {type(x).__name__}")
        if x.is_deleted():
            raise ValueError("the value was deleted or donated before its transfer")
        aval = self.aval
        if x.shape != aval.shape or x.dtype != aval.dtype:
            raise ValueError(
                f"the transfer is for {_array(aval.shape, aval.dtype)}, "
                f"found {_array(x.shape, x.dtype)}"
            )
        source = self.route.source
        if x.sharding != source and not x.sharding.is_equivalent_to(source, x.ndim):
            raise ValueError(f"the transfer is from {source}, found a value in {x.sharding}")


def plan_transfer(
    aval: Any, source: NamedSharding, target: NamedSharding, *, cross_host: bool | None = None
) -> Transfer:
    """Choose the route of a value and compile its programs.

    Programs of submeshes in which this process has no device are left to the others.

    Args:
      aval: anything with shape and dtype. PRNG keys travel as `jax.random.key_data(keys)`.
      source: how the value lies.
      target: how it shall lie: other devices, the same ones, or some of each.
      cross_host: whether the wire is between hosts, and so slow that a byte should travel once even
        if that takes more programs; by default, whether the devices belong to different processes.

    Raises:
      TypeError: the dtype is an extended one.
      ValueError: a sharding leaves a dim open, or does not divide the value evenly.
    """
    _check_dtype(aval.dtype)
    itemsize = np.dtype(aval.dtype).itemsize
    route = find_route(aval.shape, itemsize, source, target, cross_host=cross_host)
    return compile_route(route, aval.dtype)


def compile_route(route: Route, dtype: Any) -> Transfer:
    """The transfer of values of this dtype over a given route.

    Raises:
      TypeError: the dtype is an extended one.
    """
    _check_dtype(dtype)
    value = jax.ShapeDtypeStruct(route.shape, dtype)
    source, target = route.source, route.target
    here = jax.process_index()
    whole = route.whole
    prepare = copy = finish = None
    if route.prepares and _has_devices(source, here):
        prepare = _compile(_splitter(route), value, source, (route.sent,) * route.num_parts)
    if route.finishes and _has_devices(target, here):
        finish = _compile(_finished, value, route.received, target)
    if route.copies and source.is_fully_addressable and target.is_fully_addressable:
        copy = make_copier(
            [route.received]
            if whole
            else [SingleDeviceSharding(device) for device in devices_of(route.received)]
        )
    return Transfer(value, route, prepare, copy, whole, finish)


def _check_dtype(dtype: Any) -> None:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        raise TypeError(
            f"values of dtype {dtype} do not travel: send jax.random.key_data(keys), and make keys "
            "of it on the other side with jax.random.wrap_key_data"
        )


def _has_devices(sharding: NamedSharding, process: int) -> bool:
    return any(device.process_index == process for device in devices_of(sharding))


def _splitter(route: Route) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """The function of the source's program: x to the arrays that leave."""
    if route.num_parts == 1:
        return _prepared

    def split(tile: jax.Array) -> tuple[jax.Array, ...]:
        sizes = [n // k for n, k in zip(tile.shape, route.splits, strict=True)]
        offsets = itertools.product(
            *(range(0, n, step) for n, step in zip(tile.shape, sizes, strict=True))
        )
        return tuple(
            jax.lax.slice(tile, low, [a + b for a, b in zip(low, sizes, strict=True)])
            for low in offsets
        )

    mesh, spec = route.sent.mesh, route.sent.spec
    return jax.shard_map(split, mesh=mesh, in_specs=spec, out_specs=(spec,) * route.num_parts)


def _prepared(x: jax.Array) -> tuple[jax.Array, ...]:
    return (x,)


def _finished(x: jax.Array) -> jax.Array:
    return x


def _compile(
    fun: Callable[[jax.Array], Any], value: jax.ShapeDtypeStruct, source: NamedSharding, target: Any
) -> Callable[[jax.Array], Any]:
    options = compiler_options(devices_of(source)[0].platform)
    jitted = jax.jit(fun, in_shardings=source, out_shardings=target, compiler_options=options)
    return jitted.lower(value).compile()


def _array(shape: Iterable[int], dtype: Any) -> str:
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"


def _ends(route: Route) -> str:
    ends = (route.source, route.target)
    return " -> ".join(f"{tuple(s.spec)} on {s.num_devices} device(s)" for s in ends)


def _tiles(route: Route) -> str:
    counts = cut_of(route.received, route.shape).counts
    return f"{'x'.join(map(str, counts))} tiles" if counts else "copies"
