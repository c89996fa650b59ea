"""The graph laid flat for planning: `Program`.

In: a `TracedStep` and the number of microbatches. Out: every op of the graph and of its nested
bodies in one list, plus *links*, identity ops that stand where a value crosses a border and may
change its layout there:

====================  ==========================================================================
state                 a state leaf: read at the start of the step, written at its end
batch, argument       another input, or a constant captured by closure
gradient              a gradient on its way to the update; accumulates over microbatches
output                an output that is not state: no pending sum leaves the step
barrier               one operand of `optimization_barrier`
enter                 a value read by a loop or branch body (converted once, outside)
slice                 one slice per iteration of a stacked `scan` operand
carry                 a loop carry: initial value, body input, body output, final value
stack                 a `scan` output stacked over iterations
join                  an output of `cond`: the branches' values meet
====================  ==========================================================================

Every op has a `weight`, the number of times it runs per step, and one weight per operand, the
number of times a change of that operand's layout would run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alpa_lite.ir.graph import FORWARD, UPDATE, GradRegion, Graph, Literal, Op, aval_bytes, op_key
from alpa_lite.ir.trace import TracedStep
from alpa_lite.passes.microbatch import Microbatching

Path = tuple[tuple[int, int], ...]
"""Where a nested graph hangs: (op id, body index) from the outside in."""


@dataclass(frozen=True, slots=True, eq=False)
class FlatValue:
    """A value of some graph of the nest.

    Attributes:
      id: position in `Program.values`.
      aval: JAX abstract value.
      name: a path for inputs, else `""`.
      num_elements: product of the dims.
      num_bytes: of the whole array.
    """

    id: int
    aval: Any
    name: str = ""
    num_elements: int = field(init=False)
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_elements", math.prod(self.aval.shape))
        object.__setattr__(self, "num_bytes", aval_bytes(self.aval))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dims."""
        return tuple(self.aval.shape)


@dataclass(slots=True, eq=False)
class FlatOp:
    """An op or a link.

    Attributes:
      id: position in `Program.ops`.
      kind: `op`, or a link kind.
      op: the graph's op (None for state, batch, argument and gradient links).
      graph: the graph that holds `op`.
      operands: flat value ids (literals left out).
      positions: for each operand its position among the op's operands.
      results: flat value ids.
      weight: executions per step.
      operand_weights: executions per step of a layout change of each operand.
      phase: forward, backward or update.
      stacked: for slice and stack links, whether each operand / result has the extra leading dim.
      key: `op_key` of an op, for links `""`.
      name: primitive name, or the link kind.
    """

    id: int
    kind: str
    op: Op | None
    graph: Graph | None
    operands: tuple[int, ...]
    positions: tuple[int, ...]
    results: tuple[int, ...]
    weight: float
    operand_weights: tuple[float, ...]
    phase: str
    stacked: tuple[bool, ...] = ()
    key: str = ""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.op.name if self.kind == "op" and self.op is not None else self.kind


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """The flat form of a step.

    Attributes:
      step: what was traced.
      microbatching: the accumulation loop, if any.
      values: all values.
      ops: all ops and links, outer ops before the bodies they hold.
      definition: for each value the op that defines it.
      value_at: (path, graph value id) -> flat value id, as seen by readers in that graph.
      op_at: (path, graph op id) -> flat op id.
      link_at: (kind, path, key) -> flat op id; the key is an operand position, a graph value id
        or an output position, see `build_program`.
      aliases: input position -> output position, for the state.
      outputs: flat value per graph output (None for literals).
      notes: what the user should know.
    """

    step: TracedStep
    microbatching: Microbatching
    values: tuple[FlatValue, ...]
    ops: tuple[FlatOp, ...]
    definition: tuple[int, ...]
    value_at: Mapping[tuple[Path, int], int]
    op_at: Mapping[tuple[Path, int], int]
    link_at: Mapping[tuple[str, Path, int], int]
    aliases: Mapping[int, int]
    outputs: tuple[int | None, ...]
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> Graph:
        """The outermost graph."""
        return self.step.graph


