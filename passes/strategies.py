"""The choices of a decision node: mesh axes -> factors.

A strategy gives every mesh axis one of the node's factors (that dim is split along the axis),
NONE (the node is replicated along it) or PARTIAL (every device holds one summand). ZeRO, tensor,
sequence and expert parallelism are all strategies; there are no modes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.decision_graph import NONE, Layout, Node

PARTIAL = -2
"""In an axis's place: values of the node are pending sums along this axis."""

MAX_FACTORS = 8
"""Only so many dims of a node are ever split: those that most bytes have. Merged nodes of unrolled
models collect hundreds of minor dims (of masks, position tables), contractions have at most six."""

Assignment = tuple[int, ...]
"""For each mesh axis a node factor, NONE or PARTIAL."""


@dataclass(frozen=True, eq=False)  # without slots, as the table is made once
class StrategySet:
    """The strategies of one node on one mesh.

    Attributes:
      node: the node.
      assignments: `[num_strategies][num_axes]`.
      pruned: how many valid strategies were left out by `max_strategies`.
    """

    node: Node
    assignments: tuple[Assignment, ...]
    pruned: int = 0

    def __len__(self) -> int:
        return len(self.assignments)

    @functools.cached_property
    def table(self) -> np.ndarray:
        """`[num_strategies, num_axes]`: the assignments."""
        return np.asarray(self.assignments, dtype=np.int64).reshape(len(self.assignments), -1)

    def divisors(self, mesh: Mesh, factors: Sequence[int]) -> np.ndarray:
        """`[num_strategies]`: by how much the given factors' product shrinks per device."""
        hit = np.zeros(self.table.shape, dtype=bool)
        for factor in factors:
            if factor != NONE:
                hit |= self.table == factor
        return np.where(hit, np.asarray(mesh.shape, dtype=np.float64), 1.0).prod(axis=1)

    def specs(self, mesh: Mesh, layout: Layout) -> list[ShardingSpec]:
        """The spec of one operand or result under each strategy."""
        matters = {*layout.dims, *layout.partial}
        if layout.follows_partial:
            matters.add(PARTIAL)
        names = mesh.names
        return [
            layout_spec(layout, tuple(f if f in matters else NONE for f in a), names)
            for a in self.assignments
        ]


@functools.lru_cache(maxsize=1 << 16)
def layout_spec(layout: Layout, assignment: Assignment, names: tuple[str, ...]) -> ShardingSpec:
    """Spec of a value laid out by `layout` under one strategy.

    Args:
      layout: how it depends on the strategy.
      assignment: the strategy.
      names: of the mesh axes.
    """
    dims = tuple(
        ()
        if factor == NONE
        else tuple(n for n, chosen in zip(names, assignment, strict=True) if chosen == factor)
        for factor in layout.dims
    )
    partial = tuple(
        name
        for name, chosen in zip(names, assignment, strict=True)
        if chosen in layout.partial or (chosen == PARTIAL and layout.follows_partial)
    )
    return ShardingSpec(dims, tuple(sorted(partial)))


def enumerate_strategies(node: Node, mesh: Mesh, *, max_strategies: int = 128) -> StrategySet:
    """All strategies of a node whose dims divide evenly.

    Args:
      node: the node.
      mesh: up to four axes.
      max_strategies: beyond this many, those that use most axes are kept, the replicated one
        among them always.
    """
    order = sorted(range(len(node.factors)), key=lambda i: -node.factors[i].num_bytes)
    factors = sorted(order[:MAX_FACTORS])
    options: list[list[int]] = []
    for _, size in mesh.axes:
        choices = [NONE]
        if size > 1:
            choices += [i for i in factors if node.factors[i].size % size == 0]
            choices += [PARTIAL] if node.can_be_partial else []
        options.append(choices)
    valid = [a for a in itertools.product(*options) if _divides(node, mesh, a)]
    if len(valid) <= max_strategies:
        return StrategySet(node, tuple(valid))
    ranked = sorted(range(len(valid)), key=lambda i: (_waste(valid[i], mesh), i))
    keep = sorted({0, *ranked[: max_strategies - 1]})
    return StrategySet(node, tuple(valid[i] for i in keep), len(valid) - len(keep))


def _divides(node: Node, mesh: Mesh, assignment: Assignment) -> bool:
    shards: dict[int, int] = {}
    for chosen, size in zip(assignment, mesh.shape, strict=True):
        if chosen >= 0:
            shards[chosen] = shards.get(chosen, 1) * size
    return all(node.factors[f].size % n == 0 for f, n in shards.items())


def _waste(assignment: Assignment, mesh: Mesh) -> tuple[float, int]:
    """Devices that do the same work; then how scattered the axes are."""
    idle = np.prod([s for c, s in zip(assignment, mesh.shape, strict=True) if c == NONE])
    return float(idle), len({c for c in assignment if c != NONE})
