"""The whole compile of a pipeline, as a straight run of named steps.

    trace               function, shapes     -> LayeredStep     stages.source, stages.layers
    specify             method               -> PipelineSpec    stages.given_spec; searched by
                                                                stages.propose, and for a scan over
                                                                layers by stages.grid_search
    cut                 LayeredStep, spec    -> CutStep         stages.cut, stages.update
    order               spec                 -> Schedule        schedules
    place               spec, Cluster        -> Placement       inter_op.placement
    for each stage, unless one like it was planned:
      trace             CutStep              -> StageStep       stages.stage_step
      plan              StageStep, submesh   -> StagePlan       stages.plan_stage
    simulate            times of all stages  -> Timeline        schedules.simulate
    report                                   -> PipelinePlan    stages.realise

Everything after the second line is `stages.realise`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError, SolverTimeoutError, StepError
from alpa_lite.passes.pipeline import Progress, StepArgs, paused_garbage_collection
from alpa_lite.passes.pipeline_methods import (
    REMAT_POLICIES,
    ManualPipeline,
    PipelineMethod,
    PipeshardParallel,
    ThreeDParallel,
)
from alpa_lite.passes.pipeline_plan import PipelineAlternative
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.schedules import make_schedule, simulate
from alpa_lite.passes.stages.given_spec import grid_spec, manual_spec
from alpa_lite.passes.stages.grid_search import (
    SEARCHED_SCHEDULES,
    grid_candidates,
    scan_length,
)
from alpa_lite.passes.stages.propose import Proposal, StageSearch
from alpa_lite.passes.stages.realise import PlannedPipeline as PlannedPipeline
from alpa_lite.passes.stages.realise import realise, spec_of
from alpa_lite.passes.stages.realise import restore_pipeline as restore_pipeline
from alpa_lite.passes.stages.source import LayeredStep, layer_step, trace_step
from alpa_lite.passes.stages.spec import PipelineSpec
from alpa_lite.passes.stages.stage_planner import StageCache

# Shares of the memory budget that proposals may use: stages may need a little more than their
# layers one by one.
_MEMORY_SHARES = (0.98, 0.93, 0.85, 0.75, 0.6)

# Another proposal or schedule is planned if it looks better by this much than what was planned.
_WORTH = 0.99


def plan_pipeline(
    call: StepArgs, method: PipelineMethod, cluster: Cluster, *, table: RuleTable,
    progress: Progress | None = None,
) -> PlannedPipeline:  # fmt: skip
    """Plan one step as a pipeline on one cluster.

    Raises:
      InfeasibleError: a stage does not fit; says which, and how many GiB short.
      StepError: the step cannot be cut into stages or microbatches.
      PlanError: the method asks for more devices than there are, or for other layers than found.
    """
    with paused_garbage_collection():
        return _plan_pipeline(call, method, cluster, table, progress or _silent)


def _plan_pipeline(
    call: StepArgs, method: PipelineMethod, cluster: Cluster, table: RuleTable, report: Progress
) -> PlannedPipeline:
    started = time.monotonic()
    report(f"tracing {call.name}", 0.0)
    if isinstance(method, ThreeDParallel):
        num_stages = method.pp * method.num_virtual
        source = layer_step(call, int(method.num_microbatches), method.layer_num, num_stages, table)
        spec = grid_spec(method, source, cluster)
        found = realise(call.name, source, spec, method, cluster, table, report)
    elif isinstance(method, ManualPipeline):
        num_stages = len(method.layers)
        source = layer_step(call, int(method.num_microbatches), method.layer_num, num_stages, table)
        found = realise(call.name, source, manual_spec(method), method, cluster, table, report)
    elif isinstance(method, PipeshardParallel):
        found = _search(call, method, cluster, table, report)
    else:
        raise TypeError(f"not a pipeline method: {method!r}")
    report("done", 1.0)
    return replace(found, plan=replace(found.plan, wall_s=time.monotonic() - started))


def _search(
    call: StepArgs, method: PipeshardParallel, cluster: Cluster, table: RuleTable, report: Progress
) -> PlannedPipeline:
    """The best pipeline of those worth planning.

    Ctrl-C and the end of the time budget return the best so far.
    """
    planner = _Planner(call, method, cluster, table, report)
    whole = trace_step(call, 1)
    length = scan_length(call, whole, table)
    if length:
        return planner.best_of(lambda: planner.try_equal(length))
    search = StageSearch(call, whole, method, cluster, table, report)
    found = planner.best_of(lambda: planner.try_proposals(search))
    notes = (*found.plan.notes, *search.notes)
    return replace(found, plan=replace(found.plan, gap=search.gap, notes=notes))


class _Planner:
    """Plans pipelines and remembers what they were worth."""

    def __init__(
        self, call: StepArgs, method: PipeshardParallel, cluster: Cluster, table: RuleTable,
        report: Progress,
    ) -> None:  # fmt: skip
        self.call, self.method, self.cluster, self.table = call, method, cluster, table
        self.report = report
        self.started = time.monotonic()
        self.best: PlannedPipeline | None = None
        self.failure: Exception | None = None
        self.tried: list[PipelineAlternative] = []
        self.known = StageCache()

    @property
    def spent(self) -> float:
        """The fraction of the time budget that is over."""
        return (time.monotonic() - self.started) / self.method.time_limit_s

    def best_of(self, run: Callable[[], None]) -> PlannedPipeline:
        """The best of the pipelines that `run` plans."""
        try:
            run()
        except KeyboardInterrupt:
            if self.best is None:
                raise
        if self.best is None:
            raise self.failure or StepError(
                "no pipeline: the batch size must be divisible by the number of microbatches, and "
                "equal submeshes must fill the cluster. Give num_microbatches."
            )
        plan = replace(self.best.plan, alternatives=tuple(self.tried))
        return replace(self.best, plan=plan)

    def try_proposals(self, search: StageSearch) -> None:
        """Plan what the search for stages proposes, then other schedules of the best."""
        search.run()
        for share in _MEMORY_SHARES:
            proposals = search.proposals(share)
            if proposals and not self.is_worth_planning(proposals[0]):
                break  # with less memory they only get slower
            seen = set()  # pipelines that differ in a layer or two need not both be planned
            for proposal in proposals:
                submeshes = tuple(stage.submesh for stage in proposal.spec.stages)
                if submeshes not in seen and self.is_worth_planning(proposal):
                    self.plan(proposal.source, proposal.spec)
                seen.add(submeshes)
        if self.best is None:
            source, spec = search.smallest()
            self.plan(source, spec)
        self.try_schedules()
        several = self.best is not None and len(self.best.plan.stages) > 1
        free = self.method.schedule == self.method.num_stages == "auto"
        if self.best is not None and several and free and self.spent < 1:
            virtual = search.interleaved(self.best.plan.num_microbatches)
            if virtual is not None and virtual.estimate_s < self.best.plan.predicted.step_s:
                self.plan(virtual.source, virtual.spec)

    def is_worth_planning(self, proposal: Proposal) -> bool:
        """Whether there is time for it, and it may be the best."""
        best = self.best
        return best is None or (
            self.spent < 1 and proposal.estimate_s < _WORTH * best.plan.predicted.step_s
        )

    def try_schedules(self) -> None:
        """Plan the best pipeline with other schedules that may be faster, if none is prescribed."""
        if self.best is None or self.method.schedule != "auto":
            return
        source, spec = self.best.source, spec_of(self.best.plan)
        times, others = self.best.times, SEARCHED_SCHEDULES[1:] if len(spec.stages) > 1 else ()
        for schedule in others:
            tried = replace(spec, schedule=schedule)
            tasks = make_schedule(schedule, spec.num_meshes, spec.num_microbatches)
            least_s = simulate(tasks, times).step_s
            if least_s > _WORTH * self.best.plan.predicted.step_s:
                reason = f"takes {least_s:.4g} s even if its stages are as fast"
                self.tried.append(
                    PipelineAlternative(description=str(tried), step_s=None, reason=reason)
                )
            elif self.spent < 1:
                self.plan(source, tried)

    def try_equal(self, num_layers: int) -> None:
        """Plan pipelines of equal stages of a scan over so many layers."""
        fits: set[tuple[int, int]] = set()
        latest_s: dict[int, float] = {}
        settled: set[int] = set()  # numbers of stages that more microbatches only slow down
        sources: dict[tuple[int, int], LayeredStep] = {}
        for candidate in grid_candidates(self.call, self.method, self.cluster, num_layers):
            stages, shape = candidate.num_stages, (candidate.num_stages, candidate.num_microbatches)
            late = self.best is not None and self.spent > 1
            if shape in fits or stages in settled or late:
                continue
            key = candidate.num_microbatches, stages
            if key not in sources:
                sources[key] = layer_step(
                    self.call, key[0], self.method.layer_num, stages, self.table
                )
            spec = candidate.spec(sources[key].graph.flops)
            step_s = self.plan(sources[key], spec, may_recompute=False)
            if step_s is not None:
                fits.add(shape)
                if step_s > latest_s.get(stages, step_s):
                    settled.add(stages)
                latest_s[stages] = step_s
        self.try_schedules()

    def plan(
        self, source: LayeredStep, spec: PipelineSpec, may_recompute: bool = True
    ) -> float | None:
        """Predicted seconds per step; None if it does not fit.

        Args:
          source: the step.
          spec: the pipeline.
          may_recompute: whether stages that do not fit may rematerialise more.
        """
        step_s, reason, made = None, "", None
        self.report(f"planning {spec}", min(0.99, self.spent))
        remats = REMAT_POLICIES if may_recompute and self.method.remat == "auto" else ()
        try:
            found = realise(
                self.call.name, source, spec, self.method, self.cluster, self.table, _silent,
                self.known, remats,
            )  # fmt: skip
            made, step_s = spec_of(found.plan), found.plan.predicted.step_s
            if self.best is None or step_s < self.best.plan.predicted.step_s:
                self.best = found
        except (InfeasibleError, SolverTimeoutError) as error:
            self.failure, reason = self.failure or error, str(error)
        description = str(made or spec)
        self.tried.append(
            PipelineAlternative(description=description, step_s=step_s, reason=reason)
        )
        return step_s


def _silent(what: str, done: float) -> None:
    """A progress report that nobody reads."""
