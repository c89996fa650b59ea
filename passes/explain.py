"""Why a plan is what it is: `explain_decision`, `sensitivity`, `price_baselines`.

In: plans, and what is needed to solve them again. Out: values with every figure that a text or a
report shows. A figure is either in the plan or comes from a re-solve: of the same step with a
choice forbidden, with more memory, with faster links, or by another method.
"""

from __future__ import annotations

from dataclasses import dataclass

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import (
    AlpaLiteError,
    InfeasibleError,
    PlanError,
    SolverTimeoutError,
    StepError,
)
from alpa_lite.passes.methods import (
    AutoParallel,
    DataParallel,
    Method,
    Zero1Parallel,
    Zero3Parallel,
)
from alpa_lite.passes.pipeline import Progress, StepArgs, plan_step
from alpa_lite.passes.pipeline_methods import ThreeDParallel
from alpa_lite.passes.pipeshard import plan_pipeline
from alpa_lite.passes.plan import Decision, Plan
from alpa_lite.passes.plan_text import format_axes
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.variants import UNLIMITED_BYTES, ChoiceCost, Variants, faster_links

MORE_MEMORY_BYTES = 2.0**30
"""How much more memory explanations try."""

MORE_BANDWIDTH = 2.0
"""How many times the bandwidth of all links explanations try."""

_CLOSE = 1e-6
"""Relative distance of step times that counts as none."""

