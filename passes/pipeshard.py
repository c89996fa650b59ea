"""The whole compile of a pipeline, as a straight run of named steps.

    trace               function, shapes     -> LayeredStep     stages.source, stages.layers
    specify             method               -> PipelineSpec    stages.given_spec; searched over
                                                                stages.grid_search
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
from dataclasses import replace

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError, SolverTimeoutError, StepError
from alpa_lite.passes.pipeline import Progress, StepArgs
from alpa_lite.passes.pipeline_methods import (
    ManualPipeline,
    PipelineMethod,
    PipeshardParallel,
    ThreeDParallel,
)
from alpa_lite.passes.pipeline_plan import PipelineAlternative
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.given_spec import grid_spec, manual_spec
from alpa_lite.passes.stages.grid_search import (
    SEARCHED_SCHEDULES,
    GridCandidate,
    grid_candidates,
    scan_length,
)
from alpa_lite.passes.stages.realise import PlannedPipeline as PlannedPipeline
from alpa_lite.passes.stages.realise import realise
from alpa_lite.passes.stages.realise import restore_pipeline as restore_pipeline
from alpa_lite.passes.stages.source import LayeredStep, layer_step


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
    report = progress or (lambda what, done: None)
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
    """The best pipeline of equal submeshes, of all that are worth planning.

    Ctrl-C and the end of the time budget return the best so far.
    """
    length = scan_length(call, table)
    num_layers = length or layer_step(call, 1, method.layer_num).graph.num_layers
    search = _GridSearch(call, method, cluster, table, length > 0, report)
    try:
        for candidate in grid_candidates(call, method, cluster, num_layers, length > 0):
            search.consider(candidate)
        search.other_schedules()
    except KeyboardInterrupt:
        if search.best is None:
            raise
    if search.best is None:
        raise search.failure or StepError(
            f"no pipeline over {num_layers} layers: the batch size must be divisible by the number "
            "of microbatches, and equal submeshes must fill the cluster. Give num_microbatches."
        )
    plan = replace(search.best.plan, alternatives=tuple(search.tried))
    return replace(search.best, plan=plan)


class _GridSearch:
    """Plans candidates and remembers what they were worth."""

    def __init__(
        self, call: StepArgs, method: PipeshardParallel, cluster: Cluster, table: RuleTable,
        is_scan: bool, report: Progress,
    ) -> None:  # fmt: skip
        self.call, self.method, self.cluster, self.table = call, method, cluster, table
        self.is_scan, self.report = is_scan, report
        self.started = time.monotonic()
        self.best: PlannedPipeline | None = None
        self.chosen: GridCandidate | None = None
        self.failure: Exception | None = None
        self.tried: list[PipelineAlternative] = []
        self.fits: set[tuple[int, int]] = set()
        self.latest_s: dict[int, float] = {}
        self.settled: set[int] = set()  # numbers of stages that more microbatches only slow down
        self.sources: dict[tuple[int, int], LayeredStep] = {}

    def consider(self, candidate: GridCandidate) -> None:
        """Plan a candidate, unless what was planned before says that it cannot be the best."""
        stages, shape = candidate.num_stages, (candidate.num_stages, candidate.num_microbatches)
        spent = (time.monotonic() - self.started) / self.method.time_limit_s
        if shape in self.fits or stages in self.settled or (self.best is not None and spent > 1):
            return
        self.report(f"planning {candidate}", min(0.99, spent))
        step_s = self.plan(candidate)
        if step_s is not None:
            self.fits.add(shape)
            if step_s > self.latest_s.get(stages, step_s):
                self.settled.add(stages)
            self.latest_s[stages] = step_s

    def other_schedules(self) -> None:
        """Try other orders of the best candidate's tasks."""
        chosen = self.chosen
        if chosen is None or chosen.num_stages == 1 or self.method.schedule != "auto":
            return
        for schedule in SEARCHED_SCHEDULES[1:]:
            if time.monotonic() - self.started < self.method.time_limit_s:
                self.plan(replace(chosen, schedule=schedule))

    def plan(self, candidate: GridCandidate) -> float | None:
        """Predicted seconds per step; None if it does not fit."""
        step_s, reason = None, ""
        try:
            spec = candidate.spec(self.source(candidate).graph.flops)
            found = realise(
                self.call.name, self.source(candidate), spec, self.method, self.cluster,
                self.table, _silent,
            )  # fmt: skip
            step_s = found.plan.predicted.step_s
            if self.best is None or step_s < self.best.plan.predicted.step_s:
                self.best, self.chosen = found, candidate
        except (InfeasibleError, SolverTimeoutError) as error:
            self.failure, reason = self.failure or error, str(error)
        self.tried.append(
            PipelineAlternative(description=str(candidate), step_s=step_s, reason=reason)
        )
        return step_s

    def source(self, candidate: GridCandidate) -> LayeredStep:
        """The step at a candidate's microbatch size, with a scan over layers in its pieces."""
        pieces = candidate.num_stages if self.is_scan else 1
        key = candidate.num_microbatches, pieces
        if key not in self.sources:
            self.sources[key] = layer_step(
                self.call, key[0], self.method.layer_num, pieces, self.table
            )
        return self.sources[key]


def _silent(what: str, done: float) -> None:
    """A progress report that nobody reads."""
