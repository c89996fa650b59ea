"""Seconds of every strategy and of every pair of strategies: node and edge costs.

In: a contraction and its share classes (`count_work`, once), then the strategies on one mesh and a
cost model (`price`, per mesh). Out: cost arrays per class and per pair of classes. Each op and
each layout change is weighted by how often it runs per step; equal ones of a class are priced once
and counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alpa_lite.ir.flops import is_matmul
from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes import op_traits
from alpa_lite.passes.decision_graph import Contraction, Layout
from alpa_lite.passes.program import FlatOp
from alpa_lite.passes.reshard import ALL_GATHER, ALL_TO_ALL, COLLECTIVES, plan_moves, plan_reshard
from alpa_lite.passes.strategies import StrategySet


class Prices(Protocol):
    """What pricing needs from a cost model (`alpa_lite.cost_model.MeshCostModel` is one)."""

    def collective_s(self, kind: str, payload_bytes: float, axes: tuple[str, ...]) -> float:
        """Seconds of one collective over mesh axes."""

    def compute_s_array(
        self, flops: ArrayLike, bytes_accessed: ArrayLike, dtype: str, is_matmul: bool
    ) -> NDArray[np.float64]:
        """Seconds of many local operations."""


@dataclass(frozen=True, slots=True, eq=False)
class OpWork:
    """Equal ops of one class.

    Attributes:
      cls: share class.
      count: how many.
      weight: executions per step of each.
      flops: of the whole op.
      dtype: that decides the rate: of a matmul's operands, else of the result.
      is_matmul: whether it runs on matrix units.
      arrays: (bytes, dims) of every operand and result that is read from or written to memory.
      factors: node factors that divide the work.
      sums: (bytes, layout) of results that the op itself must combine.
    """

    cls: int
    count: int
    weight: float
    flops: float
    dtype: str
    is_matmul: bool
    arrays: tuple[tuple[int, tuple[int, ...]], ...]
    factors: tuple[int, ...]
    sums: tuple[tuple[int, Layout], ...]


@dataclass(frozen=True, slots=True)
class UseWork:
    """Equal layout changes between two classes.

    Attributes:
      u, v: classes that make and read the value.
      num_bytes: of the whole value.
      source, target: its layouts.
      weight: executions per step.
    """

    u: int
    v: int
    num_bytes: int
    source: Layout
    target: Layout
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What has to be priced, whatever the mesh.

    Attributes:
      ops: all work.
      uses: layout change -> how many.
    """

    ops: tuple[OpWork, ...]
    uses: dict[UseWork, int]


@dataclass(frozen=True, slots=True, eq=False)
class PricedGraph:
    """Costs of one contraction on one mesh.

    Attributes:
      mesh: the mesh.
      strategies: strategy set of each class (of its first node).
      node_cost_s: per class `[num_strategies]`.
      edge_cost_s: (class u, class v), u < v -> `[strategies of u, strategies of v]`.
    """

    mesh: Mesh
    strategies: tuple[StrategySet, ...]
    node_cost_s: tuple[np.ndarray, ...]
    edge_cost_s: dict[tuple[int, int], np.ndarray]


def count_work(
    contraction: Contraction, classes: Sequence[int], phase: str | None = None
) -> Workload:
    """Collect equal ops and equal layout changes; only the ops of one phase if that is given."""
    ops = tuple(_count_ops(contraction, classes, phase))
    uses: dict[UseWork, int] = {}
    for use in _uses(contraction, classes):
        uses[use] = uses.get(use, 0) + 1
    return Workload(ops, uses)


