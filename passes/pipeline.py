"""The whole compile, from a traced step to a plan, as a straight run of named steps.

    trace                 function, shapes        -> TracedStep          alpa_lite.ir.trace
    step contract         TracedStep              -> aliases, batch      step_contract
    flatten               TracedStep              -> Program             program
    rules                 Program                 -> ShardingRule per op contract_rules, rules
    contract              Program, rules          -> Contraction         contract
    share                 Contraction             -> classes             repeats
    for each candidate mesh (meshes) and microbatch count:
      strategies          Node, Mesh              -> StrategySet         strategies
      restrict            Method                  -> allowed strategies  methods
      price               strategies, CostModel   -> PricedGraph         pricing
      build               PricedGraph, liveness   -> IntraOpProblem      build, memory
      solve               IntraOpProblem          -> IntraOpSolution     intra_op
      read back           IntraOpSolution         -> Decisions           decisions
    choose                candidates              -> PlannedStep         here

With `ALPA_LITE_DUMP=dir` in the environment every step writes its output there as text.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from alpa_lite.cost_model import Cluster, MeshCostModel
from alpa_lite.errors import InfeasibleError, SolverTimeoutError, StepError
from alpa_lite.ir.graph import Graph, format_graph, graph_hash
from alpa_lite.ir.sharding import Mesh
from alpa_lite.ir.trace import TracedStep, trace
from alpa_lite.passes.build import Candidate, PlanningInputs, solve_on_mesh
from alpa_lite.passes.contract import contract
from alpa_lite.passes.contract_rules import program_rules, replicated_notes
from alpa_lite.passes.decision_graph import Contraction
from alpa_lite.passes.decisions import Decisions, decide
from alpa_lite.passes.memory import analyse_liveness
from alpa_lite.passes.meshes import candidate_meshes, name_axes, search_notes
from alpa_lite.passes.methods import Method
from alpa_lite.passes.microbatch import (
    TracedTwice,
    check_outputs,
    combination_notes,
    find_microbatch_loop,
)
from alpa_lite.passes.plan import Alternative, Plan
from alpa_lite.passes.pricing import count_work
from alpa_lite.passes.program import Program, build_program
from alpa_lite.passes.repeats import share_classes
from alpa_lite.passes.report import assignments_of, make_plan, replan
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.step_contract import batch_positions, split_batch, state_aliases

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArgs:
    """A step and how it is called.

    Attributes:
      fun: `fun(*args)`; static arguments already bound.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      arg_names: parameter names.
      batch_argnums, donate_argnums: positions in `args`.
      name: of the step.
    """

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    arg_names: tuple[str, ...]
    batch_argnums: tuple[int, ...]
    donate_argnums: tuple[int, ...]
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PlannedStep:
    """A plan together with what the runtime needs to run it.

    Attributes:
      plan: the reviewable value.
      decisions: all layouts.
      output_kinds: with several microbatches, how each output leaf combines (`mean`, `sum`,
        `concatenate`, or `""` for values of the update).
    """

    plan: Plan
    decisions: Decisions
    output_kinds: tuple[str, ...]


def plan_step(
    call: StepArgs, method: Method, cluster: Cluster, *, table: RuleTable,
    progress: Progress | None = None,
) -> PlannedStep:  # fmt: skip
    """Plan one step on one cluster.

    Raises:
      InfeasibleError: nothing fits; says how many GiB short and what would help.
      StepError: the step does not keep the contract.
      PlanError: a prescribed mesh or pin is impossible.
    """
    with paused_garbage_collection():
        return _plan_step(call, method, cluster, table, progress or (lambda what, done: None))


def _plan_step(
    call: StepArgs, method: Method, cluster: Cluster, table: RuleTable, report: Progress
) -> PlannedStep:
    started = time.monotonic()
    solving_s = 0.0
    meshes = candidate_meshes(method, cluster)
    tried: list[Alternative] = []
    failure: InfeasibleError | SolverTimeoutError | None = None
    full: TracedStep | None = None
    for count in microbatch_counts(method, call):
        if failure is not None and count < _least_count(failure, tried):
            continue
        report(f"tracing {call.name}", 0.0)
        try:
            traced = trace_call(call, count)
            full = full or (traced if count == 1 else trace_call(call, 1))
            both = TracedTwice(full, traced)
            kinds = check_outputs(full, traced, count, both)
            contraction, inputs = prepare(traced, call, count, method, cluster, table)
            notes = combination_notes(full, traced, kinds, count, both)
            notes = (*notes, *inputs.notes, *search_notes(method, cluster))
            inputs = replace(inputs, notes=notes)
        except StepError:
            if failure is None:
                raise
            break  # this step cannot be split into microbatches, which were only a way out
        begun = time.monotonic()
        deadline = begun + method.time_limit_s - solving_s
        best, failure = _best_mesh(inputs, meshes, deadline, count, tried, report)
        solving_s += time.monotonic() - begun
        if best is not None:
            named = name_axes(contraction, best.decisions.mesh, best.decisions.assignments)
            best = replace(best, decisions=decide(contraction, named, best.decisions.assignments))
            plan = make_plan(
                call.name, _hash(traced.graph, contraction.program), inputs, best, tuple(tried),
                time.monotonic() - started,
            )  # fmt: skip
            dump("plan.txt", plan.describe)
            report("done", 1.0)
            return PlannedStep(plan, best.decisions, kinds)
    assert failure is not None
    raise failure


def _hash(graph: Graph, program: Program) -> str:
    """`graph_hash`, with the keys that the program has made already."""
    made = (program.op_at.get(((), op.id)) for op in graph.ops)
    return graph_hash(graph, ["" if at is None else program.ops[at].key for at in made])


def _best_mesh(
    inputs: PlanningInputs, meshes: Sequence[Mesh], deadline: float, count: int,
    tried: list[Alternative], report: Progress,
) -> tuple[Candidate | None, InfeasibleError | SolverTimeoutError | None]:  # fmt: skip
    """The cheapest solution over all meshes, or why there is none; appends to `tried`."""
    best: Candidate | None = None
    failure: InfeasibleError | SolverTimeoutError | None = None
    for i, mesh in enumerate(meshes):
        report(f"solving on mesh {'x'.join(map(str, mesh.shape))}", (i + 1) / (len(meshes) + 1))
        remaining = max(0.0, deadline - time.monotonic())
        step_s, reason = None, ""
        try:
            found = solve_on_mesh(inputs, mesh, remaining / (len(meshes) - i))
            step_s = found.solution.objective_s
            if best is None or step_s < best.solution.objective_s:
                best = found
        except (InfeasibleError, SolverTimeoutError) as error:
            failure, reason = _closer(failure, error), str(error)
        tried.append(
            Alternative(mesh=mesh.shape, num_microbatches=count, step_s=step_s, reason=reason)
        )
    return best, failure


@contextlib.contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Planning makes many small lasting objects and no cycles; collecting costs a quarter more."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def trace_call(call: StepArgs, num_microbatches: int) -> TracedStep:
    """Trace at microbatch size."""
    args = call.args
    if num_microbatches > 1:
        args = split_batch(args, call.batch_argnums, num_microbatches)
    return trace(call.fun, *args, arg_names=call.arg_names, name=call.name)


def prepare(
    traced: TracedStep, call: StepArgs, count: int, method: Method, cluster: Cluster,
    table: RuleTable, pins: Mapping[str, str] | None = None,
) -> tuple[Contraction, PlanningInputs]:  # fmt: skip
    """From a traced step to the decision graph: everything that no mesh changes."""
    dump("graph.txt", lambda: format_graph(traced.graph))
    inputs = prepare_program(flatten(traced, call, count), method, cluster, table, pins)
    return inputs.contraction, replace(inputs, notes=(*inputs.notes, *_capture_notes(traced)))


def prepare_program(
    program: Program, method: Method, cluster: Cluster, table: RuleTable,
    pins: Mapping[str, str] | None = None,
) -> PlanningInputs:  # fmt: skip
    """From a flat program to the decision graph.

    Args:
      program: of a step, or of a stage of a pipeline.
      method: restrictions.
      cluster: of the devices that run it.
      table: sharding rules found so far.
      pins: prescribed layouts by input path; those of `method` by default.
    """
    rules = program_rules(program, table)
    contraction = contract(program, rules)
    dump(
        "rules.txt",
        lambda: "\n".join(f"{o.name} {r}" for o, r in zip(program.ops, rules, strict=True)),
    )
    dump("nodes.txt", lambda: "\n".join(f"{n.id} {n.name} {n.factors}" for n in contraction.nodes))
    if pins is None:
        pins = {name: str(spec) for name, spec in method.pins(contraction).items()}
    classes = share_classes(contraction, pins)
    return PlanningInputs(
        contraction=contraction, classes=classes, liveness=analyse_liveness(contraction),
        work=count_work(contraction, classes), method=method, cluster=cluster, pins=pins,
        notes=(*program.notes, *replicated_notes(program, rules)),
    )  # fmt: skip


def _capture_notes(traced: TracedStep) -> tuple[str, ...]:
    """Whether a gradient was taken in a way that its structure could not be kept."""
    graph = traced.graph
    if graph.grad_regions or all("transpose(" not in op.scope for op in graph.walk()):
        return ()
    return (
        "no gradient computation was captured, so the step is planned as one graph and cannot be "
        "split into microbatches: call alpa_lite.value_and_grad, or jax.value_and_grad looked up "
        "inside the step (a name imported from jax before is not seen)",
    )


def flatten(traced: TracedStep, call: StepArgs, count: int) -> Program:
    """The flat program under the step contract."""
    aliases = state_aliases(traced, call.donate_argnums)
    batch = batch_positions(traced, call.batch_argnums)
    loop = None
    if count > 1:
        try:
            loop = find_microbatch_loop(traced, batch, count)
        except ValueError as error:
            raise StepError(str(error)) from None
    return build_program(traced, aliases=aliases, batch_inputs=batch, microbatching=loop)


def microbatch_counts(method: Method, call: StepArgs) -> list[int]:
    """Microbatch counts in the order they are tried: the first that fits is best."""
    if method.num_microbatches != "auto":
        return [method.num_microbatches]
    leaves = [
        x for a in call.batch_argnums if a < len(call.args) for x in jax.tree.leaves(call.args[a])
    ]
    sizes = [x.shape[0] for x in leaves if getattr(x, "shape", ())]
    counts, count = [1], 2
    while sizes and all(size % count == 0 and size >= count for size in sizes) and count <= 64:
        counts.append(count)
        count *= 2
    return counts


def _least_count(
    failure: InfeasibleError | SolverTimeoutError, tried: Sequence[Alternative]
) -> float:
    """Fewer microbatches than this cannot fit: memory falls at best in proportion to their size."""
    if not isinstance(failure, InfeasibleError) or not failure.need_bytes:
        return 0.0
    assert failure.budget_bytes is not None
    return tried[-1].num_microbatches * failure.need_bytes / failure.budget_bytes


def restore(plan: Plan, call: StepArgs, method: Method, *, table: RuleTable) -> PlannedStep:
    """Rebuild the layouts of a loaded plan for a step.

    Raises:
      PlanError: the plan belongs to another step, or an edit is impossible.
      InfeasibleError: the plan needs more memory than its own budget.
    """
    count = plan.num_microbatches
    traced = trace_call(call, count)
    full = trace_call(call, 1) if count > 1 else traced
    kinds = check_outputs(full, traced, count)
    contraction, inputs = prepare(traced, call, count, method, plan.cluster, table, plan.pins)
    assignments, overridden = assignments_of(
        plan, contraction, inputs.classes, graph_hash(traced.graph)
    )
    decisions = decide(contraction, plan.mesh, assignments)
    return PlannedStep(replan(plan, inputs, decisions, overridden), decisions, kinds)


def dump(name: str, text: Callable[[], str]) -> None:
    """Write one step's output to the folder named by `ALPA_LITE_DUMP`, if any."""
    folder = os.environ.get("ALPA_LITE_DUMP")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_text(text() + "\n")


def _closer(
    a: InfeasibleError | SolverTimeoutError | None, b: InfeasibleError | SolverTimeoutError
) -> InfeasibleError | SolverTimeoutError:
    """The failure that comes closest to fitting."""
    if not isinstance(b, InfeasibleError) or b.need_bytes is None:
        return a or b
    if not isinstance(a, InfeasibleError) or a.need_bytes is None:
        return b
    return b if b.need_bytes < a.need_bytes else a


__all__ = ["Mesh", "MeshCostModel", "PlannedStep", "StepArgs", "plan_step", "restore"]
