"""Why a pipeline plan is what it is: `explain_stage`, `pipeline_sensitivity`.

In: a restored `PlannedPipeline`. Out: figures, each of a pipeline that was planned and simulated
again with one thing changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError, PlanError, SolverTimeoutError, StepError
from alpa_lite.passes.explain import (
    MEMORY,
    MORE_BANDWIDTH,
    MORE_MEMORY_BYTES,
    NOTHING,
    Outcome,
    Sensitivity,
)
from alpa_lite.passes.meshes import candidate_meshes
from alpa_lite.passes.pipeline import Progress
from alpa_lite.passes.pipeline_methods import REMAT_POLICIES, PipelineMethod, ThreeDParallel
from alpa_lite.passes.pipeline_plan import PipelinePlan, PlannedStage
from alpa_lite.passes.pipeline_timeline import plan_timeline
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.plan_stage import subcluster
from alpa_lite.passes.stages.realise import PlannedPipeline, realise, spec_of
from alpa_lite.passes.stages.spec import PipelineSpec
from alpa_lite.passes.stages.stage_planner import StageCache
from alpa_lite.passes.variants import UNLIMITED_BYTES, faster_links

_CLOSE = 0.01
"""Relative distance of step times that counts as none: stages are solved to within half of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChange:
    """A pipeline in which one stage is different.

    Attributes:
      change: what is different.
      outcome: what it would cost.
    """

    change: str
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class StageExplanation:
    """Why one stage is what it is.

    Attributes:
      index: of the stage.
      stage: as planned.
      step_s: of the whole pipeline.
      busy_s: seconds per step that its mesh spends in tasks.
      bubble_s: seconds per step that its mesh waits, from the start of the step to the last task.
      slowest: whether no stage needs longer for a microbatch.
      budget_bytes: that it may use per device.
      changes: everything that was tried, the best first.
    """

    index: int
    stage: PlannedStage
    step_s: float
    busy_s: float
    bubble_s: float
    slowest: bool
    budget_bytes: float
    changes: tuple[StageChange, ...]

    @property
    def runner_up(self) -> StageChange | None:
        """The best of what was tried; None if nothing fits."""
        return next((c for c in self.changes if c.outcome.step_s is not None), None)


@dataclass(frozen=True, eq=False)
class PipelineVariants:
    """A restored pipeline, ready to be planned again.

    Attributes:
      pipeline: as it is.
      method: what it was planned with.
      table: sharding rules found so far.
      known: stages planned so far, with the plan's memory and cluster.
    """

    pipeline: PlannedPipeline
    method: PipelineMethod
    table: RuleTable
    known: StageCache

    @property
    def plan(self) -> PipelinePlan:
        """The plan."""
        return self.pipeline.plan

    def outcome(
        self, spec: PipelineSpec | None = None, *, budget_bytes: float | None = None,
        cluster: Cluster | None = None,
    ) -> Outcome:  # fmt: skip
        """What another pipeline of the same step would cost; the same one by default."""
        other = budget_bytes is not None or cluster is not None
        method = replace(
            self.method, memory_budget_bytes=budget_bytes or self.plan.memory_budget_bytes
        )
        try:
            found = realise(
                self.plan.name, self.pipeline.source, spec or spec_of(self.plan), method,
                cluster or self.plan.cluster, self.table, lambda what, done: None,
                None if other else self.known,
            ).plan  # fmt: skip
        except (InfeasibleError, SolverTimeoutError, PlanError, StepError) as error:
            return Outcome(step_s=None, peak_bytes=None, reason=str(error))
        return Outcome(step_s=found.predicted.step_s, peak_bytes=found.predicted.peak_bytes)


def pipeline_sensitivity(variants: PipelineVariants) -> Sensitivity:
    """What other memory and other links would do, with the same stages."""
    plan = variants.plan
    unlimited = variants.outcome(budget_bytes=UNLIMITED_BYTES)
    assert unlimited.step_s is not None
    binds = unlimited.step_s < plan.predicted.step_s * (1 - _CLOSE)
    return Sensitivity(
        binding=MEMORY if binds else NOTHING,
        unlimited_memory=unlimited,
        more_memory=variants.outcome(budget_bytes=plan.memory_budget_bytes + MORE_MEMORY_BYTES),
        more_bandwidth=variants.outcome(cluster=faster_links(plan.cluster, MORE_BANDWIDTH)),
    )