def build_program(
    step: TracedStep, *, aliases: Mapping[int, int], batch_inputs: frozenset[int],
    microbatching: Microbatching | None = None,
) -> Program:  # fmt: skip
    """Flatten a traced step.

    Args:
      step: the traced step (at microbatch size when there are several microbatches).
      aliases: input position -> output position that must share one layout.
      batch_inputs: input positions that are batch leaves.
      microbatching: the accumulation loop; none by default.
    """
    loop = microbatching or Microbatching(1)
    builder = _Flattener(loop)
    builder.inputs(step.graph, aliases, batch_inputs)
    builder.body(step.graph, (), 1.0)
    builder.close_state(step.graph, aliases)
    builder.other_outputs(step.graph, aliases)
    outputs = tuple(
        None if isinstance(o, Literal) else builder.value_at[(), o] for o in step.graph.outputs
    )
    return Program(
        step=step, microbatching=loop, values=tuple(builder.values), ops=tuple(builder.ops),
        definition=tuple(builder.definition), value_at=builder.value_at, op_at=builder.op_at,
        link_at=builder.link_at, aliases=dict(aliases), outputs=outputs,
        notes=(*step.graph.notes, *dict.fromkeys(builder.notes)),
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Flattener:
    loop: Microbatching
    values: list[FlatValue] = field(default_factory=list)
    ops: list[FlatOp] = field(default_factory=list)
    definition: list[int] = field(default_factory=list)
    value_at: dict[tuple[Path, int], int] = field(default_factory=dict)
    op_at: dict[tuple[Path, int], int] = field(default_factory=dict)
    link_at: dict[tuple[str, Path, int], int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    in_loop_view: dict[int, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # equal keys are one string

    def new_value(self, aval: Any, name: str = "") -> int:
        self.values.append(FlatValue(len(self.values), aval, name))
        self.definition.append(-1)
        return len(self.values) - 1

    def add(
        self, kind: str, op: Op | None, graph: Graph | None, operands: Sequence[int],
        results: Sequence[int], weight: float, operand_weights: Sequence[float], phase: str,
        positions: Sequence[int] = (), stacked: Sequence[bool] = (), key: str = "",
    ) -> FlatOp:  # fmt: skip
        flat = FlatOp(
            len(self.ops), kind, op, graph, tuple(operands),
            tuple(positions) or tuple(range(len(operands))), tuple(results), weight,
            tuple(operand_weights), phase, tuple(stacked), key,
        )  # fmt: skip
        self.ops.append(flat)
        for result in results:
            self.definition[result] = flat.id
        return flat

    def inputs(self, graph: Graph, aliases: Mapping[int, int], batch: frozenset[int]) -> None:
        names = graph.input_names or tuple(f"input{i}" for i in range(len(graph.inputs)))
        for position, value in enumerate(graph.inputs):
            new = self.new_value(graph.values[value].aval, names[position])
            self.value_at[(), value] = new
            kind = "state" if position in aliases else "batch" if position in batch else "argument"
            # The operand of a state link (the new state) is known only at the end.
            link = self.add(kind, None, graph, (), (new,), 1.0, (), UPDATE)
            self.link_at["input", (), position] = link.id
        for value in graph.constants:
            self.constant(graph, (), value)

    def constant(self, graph: Graph, path: Path, value: int) -> None:
        new = self.new_value(graph.values[value].aval, "constant")
        self.value_at[path, value] = new
        self.link_at["constant", path, value] = self.add(
            "argument", None, graph, (), (new,), 1.0, (), UPDATE
        ).id

    def close_state(self, graph: Graph, aliases: Mapping[int, int]) -> None:
        for position, out in aliases.items():
            output = graph.outputs[out]
            if isinstance(output, Literal):
                continue
            link = self.ops[self.link_at["input", (), position]]
            new_value = self.value_at[(), output]
            if new_value not in link.results:
                link.operands, link.positions, link.operand_weights = (new_value,), (0,), (1.0,)

    def other_outputs(self, graph: Graph, aliases: Mapping[int, int]) -> None:
        taken = set(aliases.values())
        for position, output in enumerate(graph.outputs):
            if position not in taken and not isinstance(output, Literal):
                value = self.value_at[(), output]
                link = self.add("output", None, graph, (value,), (), 1.0, (1.0,), UPDATE)
                self.link_at["output", (), position] = link.id

    def body(self, graph: Graph, path: Path, weight: float) -> None:
        """Append the ops of one graph whose inputs are already mapped."""
        micro = self.loop if not path else Microbatching(1)
        loop_weight = weight * micro.num_microbatches
        regions = {r.last_op: r for r in graph.grad_regions}
        for op in graph.ops:
            if op.id in regions:
                self.gradients(graph, path, regions[op.id], weight)
            inside = op.id in micro.loop_ops
            self.operation(graph, path, op, loop_weight if inside else weight, inside)
        if len(graph.ops) in regions:
            self.gradients(graph, path, regions[len(graph.ops)], weight)

    def gradients(self, graph: Graph, path: Path, region: GradRegion, weight: float) -> None:
        """Links on which gradients leave the backward pass."""
        if path:
            return
        repeats = weight * self.loop.num_microbatches
        loop_outputs = self.loop.outputs
        for value in dict.fromkeys((*region.grads, *loop_outputs)):
            inner = self.value_at[path, value]
            outer = self.new_value(self.values[inner].aval)
            link = self.add("gradient", None, graph, (inner,), (outer,), 1.0, (repeats,), UPDATE)
            self.link_at["gradient", path, value] = link.id
            self.value_at[path, value] = outer

    def read(self, graph: Graph, path: Path, value: int, inside: bool) -> int:
        """The flat value behind an operand; `inside` the microbatch loop, its view of it."""
        if not inside or value not in self.loop.invariants:
            return self.value_at[path, value]
        if value not in self.in_loop_view:
            outer = self.value_at[path, value]
            inner = self.new_value(graph.values[value].aval, self.values[outer].name)
            link = self.add("enter", None, graph, (outer,), (inner,), 1.0, (1.0,), FORWARD)
            # Not "enter": the keys of a loop op with id 0 are small numbers as well.
            self.link_at["microbatch", (), value] = link.id
            self.in_loop_view[value] = inner
        return self.in_loop_view[value]

    def operation(self, graph: Graph, path: Path, op: Op, weight: float, inside: bool) -> None:
        positions = [i for i, o in enumerate(op.operands) if not isinstance(o, Literal)]
        operands = [self.read(graph, path, value, inside) for value in op.operand_ids]
        results = [self.new_value(graph.values[r].aval) for r in op.results]
        if op.name == "optimization_barrier":
            for i, (operand, result) in enumerate(zip(operands, results, strict=True)):
                link = self.add(
                    "barrier", op, graph, (operand,), (result,), weight, (weight,), op.phase
                )
                self.link_at["barrier", path, (op.id << 16) + i] = link.id
        elif op.subgraphs:
            by_position = dict(zip(positions, operands, strict=True))
            handler = {"scan": self.scan, "while": self.while_loop, "cond": self.cond}[op.name]
            handler(graph, path, op, by_position, results, weight)
        else:
            key = op_key(graph, op)
            flat = self.add(
                "op", op, graph, operands, results, weight, (weight,) * len(operands), op.phase,
                positions, key=self.keys.setdefault(key, key),
            )  # fmt: skip
            self.op_at[path, op.id] = flat.id
        for graph_value, flat_value in zip(op.results, results, strict=True):
            self.value_at[path, graph_value] = flat_value

    def link(
        self, kind: str, path: Path, op: Op, index: int, graph: Graph, operands: Sequence[int],
        results: Sequence[int], weight: float, operand_weights: Sequence[float],
        stacked: Sequence[bool] = (),
    ) -> None:  # fmt: skip
        flat = self.add(
            kind, op, graph, operands, results, weight, operand_weights, op.phase, stacked=stacked
        )
        self.link_at[kind, path, (op.id << 16) + index] = flat.id

    def enter(
        self, graph: Graph, path: Path, op: Op, index: int, body: Graph, body_index: int,
        body_input: int, operand: int | None, weight: float,
    ) -> None:  # fmt: skip
        """A body input that is the same array in every execution of the body."""
        inner_path = (*path, (op.id, body_index))
        inner = self.new_value(body.values[body_input].aval)
        self.value_at[inner_path, body_input] = inner
        operands = () if operand is None else (operand,)
        self.link(
            "enter", path, op, index, graph, operands, (inner,), weight, (weight,) * len(operands)
        )

    def nested(self, path: Path, op: Op, body_index: int, weight: float) -> Path:
        body = op.subgraphs[body_index]
        inner = (*path, (op.id, body_index))
        for value in body.constants:
            self.constant(body, inner, value)
        self.body(body, inner, weight)
        return inner

    def scan(
        self, graph: Graph, path: Path, op: Op, operands: Mapping[int, int],
        results: Sequence[int], weight: float,
    ) -> None:  # fmt: skip
        body, length = op.subgraphs[0], op.params["length"]
        num_consts, num_carry = op.params["num_consts"], op.params["num_carry"]
        inner_path = (*path, (op.id, 0))
        repeats = weight * length
        for i, value in enumerate(body.inputs):
            outer = operands.get(i)
            if i < num_consts:
                self.enter(graph, path, op, i, body, 0, value, outer, weight)
                continue
            inner = self.new_value(body.values[value].aval)
            self.value_at[inner_path, value] = inner
            have = () if outer is None else (outer,)
            if i >= num_consts + num_carry:
                self.link(
                    "slice", path, op, i, graph, have, (inner,), repeats, (weight,) * len(have),
                    (True,) * len(have) + (False,),
                )  # fmt: skip
            else:
                self.link(
                    "carry", path, op, i, graph, have, (inner,), repeats, (weight,) * len(have)
                )
        self.nested(path, op, 0, repeats)
        for i, output in enumerate(body.outputs):
            inner_out = None if isinstance(output, Literal) else self.value_at[inner_path, output]
            if i < num_carry:
                carry = self.ops[self.link_at["carry", path, (op.id << 16) + num_consts + i]]
                self.close_carry(carry, inner_out, results[i], repeats)
            else:
                have = () if inner_out is None else (inner_out,)
                self.link(
                    "stack", path, op, i, graph, have, (results[i],), weight,
                    (repeats,) * len(have), (False,) * len(have) + (True,),
                )  # fmt: skip

    def close_carry(
        self, carry: FlatOp, inner_out: int | None, result: int, repeats: float
    ) -> None:
        """Give a carry link its body output and its final value."""
        carry.results = (*carry.results, result)
        self.definition[result] = carry.id
        if inner_out is not None and inner_out not in carry.results:
            carry.operands = (*carry.operands, inner_out)
            carry.positions = tuple(range(len(carry.operands)))
            carry.operand_weights = (*carry.operand_weights, repeats)

    def while_loop(
        self, graph: Graph, path: Path, op: Op, operands: Mapping[int, int],
        results: Sequence[int], weight: float,
    ) -> None:  # fmt: skip
        self.notes.append(
            f"while loop at {op.source or op.scope or 'an unknown place'}: its trip count is not "
            "known, so its body is priced as one iteration"
        )
        cond, body = op.subgraphs
        num_cond, num_body = op.params["cond_nconsts"], op.params["body_nconsts"]
        for i in range(num_cond):
            self.enter(graph, path, op, i, cond, 0, cond.inputs[i], operands.get(i), weight)
        for i in range(num_body):
            at = num_cond + i
            self.enter(graph, path, op, at, body, 1, body.inputs[i], operands.get(at), weight)
        carries = []
        for i in range(len(results)):
            at = num_cond + num_body + i
            outer = operands.get(at)
            inner = self.new_value(body.values[body.inputs[num_body + i]].aval)
            self.value_at[(*path, (op.id, 1)), body.inputs[num_body + i]] = inner
            self.value_at[(*path, (op.id, 0)), cond.inputs[num_cond + i]] = inner
            have = () if outer is None else (outer,)
            self.link("carry", path, op, at, graph, have, (inner,), weight, (weight,) * len(have))
            carries.append(self.ops[-1])
        self.nested(path, op, 0, weight)
        inner_path = self.nested(path, op, 1, weight)
        for carry, output, result in zip(carries, body.outputs, results, strict=True):
            inner_out = None if isinstance(output, Literal) else self.value_at[inner_path, output]
            self.close_carry(carry, inner_out, result, weight)

    def cond(
        self, graph: Graph, path: Path, op: Op, operands: Mapping[int, int],
        results: Sequence[int], weight: float,
    ) -> None:  # fmt: skip
        # The branch index must be known everywhere: a link of its own keeps it replicated.
        ends: list[list[int]] = [[] for _ in results]
        for b, branch in enumerate(op.subgraphs):
            for i, value in enumerate(branch.inputs):
                at = 1 + b * len(branch.inputs) + i
                self.enter(graph, path, op, at, branch, b, value, operands.get(1 + i), weight)
            inner_path = self.nested(path, op, b, weight)
            for out, output in enumerate(branch.outputs):
                if not isinstance(output, Literal):
                    ends[out].append(self.value_at[inner_path, output])
        for i, (have, result) in enumerate(zip(ends, results, strict=True)):
            self.link(
                "join", path, op, i, graph, tuple(dict.fromkeys(have)), (result,), weight,
                (weight,) * len(set(have)),
            )  # fmt: skip