MEMORY, METHOD, PIN, NOTHING = "memory", "method", "pin", "nothing"
"""What may bind a choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a re-solve gives.

    Attributes:
      step_s: predicted; None if nothing fits.
      peak_bytes: per device; None if nothing fits.
      reason: why nothing fits, else `""`.
    """

    step_s: float | None
    peak_bytes: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A recipe that people use by hand, planned for the same step, cluster and memory.

    Attributes:
      name: what people call it.
      method: the parallel method, with its options.
      layout: mesh and microbatches; `""` if nothing fits.
      outcome: what it would cost.
    """

    name: str
    method: str
    layout: str
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What the step would take if something were different, on the same mesh.

    Attributes:
      binding: whether memory binds (`memory`), or nothing does (`nothing`).
      unlimited_memory, more_memory, more_bandwidth: with unlimited memory, `MORE_MEMORY_BYTES`
        more of it, and `MORE_BANDWIDTH` times the bandwidth of all links.
    """

    binding: str
    unlimited_memory: Outcome
    more_memory: Outcome
    more_bandwidth: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The best plan in which a decision chooses something else.

    Attributes:
      outcome: what it would cost.
      axes: what the decision would choose, see `Decision.axes`; None if there is no such plan.
      also_changed: names of the other decisions that would change with it.
    """

    outcome: Outcome
    axes: dict[str, str] | None
    also_changed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionExplanation:
    """Why one decision is what it is.

    Attributes:
      decision: what was decided.
      layout: of an input, its spec, else `""`.
      step_s: of the plan; of a stage, its own seconds per step.
      cost: of the choice, by term.
      num_choices: strategies that the method allows it.
      binding: `memory`, `method`, `pin` or `nothing`: what keeps it from choosing what would be
        fastest without.
      unbound_axes: what it would choose with unlimited memory.
      runner_up: the best alternative.
      sensitivity: of the plan.
    """

    decision: Decision
    layout: str
    step_s: float
    cost: ChoiceCost
    num_choices: int
    binding: str
    unbound_axes: dict[str, str]
    runner_up: RunnerUp
    sensitivity: Sensitivity


def explain_decision(variants: Variants, name: str, layout: str = "") -> DecisionExplanation:
    """Why a decision is what it is; solves the step again a few times.

    Args:
      variants: of the step or stage.
      name: of the decision.
      layout: of an input, to be shown.
    """
    decision = variants.decision(name)
    unbound = variants.solve(budget_bytes=UNLIMITED_BYTES)
    unbound_axes = _axes_in(unbound, name)
    choices = variants.num_choices(name)
    again = variants.solve()
    if name in map(variants.decision_of_input, variants.plan.pins):
        binding = PIN
    elif choices <= 1:
        binding = METHOD
    elif unbound_axes != _axes_in(again, name) and _faster(unbound, again):
        binding = MEMORY
    else:
        binding = NOTHING
    return DecisionExplanation(
        decision=decision, layout=layout, step_s=variants.plan.predicted.step_s,
        cost=variants.cost(name), num_choices=choices, binding=binding,
        unbound_axes=unbound_axes, runner_up=_runner_up(variants, name),
        sensitivity=sensitivity(variants),
    )  # fmt: skip


def sensitivity(variants: Variants) -> Sensitivity:
    """What other memory and other links would do to a step or stage."""
    plan = variants.plan
    unlimited = variants.solve(budget_bytes=UNLIMITED_BYTES)
    more = variants.solve(budget_bytes=plan.memory_budget_bytes + MORE_MEMORY_BYTES)
    faster = variants.solve(cluster=faster_links(plan.cluster, MORE_BANDWIDTH))
    return Sensitivity(
        binding=MEMORY if _faster(unlimited, variants.solve()) else NOTHING,
        unlimited_memory=_outcome(unlimited),
        more_memory=_outcome(more), more_bandwidth=_outcome(faster),
    )  # fmt: skip


def price_baselines(
    call: StepArgs, cluster: Cluster, budget_bytes: float, num_microbatches: int,
    *, table: RuleTable, progress: Progress | None = None,
) -> tuple[Baseline, ...]:  # fmt: skip
    """What plain data parallel, ZeRO-1, FSDP and a Megatron grid would cost.

    The data-parallel recipes take the fewest microbatches that fit. The grids, tensor parallel
    within hosts and data parallel or pipelined between them, take as many as given. The last is
    what a search without stages finds.

    Args:
      call: the step.
      cluster: the hardware.
      budget_bytes: per device.
      num_microbatches: of the grids.
      table: sharding rules found so far.
      progress: called with what is being done and the fraction done.
    """
    report = progress or (lambda what, done: None)
    tp, dp = cluster.devices_per_host, cluster.num_hosts
    recipes: list[tuple[str, Method]] = [
        ("data parallel", DataParallel(memory_budget_bytes=budget_bytes)),
        ("ZeRO-1", Zero1Parallel(memory_budget_bytes=budget_bytes)),
        ("FSDP (ZeRO-3)", Zero3Parallel(memory_budget_bytes=budget_bytes)),
        (
            f"Megatron, dp={dp}, tp={tp}",
            ThreeDParallel(
                dp=dp, tp=tp, pp=1, num_microbatches=num_microbatches,
                memory_budget_bytes=budget_bytes,
            ),
        ),
        ("searched, one mesh", AutoParallel(memory_budget_bytes=budget_bytes)),
    ]  # fmt: skip
    if dp > 1 and num_microbatches > 1:
        staged = ThreeDParallel(
            dp=1, tp=tp, pp=dp, num_microbatches=num_microbatches, memory_budget_bytes=budget_bytes
        )
        recipes.insert(4, (f"Megatron, tp={tp}, pp={dp}", staged))
    found = []
    for i, (name, method) in enumerate(recipes):
        report(f"planning {name}", i / len(recipes))
        found.append(_baseline(name, call, method, cluster, table))
    return tuple(found)


def _baseline(
    name: str, call: StepArgs, method: Method, cluster: Cluster, table: RuleTable
) -> Baseline:
    try:
        if isinstance(method, ThreeDParallel):
            staged = plan_pipeline(call, method, cluster, table=table).plan
            outcome = Outcome(
                step_s=staged.predicted.step_s, peak_bytes=staged.predicted.peak_bytes
            )
            shape = format_axes(staged.stages[0].plan.mesh.axes)
            pipeline = f", {len(staged.stages)} stages" if method.pp > 1 else ""
            layout = f"{shape}{pipeline}, {_microbatches(staged.num_microbatches)}"
        else:
            plan = plan_step(call, method, cluster, table=table).plan
            outcome = _outcome(plan)
            layout = f"{format_axes(plan.mesh.axes)}, {_microbatches(plan.num_microbatches)}"
    except (InfeasibleError, SolverTimeoutError, PlanError, StepError) as error:
        return Baseline(name=name, method=method.label, layout="", outcome=_failed(error))
    return Baseline(name=name, method=method.label, layout=layout, outcome=outcome)


def _microbatches(count: int) -> str:
    return f"{count} microbatch{'es' * (count > 1)}"


def _runner_up(variants: Variants, name: str) -> RunnerUp:
    try:
        plan = variants.solve(without=name)
    except (InfeasibleError, SolverTimeoutError) as error:
        return RunnerUp(outcome=_failed(error), axes=None, also_changed=())
    before = {d.name: dict(d.axes) for d in variants.records}
    changed = [d.name for d in plan.decisions if dict(d.axes) != before.get(d.name)]
    return RunnerUp(
        outcome=_outcome(plan), axes=_axes_in(plan, name),
        also_changed=tuple(each for each in changed if each != name),
    )  # fmt: skip


def _axes_in(plan: Plan, name: str) -> dict[str, str]:
    return dict(next(d.axes for d in plan.decisions if d.name == name))


def _outcome(plan: Plan) -> Outcome:
    return Outcome(step_s=plan.predicted.step_s, peak_bytes=plan.predicted.peak_bytes)


def _failed(error: AlpaLiteError) -> Outcome:
    return Outcome(step_s=None, peak_bytes=None, reason=str(error))


def _faster(plan: Plan, other: Plan) -> bool:
    return plan.predicted.step_s < other.predicted.step_s * (1 - _CLOSE)
