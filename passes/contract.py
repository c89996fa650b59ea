"""Which ops decide together: `Contraction`, the graph of decision nodes.

In: a `Program` and the sharding rule of each op. Out: nodes, each a set of ops that share one
assignment of mesh axes to factors, and the edges between them, on which layouts may change.

Costly ops decide alone. Cheap ops join the producer of their largest operand, so a residual
stream with its norms and activations, forward and backward, is one decision. Merging composes the
ops' sharding rules: factors that meet along a value become one. Updates are kept apart from
forward and backward, so that parameters, gradients and optimizer state can differ (ZeRO).

Where one value feeds several other nodes in one phase, a *copy* node stands between: a layout
change is then paid once per phase, in the price and in the program alike. An activation read in
forward and backward gets a copy in front of these, whose layout is kept from one to the other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from alpa_lite.ir.graph import BACKWARD, FORWARD, UPDATE
from alpa_lite.passes import op_traits
from alpa_lite.passes.decision_graph import NONE, Contraction, Layout, Node, NodeFactor
from alpa_lite.passes.program import FlatOp, FlatValue, Program
from alpa_lite.passes.rules import Factor, FactorKind, ShardingRule


def contract(program: Program, rules: Sequence[ShardingRule]) -> Contraction:
    """Merge ops into decision nodes and put copies between nodes.

    Args:
      program: the flat program.
      rules: one rule per op of the program, over its flat operands (`rule_of_link` for links).
    """
    merger = _Merger(program, rules)
    merger.merge_all()
    ops, values, operands, all_rules = merger.insert_copies()
    return merger.finish(ops, values, operands, all_rules)


def rule_of_link(op: FlatOp, values: Sequence[FlatValue]) -> ShardingRule:
    """The rule of a link: identity, the stacked leading dim apart."""
    stacked = op.stacked or (False,) * (len(op.operands) + len(op.results))
    all_values = (*op.operands, *op.results)
    core = next(
        values[v].shape[1:] if lead else values[v].shape
        for v, lead in zip(all_values, stacked, strict=True)
    )
    factors = [Factor(n, FactorKind.PASS) for n in core]
    arrays = []
    for value, lead in zip(all_values, stacked, strict=True):
        dims = [(d,) if n > 1 else () for d, n in enumerate(core)]
        if lead:
            factors.append(Factor(values[value].shape[0], FactorKind.BLOCKED))
            dims.insert(0, (len(factors) - 1,))
        arrays.append(tuple(dims))
    n = len(op.operands)
    return ShardingRule(tuple(factors), tuple(arrays[:n]), tuple(arrays[n:]), "link")


@dataclass(slots=True, eq=False)
class _UnionFind:
    parent: list[int] = field(default_factory=list)

    def find(self, x: int) -> int:
        while self.parent[x] != x:
            self.parent[x] = self.parent[self.parent[x]]
            x = self.parent[x]
        return x


class _Merger:
    def __init__(self, program: Program, rules: Sequence[ShardingRule]) -> None:
        self.program = program
        self.rules = list(rules)
        self.offset: list[int] = []
        self.kind: list[FactorKind] = []
        self.size: list[int] = []
        for rule in self.rules:
            self.add_factors(rule)
        self.factor_sets = _UnionFind(list(range(len(self.kind))))
        self.rivals: list[set[int]] = [set() for _ in self.kind]
        for op, rule in zip(program.ops, self.rules, strict=True):
            self.note_rivals(op.id, rule)
        self.groups = _UnionFind([op.id for op in program.ops])
        self.largest = [self.largest_array(op) for op in program.ops]
        self.readers: dict[int, list[int]] = defaultdict(list)
        for op in program.ops:
            for value in op.operands:
                self.readers[value].append(op.id)
        self.gradient_bound = self.find_gradient_bound()
        self.partial_ok = self.find_partial_capable()

    def add_factors(self, rule: ShardingRule) -> None:
        self.offset.append(len(self.kind))
        minor = {f for array in (*rule.operands, *rule.results) for dim in array for f in dim[1:]}
        for i, factor in enumerate(rule.factors):
            # Only the major factor of a dim can be sharded: a minor one would not be contiguous.
            blocked = factor.kind is FactorKind.BLOCKED or i in minor or factor.size == 1
            self.kind.append(FactorKind.BLOCKED if blocked else factor.kind)
            self.size.append(factor.size)

    def note_rivals(self, op: int, rule: ShardingRule) -> None:
        base = self.offset[op]
        for array in (*rule.operands, *rule.results):
            majors = [base + dim[0] for dim in array if dim]
            for f in majors:
                self.rivals[f].update(g for g in majors if g != f)

    # What may be merged.

    def is_anchor(self, op: FlatOp) -> bool:
        if op.kind != "op":
            return op.kind not in op_traits.MERGEABLE_LINKS
        rule = self.rules[op.id]
        if op.name in op_traits.HEAVY or rule.origin == "replicated":
            return True
        if op_traits.has_blocked(rule) or op_traits.splits_dims(rule):
            return True
        return op.name == "reduce_sum" and any(r in self.gradient_bound for r in op.results)

    def find_gradient_bound(self) -> set[int]:
        """Values that only linear ops separate from a gradient on its way to the update."""
        program = self.program
        bound: set[int] = set()
        for op in program.ops:
            if op.kind == "gradient":
                bound |= set(op.operands)
            elif op.phase == UPDATE and not program.graph.grad_regions:
                bound |= {
                    v for v in op.operands if program.ops[program.definition[v]].phase == BACKWARD
                }
        for op in reversed(program.ops):
            if op_traits.is_linear(op) and any(r in bound for r in op.results):
                bound |= set(op.operands)
        return bound

    def find_partial_capable(self) -> set[int]:
        """Values that can be pending sums: of contractions, then of linear ops on only such."""
        capable: set[int] = set()
        for op in self.program.ops:
            rule = self.rules[op.id]
            summing = op.kind == "op" and self.is_anchor(op) and op_traits.sums_over(rule)
            follows = (
                op_traits.is_linear(op)
                and op.operands
                and (op.phase != UPDATE or op.kind != "op")
                and all(v in capable for v in op.operands)
            )
            if summing or follows:
                capable |= set(op.results)
        return capable

    def is_partial_linear(self, op: FlatOp) -> bool:
        """A linear op that can hand a pending sum on."""
        return bool(op.results) and op.results[0] in self.partial_ok and op_traits.is_linear(op)

    def merge_all(self) -> None:
        program = self.program
        for op in program.ops:
            if self.is_anchor(op):
                continue
            largest = self.largest_array(op)
            for position, value in enumerate(op.operands):
                size = program.values[value].num_elements
                producer = program.ops[program.definition[value]]
                if size == largest and size > 1 and self.may_join(op, producer):
                    self.try_merge(op, position, producer, program.values[value])

    def largest_array(self, op: FlatOp) -> int:
        """Elements of the largest array that the op reads or makes."""
        around = (*op.operands, *op.results)
        return max((self.program.values[v].num_elements for v in around), default=0)

    def may_join(self, op: FlatOp, producer: FlatOp) -> bool:
        if self.is_anchor(producer):
            return False
        if self.is_partial_linear(op) != self.is_partial_linear(producer):
            return False
        return self.side(op) == self.side(producer)

    def side(self, op: FlatOp) -> str:
        """Update, or the rest; parameters read by forward or backward belong to the rest."""
        if op.kind == "state":
            phases = {self.program.ops[r].phase for v in op.results for r in self.readers[v]}
            return UPDATE if phases <= {UPDATE} else "model"
        return UPDATE if op.phase == UPDATE else "model"

    def try_merge(self, op: FlatOp, position: int, producer: FlatOp, value: FlatValue) -> None:
        """Unify the factors of one value's dims in its producer and its reader."""
        here, there = self.groups.find(op.id), self.groups.find(producer.id)
        if value.num_elements < min(self.largest[here], self.largest[there]):
            # Dims that the value lacks would stay apart, and an axis could split one of them only.
            return
        result = producer.results.index(value.id)
        ours = self.rules[op.id].operands[position]
        theirs = self.rules[producer.id].results[result]
        pairs = []
        for a, b in zip(ours, theirs, strict=True):
            if len(a) > 1 or len(b) > 1:
                return
            if a and b:
                x = self.factor_sets.find(self.offset[op.id] + a[0])
                y = self.factor_sets.find(self.offset[producer.id] + b[0])
                if x != y:
                    pairs.append((x, y))
        if any(self.conflict(x, y) for x, y in pairs):
            return
        for x, y in pairs:
            self.union_factors(x, y)
        first, second = sorted((here, there))
        self.groups.parent[second] = first
        self.largest[first] = max(self.largest[first], self.largest[second])

    def conflict(self, x: int, y: int) -> bool:
        x, y = self.factor_sets.find(x), self.factor_sets.find(y)
        smaller, other = (x, y) if len(self.rivals[x]) < len(self.rivals[y]) else (y, x)
        return any(self.factor_sets.find(r) == other for r in self.rivals[smaller])

    def union_factors(self, x: int, y: int) -> None:
        x, y = self.factor_sets.find(x), self.factor_sets.find(y)
        if x == y:
            return
        if len(self.rivals[x]) < len(self.rivals[y]):
            x, y = y, x
        self.factor_sets.parent[y] = x
        self.rivals[x] = {self.factor_sets.find(r) for r in self.rivals[x] | self.rivals[y]}
        self.rivals[y] = set()
        self.size[x] = math.gcd(self.size[x], self.size[y])
        if FactorKind.BLOCKED in (self.kind[x], self.kind[y]):
            self.kind[x] = FactorKind.BLOCKED
        elif FactorKind.PASS in (self.kind[x], self.kind[y]):
            self.kind[x] = FactorKind.PASS

    # Copies.

    def insert_copies(
        self,
    ) -> tuple[list[FlatOp], list[FlatValue], list[list[int]], list[ShardingRule]]:
        program = self.program
        ops, values = list(program.ops), list(program.values)
        operands = [list(op.operands) for op in program.ops]
        lasting = self.find_lasting()
        for value in program.values:
            if value.num_elements <= 1 or program.definition[value.id] < 0:
                continue
            home = self.groups.find(program.definition[value.id])
            by_phase: dict[str, list[tuple[int, int]]] = defaultdict(list)
            for reader in dict.fromkeys(self.readers[value.id]):
                if self.groups.find(reader) == home or ops[reader].kind == "state":
                    continue
                for position, operand in enumerate(program.ops[reader].operands):
                    if operand == value.id:
                        by_phase[ops[reader].phase].append((reader, position))
            source = value
            if {FORWARD, BACKWARD} <= by_phase.keys() and value.id not in lasting:
                uses = [*by_phase[FORWARD], *by_phase[BACKWARD]]
                source = self.add_copy(ops, values, operands, value, FORWARD, uses)
            for phase, uses in by_phase.items():
                if len({self.reading(reader, position) for reader, position in uses}) > 1:
                    given = value if phase == UPDATE else source
                    self.add_copy(ops, values, operands, given, phase, uses)
        return ops, values, operands, self.rules

    def reading(self, reader: int, position: int) -> tuple[int, tuple[int, ...]]:
        """Readers of one node that want the same layout share one layout change anyway."""
        base = self.offset[reader]
        dims = tuple(
            self.factor_sets.find(base + dim[0]) if dim else NONE
            for dim in self.rules[reader].operands[position]
        )
        return self.groups.find(reader), dims

    def add_copy(
        self, ops: list[FlatOp], values: list[FlatValue], operands: list[list[int]],
        value: FlatValue, phase: str, uses: Sequence[tuple[int, int]],
    ) -> FlatValue:  # fmt: skip
        result = FlatValue(len(values), value.aval, value.name)
        weight = max(ops[reader].operand_weights[position] for reader, position in uses)
        copy = FlatOp(
            len(ops), "copy", None, None, (value.id,), (0,), (result.id,), weight, (weight,), phase
        )
        values.append(result)
        ops.append(copy)
        operands.append([value.id])
        rule = rule_of_link(copy, values)
        self.rules.append(rule)
        self.add_factors(rule)
        new = range(len(self.factor_sets.parent), len(self.kind))
        self.factor_sets.parent.extend(new)
        self.rivals.extend(set() for _ in new)
        self.groups.parent.append(copy.id)
        for reader, position in uses:
            operands[reader][position] = result.id
        return result

    def find_lasting(self) -> set[int]:
        """Parameters and what cheap ops make of them: their gathers are not kept for backward."""
        lasting: set[int] = set()
        for op in self.program.ops:
            cheap = not self.is_anchor(op) and op.operands and set(op.operands) <= lasting
            if op.kind in ("state", "argument", "enter") or cheap:
                lasting |= set(op.results)
        return lasting

    # The result.

    def finish(
        self, ops: list[FlatOp], values: list[FlatValue], operands: list[list[int]],
        rules: list[ShardingRule],
    ) -> Contraction:  # fmt: skip
        members: dict[int, list[int]] = defaultdict(list)
        for op in ops:
            members[self.groups.find(op.id)].append(op.id)
        node_of = [0] * len(ops)
        nodes: list[Node] = []
        factor_index: dict[int, int] = {}
        for root in sorted(members):
            node_id = len(nodes)
            for op_id in members[root]:
                node_of[op_id] = node_id
            nodes.append(self.make_node(node_id, members[root], ops, values, factor_index))
        partial_nodes = {n.id for n in nodes if n.can_be_partial}
        operand_layouts, result_layouts = [], []
        for op in ops:
            ins, outs = self.layouts(op, factor_index, node_of[op.id] in partial_nodes)
            operand_layouts.append(ins)
            result_layouts.append(outs)
        definition = list(self.program.definition) + [op.id for op in ops[len(self.program.ops) :]]
        return Contraction(
            program=self.program, rules=tuple(rules), ops=tuple(ops), values=tuple(values),
            operands=tuple(map(tuple, operands)), nodes=tuple(nodes), node_of=tuple(node_of),
            operand_layouts=tuple(operand_layouts), result_layouts=tuple(result_layouts),
            definition=tuple(definition),
        )  # fmt: skip

    def make_node(
        self, node_id: int, member_ops: Sequence[int], ops: Sequence[FlatOp],
        values: Sequence[FlatValue], factor_index: dict[int, int],
    ) -> Node:  # fmt: skip
        weights: dict[int, float] = {}
        for op_id in member_ops:
            rule, base = self.rules[op_id], self.offset[op_id]
            for f in range(len(rule.factors)):
                root = self.factor_sets.find(base + f)
                if self.kind[root] is not FactorKind.BLOCKED:
                    weights.setdefault(root, 0.0)
            for value, array in zip(ops[op_id].results, rule.results, strict=True):
                for dim in array:
                    root = self.factor_sets.find(base + dim[0]) if dim else NONE
                    if root in weights:
                        weights[root] += values[value].num_bytes * ops[op_id].weight
        factors: list[NodeFactor] = []
        for root, weight in weights.items():
            factor_index[root] = len(factors)
            label = f"{_letter(len(factors))}{self.size[root]}"
            factors.append(NodeFactor(self.size[root], label, weight))
        linear = all(self.is_partial_linear(ops[o]) for o in member_ops)
        name = _node_name(ops, values, member_ops)
        return Node(node_id, tuple(member_ops), tuple(factors), linear, name)

    def layouts(
        self, op: FlatOp, factor_index: dict[int, int], node_partial: bool
    ) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
        rule, base = self.rules[op.id], self.offset[op.id]

        def index(f: int) -> int:
            return factor_index.get(self.factor_sets.find(base + f), NONE)

        def dims(array: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
            return tuple(index(dim[0]) if dim else NONE for dim in array)

        reduced = {
            index(i): f.combine
            for i, f in enumerate(rule.factors)
            if f.kind is FactorKind.REDUCTION and f.size > 1 and index(i) != NONE
        }
        stays = op.kind == "op" and bool(op.results) and op.results[0] in self.partial_ok
        linear = self.is_partial_linear(op)
        pending = tuple(f for f, combine in reduced.items() if combine == "sum" and stays)
        resolved = tuple(f for f in reduced if f not in pending)
        combine = next((reduced[f] for f in resolved), "sum")
        ins = tuple(Layout(dims(a), follows_partial=node_partial) for a in rule.operands)
        outs = tuple(
            Layout(dims(a), pending, node_partial and linear, resolved, combine)
            for a in rule.results
        )
        return ins, outs


def _letter(i: int) -> str:
    letter = "abcdefghijklmnopqrstuvwxyz"[i % 26]
    return letter if i < 26 else f"{letter}{i // 26}_"


def _node_name(
    ops: Sequence[FlatOp], values: Sequence[FlatValue], member_ops: Sequence[int]
) -> str:
    first = ops[member_ops[0]]
    if first.kind == "copy":
        return f"copy of {_value_name(ops, values, first.operands[0])} ({first.phase})"
    named = [v for v in (*first.operands, *first.results) if values[v].name]
    if first.kind in ("state", "batch", "argument") and named:
        return values[named[0]].name
    scope = first.op.scope if first.op is not None else ""
    suffix = f" +{len(member_ops) - 1}" if len(member_ops) > 1 else ""
    return f"{scope or first.phase}:{first.name}#{first.id}{suffix}"


def _value_name(ops: Sequence[FlatOp], values: Sequence[FlatValue], value: int) -> str:
    return values[value].name or f"value {value}"
