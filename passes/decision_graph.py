"""The decision graph: what decides together, and how layouts follow from decisions.

`Contraction` is made by `contract`; strategies, prices and decisions are about its nodes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from alpa_lite.passes.program import FlatOp, FlatValue, Program
from alpa_lite.passes.rules import ShardingRule

NONE = -1
"""In a dim's place: no factor of the node shards it."""


@dataclass(frozen=True, slots=True)
class NodeFactor:
    """A dim that a node can shard.

    Attributes:
      size: greatest common divisor of the sizes it has in the node's ops.
      label: a readable name.
      num_bytes: of all results that have it, times their executions per step.
    """

    size: int
    label: str
    num_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """How one operand or result depends on its node's strategy.

    Attributes:
      dims: node factor per dim, or NONE.
      partial: node factors whose sharding makes the value a pending sum.
      follows_partial: whether it is a pending sum wherever the node says `PARTIAL`.
      resolved: node factors over which the op itself must combine its result at once.
      combine: how (`sum`, `max`, ...).
    """

    dims: tuple[int, ...]
    partial: tuple[int, ...] = ()
    follows_partial: bool = False
    resolved: tuple[int, ...] = ()
    combine: str = "sum"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """Ops that share one strategy.

    Attributes:
      id: position in `Contraction.nodes`.
      ops: flat op ids, ascending.
      factors: shardable dims.
      can_be_partial: whether a strategy may leave its values pending sums (linear ops only).
      name: readable.
    """

    id: int
    ops: tuple[int, ...]
    factors: tuple[NodeFactor, ...]
    can_be_partial: bool
    name: str


@dataclass(frozen=True, eq=False)  # without slots, as `uses` are found once
class Contraction:
    """The decision graph.

    Attributes:
      program: what was contracted.
      rules: sharding rule per op, copies included.
      ops: `program.ops` followed by copies.
      values: `program.values` followed by the copies' results.
      operands: for each op the flat values it really reads (copies put in between).
      nodes: the decisions.
      node_of: node per op.
      operand_layouts, result_layouts: per op.
      definition: op that defines each value.
    """

    program: Program
    rules: tuple[ShardingRule, ...]
    ops: tuple[FlatOp, ...]
    values: tuple[FlatValue, ...]
    operands: tuple[tuple[int, ...], ...]
    nodes: tuple[Node, ...]
    node_of: tuple[int, ...]
    operand_layouts: tuple[tuple[Layout, ...], ...]
    result_layouts: tuple[tuple[Layout, ...], ...]
    definition: tuple[int, ...]

    def input_links(self) -> dict[str, int]:
        """Input path -> id of its link."""
        names = self.program.graph.input_names
        return {
            names[position]: op
            for (kind, _, position), op in self.program.link_at.items()
            if kind == "input"
        }

    def origin(self, value: int) -> int:
        """The value behind copies."""
        while self.ops[self.definition[value]].kind == "copy":
            value = self.operands[self.definition[value]][0]
        return value

    def use_key(self, op: int, position: int) -> tuple[int, int, str, Layout]:
        """Equal for uses of a value that share one layout change: same node, phase and layout."""
        value = self.operands[op][position]
        return value, self.node_of[op], self.ops[op].phase, self.operand_layouts[op][position]

    @functools.cached_property
    def uses(self) -> tuple[tuple[FlatOp, int], ...]:
        """(op, operand position) of every use that may change a layout, shared ones once."""
        first: dict[tuple[int, int, str, Layout], tuple[FlatOp, int]] = {}
        for op in self.ops:
            for position in range(len(self.operands[op.id])):
                first.setdefault(self.use_key(op.id, position), (op, position))
        return tuple(first.values())
