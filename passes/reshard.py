"""From one sharding of an array to another: the collectives, in order.

In: two `ShardingSpec`s. Out: `ReshardStep`s. The cost model prices these steps and
`alpa_lite.runtime.reshard` executes the very same ones, so a plan's collectives are exactly those
of the program.

Each dim keeps the longest common prefix of its axes; what follows in the source is removed from
the minor end (all_gather, or all_to_all into another dim), what follows in the target is appended
(a free local slice, a reduce_scatter of a pending sum, or that all_to_all). Pending sums go before
gathers, when arrays are smallest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from alpa_lite.ir.sharding import Mesh, ShardingSpec

SLICE = "slice"
MASK = "mask"
ALL_GATHER = "all_gather"
ALL_REDUCE = "all_reduce"
REDUCE_SCATTER = "reduce_scatter"
ALL_TO_ALL = "all_to_all"
COLLECTIVES = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL)


@dataclass(frozen=True, slots=True)
class ReshardStep:
    """One local or collective operation.

    Attributes:
      kind: one of the constants of this module; `mask` keeps the value on the first device of the
        axes and puts zeros elsewhere (replicated to pending sum).
      axes: mesh axes involved, major to minor.
      dim: dim split by slice, reduce_scatter and all_to_all, joined by all_gather.
      from_dim: dim joined by all_to_all.
      payload_fraction: payload over the bytes of the whole array: all_reduce, reduce_scatter and
        all_to_all count the input on one device, all_gather its result.
    """

    kind: str
    axes: tuple[str, ...]
    dim: int = -1
    from_dim: int = -1
    payload_fraction: float = 0.0


@functools.lru_cache(maxsize=1 << 18)
def plan_reshard(source: ShardingSpec, target: ShardingSpec, mesh: Mesh) -> tuple[ReshardStep, ...]:
    """Steps that turn `source` into `target`.

    Args:
      source: present spec; may have pending sums.
      target: wanted spec; may have pending sums.
      mesh: the mesh of both.
    """
    return tuple(
        ReshardStep(
            move.kind, move.axes, move.dim, move.from_dim,
            0.0 if move.split is None else 1.0 / mesh.size(move.split),
        )
        for move in plan_moves(source, target, mesh.names)
    )  # fmt: skip


class Move(NamedTuple):
    """A `ReshardStep` on a mesh of any shape.

    Attributes:
      kind, axes, dim, from_dim: as there.
      split: mesh axes that divide the payload; None where nothing is sent.
    """

    kind: str
    axes: tuple[str, ...]
    dim: int = -1
    from_dim: int = -1
    split: tuple[str, ...] | None = None


@functools.lru_cache(maxsize=1 << 16)
def plan_moves(
    source: ShardingSpec, target: ShardingSpec, names: tuple[str, ...]
) -> tuple[Move, ...]:
    """What `plan_reshard` does on every mesh with axes of these names."""
    return () if source == target else tuple(_Planner(source, target, names).run())


class _Planner:
    def __init__(self, source: ShardingSpec, target: ShardingSpec, names: tuple[str, ...]) -> None:
        self.names = names
        self.dims = [list(axes) for axes in source.dims]
        self.goal = [list(axes) for axes in target.dims]
        self.keep = [_common_prefix(a, b) for a, b in zip(self.dims, self.goal, strict=True)]
        self.pending = [a for a in source.partial if a not in target.partial]
        self.to_mask = tuple(a for a in target.partial if a not in source.partial)
        self.steps: list[Move] = []

    def run(self) -> list[Move]:
        while True:
            if not (self.push_free() or self.exchange()):
                if self.pending:
                    self.all_reduce()
                elif not self.gather():
                    break
        if self.to_mask:
            self.steps.append(Move(MASK, self.to_mask))
        assert self.dims == self.goal, (self.dims, self.goal)
        return self.steps

    def split(self) -> tuple[str, ...]:
        """The axes that split the array now."""
        return tuple(axis for axes in self.dims for axis in axes)

    def next_push(self, dim: int) -> str | None:
        """The axis to append to a dim, once nothing is left to remove from it."""
        if (
            len(self.dims[dim]) > self.keep[dim]
            and self.dims[dim] != self.goal[dim][: len(self.dims[dim])]
        ):
            return None
        have = len(self.dims[dim])
        return self.goal[dim][have] if have < len(self.goal[dim]) else None

    def push_free(self) -> bool:
        """Slice, or scatter a pending sum."""
        used = {axis for axes in self.dims for axis in axes}
        for scatter in (False, True):
            for dim in range(len(self.dims)):
                axis = self.next_push(dim)
                if axis is None or axis in used or (axis in self.pending) != scatter:
                    continue
                kind = REDUCE_SCATTER if scatter else SLICE
                split = self.split() if scatter else None
                self.steps.append(Move(kind, (axis,), dim, split=split))
                if scatter:
                    self.pending.remove(axis)
                self.dims[dim].append(axis)
                return True
        return False

    def exchange(self) -> bool:
        """Move a minor-most axis from one dim to the minor end of another."""
        for source, axes in enumerate(self.dims):
            if len(axes) <= self.keep[source]:
                continue
            for dim in range(len(self.dims)):
                if dim == source or self.next_push(dim) is None:
                    continue
                # As many minor axes at once as the target wants in this order.
                for start in range(self.keep[source], len(axes)):
                    moved = axes[start:]
                    have = len(self.dims[dim])
                    if self.goal[dim][have : have + len(moved)] == moved:
                        step = Move(ALL_TO_ALL, tuple(moved), dim, source, self.split())
                        del axes[start:]
                        self.dims[dim].extend(moved)
                        self.steps.append(step)
                        return True
        return False

    def all_reduce(self) -> None:
        axes = tuple(a for a in self.names if a in self.pending)
        self.steps.append(Move(ALL_REDUCE, axes, split=self.split()))
        self.pending = []

    def gather(self) -> bool:
        """Remove surplus minor axes of one dim, as one collective where nothing else wants them."""
        for dim, axes in enumerate(self.dims):
            if len(axes) <= self.keep[dim] or axes == self.goal[dim][: len(axes)]:
                continue
            removed = [axes.pop()]
            while len(axes) > self.keep[dim] and not self.wanted_elsewhere(axes[-1], dim):
                removed.insert(0, axes.pop())
            self.steps.append(Move(ALL_GATHER, tuple(removed), dim, split=self.split()))
            return True
        return False

    def wanted_elsewhere(self, axis: str, dim: int) -> bool:
        return any(axis in goal for d, goal in enumerate(self.goal) if d != dim)


def _common_prefix(a: list[str], b: list[str]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
