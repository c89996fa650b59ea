"""A stage of a pipeline as a step of its own, which the planner of whole steps can plan.

In: `StepParts`, a `StageCut`, the `UpdateSplit`. Out: `StageStep`: a traced step
`(state, arguments, batch) -> (state, others)`, where the state are the parameters and optimizer
state that live on the stage, the batch is one microbatch's rows, incoming activations and incoming
cotangents, and the others are outgoing activations and cotangents (per microbatch), metrics, and
what the update of other stages needs. So layouts, prices, memory and programs of a stage come from
the same passes as those of a whole step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite import compat
from alpa_lite.ir.grad import GradSpec, value_and_grad_p
from alpa_lite.ir.graph import Graph
from alpa_lite.ir.trace import TracedStep, trace
from alpa_lite.passes.pipeline_methods import NO_REMAT, SELECTIVE_REMAT
from alpa_lite.passes.stages.cut import Link, StageCut
from alpa_lite.passes.stages.layers import equation_key
from alpa_lite.passes.stages.parts import StepParts, evaluate, read, variables
from alpa_lite.passes.stages.update import Contribution, UpdateSplit


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a stage step.

    Attributes:
      kind: `state` (a step input or output that lives here), `argument` (a step input that lives
        elsewhere or nowhere), `row` (a batch input), `activation`, `cotangent` (per microbatch),
        `update` (sent between stages once per step), `result` (a step output that is no state).
      position: of the step's flat input or output; -1 for others.
      key: for what is sent, what identifies it on both sides: a `Link`, or the (variable or
        `Contribution`, source, target) of `UpdateSplit.sends`.
    """

    kind: str
    position: int = -1
    key: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class StageStep:
    """A stage as a step.

    Attributes:
      cut: its forward pass.
      traced: the step, at microbatch size.
      inputs, outputs: what each flat input and output of `traced` is.
      output_kinds: how each output combines over microbatches.
    """

    cut: StageCut
    traced: TracedStep
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    output_kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepNames:
    """What is known of a step's inputs and outputs besides their types.

    Attributes:
      inputs, outputs: paths.
      output_kinds: how outputs combine over microbatches: `mean`, `sum`, `concatenate`, or `""`.
      aliases: input position -> output position of the state.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_kinds: tuple[str, ...]
    aliases: Mapping[int, int]


def build_stage_step(
    parts: StepParts, cut: StageCut, split: UpdateSplit, names: StepNames,
    remat: str = NO_REMAT, like: StageStep | None = None,
) -> StageStep:  # fmt: skip
    """Trace one stage.

    Args:
      parts: of the whole step.
      cut: of this stage.
      split: of the update.
      names: of the whole step.
      remat: one of `REMAT_POLICIES`, for every layer of the stage.
      like: a stage with the same signature, whose graph is this one's with other names.
    """
    builder = _Stage(parts, cut, split, names, remat)
    state, arguments, rows = builder.inputs()
    ports = (*state, *arguments, *rows)
    if like is None:
        step = builder.step(state, arguments, rows)
        groups = [[builder.aval(p) for p in each] for each in (state, arguments, rows)]
        traced = trace(step, *groups, name="stage")
    else:
        traced = like.traced
    outputs = builder.outputs(state)
    graph = replace(
        traced.graph, input_names=_distinct(builder.name(p, names.inputs) for p in ports),
        output_names=_distinct(builder.name(p, names.outputs) for p in outputs),
    )  # fmt: skip
    kinds = tuple(builder.kind(p) for p in outputs)
    return StageStep(cut, replace(traced, graph=graph), ports, outputs, kinds)


def stage_signature(
    parts: StepParts, cut: StageCut, split: UpdateSplit, names: StepNames, remat: str
) -> str:
    """A hash that is equal for stages whose graphs are equal but for names."""
    builder = _Stage(parts, cut, split, names, remat)
    state, arguments, rows = builder.inputs()
    outputs = builder.outputs(state)
    numbers: dict[Any, int] = {}
    digest = hashlib.sha256(remat.encode())

    def number(atom: Any) -> str:
        if compat.is_literal(atom):
            return f"lit{atom}"
        if atom in parts.constants:
            return f"const{id(parts.constants[atom])}"
        return str(numbers.setdefault(atom, len(numbers)))

    for group in (state, arguments, rows):
        for port in group:
            variable = parts.inputs[port.position] if port.position >= 0 else _of_port(port)
            aval = builder.aval(port)
            weak = "weak" if aval.weak_type else ""
            text = f"{port.kind} {aval.dtype}{aval.shape}{weak} {number(variable)}\n"
            digest.update(text.encode())
        digest.update(b"--\n")
    sections = (
        [parts.before[i] for i in builder.before()],
        *([parts.loop[i] for i in each] for each in cut.segments),
        [parts.after[i] for i in split.equations[cut.index]],
    )
    for equations in sections:
        for eqn in equations:
            read_by = ",".join(map(number, eqn.invars))
            made = ",".join(map(number, eqn.outvars))
            digest.update(f"{equation_key(eqn)}({read_by})->{made}\n".encode())
        digest.update(b"--\n")
    for result in cut.results:
        digest.update(f"result {result == 0} {number(parts.results[result][1])}\n".encode())
    for variable, found in split.contributions.items():
        here = [c for c in found if c.stage == cut.index]
        if here or variable in split.sums[cut.index]:
            atoms = parts.grads if here and here[0].is_gradient else ()
            wrt = [number(atoms[c.index][1]) for c in here if c.is_gradient]
            shares = [(c.share, c.stage == cut.index) for c in found]
            summed = variable in split.sums[cut.index]
            digest.update(f"{number(variable)} {wrt} {shares} {summed}\n".encode())
    for port in outputs:
        atom = parts.outputs[port.position] if port.position >= 0 else _of_port(port)
        digest.update(f"{port.kind} {builder.kind(port)} {number(atom)}\n".encode())
    return digest.hexdigest()


def update_rounds(graph: Graph, arrivals: Mapping[int, int]) -> dict[int, int]:
    """Round of every op after the gradient: the largest of those of what it reads.

    Args:
      graph: of a stage step.
      arrivals: round of inputs, by position; 0 for those not named.
    """
    rounds = {graph.inputs[position]: r for position, r in arrivals.items()}
    found = {}
    first = max((r.last_op for r in graph.grad_regions), default=0)
    for op in graph.ops[first:]:
        found[op.id] = max((rounds.get(v, 0) for v in op.operand_ids), default=0)
        rounds |= dict.fromkeys(op.results, found[op.id])
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    parts: StepParts
    cut: StageCut
    split: UpdateSplit
    names: StepNames
    remat: str

    # Ports.

    def inputs(self) -> tuple[list[Port], list[Port], list[Port]]:
        parts, here = self.parts, self.cut.index
        state = [
            Port("state", position)
            for position, home in enumerate(self.split.input_homes)
            if home == here
        ]
        incoming = [s for s in self.split.sends if s[2] == here]
        sent_inputs = {v for v, _, _ in incoming}
        wanted = self.wanted_inputs()
        arguments = [
            Port("argument", position)
            for position, v in enumerate(parts.inputs)
            if v in sent_inputs
            or (v in wanted and self.split.input_homes[position] is None and v not in parts.batch)
        ]
        known = set(parts.inputs)
        arguments += [Port("update", key=s) for s in incoming if s[0] not in known]
        rows = [Port("row", parts.inputs.index(v)) for v in self.cut.batch]
        rows += [Port("activation", key=link) for link in self.cut.received]
        rows += [Port("cotangent", key=link) for link in self.cut.sent if link.differentiable]
        return state, arguments, rows

    def outputs(self, state: Sequence[Port]) -> tuple[Port, ...]:
        here = self.cut.index
        ports = [Port("state", self.names.aliases[p.position]) for p in state]
        taken = set(self.names.aliases.values())
        ports += [
            Port("result", position)
            for position, home in enumerate(self.split.output_homes)
            if position not in taken and (home == here or self.has_rows_of(position))
        ]
        ports += [Port("activation", key=link) for link in self.unique_sent()]
        ports += [Port("cotangent", key=link) for link in self.cut.received if link.differentiable]
        known = set(self.parts.inputs)
        ports += [Port("update", key=s) for s in self.unique_updates() if s[0] not in known]
        return tuple(ports)

    def has_rows_of(self, position: int) -> bool:
        """Whether an output has rows of the batch of which this stage computes a part."""
        atom = self.parts.outputs[position]
        return (
            not compat.is_literal(atom)
            and atom in self.split.per_example
            and any(c.stage == self.cut.index for c in self.split.contributions[atom])
        )

    def unique_sent(self) -> list[Link]:
        """One link of every value that is handed on, however many stages read it."""
        return list({link.variable: link for link in reversed(self.cut.sent)}.values())[::-1]

    def unique_updates(self) -> list[tuple[Any, int, int]]:
        sends = [s for s in self.split.sends if s[1] == self.cut.index]
        return list({s[0]: s for s in reversed(sends)}.values())[::-1]

    def aval(self, port: Port) -> jax.ShapeDtypeStruct:
        if port.kind in ("activation", "cotangent"):
            aval = port.key.variable.aval
        elif port.kind == "update":
            aval = _variable(port.key[0]).aval
        else:
            aval = self.parts.inputs[port.position].aval
        return jax.ShapeDtypeStruct(
            aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False)
        )

    def name(self, port: Port, names: Sequence[str]) -> str:
        if port.position >= 0:
            return names[port.position]
        if port.kind == "update":
            _, source, target = port.key
            return f"update from stage {source} to {target}"
        return f"{port.kind} from stage {port.key.source} to {port.key.target}"

    def kind(self, port: Port) -> str:
        if port.kind in ("activation", "cotangent"):
            return "concatenate"
        return self.names.output_kinds[port.position] if port.kind == "result" else ""

    def wanted_inputs(self) -> set[Any]:
        """Inputs of the step that something here reads."""
        parts, cut, split = self.parts, self.cut, self.split
        equations = [parts.loop[i] for each in cut.segments for i in each]
        equations += [parts.before[i] for i in self.before()]
        equations += [parts.after[i] for i in split.equations[cut.index]]
        wanted = {v for eqn in equations for v in variables(eqn.invars)}
        wanted |= set(variables(parts.results[r][1] for r in cut.results))
        homes = zip(parts.outputs, split.output_homes, strict=True)
        return wanted | {a for a, home in homes if home == cut.index and not compat.is_literal(a)}

    def before(self) -> list[int]:
        return sorted({*self.cut.before, *self.split.before[self.cut.index]})

    # The step.

    def step(self, state: Sequence[Port], arguments: Sequence[Port], rows: Sequence[Port]) -> Any:
        def run(
            state_values: Sequence[Any], argument_values: Sequence[Any], row_values: Sequence[Any]
        ) -> tuple[list[Any], list[Any]]:
            env: dict[Any, Any] = dict(self.parts.constants)
            cotangents: dict[Any, Any] = {}
            received: dict[Any, Any] = {}
            values = (*state_values, *argument_values, *row_values)
            for port, x in zip((*state, *arguments, *rows), values, strict=True):
                if port.kind == "activation":
                    env[port.key.variable] = x
                elif port.kind == "cotangent":
                    v = port.key.variable
                    cotangents[v] = cotangents[v] + x if v in cotangents else x
                elif port.kind == "update":
                    received[port.key[0]] = x
                else:
                    env[self.parts.inputs[port.position]] = x
            evaluate((self.parts.before[i] for i in self.before()), env)
            sent, handed_back, made = self.differentiate(env, cotangents)
            late = self.update(env, received, made)
            outs = []
            for port in self.outputs(state):
                if port.kind == "activation":
                    outs.append(sent[port.key.variable])
                elif port.kind == "cotangent":
                    outs.append(handed_back[port.key.variable])
                elif port.kind == "update":
                    key = port.key[0]
                    outs.append(made[key] if isinstance(key, Contribution) else late[key])
                else:
                    outs.append(jnp.asarray(read(self.parts.outputs[port.position], late)))
            return outs[: len(state)], outs[len(state) :]

        return run

    def differentiate(
        self, env: dict[Any, Any], cotangents: Mapping[Any, Any]
    ) -> tuple[dict[Any, Any], dict[Any, Any], dict[Contribution, Any]]:
        """Forward and backward: what is handed on, handed back, and contributed to the update."""
        parts, cut = self.parts, self.cut
        links = [link for link in cut.received if link.differentiable]
        active = [*cut.wrt, *(link.variable for link in links)]
        made_here = {v for each in cut.segments for i in each for v in parts.loop[i].outvars}
        reads = [v for each in cut.segments for i in each for v in variables(parts.loop[i].invars)]
        reads += variables(parts.results[r][1] for r in cut.results)
        others = [v for v in dict.fromkeys(reads) if v not in made_here and v not in active]
        others = [v for v in others if v not in parts.constants]
        loss = [r for r in cut.results if r == 0]
        aux = [r for r in cut.results if r != 0]
        sent = [link.variable for link in self.unique_sent()]
        seeds = [v for v in sent if v in cotangents]
        rest = [v for v in sent if v not in cotangents]

        def forward(*values: Any) -> list[Any]:
            inner = dict(parts.constants)
            inner.update(zip((*active, *others), values, strict=True))
            self.layers(inner)
            outs = [read(parts.loss, inner) for _ in loss]
            outs += [inner[v] for v in (*seeds, *rest)]
            # Of its own, should it also be handed on: both are combined in different ways.
            return outs + [jnp.copy(read(parts.results[r][1], inner)) for r in aux]

        operands = [env[v] for v in (*active, *others)]
        closed = jax.make_jaxpr(forward)(*operands)
        forward_jaxpr = compat.constants_as_operands(closed)
        num_consts = len(closed.consts)
        first = len(loss)
        spec = GradSpec(
            forward_jaxpr, num_consts, tuple(num_consts + i for i in range(len(active))),
            has_loss=bool(loss), seeded=tuple(first + i for i in range(len(seeds))),
            num_accumulated=len(cut.wrt),
        )  # fmt: skip
        results = value_and_grad_p.bind(
            *closed.consts, *operands, *(cotangents[v] for v in seeds), spec=spec
        )
        supply = iter(results)
        loss_values = [next(supply) for _ in loss]
        handed_on = {v: next(supply) for v in (*seeds, *rest)}
        aux_values = [next(supply) for _ in aux]
        grads = {v: next(supply) for v in active}
        values = dict(zip((*loss, *aux), (*loss_values, *aux_values), strict=True))
        made = {}
        for found in self.split.contributions.values():
            for c in found:
                if c.stage == cut.index:
                    made[c] = grads[parts.grads[c.index][1]] if c.is_gradient else values[c.index]
        return handed_on, {link.variable: grads[link.variable] for link in links}, made

    def layers(self, env: dict[Any, Any]) -> None:
        """The forward pass, layer by layer; each may be computed again in the backward pass."""
        parts = self.parts
        free, *layers = self.cut.segments
        evaluate((parts.loop[i] for i in free), env)
        if self.remat == NO_REMAT:
            for each in layers:
                evaluate((parts.loop[i] for i in each), env)
            return
        policy = (
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            if self.remat == SELECTIVE_REMAT
            else None
        )
        wanted = {link.variable for link in self.cut.sent}
        wanted |= set(variables(parts.results[r][1] for r in self.cut.results))
        for number, each in enumerate(layers):
            equations = [parts.loop[i] for i in each]
            made = {v for eqn in equations for v in eqn.outvars}
            reads = dict.fromkeys(
                v for eqn in equations for v in variables(eqn.invars) if v not in made
            )
            later = {
                v
                for later_layer in layers[number + 1 :]
                for i in later_layer
                for v in variables(parts.loop[i].invars)
            }
            inputs = [v for v in reads if v not in parts.constants]
            outputs = [
                v
                for v in dict.fromkeys(v for eqn in equations for v in eqn.outvars)
                if v in later or v in wanted
            ]
            run = _function(equations, inputs, outputs, parts.constants)
            values = jax.checkpoint(run, policy=policy)(*(env[v] for v in inputs))
            env.update(zip(outputs, values, strict=True))

    def update(
        self, env: Mapping[Any, Any], received: Mapping[Any, Any], made: Mapping[Contribution, Any]
    ) -> dict[Any, Any]:
        """The values of the update that this stage computes."""
        parts, split, here = self.parts, self.split, self.cut.index
        late = dict(env)
        for variable, found in split.contributions.items():
            own = [c for c in found if c.stage == here]
            if own and (len(found) == 1 or variable in split.per_example):
                late[variable] = made[own[0]]
        for variable in split.sums[here]:
            total = None
            for c in split.contributions[variable]:
                x = made[c] if c.stage == here else received[c]
                if c.share != 1.0 and jnp.issubdtype(x.dtype, jnp.inexact):
                    x = x * jnp.asarray(c.share, x.dtype)
                total = x if total is None else total + x
            late[variable] = total
        late.update({v: x for v, x in received.items() if not isinstance(v, Contribution)})
        for variable, _ in (*parts.grads, *parts.results):
            if variable not in split.contributions:  # nothing in the loss reads the parameter
                late[variable] = jnp.zeros(variable.aval.shape, variable.aval.dtype)
        evaluate((parts.after[i] for i in split.equations[here]), late)
        return late


def _function(
    equations: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any],
    constants: Mapping[Any, Any],
) -> Callable[..., list[Any]]:  # fmt: skip
    """Equations as a function of arrays."""

    def run(*values: Any) -> list[Any]:
        env = {**constants, **dict(zip(inputs, values, strict=True))}
        evaluate(equations, env)
        return [env[v] for v in outputs]

    return run


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    """The names, those that come again with a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)


def _of_port(port: Port) -> Any:
    return port.key.variable if isinstance(port.key, Link) else _variable(port.key[0])


def _variable(key: Any) -> Any:
    return key.variable if isinstance(key, Contribution) else key
