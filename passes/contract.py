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


@dataclass(frozen=True, slots=True, eq=False)
class _RuleFacts:
    """What merging needs of a rule; equal ops have one rule object, looked at once.

    Attributes:
      kinds, sizes: of each factor.
      rivals: of each factor, those that stand beside it in an array: one axis splits one of them.
      sums, anchors: whether it leaves pending sums, or makes the op decide alone.
    """

    kinds: tuple[FactorKind, ...]
    sizes: tuple[int, ...]
    rivals: tuple[tuple[int, ...], ...]
    sums: bool
    anchors: bool

    @classmethod
    def of(cls, rule: ShardingRule) -> _RuleFacts:
        """Look at a rule."""
        arrays = (*rule.operands, *rule.results)
        # Only the major factor of a dim can be sharded: a minor one would not be contiguous.
        minor = {f for array in arrays for dim in array for f in dim[1:]}
        rivals: list[set[int]] = [set() for _ in rule.factors]
        for array in arrays:
            majors = {dim[0] for dim in array if dim}
            for f in majors:
                rivals[f] |= majors - {f}
        return cls(
            kinds=tuple(
                FactorKind.BLOCKED if i in minor or f.size == 1 else f.kind
                for i, f in enumerate(rule.factors)
            ),
            sizes=tuple(f.size for f in rule.factors),
            rivals=tuple(map(tuple, rivals)),
            sums=op_traits.sums_over(rule),
            anchors=rule.origin == "replicated"
            or op_traits.has_blocked(rule)
            or op_traits.splits_dims(rule),
        )