def price(
    work: Workload, strategies: Sequence[StrategySet], mesh: Mesh, prices: Prices,
    limits: Mapping[UseWork, float] | None = None,
) -> PricedGraph:  # fmt: skip
    """Price every strategy and pair.

    Args:
      work: from `count_work`.
      strategies: per class.
      mesh: the mesh.
      prices: its cost model.
      limits: layout changes that must not make an array of so many bytes per device or more.
    """
    node_cost = [np.zeros(len(s)) for s in strategies]
    divisors = _Divisors(strategies, mesh)
    for op in work.ops:
        seconds = _compute_cost(op, divisors, prices)
        if op.sums:
            seconds = seconds + _sum_cost(op, strategies[op.cls], mesh, prices)
        node_cost[op.cls] += op.count * seconds
    edge_cost: dict[tuple[int, int], np.ndarray] = {}
    tables = _UseTables(strategies, mesh, prices)
    for use, count in work.uses.items():
        cost = count * use.weight * tables.cost(use, (limits or {}).get(use))
        if use.u == use.v:
            # Members of one class choose alike, whether the two ends are one node or not.
            node_cost[use.u] += np.diagonal(cost)
        elif use.u < use.v:
            edge_cost[use.u, use.v] = edge_cost.get((use.u, use.v), 0.0) + cost
        else:
            edge_cost[use.v, use.u] = edge_cost.get((use.v, use.u), 0.0) + cost.T
    edge_cost = {pair: cost for pair, cost in edge_cost.items() if cost.any()}
    return PricedGraph(mesh, tuple(strategies), tuple(node_cost), edge_cost)


def compute_s(work: Workload, chosen: Sequence[StrategySet], mesh: Mesh, prices: Prices) -> float:
    """Seconds of all local work per step, `chosen` holding one strategy per class."""
    divisors = _Divisors(chosen, mesh)
    return sum(op.count * float(_compute_cost(op, divisors, prices)[0]) for op in work.ops)


def converted_bytes(
    source: ShardingSpec, target: ShardingSpec, num_bytes: float, mesh: Mesh
) -> float:
    """Bytes per device of the new array that a gathering layout change makes, else 0."""
    kinds = {step.kind for step in plan_reshard(source, target, mesh)}
    return num_bytes / target.num_shards(mesh) if kinds & {ALL_GATHER, ALL_TO_ALL} else 0.0


def use_work(c: Contraction, classes: Sequence[int], op: FlatOp, position: int) -> UseWork:
    """The layout change of one operand, as it is priced."""
    value = c.operands[op.id][position]
    producer = c.ops[c.definition[value]]
    return UseWork(
        classes[c.node_of[producer.id]], classes[c.node_of[op.id]], c.values[value].num_bytes,
        c.result_layouts[producer.id][producer.results.index(value)],
        c.operand_layouts[op.id][position], op.operand_weights[position],
    )  # fmt: skip


