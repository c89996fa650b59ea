"""The problem while presolve works on it: `Graph` is mutable, `Presolved` is what remains.

In: an `IntraOpProblem`. Out, after any number of steps: the smaller problem and the way back to
choices of the original one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .problem import (
    Edge,
    FloatArray,
    IntArray,
    IntraOpProblem,
    MemoryRow,
    budget_limit,
    merge_parallel_edges,
)


class ContradictionError(Exception):
    """Internal: no choice is allowed, or none fits. `infeasible` finds out why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fold:
    """A node that left the problem: its strategy is a table lookup on its parents' strategies.

    Attributes:
        node: The node.
        parents: Nodes its strategy depends on (none, one or two).
        rows: Per parent, original strategy -> index into that axis of `table`.
        table: Original strategy of `node`, one axis per parent.
    """

    node: int
    parents: tuple[int, ...]
    rows: tuple[IntArray, ...]
    table: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Presolved:
    """The reduced problem and how to undo the reduction.

    Attributes:
        problem: The reduced problem.
        constant_s: Cost of everything that was decided, in seconds.
        num_nodes: Number of nodes of the original problem.
        nodes: Original index of each reduced node.
        kept: Per reduced node, original index of each strategy left.
        folds: Nodes removed, in order of removal.
        used_budget: Whether the memory budget removed a strategy.
    """

    problem: IntraOpProblem
    constant_s: float
    num_nodes: int
    nodes: tuple[int, ...]
    kept: tuple[IntArray, ...]
    folds: tuple[Fold, ...]
    used_budget: bool

    def decode(self, choice: Sequence[int]) -> tuple[int, ...]:
        """Turns a choice for the reduced problem into one for the original."""
        full = [-1] * self.num_nodes
        for node, kept, picked in zip(self.nodes, self.kept, choice, strict=True):
            full[node] = int(kept[picked])
        for fold in reversed(self.folds):
            at = tuple(
                rows[full[parent]] for parent, rows in zip(fold.parents, fold.rows, strict=True)
            )
            full[fold.node] = int(fold.table[at])
        return tuple(full)

    def encode(self, choice: Sequence[int]) -> tuple[int, ...] | None:
        """Turns a choice for the original problem into one for the reduced problem.

        Returns:
            A choice that decodes to something at least as good, or None if a strategy is gone.
        """
        picked = []
        for node, kept in zip(self.nodes, self.kept, strict=True):
            at = np.flatnonzero(kept == choice[node])
            if not len(at):
                return None
            picked.append(int(at[0]))
        return tuple(picked)


