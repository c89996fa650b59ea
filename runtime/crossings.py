"""What crosses from one phase of a step to later ones: `find_crossings`.

In: segments that run one after the other. Out: for each, the arrays it reads that are made outside
of it. They are found by running all segments once on abstract values, so they are exactly those
that the interpreter asks for: a value, or what a layout change that the plan shares has made of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.decisions import Decisions, LayoutChange
from alpa_lite.passes.reshard import COLLECTIVES, ReshardStep
from alpa_lite.runtime.interpreter import Env, Interpreter, Key
from alpa_lite.runtime.reshard import spec_after
from alpa_lite.runtime.segments import Segment


@dataclass(frozen=True, slots=True)
class Border:
    """An array as it stands between two programs.

    A pending sum has one more dim in front, split over the axes of the sum: every device's summand
    is its part.

    Attributes:
      shape: of the whole array, without that dim.
      dtype: element type.
      spec: its layout.
      weak: whether its type is weak.
    """

    shape: tuple[int, ...]
    dtype: Any
    spec: ShardingSpec
    weak: bool = False

    def aval(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """Type of the whole array between programs."""
        front = (mesh.size(self.spec.partial),) if self.spec.partial else ()
        return jax.ShapeDtypeStruct((*front, *self.shape), self.dtype, weak_type=self.weak)

    def sharding(self, mesh: jax.sharding.Mesh) -> NamedSharding:
        """Its layout between programs."""
        dims = ShardingSpec(self.spec.dims).partition_spec()
        front = (self.spec.partial,) if self.spec.partial else ()
        return NamedSharding(mesh, PartitionSpec(*front, *dims))

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of a device's part between programs."""
        front = (1,) if self.spec.partial else ()
        return (*front, *self.spec.local_shape(self.shape, mesh))

    def local_bytes(self, mesh: Mesh) -> int:
        """Bytes of a device's part."""
        itemsize = getattr(self.dtype, "itemsize", 8)
        return math.prod(self.local_shape(mesh)) * itemsize

    def unpack(self, x: jax.Array) -> jax.Array:
        """A device's part as programs compute with it."""
        return jax.lax.squeeze(x, (0,)) if self.spec.partial else x

    def pack(self, x: jax.Array) -> jax.Array:
        """The reverse."""
        return jax.lax.expand_dims(x, (0,)) if self.spec.partial else x


def border_of(decisions: Decisions, key: Key) -> Border:
    """How the array of a key of `Env` stands between programs."""
    value, history = (key, ()) if isinstance(key, int) else (key[0], key[2])
    spec = decisions.value_spec(value)
    for step in history:
        spec = spec_after(spec, step)
    flat = decisions.contraction.values[value]
    return Border(flat.shape, flat.aval.dtype, spec)


def find_crossings(
    interpreter: Interpreter, segments: Sequence[Segment], mesh: jax.sharding.Mesh,
    given: Mapping[Key, int], lasting: Collection[Key],
) -> tuple[list[tuple[Key, ...]], dict[Key, int]]:  # fmt: skip
    """Run all segments on abstract values.

    Args:
      interpreter: of the step.
      segments: in the order in which they run.
      mesh: devices, which are not used.
      given: keys known from the start, with the positions of the inputs they are, or graph values
        of constants as `-1 - value`.
      lasting: keys that every segment may read at no cost, besides `given`.

    Returns:
      Per segment, the keys it reads that it does not make, in order of reading; and for every key,
      the position of the segment that made it (given ones left out).
    """
    graph = interpreter.program.graph
    reads: list[tuple[Key, ...]] = []
    made: dict[Key, int] = {}
    specs = [interpreter.d.value_spec(interpreter.input_value(i)) for i in range(len(graph.inputs))]

    def run(*inputs: jax.Array) -> jax.Array:
        earlier: Env = {
            key: inputs[at] if at >= 0 else interpreter.constant(-1 - at)
            for key, at in given.items()
        }
        for position, segment in enumerate(segments):
            env = _Recorded(earlier)
            interpreter.run(segment, env)
            reads.append(tuple(env.read))
            for key in env:
                made.setdefault(key, position)
            earlier |= env
        return jnp.zeros(())

    step = jax.shard_map(
        run, mesh=mesh, in_specs=tuple(s.partition_spec() for s in specs),
        out_specs=PartitionSpec(), check_vma=False,
    )  # fmt: skip
    values = [graph.values[v] for v in graph.inputs]
    jax.eval_shape(step, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values))
    free = {*given, *lasting}
    return [_without_free(keys, free, interpreter.mesh) for keys in reads], made


class _Recorded(dict[Key, Any]):
    """The environment of one segment; notes which earlier arrays it reads."""

    def __init__(self, earlier: Mapping[Key, Any]) -> None:
        super().__init__()
        self.earlier = earlier
        self.read: dict[Key, None] = {}

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.earlier

    def __missing__(self, key: Key) -> Any:
        self.read[key] = None
        return self.earlier[key]


def _without_free(keys: Sequence[Key], free: Collection[Key], mesh: Mesh) -> tuple[Key, ...]:
    """Reads of local slices of what is read anyway are reads of that, and slicing again."""
    whole = set(keys)
    found: dict[Key, None] = {}
    for key in keys:
        best = source = key
        while not isinstance(source, int) and _is_local(source[2][-1], mesh):
            source = _before(source)
            if source in whole or source in free:
                best = source
        found[best] = None
    return tuple(found)


def _before(key: tuple[int, str, tuple[ReshardStep, ...]]) -> Key:
    """The key one layout change earlier."""
    value, again, history = key
    if len(history) == 1:
        return value
    *_, (_, previous) = LayoutChange(value, again, (), history[:-1]).results()
    return previous


def _is_local(step: ReshardStep, mesh: Mesh) -> bool:
    return step.kind not in COLLECTIVES or mesh.size(step.axes) == 1