def resolved_axes(layout: Layout, assignment: Sequence[int], mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes over which an op combines its result before anyone reads it."""
    return tuple(
        name for name, f in zip(mesh.names, assignment, strict=True) if f in layout.resolved
    )


def internal_values(contraction: Contraction) -> frozenset[int]:
    """Values that live only inside one fusion: made and read by cheap ops of one node and phase."""
    return _internal_values(contraction, _fusions(contraction))


def _internal_values(c: Contraction, fusions: Sequence[int]) -> frozenset[int]:
    escaped = {v for v in c.program.outputs if v is not None}
    for op in c.ops:
        for value in c.operands[op.id]:
            if fusions[op.id] == _ALONE or fusions[c.definition[value]] != fusions[op.id]:
                escaped.add(value)
    return frozenset(
        v for op in c.ops if fusions[op.id] != _ALONE for v in op.results if v not in escaped
    )


# Counting.

_ALONE = -1
"""In the place of a fusion: an op that XLA runs by itself."""


def _count_ops(c: Contraction, classes: Sequence[int], phase: str | None) -> Iterator[OpWork]:
    fusions = _fusions(c)
    internal = _internal_values(c, fusions)
    counted: dict[tuple[Any, ...], tuple[int, FlatOp]] = {}
    for op in c.ops:
        if op.kind != "op" or not op.results or phase not in (None, op.phase):
            continue
        layouts = (*c.operand_layouts[op.id], *c.result_layouts[op.id])
        in_memory = _arrays(c, op, fusions, internal)
        cls = classes[c.node_of[op.id]]
        key = (cls, op.key, op.weight, layouts, in_memory)
        count, first = counted.get(key, (0, op))
        counted[key] = (count + 1, first)
    for (cls, _, _, layouts, in_memory), (count, op) in counted.items():
        assert op.op is not None
        outs = c.result_layouts[op.id]
        yield OpWork(
            cls=cls, count=count, weight=op.weight, flops=op.op.flops,
            dtype=_compute_dtype(c, op), is_matmul=is_matmul(op.op.name),
            arrays=in_memory, factors=tuple(sorted({f for x in layouts for f in x.dims})),
            sums=tuple(
                (c.values[value].num_bytes, layout)
                for value, layout in zip(op.results, outs, strict=True)
                if layout.resolved
            ),
        )  # fmt: skip


def _compute_dtype(c: Contraction, op: FlatOp) -> str:
    assert op.op is not None
    matmul = is_matmul(op.op.name) and c.operands[op.id]
    value = c.operands[op.id][0] if matmul else op.results[0]
    return str(c.values[value].aval.dtype)


def _arrays(
    c: Contraction, op: FlatOp, fusions: Sequence[int], internal: frozenset[int]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Operands and results that reach memory: XLA fuses chains of cheap ops."""
    read = [
        (c.values[v].num_bytes, layout.dims)
        for v, layout in zip(c.operands[op.id], c.operand_layouts[op.id], strict=True)
        if fusions[op.id] == _ALONE or fusions[c.definition[v]] != fusions[op.id]
    ]
    written = [
        (c.values[v].num_bytes, layout.dims)
        for v, layout in zip(op.results, c.result_layouts[op.id], strict=True)
        if v not in internal
    ]
    return tuple(read + written)


def _uses(c: Contraction, classes: Sequence[int]) -> Iterator[UseWork]:
    for op, position in c.uses:
        use = use_work(c, classes, op, position)
        if use.u == use.v and use.source.dims == use.target.dims and not use.source.partial:
            continue
        shape = c.values[c.operands[op.id][position]].shape
        if use.source.partial or any(n > 1 for n in shape):
            yield use


def _fusions(c: Contraction) -> list[int]:
    """For each op the number of the fusion it may be in: cheap ops of one node, phase and graph.

    `_ALONE` for ops that are not cheap.
    """
    numbers: dict[tuple[int, str, int], int] = {}
    return [
        numbers.setdefault((c.node_of[op.id], op.phase, id(op.graph)), len(numbers))
        if op.kind == "op" and op.name not in op_traits.HEAVY
        else _ALONE
        for op in c.ops
    ]


# Pricing.


class _Divisors:
    """By how much factors shrink per device under each strategy, each found once."""

    def __init__(self, strategies: Sequence[StrategySet], mesh: Mesh) -> None:
        self.strategies, self.mesh = strategies, mesh
        self.known: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}

    def of(self, cls: int, factors: tuple[int, ...]) -> np.ndarray:
        """`[num_strategies]`: see `StrategySet.divisors`."""
        key = cls, factors
        if key not in self.known:
            self.known[key] = self.strategies[cls].divisors(self.mesh, factors)
        return self.known[key]


def _compute_cost(op: OpWork, divisors: _Divisors, prices: Prices) -> np.ndarray:
    """`[num_strategies]` seconds per step of one op's own work."""
    if not op.arrays and not op.is_matmul:
        return np.zeros(len(divisors.strategies[op.cls]))
    local_bytes = sum(
        (num_bytes / divisors.of(op.cls, dims) for num_bytes, dims in op.arrays), np.zeros(1)
    )
    local_flops = op.flops / divisors.of(op.cls, op.factors)
    seconds = prices.compute_s_array(local_flops, local_bytes, op.dtype, op.is_matmul)
    return op.weight * seconds