class _Merger:
    def __init__(self, program: Program, rules: Sequence[ShardingRule]) -> None:
        self.program = program
        self.rules = list(rules)
        known: dict[int, _RuleFacts] = {}
        self.facts = [known.get(id(r)) or known.setdefault(id(r), _RuleFacts.of(r)) for r in rules]
        self.offset: list[int] = []
        self.kind: list[FactorKind] = []
        self.size: list[int] = []
        self.rivals: list[set[int]] = []
        for facts in self.facts:
            self.add_factors(facts)
        self.factor_sets = _UnionFind(list(range(len(self.kind))))
        self.groups = _UnionFind([op.id for op in program.ops])
        self.largest_array = [self.find_largest_array(op) for op in program.ops]
        self.largest = list(self.largest_array)  # of the groups
        self.readers: dict[int, list[int]] = defaultdict(list)
        for op in program.ops:
            for value in op.operands:
                self.readers[value].append(op.id)
        self.linear = [op_traits.is_linear(op) for op in program.ops]
        self.gradient_bound = self.find_gradient_bound()
        self.anchor = [self.is_anchor(op) for op in program.ops]
        self.partial_ok = self.find_partial_capable()
        self.hands_on = [self.hands_partial_on(op) for op in program.ops]

    def add_factors(self, facts: _RuleFacts) -> None:
        base = len(self.kind)
        self.offset.append(base)
        self.kind += facts.kinds
        self.size += facts.sizes
        self.rivals += ({base + g for g in others} for others in facts.rivals)

    # What may be merged.

    def is_anchor(self, op: FlatOp) -> bool:
        if op.kind != "op":
            return op.kind not in op_traits.MERGEABLE_LINKS
        if op.name in op_traits.HEAVY or self.facts[op.id].anchors:
            return True
        return op.name == "reduce_sum" and any(r in self.gradient_bound for r in op.results)

    def find_gradient_bound(self) -> set[int]:
        """Values that only linear ops separate from a gradient on its way to the update."""
        program = self.program
        bound: set[int] = set()
        for op in program.ops:
            if op.kind == "gradient":
                bound.update(op.operands)
            elif op.phase == UPDATE and not program.graph.grad_regions:
                bound |= {
                    v for v in op.operands if program.ops[program.definition[v]].phase == BACKWARD
                }
        for op in reversed(program.ops):
            if self.linear[op.id] and any(r in bound for r in op.results):
                bound.update(op.operands)
        return bound

    def find_partial_capable(self) -> set[int]:
        """Values that can be pending sums: of contractions, then of linear ops on only such."""
        capable: set[int] = set()
        for op in self.program.ops:
            summing = op.kind == "op" and self.anchor[op.id] and self.facts[op.id].sums
            follows = (
                self.linear[op.id]
                and op.operands
                and (op.phase != UPDATE or op.kind != "op")
                and all(v in capable for v in op.operands)
            )
            if summing or follows:
                capable.update(op.results)
        return capable

    def hands_partial_on(self, op: FlatOp) -> bool:
        """Whether it is a linear op that can hand a pending sum on."""
        return self.linear[op.id] and bool(op.results) and op.results[0] in self.partial_ok

    def merge_all(self) -> None:
        program = self.program
        for op in program.ops:
            if self.anchor[op.id]:
                continue
            largest = self.largest_array[op.id]
            for position, value in enumerate(op.operands):
                size = program.values[value].num_elements
                producer = program.ops[program.definition[value]]
                if size == largest and size > 1 and self.may_join(op, producer):
                    self.try_merge(op, position, producer, program.values[value])

    def find_largest_array(self, op: FlatOp) -> int:
        """Elements of the largest array that the op reads or makes."""
        around = (*op.operands, *op.results)
        return max((self.program.values[v].num_elements for v in around), default=0)

    def may_join(self, op: FlatOp, producer: FlatOp) -> bool:
        if self.anchor[producer.id] or self.hands_on[op.id] != self.hands_on[producer.id]:
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
        find = self.factor_sets.find
        result = producer.results.index(value.id)
        ours = self.rules[op.id].operands[position]
        theirs = self.rules[producer.id].results[result]
        pairs = []
        for a, b in zip(ours, theirs, strict=True):
            if len(a) > 1 or len(b) > 1:
                return
            if a and b:
                x = find(self.offset[op.id] + a[0])
                y = find(self.offset[producer.id] + b[0])
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
        """Whether two roots stand beside each other in some array."""
        smaller, other = (x, y) if len(self.rivals[x]) < len(self.rivals[y]) else (y, x)
        return any(self.factor_sets.find(r) == other for r in self.rivals[smaller])

    def union_factors(self, x: int, y: int) -> None:
        x, y = self.factor_sets.find(x), self.factor_sets.find(y)
        if x == y:
            return
        if len(self.rivals[x]) < len(self.rivals[y]):
            x, y = y, x
        self.factor_sets.parent[y] = x
        self.rivals[x] |= self.rivals[y]
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
        self.add_factors(_RuleFacts.of(rule))
        self.factor_sets.parent.extend(range(len(self.factor_sets.parent), len(self.kind)))
        self.groups.parent.append(copy.id)
        self.hands_on.append(False)
        for reader, position in uses:
            operands[reader][position] = result.id
        return result

    def find_lasting(self) -> set[int]:
        """Parameters and what cheap ops make of them: their gathers are not kept for backward."""
        lasting: set[int] = set()
        for op in self.program.ops:
            cheap = not self.anchor[op.id] and op.operands and set(op.operands) <= lasting
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
        roots = [self.factor_sets.find(f) for f in range(len(self.kind))]
        factor_index: dict[int, int] = {}
        for root in sorted(members):
            node_id = len(nodes)
            for op_id in members[root]:
                node_of[op_id] = node_id
            nodes.append(self.make_node(node_id, members[root], ops, values, roots, factor_index))
        index = [factor_index.get(root, NONE) for root in roots]
        operand_layouts, result_layouts = [], []
        # Equal ops of equal nodes share one pair of tuples.
        known: dict[tuple[object, ...], tuple[tuple[Layout, ...], tuple[Layout, ...]]] = {}
        for op in ops:
            rule, base = rules[op.id], self.offset[op.id]
            own = tuple(index[base : base + len(rule.factors)])
            stays = op.kind == "op" and bool(op.results) and op.results[0] in self.partial_ok
            partial = nodes[node_of[op.id]].can_be_partial
            key = (id(rule), own, stays, partial, self.hands_on[op.id])
            if key not in known:
                known[key] = _layouts(rule, own, stays, partial, partial and self.hands_on[op.id])
            operand_layouts.append(known[key][0])
            result_layouts.append(known[key][1])
        definition = list(self.program.definition) + [op.id for op in ops[len(self.program.ops) :]]
        return Contraction(
            program=self.program, rules=tuple(rules), ops=tuple(ops), values=tuple(values),
            operands=tuple(map(tuple, operands)), nodes=tuple(nodes), node_of=tuple(node_of),
            operand_layouts=tuple(operand_layouts), result_layouts=tuple(result_layouts),
            definition=tuple(definition),
        )  # fmt: skip

    def make_node(
        self, node_id: int, member_ops: Sequence[int], ops: Sequence[FlatOp],
        values: Sequence[FlatValue], roots: Sequence[int], factor_index: dict[int, int],
    ) -> Node:  # fmt: skip
        weights: dict[int, float] = {}
        for op_id in member_ops:
            rule, base = self.rules[op_id], self.offset[op_id]
            for root in roots[base : base + len(rule.factors)]:
                if self.kind[root] is not FactorKind.BLOCKED:
                    weights.setdefault(root, 0.0)
            for value, array in zip(ops[op_id].results, rule.results, strict=True):
                num_bytes = values[value].num_bytes * ops[op_id].weight
                for dim in array:
                    if dim and roots[base + dim[0]] in weights:
                        weights[roots[base + dim[0]]] += num_bytes
        factors: list[NodeFactor] = []
        for root, weight in weights.items():
            factor_index[root] = len(factors)
            label = f"{_letter(len(factors))}{self.size[root]}"
            factors.append(NodeFactor(self.size[root], label, weight))
        linear = all(self.hands_on[o] for o in member_ops)
        name = _node_name(ops, values, member_ops)
        return Node(node_id, tuple(member_ops), tuple(factors), linear, name)


def _layouts(
    rule: ShardingRule, index: Sequence[int], stays: bool, reads_partial: bool, hands_on: bool
) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
    """Layouts of the operands and results of an op.

    Args:
      rule: of the op.
      index: node factor of each of its factors, or NONE.
      stays: whether its sums may stay pending.
      reads_partial: whether operands are pending where its node says so.
      hands_on: whether results are.
    """

    def dims(array: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        return tuple(index[dim[0]] if dim else NONE for dim in array)

    reduced = {
        index[i]: f.combine
        for i, f in enumerate(rule.factors)
        if f.kind is FactorKind.REDUCTION and f.size > 1 and index[i] != NONE
    }
    pending = tuple(f for f, combine in reduced.items() if combine == "sum" and stays)
    resolved = tuple(f for f in reduced if f not in pending)
    combine = next((reduced[f] for f in resolved), "sum")
    ins = tuple(Layout(dims(a), follows_partial=reads_partial) for a in rule.operands)
    outs = tuple(Layout(dims(a), pending, hands_on, resolved, combine) for a in rule.results)
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
