"""Presolve: an equivalent smaller problem, and the way back.

In: an `IntraOpProblem`. Out: a `Presolved` whose problem has the same optimum minus `constant_s`,
and which turns any choice for the small problem into one for the large problem of the same cost.

Every step is exact with the memory rows in place; a step that has to know that memory does not
matter at a node (folding) first checks it. The steps, in the order they are tried:

    drop_forbidden       strategies without an allowed partner at some neighbour (arc consistency)
    normalise            edge costs that belong to one end only move to that node; constants leave
    drop_slack_rows      memory rows that no choice can break, or that another row implies
    drop_oversized       strategies that break a row even if all other nodes take their smallest
    drop_dominated       strategies that another one beats whatever the neighbours do
    fold_decided         nodes with one strategy left
    fold_followers       nodes whose strategy follows from a neighbour's (aliases, leaves)
    fold_between         memory-free nodes of degree two, by min-plus elimination
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .problem import (
    FloatArray,
    IntArray,
    IntraOpProblem,
)
from .reduced_graph import ContradictionError, Graph, Presolved

# A difference of two costs smaller than this fraction of them is rounding, not cost.
_ROUNDING = 1e-15

# Sizes above which a step would take longer than what it saves: entries of the comparison of all
# pairs of strategies of a node (0.1 s), entries of the table of one min-plus elimination (20 ms).
_MAX_DOMINANCE_ENTRIES = 2e7
_MAX_FOLD_ENTRIES = 4e6


Step = Callable[[Graph], bool]


def presolve(problem: IntraOpProblem, steps: Sequence[Step] | None = None) -> Presolved:
    """Applies the steps until none of them finds anything to do.

    Args:
        problem: A verified problem.
        steps: The steps to use; default all of them.

    Raises:
        ContradictionError: If a step finds that no choice is allowed or fits.
    """
    graph = Graph(problem)
    chosen = STEPS if steps is None else steps
    changed = True
    while changed:
        changed = False
        for step in chosen:
            changed |= step(graph)
    return graph.finish()


def drop_forbidden(graph: Graph) -> bool:
    """Arc consistency: drops strategies that are forbidden or have no allowed partner."""
    changed = False
    while graph.unchecked:
        node = graph.unchecked.pop()
        allowed = np.isfinite(graph.cost[node])
        for cost in graph.edge[node].values():
            allowed &= np.isfinite(cost).any(axis=1)
        if allowed.all():
            continue
        graph.keep(node, np.flatnonzero(allowed))
        changed = True
    return changed


def normalise(graph: Graph) -> bool:
    """Moves what an edge costs whatever the other end does into the nodes; drops zero edges.

    Returns True only if an edge disappeared: moving costs enables nothing by itself.
    """
    changed = False
    for u, v in sorted(graph.unsplit):
        if not _split_edge(graph, u, v):
            graph.drop_edge(u, v)
            changed = True
    graph.unsplit.clear()
    for node, cost in graph.cost.items():
        lowest = cost.min()
        if lowest != 0.0 and np.isfinite(lowest):
            graph.constant_s += float(lowest)
            graph.cost[node] = cost - lowest
        smallest = graph.bytes[node].min(axis=1)
        if smallest.any():
            graph.room = graph.room - smallest
            graph.bytes[node] = graph.bytes[node] - smallest[:, None]
    return changed


def _split_edge(graph: Graph, u: int, v: int) -> bool:
    """Makes every row and column of an edge start at zero; whether anything else is left."""
    cost = graph.edge[u][v]
    row = _finite_or_zero(cost.min(axis=1))
    rest = cost - row[:, None]
    column = _finite_or_zero(rest.min(axis=0))
    rest = rest - column
    # What two subtractions leave of equal numbers is rounding: snap it, entry by entry.
    magnitude = np.abs(np.where(np.isfinite(cost), cost, 0.0))
    rest[np.abs(rest) <= 4 * _ROUNDING * magnitude] = 0.0
    graph.cost[u] = graph.cost[u] + row
    graph.cost[v] = graph.cost[v] + column
    graph.edge[u][v], graph.edge[v][u] = rest, rest.T
    return bool(rest.any())


def _finite_or_zero(values: FloatArray) -> FloatArray:
    """Rows without any allowed pair have an infinite minimum; leave those to `drop_forbidden`."""
    return np.where(np.isfinite(values), values, 0.0)


def drop_slack_rows(graph: Graph) -> bool:
    """Drops rows that always hold, and rows that hold whenever another one does."""
    if not graph.rows:
        return False
    most = sum((b.max(axis=1) for b in graph.bytes.values()), np.zeros(len(graph.rows)))
    needed = [row for row in range(len(graph.rows)) if most[row] > graph.room[row]]
    kept: list[int] = []
    for row in needed:
        others = kept + [other for other in needed if other > row]
        if not any(_implies(graph, other, row) for other in others):
            kept.append(row)
    if len(kept) == len(graph.rows):
        return False
    graph.rows = [graph.rows[row] for row in kept]
    graph.room = graph.room[kept]
    for node in graph.bytes:
        graph.bytes[node] = graph.bytes[node][kept]
    graph.stale |= set(graph.cost)
    return True


def _implies(graph: Graph, row: int, implied: int) -> bool:
    """Whether `sum bytes[implied] <= room[implied]` follows from the same for `row`."""
    excess = sum(float((b[implied] - b[row]).max()) for b in graph.bytes.values())
    return excess <= graph.room[implied] - graph.room[row]


def drop_oversized(graph: Graph) -> bool:
    """Drops strategies that break a row even if every other node takes its smallest strategy."""
    if not graph.rows:
        return False
    smallest = {node: b.min(axis=1) for node, b in graph.bytes.items()}
    spare = graph.room - sum(smallest.values(), np.zeros(len(graph.rows)))
    if (spare < 0).any():
        raise ContradictionError
    changed = False
    for node in sorted(graph.cost):
        extra = graph.bytes[node] - smallest[node][:, None]
        fits = (extra <= spare[:, None]).all(axis=0)
        if not fits.all():
            graph.keep(node, np.flatnonzero(fits))
            graph.used_budget = changed = True
    return changed


def drop_dominated(graph: Graph) -> bool:
    """Drops strategy j of a node if some strategy i is never worse (Goldstein's criterion).

    i dominates j if its bytes are no larger in any row and

        cost[i] - cost[j] + sum_edges max_q (edge[i, q] - edge[j, q]) <= 0:

    swapping j for i then helps whatever the neighbours chose. This covers "no larger in every
    entry" and is much stronger on edges that differ by a shift.
    """
    changed = False
    for node in sorted(graph.stale):
        graph.stale.discard(node)
        if not 1 < len(graph.cost[node]) <= _dominance_limit(graph, node):
            continue
        keep = _undominated(_dominance(graph, node))
        if len(keep) < len(graph.cost[node]):
            graph.keep(node, keep)
            graph.stale.discard(node)
            changed = True
    return changed


def _dominance_limit(graph: Graph, node: int) -> float:
    """Number of strategies up to which comparing all pairs is worth its time."""
    width = sum(edge.shape[1] for edge in graph.edge[node].values())
    return math.sqrt(_MAX_DOMINANCE_ENTRIES / max(width, 1))


def _dominance(graph: Graph, node: int) -> np.ndarray:
    """`[k, k]` booleans: whether the row strategy dominates the column strategy."""
    cost = graph.cost[node]
    with np.errstate(invalid="ignore"):
        regret = cost[:, None] - cost[None, :]
        for edge in graph.edge[node].values():
            # A neighbour's strategy that j forbids cannot be there when j is: it does not count.
            worse = np.where(np.isinf(edge)[None], -np.inf, edge[:, None] - edge[None])
            regret = regret + worse.max(axis=-1)
        # No tolerance: costs span eleven decades, and one op's rounding is another op's cost.
        dominates = regret <= 0
    for row in graph.bytes[node]:
        dominates &= row[:, None] <= row[None]
    return dominates


def _undominated(dominates: np.ndarray) -> IntArray:
    """Removes dominated strategies one at a time, so that of equal ones the first survives."""
    alive = np.ones(len(dominates), dtype=bool)
    np.fill_diagonal(dominates, False)
    # Of two that dominate each other the lower index must win, so try the higher one first.
    for strategy in reversed(range(len(dominates))):
        if (dominates[:, strategy] & alive).any():
            alive[strategy] = False
    return np.flatnonzero(alive)


def fold_decided(graph: Graph) -> bool:
    """Folds nodes with a single strategy into their neighbours and the constant."""
    decided = [node for node in sorted(graph.cost) if len(graph.cost[node]) == 1]
    for node in decided:
        if not np.isfinite(graph.cost[node][0]):
            raise ContradictionError
        graph.constant_s += float(graph.cost[node][0])
        graph.room = graph.room - graph.bytes[node][:, 0]
        for other, cost in graph.edge[node].items():
            graph.cost[other] = graph.cost[other] + cost[0]
        graph.fold(node, (), np.array(0))
    return bool(decided)


def fold_followers(graph: Graph) -> bool:
    """Folds nodes whose strategy is a function of one neighbour's, or of nothing.

    That is so if every strategy of the neighbour allows exactly one (alias constraints), or if
    the node is a leaf and, for every strategy of the neighbour, its cheapest answer is also its
    smallest in every memory row.
    """
    changed = False
    for node in sorted(graph.cost):
        if not graph.edge[node]:
            changed |= _fold_isolated(graph, node)
            continue
        for leader in sorted(graph.edge[node]):
            follow = _follow_table(graph, node, leader)
            if follow is not None:
                _merge_into(graph, node, leader, follow)
                changed = True
                break
    return changed


def _fold_isolated(graph: Graph, node: int) -> bool:
    if not np.isfinite(graph.cost[node]).any():
        raise ContradictionError
    best = _cheapest_and_smallest(graph.cost[node][None], graph.bytes[node])
    if best is None:
        return False
    graph.constant_s += float(graph.cost[node][best[0]])
    graph.room = graph.room - graph.bytes[node][:, best[0]]
    graph.fold(node, (), np.array(best[0]))
    return True


def _follow_table(graph: Graph, node: int, leader: int) -> IntArray | None:
    """`[k_leader]` strategy of `node` per strategy of `leader`, or None if it has a choice."""
    edge = graph.edge[leader][node]
    allowed = np.isfinite(edge) & np.isfinite(graph.cost[node])
    if (allowed.sum(axis=1) == 1).all():
        return allowed.argmax(axis=1)
    if len(graph.edge[node]) == 1 and allowed.any(axis=1).all():
        return _cheapest_and_smallest(edge + graph.cost[node], graph.bytes[node])
    return None


def _cheapest_and_smallest(cost: FloatArray, size: FloatArray) -> IntArray | None:
    """Per row of `cost` `[n, k]` the cheapest column if it also has the smallest `[r, k]` size."""
    if not size.any():
        return cost.argmin(axis=1)
    lowest = cost.min(axis=1, keepdims=True)
    # Among equally cheap columns prefer the one with the smallest total, then compare exactly.
    best = np.where(cost == lowest, size.sum(axis=0), np.inf).argmin(axis=1)
    allowed = np.isfinite(cost)
    smaller = size[:, None, :] < size[:, best][:, :, None]
    return None if (smaller & allowed).any() else best


def _merge_into(graph: Graph, node: int, leader: int, follow: IntArray) -> None:
    """Gives the leader the node's costs, bytes and edges, with the node's strategy decided."""
    each = np.arange(len(follow))
    graph.cost[leader] = (
        graph.cost[leader] + graph.edge[leader][node][each, follow] + graph.cost[node][follow]
    )
    graph.bytes[leader] = graph.bytes[leader] + graph.bytes[node][:, follow]
    for other, cost in list(graph.edge[node].items()):
        if other != leader:
            graph.add_edge(leader, other, cost[follow])
    graph.fold(node, (leader,), follow)
    graph.stale |= {leader, *graph.edge[leader]}
    graph.unchecked.add(leader)


def fold_between(graph: Graph) -> bool:
    """Replaces a memory-free node of degree two by an edge between its neighbours (min-plus)."""
    changed = False
    for node in sorted(graph.cost):
        if len(graph.edge[node]) != 2 or graph.bytes[node].any():
            continue
        left, right = sorted(graph.edge[node])
        if (
            len(graph.cost[left]) * len(graph.cost[right]) * len(graph.cost[node])
            > _MAX_FOLD_ENTRIES
        ):
            continue
        through = (
            graph.edge[left][node][:, None, :]
            + graph.edge[right][node][None, :, :]
            + graph.cost[node]
        )
        graph.add_edge(left, right, through.min(axis=-1))
        graph.fold(node, (left, right), through.argmin(axis=-1))
        changed = True
    return changed


STEPS: tuple[Step, ...] = (
    drop_forbidden,
    normalise,
    drop_slack_rows,
    drop_oversized,
    drop_dominated,
    fold_decided,
    fold_followers,
    fold_between,
)