def _sum_cost(op: OpWork, strategies: StrategySet, mesh: Mesh, prices: Prices) -> np.ndarray:
    """`[num_strategies]` seconds per step of the sums an op completes at once."""
    seconds = np.zeros(len(strategies))
    for num_bytes, layout in op.sums:
        local = num_bytes / strategies.divisors(mesh, layout.dims)
        for i, assignment in enumerate(strategies.assignments):
            axes = resolved_axes(layout, assignment, mesh)
            if axes:
                seconds[i] += prices.collective_s("all_reduce", float(local[i]), axes)
    return op.weight * seconds


_Specs = tuple[ShardingSpec, ...]
_Collectives = tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
"""Of a layout change: kind, mesh axes, and axes that divide the payload of each."""


@functools.lru_cache(maxsize=1 << 12)
def _changes(
    sources: _Specs, targets: _Specs, names: tuple[str, ...]
) -> tuple[tuple[_Collectives, ...], np.ndarray]:
    """The distinct layout changes between two lists of specs, and which one each pair needs."""
    distinct: dict[_Collectives, int] = {}
    at = [
        [distinct.setdefault(_collectives(s, t, names), len(distinct)) for t in targets]
        for s in sources
    ]
    return tuple(distinct), np.array(at)


def _collectives(
    source: ShardingSpec, target: ShardingSpec, names: tuple[str, ...]
) -> _Collectives:
    return tuple(
        (move.kind, move.axes, move.split or ())
        for move in plan_moves(source, target, names)
        if move.kind in COLLECTIVES
    )


class _UseTables:
    """Layout-change seconds for all pairs of strategies, each distinct table made once."""

    def __init__(self, strategies: Sequence[StrategySet], mesh: Mesh, prices: Prices) -> None:
        self.strategies = strategies
        self.mesh = mesh
        self.prices = prices
        self.specs_of: dict[tuple[int, Layout], tuple[int, np.ndarray]] = {}
        self.spec_lists: dict[_Specs, int] = {}
        self.lists: list[_Specs] = []
        self.tables: dict[tuple[int, int, int], np.ndarray] = {}

    def cost(self, use: UseWork, limit_bytes: float | None) -> np.ndarray:
        """`[strategies of u, strategies of v]` seconds of one change; `inf` if too large."""
        sources, source_at = self.specs(use.u, use.source)
        targets, target_at = self.specs(use.v, use.target)
        key = (sources, targets, use.num_bytes)
        if key not in self.tables:
            changes, change_at = _changes(self.lists[sources], self.lists[targets], self.mesh.names)
            seconds = [self.seconds(steps, use.num_bytes) for steps in changes]
            self.tables[key] = np.array(seconds)[change_at]
        table = self.tables[key]
        if limit_bytes is not None:
            table = np.where(
                self.sizes(sources, targets, use.num_bytes) >= limit_bytes, np.inf, table
            )
        return table[np.ix_(source_at, target_at)]

    def seconds(self, steps: _Collectives, num_bytes: int) -> float:
        """Seconds to change the layout of an array of `num_bytes` once."""
        each = (
            self.prices.collective_s(kind, num_bytes / self.mesh.size(split), axes)
            for kind, axes, split in steps
        )
        return sum(each, start=0.0)

    def sizes(self, sources: int, targets: int, num_bytes: int) -> np.ndarray:
        """Bytes per device that each change makes."""
        return np.array(
            [
                [converted_bytes(s, t, num_bytes, self.mesh) for t in self.lists[targets]]
                for s in self.lists[sources]
            ]
        )

    def specs(self, cls: int, layout: Layout) -> tuple[int, np.ndarray]:
        """(number of the list of distinct specs, which of them each strategy gives)."""
        key = (cls, layout)
        if key not in self.specs_of:
            every = self.strategies[cls].specs(self.mesh, layout)
            distinct = {spec: i for i, spec in enumerate(dict.fromkeys(every))}
            names = tuple(distinct)
            if names not in self.spec_lists:
                self.spec_lists[names] = len(self.lists)
                self.lists.append(names)
            at = np.array([distinct[s] for s in every])
            self.specs_of[key] = (self.spec_lists[names], at)
        return self.specs_of[key]
