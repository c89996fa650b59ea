"""The whole compile of a pipeline, as a straight run of named steps.

    trace               function, shapes     -> LayeredStep     stages.source, stages.layers
    specify             method               -> PipelineSpec    stages.given_spec, stages.search,
                                                                stages.scan_search
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
from alpa_lite.passes.stages.realise import PlannedPipeline as PlannedPipeline
from alpa_lite.passes.stages.realise import realise
from alpa_lite.passes.stages.realise import restore_pipeline as restore_pipeline
from alpa_lite.passes.stages.scan_search import scan_candidates, scan_length
from alpa_lite.passes.stages.source import layer_step


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
        length = scan_length(call, table)
        if length > 1:
            found = _search_scan(call, method, cluster, table, length, report)
        else:
            found = _search_layers(call, method, cluster, table, report)
    else:
        raise TypeError(f"not a pipeline method: {method!r}")
    report("done", 1.0)
    return replace(found, plan=replace(found.plan, wall_s=time.monotonic() - started))


def _search_layers(
    call: StepArgs, method: PipeshardParallel, cluster: Cluster, table: RuleTable, report: Progress
) -> PlannedPipeline:
    """The best pipeline over layers that stand side by side."""
    from alpa_lite.passes.stages.search import search_pipeline

    found = search_pipeline(call, method, cluster, table, report)
    spec = found.proposals[0].spec
    source = layer_step(call, spec.num_microbatches, method.layer_num)
    pipeline = realise(call.name, source, spec, method, cluster, table, report)
    plan = replace(
        pipeline.plan, gap=found.gap, alternatives=found.alternatives,
        notes=(*pipeline.plan.notes, *found.notes),
    )  # fmt: skip
    return replace(pipeline, plan=plan)


def _search_scan(
    call: StepArgs, method: PipeshardParallel, cluster: Cluster, table: RuleTable, length: int,
    report: Progress,
) -> PlannedPipeline:  # fmt: skip
    """The best pipeline over a scan of layers, of all that are worth planning."""
    deadline = time.monotonic() + method.time_limit_s
    best: PlannedPipeline | None = None
    failure: Exception | None = None
    tried: list[PipelineAlternative] = []
    fits: set[tuple[int, int]] = set()
    latest_s: dict[int, float] = {}
    settled: set[int] = set()  # numbers of stages for which more microbatches only cost time
    for spec in scan_candidates(call, method, cluster, length):
        shape = len(spec.stages), spec.num_microbatches
        late = best is not None and time.monotonic() > deadline
        if shape in fits or shape[0] in settled or late:
            continue
        what = (
            f"{shape[0]} stages of {spec.stages[0].submesh}, {shape[1]} microbatches, remat "
            f"{spec.stages[0].remat}"
        )
        report(
            f"planning {what}", min(0.99, 1 - (deadline - time.monotonic()) / method.time_limit_s)
        )
        step_s, reason = None, ""
        try:
            source = layer_step(call, shape[1], method.layer_num, shape[0], table)
            if shape[0] == 1 and source.graph.num_layers > 1:
                layers = tuple(range(source.graph.num_layers))
                spec = replace(spec, stages=(replace(spec.stages[0], layers=layers),))
            found = realise(call.name, source, spec, method, cluster, table, _silent)
            step_s = found.plan.predicted.step_s
            fits.add(shape)
            if step_s > latest_s.get(shape[0], step_s):
                settled.add(shape[0])
            latest_s[shape[0]] = step_s
            if best is None or step_s < best.plan.predicted.step_s:
                best = found
        except (InfeasibleError, SolverTimeoutError) as error:
            failure, reason = failure or error, str(error)
        tried.append(PipelineAlternative(description=what, step_s=step_s, reason=reason))
    if best is None:
        raise failure or StepError(
            f"no pipeline over the scan of {length} layers: the batch size must be divisible by "
            "the number of microbatches, and equal submeshes must fill the cluster. Give "
            "num_microbatches."
        )
    return replace(best, plan=replace(best.plan, alternatives=tuple(tried)))


def _silent(what: str, done: float) -> None:
    """A progress report that nobody reads."""