def explain_stage(
    variants: PipelineVariants, index: int, progress: Progress | None = None
) -> StageExplanation:
    """Why a stage is what it is: plans the pipeline again with it changed in every small way.

    Tried are the other logical meshes of its devices, the other rematerialisation policies, and one
    layer more or less at either end. In a pipeline whose grid was prescribed the mesh stays.

    Args:
      variants: of the pipeline.
      index: of the stage.
      progress: called with what is being done and the fraction done.
    """
    report = progress or (lambda what, done: None)
    plan = variants.plan
    stage = plan.stages[index]
    changes = list(_changes(variants, index))
    found = []
    for i, (change, spec) in enumerate(changes):
        report(f"planning with {change}", i / len(changes))
        found.append(StageChange(change=change, outcome=variants.outcome(spec)))
    found.sort(key=lambda c: (c.outcome.step_s is None, c.outcome.step_s or 0.0))
    timeline = plan_timeline(plan)
    ends = timeline.end_s[stage.mesh]
    busy_s = timeline.busy_s[stage.mesh]
    sharing = sum(s.mesh == stage.mesh for s in plan.stages)
    return StageExplanation(
        index=index, stage=stage, step_s=plan.predicted.step_s, busy_s=busy_s,
        bubble_s=max(0.0, (ends[-1] if ends else 0.0) - busy_s),
        slowest=all(_microbatch_s(stage) >= _microbatch_s(s) for s in plan.stages),
        budget_bytes=plan.memory_budget_bytes / sharing, changes=tuple(found),
    )  # fmt: skip


def _changes(variants: PipelineVariants, index: int) -> Iterator[tuple[str, PipelineSpec]]:
    """(what is different, pipeline)."""
    spec = spec_of(variants.plan)
    at = index % len(spec.stages)
    own = spec.stages[at]
    if not isinstance(variants.method, ThreeDParallel):
        part = subcluster(
            variants.plan.cluster, own.submesh.num_hosts, own.submesh.devices_per_host
        )
        for mesh in candidate_meshes(variants.method, part):
            if mesh.shape != own.mesh_shape:
                shape = "x".join(map(str, mesh.shape))
                yield f"logical mesh {shape}", _with(spec, at, replace(own, mesh_shape=mesh.shape))
    for remat in REMAT_POLICIES:
        if remat != own.remat:
            yield f"remat {remat}", _with(spec, at, replace(own, remat=remat))
    if len(own.layers) > 1 and at > 0:
        yield f"layer {own.layers[0]} on stage {at - 1}", _moved(spec, at - 1, 1)
    if len(own.layers) > 1 and at + 1 < len(spec.stages):
        yield f"layer {own.layers[-1]} on stage {at + 1}", _moved(spec, at, -1)
    if at > 0 and len(spec.stages[at - 1].layers) > 1:
        yield f"layer {spec.stages[at - 1].layers[-1]} on stage {at}", _moved(spec, at - 1, -1)
    if at + 1 < len(spec.stages) and len(spec.stages[at + 1].layers) > 1:
        yield f"layer {spec.stages[at + 1].layers[0]} on stage {at}", _moved(spec, at, 1)


def _with(spec: PipelineSpec, at: int, stage: object) -> PipelineSpec:
    stages = list(spec.stages)
    stages[at] = stage  # type: ignore[call-overload]
    return replace(spec, stages=tuple(stages))


def _moved(spec: PipelineSpec, at: int, by: int) -> PipelineSpec:
    """The end of stage `at` moved by one layer, towards the next stage if `by` is 1."""
    first, second = spec.stages[at], spec.stages[at + 1]
    layers = (*first.layers, *second.layers)
    cut = len(first.layers) + by
    spec = _with(spec, at, replace(first, layers=layers[:cut]))
    return _with(spec, at + 1, replace(second, layers=layers[cut:]))


def _microbatch_s(stage: PlannedStage) -> float:
    return stage.forward_s + stage.backward_s
