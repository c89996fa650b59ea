"""A step cut into the segments that a pipeline runs as programs of their own: `cut_phases`.

In: `Decisions`. Out: a `PhaseCut`: what runs once before the microbatches (`prepare`), the forward
and backward part of one microbatch, and the rounds of the update.

Two kinds of ops run in every segment that reads them, since that costs less than to hand on what
they make: those that make something of nothing (masks), and those of the loop that only reshape or
broadcast. None of them communicates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from alpa_lite.ir.graph import BACKWARD, Literal, Op
from alpa_lite.passes.decisions import Decisions, layout_change
from alpa_lite.passes.microbatch import CONCATENATE
from alpa_lite.passes.op_traits import HEAVY
from alpa_lite.passes.program import FlatOp
from alpa_lite.passes.reshard import COLLECTIVES, ReshardStep
from alpa_lite.runtime.segments import Item, Segment, StepParts, split_step

FORWARD_NAME = "forward"
BACKWARD_NAME = "backward"
BACKWARD_INPUT_NAME = "backward_input"
BACKWARD_WEIGHT_NAME = "backward_weight"

_RESHAPING = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims"))
_RANDOM = frozenset(("threefry2x32", "rng_bit_generator", "rng_uniform"))


@dataclass(frozen=True, slots=True, eq=False)
class PhaseCut:
    """The segments of a step.

    Attributes:
      parts: the step.
      prepare: once, before the first microbatch; returns outputs per microbatch that are the same
        for all of them.
      loop: per microbatch, in order.
      update: once, after the last microbatch, in rounds; some may be empty.
      direct: invariants of the loop (flat values, as the loop sees them) that are inputs or
        constants as they are: graph value of each.
      passed: outputs that are inputs as they are: output position -> input position. No segment
        returns them.
    """

    parts: StepParts
    prepare: Segment
    loop: tuple[Segment, ...]
    update: tuple[Segment, ...]
    direct: Mapping[int, int]
    passed: Mapping[int, int]


def cut_phases(
    decisions: Decisions, output_kinds: Sequence[str], *, split_backward: bool = False,
    update_rounds: Sequence[Collection[int]] | None = None,
    late_inputs: Collection[int] = (),
) -> PhaseCut:  # fmt: skip
    """Cut a step.

    Args:
      decisions: of the planned step.
      output_kinds: how outputs of microbatches combine, per graph output.
      split_backward: whether to cut the backward part into what outputs per microbatch (cotangents
        handed back) need, and the rest. A `scan` is one op: its weight gradients stay with the
        former. Without such outputs all of it is the rest.
      update_rounds: ids of the ops of each round of the update; those not named run in the first
        round that reads them. One round by default.
      late_inputs: positions of batch inputs that arrive with the backward pass; what reads them
        belongs to it.

    Raises:
      ValueError: the rounds name other ops than those of the update, name one twice, or one reads
        what a later one makes.
    """
    return _Cutter(decisions, output_kinds, frozenset(late_inputs)).run(
        split_backward, update_rounds
    )


class _Cutter:
    def __init__(
        self, decisions: Decisions, output_kinds: Sequence[str], late_inputs: frozenset[int]
    ) -> None:
        self.d = decisions
        self.c = decisions.contraction
        self.program = decisions.contraction.program
        self.graph = self.program.graph
        self.kinds = output_kinds
        self.late = {self.graph.inputs[i] for i in late_inputs}
        self.parts = split_step(self.program, output_kinds)
        self.maker = {r: op for op in self.graph.ops for r in op.results}
        self.loop_ids = {op.id for op in self.parts.loop}
        self.enters = self.parts.enters()
        self.from_nothing = self.find_from_nothing()

    def run(
        self, split_backward: bool, rounds: Sequence[Collection[int]] | None
    ) -> PhaseCut:  # fmt: skip
        direct = {
            link.results[0]: value
            for value, link in self.enters.items()
            if value not in self.maker and not self.steps(link, 0)
        }
        passed = self.passed()
        loop = self.loop(split_backward)
        again = [self.repeated(ops) for _, ops in loop]
        entered = [
            v
            for v in self.enters
            if v not in self.from_nothing and self.enters[v].results[0] not in direct
        ]
        same = self.same_for_all(passed)
        early = [o for o in (self.graph.outputs[i] for i in same) if not isinstance(o, Literal)]
        ready = self.closure((*entered, *early), self.parts.before)
        links = self.parts.links
        loose = [links[v] for v in dict.fromkeys(early) if v in links and v not in self.maker]
        update = self.update_ops(ready)
        round_of = self.rounds(update, rounds)
        num_rounds = max(1, len(rounds or ()))
        homes = self.output_homes([ops for _, ops in loop], round_of, num_rounds, {*passed, *same})
        update_segments = tuple(
            Segment(
                "update" if num_rounds == 1 else f"update_{r}",
                (
                    *(link for link in self.parts.loose if r == 0 and link not in loose),
                    *self.parts.items(op for op in update if round_of[op.id] == r),
                ),
                (), homes["update", r],
            )
            for r in range(num_rounds)
        )  # fmt: skip
        return PhaseCut(
            self.parts,
            Segment(
                "prepare",
                (
                    *self.parts.items(op for op in self.parts.before if op.id in ready),
                    *(self.enters[v] for v in entered),
                    *loose,
                ),
                (), tuple(same),
            ),
            tuple(
                self.loop_segment(name, ops, more, homes["loop", i])
                for i, ((name, ops), more) in enumerate(zip(loop, again, strict=True))
            ),
            update_segments, direct, passed,
        )  # fmt: skip

    # What is repeated.

    def find_from_nothing(self) -> dict[int, Op]:
        """Ops that read no input, by result; their ways into the loop are free."""
        found: dict[int, Op] = {}
        for op in (*self.parts.before, *self.parts.loop):
            if found.keys() >= {*op.operand_ids} and _is_cheap(op) and self.is_local(op):
                found |= dict.fromkeys(op.results, op)
        return {
            value: op
            for value, op in found.items()
            if value not in self.enters or self.changes_locally(self.enters[value], 0)
        }

    def is_local(self, op: Op) -> bool:
        """Whether an op without nested graphs runs without communication."""
        flat = self.c.ops[self.program.op_at[(), op.id]]
        resolved = (axes for axes, _ in self.d.resolved[flat.id])
        return all(self.d.mesh.size(axes) == 1 for axes in resolved) and all(
            self.changes_locally(flat, p) for p in range(len(flat.operands))
        )

    def changes_locally(self, op: FlatOp, position: int) -> bool:
        """Whether an operand gets its layout without communication."""
        return all(
            s.kind not in COLLECTIVES or self.d.mesh.size(s.axes) == 1
            for s in self.steps(op, position)
        )

    def steps(self, op: FlatOp, position: int) -> tuple[ReshardStep, ...]:
        """The layout change of an operand, that of a copy before it included."""
        change = layout_change(self.d, op, position)
        return (*change.done, *change.steps)

    def repeated(self, ops: Sequence[Op]) -> set[int]:
        """Ops of elsewhere that run again with these ops of the loop."""
        here = {op.id for op in ops}
        more: set[int] = set()
        todo = [v for op in ops for v in op.operand_ids]
        while todo:
            op = self.maker.get(todo.pop())
            if op is None or op.id in here or op.id in more:
                continue
            reshapes = op.id in self.loop_ids and op.name in _RESHAPING and self.is_local(op)
            if reshapes or all(r in self.from_nothing for r in op.results):
                more.add(op.id)
                todo += op.operand_ids
        return more

    def loop_segment(
        self, name: str, ops: Sequence[Op], again: set[int], outputs: tuple[int, ...]
    ) -> Segment:
        graph = self.graph
        made_before = [graph.ops[i] for i in sorted(again - self.loop_ids)]
        mixed = sorted({op.id for op in ops} | (again & self.loop_ids))
        read = {v for i in mixed for v in graph.ops[i].operand_ids}
        items: list[Item] = [*made_before]
        items += [
            self.enters[r]
            for op in made_before
            for r in op.results
            if r in read and r in self.enters
        ]
        for i in mixed:
            items += [graph.ops[i]] if i in again else self.parts.items([graph.ops[i]])
        made = {r for op in ops for r in op.results}
        exits = tuple(e for v, e in self.parts.exits.items() if v in made and e.kind != CONCATENATE)
        return Segment(name, tuple(items), exits, outputs)

    # The loop.

    def loop(self, split_backward: bool) -> list[tuple[str, list[Op]]]:
        """Names and ops of the loop's segments, those without ops left out."""
        forward: list[Op] = []
        backward: list[Op] = []
        behind = set(self.late)
        for op in self.parts.loop:
            late = op.phase == BACKWARD or not behind.isdisjoint(op.operand_ids)
            (backward if late else forward).append(op)
            if late:
                behind.update(op.results)
        found = [(FORWARD_NAME, forward)]
        if split_backward:
            first = self.closure(self.handed_back(backward), backward)
            found += [
                (BACKWARD_INPUT_NAME, [op for op in backward if op.id in first]),
                (BACKWARD_WEIGHT_NAME, [op for op in backward if op.id not in first]),
            ]
        else:
            found.append((BACKWARD_NAME, backward))
        return [(name, ops) for name, ops in found if ops or name == FORWARD_NAME]

    def handed_back(self, backward: Sequence[Op]) -> list[int]:
        """Values of the backward pass that leave it for every microbatch."""
        made = {r for op in backward for r in op.results}
        return [v for i, v in self.output_values() if v in made and self.is_per_microbatch(i)]

    def closure(self, values: Iterable[int], ops: Iterable[Op]) -> set[int]:
        """Ids of those ops that the values are made of."""
        within = {op.id for op in ops}
        found: set[int] = set()
        todo = list(values)
        while todo:
            op = self.maker.get(todo.pop())
            if op is not None and op.id in within and op.id not in found:
                found.add(op.id)
                todo += op.operand_ids
        return found

    # Outputs.

    def output_values(self) -> list[tuple[int, int]]:
        """(position, graph value) of every output that is no literal."""
        outputs = enumerate(self.graph.outputs)
        return [(i, o) for i, o in outputs if not isinstance(o, Literal)]

    def is_per_microbatch(self, output: int) -> bool:
        return self.kinds[output] == CONCATENATE or not self.graph.grad_regions

    def passed(self) -> dict[int, int]:
        """Outputs that are inputs in the same layout.

        A state leaf goes out once at most, by preference as itself: its next reader may donate it.
        """
        at = {v: i for i, v in enumerate(self.graph.inputs)}
        found: dict[int, int] = {}
        outputs = [(i, at[v]) for i, v in self.output_values() if v in at]
        own = dict(self.program.aliases)
        for output, position in sorted(outputs, key=lambda o: own.get(o[1]) != o[0]):
            again = position in own and position in found.values()
            if not again and not self.changes_output(output, position):
                found[output] = position
        return found

    def changes_output(self, output: int, position: int) -> bool:
        """Whether an input goes out in another layout."""
        key = ("output", (), output)
        if key in self.program.link_at:
            link = self.c.ops[self.program.link_at[key]]
        else:
            state = next(i for i, o in self.program.aliases.items() if o == output)
            link = self.c.ops[self.program.link_at["input", (), state]]
            if state == position:
                return False
        return bool(self.steps(link, 0))

    def same_for_all(self, passed: Collection[int]) -> list[int]:
        """Outputs per microbatch that no microbatch changes: of a gradient that is a constant."""
        if not self.graph.grad_regions:
            return []
        varying = self.batch_values() | {r for op in self.parts.loop for r in op.results}
        return [
            i
            for i, output in enumerate(self.graph.outputs)
            if self.is_per_microbatch(i) and i not in passed
            and (isinstance(output, Literal) or output not in varying)
        ]  # fmt: skip

    def output_homes(
        self, loop: Sequence[Sequence[Op]], round_of: Mapping[int, int], num_rounds: int,
        elsewhere: Collection[int],
    ) -> dict[tuple[str, int], tuple[int, ...]]:  # fmt: skip
        """Output positions by the segment that returns them."""
        where = {op.id: i for i, ops in enumerate(loop) for op in ops}
        found: dict[tuple[str, int], tuple[int, ...]] = {
            **{("loop", i): () for i in range(len(loop))},
            **{("update", r): () for r in range(num_rounds)},
        }
        batch = self.batch_values()
        for position, output in enumerate(self.graph.outputs):
            if position in elsewhere:
                continue
            home = ("update", 0) if self.graph.grad_regions else ("loop", 0)
            if not isinstance(output, Literal):
                op = self.maker.get(output)
                if output in batch:
                    home = ("loop", 1 if output in self.late else 0)
                elif op is not None and op.id in round_of:
                    home = ("update", round_of[op.id])
                elif op is not None and op.id in where and self.is_per_microbatch(position):
                    home = ("loop", where[op.id])
            found[home] += (position,)
        return found

    def batch_values(self) -> set[int]:
        inputs = self.c.ops[: len(self.graph.inputs)]
        return {v for v, op in zip(self.graph.inputs, inputs, strict=True) if op.kind == "batch"}

    # The update.

    def update_ops(self, ready: set[int]) -> list[Op]:
        """Ops of the update, and those before the loop that it needs and the loop did not."""
        rest = [op for op in self.parts.before if op.id not in ready]
        read = [v for op in self.parts.after for v in op.operand_ids]
        read += [v for _, v in self.output_values()]
        read += self.parts.links
        needed = self.closure(read, rest)
        return [*(op for op in rest if op.id in needed), *self.parts.after]

    def rounds(self, ops: Sequence[Op], named: Sequence[Collection[int]] | None) -> dict[int, int]:
        """Round of every op of the update."""
        if not named:
            return {op.id: 0 for op in ops}
        ids = {op.id for op in ops}
        found: dict[int, int] = {}
        for r, each in enumerate(named):
            for i in each:
                if i not in ids or i in found:
                    what = "is in two rounds" if i in found else "is no op of the update"
                    raise ValueError(
                        f"update_rounds partition the ops after the gradient: op {i}, in round "
                        f"{r}, {what}"
                    )
                found[i] = r
        earliest: dict[int, int] = {}
        for op in reversed(ops):
            if op.id not in found:
                readers = [earliest[v] for v in op.results if v in earliest]
                found[op.id] = min(readers, default=len(named) - 1)
            for v in op.operand_ids:
                earliest[v] = min(earliest.get(v, len(named)), found[op.id])
        for op in ops:
            for v in op.operand_ids:
                maker = self.maker.get(v)
                if maker is not None and found.get(maker.id, 0) > found[op.id]:
                    raise ValueError(
                        f"an op of the update reads what earlier rounds or its own make: op "
                        f"{op.id} ({op.name}) is in round {found[op.id]} and reads what op "
                        f"{maker.id} ({maker.name}) makes in round {found[maker.id]}"
                    )
        return found


def _is_cheap(op: Op) -> bool:
    """Whether an op that reads nothing may as well run for every microbatch."""
    random = op.name in _RANDOM or op.name.startswith("random_")
    return not (random or op.subgraphs or op.name in HEAVY or op.name == "optimization_barrier")
