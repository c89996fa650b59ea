"""`alpa-lite explain`: why a plan, a stage, or the layout of one value is what it is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import jax
import typer

from alpa_lite.cli.configuration import Configuration
from alpa_lite.cli.exits import InputError
from alpa_lite.cli.find import find_stage, find_subjects
from alpa_lite.cli.options import JsonOption, PlanArgument, TargetOption
from alpa_lite.cli.output import Report, print_json, progress_bar
from alpa_lite.cli.target import Target
from alpa_lite.passes.explain import (
    Baseline,
    DecisionExplanation,
    Sensitivity,
    explain_decision,
    price_baselines,
    sensitivity,
)
from alpa_lite.passes.explain_pipeline import (
    PipelineVariants,
    StageExplanation,
    explain_stage,
    pipeline_sensitivity,
)
from alpa_lite.passes.explain_text import describe_decision, describe_explanation, describe_stage
from alpa_lite.passes.methods import Method
from alpa_lite.passes.pipeline import StepArgs, restore
from alpa_lite.passes.pipeline_methods import PipelineMethod
from alpa_lite.passes.pipeline_plan import PipelinePlan, load_plan
from alpa_lite.passes.pipeshard import restore_pipeline
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.plan_text import collapse_paths
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.stage_planner import StageCache
from alpa_lite.passes.variants import Variants

MOST_DECISIONS = 8
"""Names that mean more decisions than this are too vague: each costs a few solves."""


def explain(
    file: PlanArgument,
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="[PARAM|OP|STAGE]",
            help="A parameter (layers.3.mlp.up), a shell pattern, an operation (dot_general#22, "
            "as `show --json` names decisions), or `stage 0`; the whole plan if left out.",
        ),
    ] = None,
    target: TargetOption = None,
    json: JsonOption = False,
) -> None:
    """Say why a plan is what it is, in words and numbers.

    What was chosen, its seconds and bytes by term, what binds, the runner-up and what it would
    cost; of the whole plan also what plain data parallelism, FSDP and a Megatron grid would cost.
    Every number is in the plan or comes from planning again: with the choice forbidden, with
    1 GiB more memory, with links twice as fast.

    With --json the output is an object: of the whole plan with step_s, sensitivity and baselines;
    of a stage with its figures and changes; of a parameter or operation with decisions, a list.
    """
    plan = load_plan(file)
    index = None if subject is None else find_stage(subject, plan)
    subjects = [] if subject is None or index is not None else _subjects(subject, plan)
    asked = Configuration.of_plan(plan, target)
    asked.make_method()
    jax.config.update("jax_platforms", "cpu")
    with progress_bar() as report:
        report(f"tracing {plan.name}", 0.0)
        again = PlanAgain.of(plan, asked)
        if subject is None:
            text, data = _whole(again, report)
        elif index is not None:
            stage = explain_stage(again.pipeline(), index, report)
            text, data = describe_stage(stage), stage_json(stage)
        else:
            text, data = _decisions(again, subjects, report)
    if json:
        print_json(data)
    else:
        print(text)


def step_args(target: Target) -> StepArgs:
    """The step as `parallelize` passes it on."""
    names = tuple(inspect.signature(target.step).parameters)[:2]
    return StepArgs(
        fun=target.step, args=(target.state, target.batch), arg_names=names, batch_argnums=(1,),
        donate_argnums=(0,), name=target.name,
    )  # fmt: skip


def stage_json(found: StageExplanation) -> dict[str, Any]:
    """Plain data; of the stage's own plan only what `explain` is about."""
    data = {
        name: getattr(found.stage, name)
        for name in ("layers", "mesh", "remat", "in_flight", "forward_s", "backward_s",
                     "per_step_s", "peak_bytes", "stash_bytes")
    }  # fmt: skip
    own = ("index", "step_s", "busy_s", "bubble_s", "slowest", "budget_bytes")
    return {
        **{name: getattr(found, name) for name in own},
        "stage": data | {"logical_mesh": dict(found.stage.plan.mesh.axes)},
        "changes": [asdict(change) for change in found.changes],
    }


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One decision to explain.

    Attributes:
      stage: where it is; None in a plan for one mesh.
      paths: inputs that it lays out; empty for an operation.
      name: of the decision, if it is about an operation.
    """

    stage: int | None
    paths: tuple[str, ...]
    name: str | None


class PlanAgain:
    """A plan together with its step, traced when first needed."""

    def __init__(self, plan: Plan | PipelinePlan, call: StepArgs, method: Method) -> None:
        self.plan, self.call, self.method = plan, call, method
        self.table = RuleTable()
        self._pipeline: PipelineVariants | None = None
        self._variants: dict[int | None, Variants] = {}

    @classmethod
    def of(cls, plan: Plan | PipelinePlan, asked: Configuration) -> PlanAgain:
        """From what a plan was made from.

        Raises:
          InputError: there is no such target, or the options mean nothing.
        """
        _, found = asked.load()
        return cls(plan, step_args(found), asked.make_method())

    def pipeline(self) -> PipelineVariants:
        """Of a plan with stages."""
        if self._pipeline is None:
            plan = self.plan
            assert isinstance(plan, PipelinePlan)
            method = self.method if isinstance(self.method, PipelineMethod) else PipelineMethod()
            restored = restore_pipeline(plan, self.call, method, table=self.table)
            self._pipeline = PipelineVariants(restored, method, self.table, StageCache())
        return self._pipeline

    def variants(self, stage: int | None) -> Variants:
        """Of a plan for one mesh, or of one stage."""
        if stage not in self._variants:
            if stage is None:
                assert isinstance(self.plan, Plan)
                planned = restore(self.plan, self.call, self.method, table=self.table)
                self._variants[None] = Variants.of(planned, self.method)
            else:
                pipeline = self.pipeline()
                in_flight = pipeline.plan.stages[stage].in_flight
                planned = pipeline.pipeline.planned[stage]
                self._variants[stage] = Variants.of(planned, pipeline.method, in_flight)
        return self._variants[stage]


def explain_whole(again: PlanAgain, report: Report) -> tuple[Sensitivity, tuple[Baseline, ...]]:
    """What binds a plan, and what recipes would cost."""
    plan = again.plan
    report("solving with other memory and links", 0.1)
    if isinstance(plan, Plan):
        found = sensitivity(again.variants(None))
    else:
        found = pipeline_sensitivity(again.pipeline())
    baselines = price_baselines(
        again.call, plan.cluster, plan.memory_budget_bytes, plan.num_microbatches,
        table=again.table, progress=report,
    )  # fmt: skip
    return found, baselines


def _whole(again: PlanAgain, report: Report) -> tuple[str, dict[str, Any]]:
    found, baselines = explain_whole(again, report)
    data = {
        "step_s": again.plan.predicted.step_s,
        "sensitivity": asdict(found),
        "baselines": [asdict(each) for each in baselines],
    }
    return describe_explanation(again.plan, found, baselines), data


def _decisions(
    again: PlanAgain, subjects: Sequence[Subject], report: Report
) -> tuple[str, dict[str, Any]]:
    wanted: dict[tuple[int | None, str], list[str]] = {}
    fixed: list[str] = []
    for each in subjects:
        variants = again.variants(each.stage)
        if each.name is not None:
            wanted.setdefault((each.stage, each.name), [])
        for path in each.paths:
            name = variants.decision_of_input(path)
            if name is None:
                fixed.append(path)
            else:
                wanted.setdefault((each.stage, name), []).append(path)
    if len(wanted) > MOST_DECISIONS:
        names = ", ".join(name for _, name in list(wanted)[:MOST_DECISIONS])
        raise InputError(f"that means {len(wanted)} decisions; name fewer: {names}, ...")
    texts, data = [], []
    for i, ((stage, name), paths) in enumerate(wanted.items()):
        report(f"solving without the choice of {name}", i / len(wanted))
        variants = again.variants(stage)
        layout = str(variants.plan.inputs[paths[0]]) if paths else ""
        found = explain_decision(variants, name, layout)
        texts.append(describe_decision(found, _title(found, paths, stage)))
        data.append({**asdict(found), "stage": stage, "inputs": paths})
    if fixed:
        shown = ", ".join(collapse_paths(fixed).values())
        texts.append(f"{shown}: replicated, as nothing there can be split.")
    return "\n\n".join(texts), {"decisions": data, "without_choice": fixed}


def _title(found: DecisionExplanation, paths: Sequence[str], stage: int | None) -> str:
    name = found.decision.name
    what = ", ".join(collapse_paths(list(paths)).values()) or name
    like = f", which decides like {name}" if paths and name not in paths else ""
    return f"{what}{like}" + ("" if stage is None else f", on stage {stage}")


def _subjects(text: str, plan: Plan | PipelinePlan) -> list[Subject]:
    """What a user means, in the plan or in every stage that has it.

    Raises:
      InputError: nothing has that name.
    """
    parts: list[tuple[int | None, Plan]] = [(None, plan)] if isinstance(plan, Plan) else [
        (i, stage.plan) for i, stage in enumerate(plan.stages)
    ]  # fmt: skip
    found, problem = [], None
    for stage, part in parts:
        try:
            paths, names = find_subjects(text, part)
        except InputError as error:
            problem = problem or error
            continue
        if paths:
            found.append(Subject(stage=stage, paths=tuple(paths), name=None))
        found += [Subject(stage=stage, paths=(), name=name) for name in names]
    # What is an input somewhere is meant as that everywhere.
    if any(each.paths for each in found):
        found = [each for each in found if each.paths]
    if not found:
        assert problem is not None
        raise problem
    return found