class Graph:
    """The problem under reduction; the steps below change it in place.

    Attributes:
        cost: Node -> `[num_strategies]` seconds. The keys are the nodes still there.
        kept: Node -> `[num_strategies]` original strategy indices.
        edge: Node -> neighbour -> `[num_strategies, num_strategies(neighbour)]` seconds; both
            directions are stored, one as a view of the other.
        bytes: Node -> `[num_rows, num_strategies]` bytes.
        room: `[num_rows]` bytes left for the nodes still there, rounding allowance included.
        rows: Original index of each row.
        stale: Nodes whose costs or neighbours changed since dominance was last checked.
        unchecked: Nodes that may have got a forbidden strategy since that was last checked.
        unsplit: Edges `(u, v)`, u < v, that changed since they were last normalised.
    """

    def __init__(self, problem: IntraOpProblem) -> None:
        self.original = problem
        nodes = range(len(problem.names))
        self.cost = {v: np.array(problem.node_cost_s[v], dtype=np.float64) for v in nodes}
        self.kept = {v: np.arange(len(self.cost[v])) for v in nodes}
        self.edge: dict[int, dict[int, FloatArray]] = {v: {} for v in nodes}
        self.stale = set(nodes)
        self.unchecked = set(nodes)
        self.unsplit: set[tuple[int, int]] = set()
        for edge in merge_parallel_edges(problem.edges):
            self.add_edge(edge.u, edge.v, edge.cost_s.astype(np.float64))
        rows = problem.memory if np.isfinite(problem.memory_budget_bytes) else ()
        limit = budget_limit(problem.memory_budget_bytes)
        self.rows = list(range(len(rows)))
        self.room = np.array([limit - row.fixed_bytes for row in rows], dtype=np.float64)
        self.bytes = {v: np.zeros((len(rows), len(self.cost[v]))) for v in nodes}
        for index, row in enumerate(rows):
            for node, term in row.terms.items():
                self.bytes[node][index] = term
        self.constant_s = 0.0
        self.folds: list[Fold] = []
        self.used_budget = False

    def add_edge(self, u: int, v: int, cost_s: FloatArray) -> None:
        """Adds a cost between two nodes, on top of what is there."""
        total = self.edge[u][v] + cost_s if v in self.edge[u] else cost_s
        self.edge[u][v], self.edge[v][u] = total, total.T
        self.unchecked |= {u, v}
        self.unsplit.add((min(u, v), max(u, v)))

    def drop_edge(self, u: int, v: int) -> None:
        """Removes the edge between two nodes."""
        del self.edge[u][v], self.edge[v][u]
        self.unsplit.discard((min(u, v), max(u, v)))

    def keep(self, node: int, strategies: IntArray) -> None:
        """Restricts a node to some of its current strategies.

        Raises:
            ContradictionError: If none are left.
        """
        if not len(strategies):
            raise ContradictionError
        self.cost[node] = self.cost[node][strategies]
        self.kept[node] = self.kept[node][strategies]
        self.bytes[node] = self.bytes[node][:, strategies]
        for other, cost in list(self.edge[node].items()):
            self.edge[node][other] = np.ascontiguousarray(cost[strategies])
            self.edge[other][node] = self.edge[node][other].T
            self.unsplit.add((min(node, other), max(node, other)))
        self.stale |= {node, *self.edge[node]}
        self.unchecked |= {node, *self.edge[node]}

    def fold(self, node: int, parents: tuple[int, ...], table: IntArray) -> None:
        """Removes a node; `table` holds its current strategy per parents' current strategies."""
        rows = []
        for parent in parents:
            lookup = np.full(len(self.original.node_cost_s[parent]), -1)
            lookup[self.kept[parent]] = np.arange(len(self.kept[parent]))
            rows.append(lookup)
        self.folds.append(
            Fold(node=node, parents=parents, rows=tuple(rows), table=self.kept[node][table])
        )
        self.stale |= set(self.edge[node])
        self.unchecked |= set(self.edge[node])
        for other in list(self.edge[node]):
            self.drop_edge(node, other)
        del self.cost[node], self.kept[node], self.bytes[node], self.edge[node]
        self.stale.discard(node)
        self.unchecked.discard(node)

    def finish(self) -> Presolved:
        """Packs what is left as an `IntraOpProblem`."""
        nodes = sorted(self.cost)
        position = {node: index for index, node in enumerate(nodes)}
        limit = budget_limit(self.original.memory_budget_bytes)
        memory = tuple(
            MemoryRow(
                name=self.original.memory[row].name,
                fixed_bytes=float(limit - self.room[index]),
                terms={
                    position[v]: self.bytes[v][index] for v in nodes if self.bytes[v][index].any()
                },
            )
            for index, row in enumerate(self.rows)
        )
        edges = tuple(
            Edge(u=position[u], v=position[v], cost_s=cost)
            for u in nodes
            for v, cost in sorted(self.edge[u].items())
            if u < v
        )
        return Presolved(
            problem=IntraOpProblem(
                names=tuple(self.original.names[v] for v in nodes),
                node_cost_s=tuple(self.cost[v] for v in nodes),
                edges=edges,
                memory=memory,
                memory_budget_bytes=self.original.memory_budget_bytes,
            ),
            constant_s=self.constant_s,
            num_nodes=len(self.original.names),
            nodes=tuple(nodes),
            kept=tuple(self.kept[v] for v in nodes),
            folds=tuple(self.folds),
            used_budget=self.used_budget,
        )
