"""A pipeline of which every stage is planned, simulated and written down: `realise`.

In: a `LayeredStep` and a `PipelineSpec`, or a loaded `PipelinePlan`. Out: a `PlannedPipeline`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError, PlanError
from alpa_lite.passes.inter_op import Placement, Submesh, place_submeshes
from alpa_lite.passes.pipeline import PlannedStep, Progress, StepArgs
from alpa_lite.passes.pipeline_methods import (
    PipelineMethod,
)
from alpa_lite.passes.pipeline_plan import (
    PipelinePlan,
    PipelinePredicted,
    PlannedStage,
)
from alpa_lite.passes.report import versions
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.schedules import (
    Schedule,
    TaskTimes,
    Timeline,
    make_schedule,
    simulate,
)
from alpa_lite.passes.stages.source import CutStep, LayeredStep, layer_step
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec
from alpa_lite.passes.stages.stage_planner import LaidStage, StageCache, StagePlanner
from alpa_lite.passes.stages.stage_step import StageStep
from alpa_lite.passes.stages.transfer_cost import link_bytes, transfer_s


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PlannedPipeline:
    """A pipeline plan together with what the runtime needs to run it.

    Attributes:
      plan: the reviewable value.
      source: the step.
      cut: the step in stages.
      schedule: the tasks of every mesh.
      steps: per stage, ports and graph.
      planned: per stage, plan and layouts.
      timeline: the simulated step; its order of tasks is the one that is run.
      times: of its tasks and transfers.
    """

    plan: PipelinePlan
    source: LayeredStep
    cut: CutStep
    schedule: Schedule
    steps: tuple[StageStep, ...]
    planned: tuple[PlannedStep, ...]
    timeline: Timeline
    times: TaskTimes


def realise(
    name: str, source: LayeredStep, spec: PipelineSpec, method: PipelineMethod, cluster: Cluster,
    table: RuleTable, report: Progress, known: StageCache | None = None,
    remats: Sequence[str] = (),
) -> PlannedPipeline:  # fmt: skip
    """Plan every stage of a pipeline, and simulate it.

    Args:
      name: of the step.
      source: the step at `spec.num_microbatches`.
      spec: the pipeline.
      method: restrictions and options of the layouts.
      cluster: the hardware.
      table: sharding rules found so far.
      report: called with what is being done and the fraction done.
      known: stages planned for other pipelines of the same step and method; grows.
      remats: policies, the one that keeps most first; a stage that does not fit gets the next one.

    Raises:
      InfeasibleError: a stage does not fit whatever is computed again.
    """
    known = known or StageCache()
    schedule, cut, meshes = lay_out(source, spec, cluster, known)
    layouts = StagePlanner(source, spec, schedule, cut, meshes, method, cluster, table, known)
    stages: dict[int, LaidStage] = {}
    # The best layouts with few microbatches in flight are the best with more, if they fit.
    left = sorted(range(len(cut.cuts)), key=layouts.in_flight.__getitem__)
    while left:
        index = layouts.next_of(left)
        report(f"planning stage {index} of {len(cut.cuts)}", len(stages) / len(cut.cuts))
        try:
            stages[index] = layouts.plan(index, name)
            left.remove(index)
        except InfeasibleError:
            position = index % len(spec.stages)
            remat = _next_remat(layouts.spec.stages[position].remat, remats)
            if remat is None:
                raise
            layouts.spec = _with_remat(layouts.spec, position, remat)
            left += [i for i in stages if i % len(spec.stages) == position]
            stages = {i: laid for i, laid in stages.items() if i not in left}
    in_order = [stages[i] for i in range(len(cut.cuts))]
    return assemble(name, source, layouts.spec, schedule, cut, meshes, in_order, method, cluster)


def _next_remat(remat: str, remats: Sequence[str]) -> str | None:
    """The policy that keeps less than this one; None if there is none."""
    later = remats[remats.index(remat) + 1 :] if remat in remats else ()
    return later[0] if later else None


def _with_remat(spec: PipelineSpec, position: int, remat: str) -> PipelineSpec:
    stages = list(spec.stages)
    stages[position] = replace(stages[position], remat=remat)
    return replace(spec, stages=tuple(stages))


def lay_out(
    source: LayeredStep, spec: PipelineSpec, cluster: Cluster, known: StageCache
) -> tuple[Schedule, CutStep, tuple[Placement, ...]]:
    """The tasks, the stages, and where their submeshes lie.

    Raises:
      PlanError: the submeshes do not fit the cluster, stages that share a submesh differ, or there
        is no such schedule.
      StepError: the layers of the stages are not all layers in order.
    """
    try:
        schedule = make_schedule(
            spec.schedule, spec.num_meshes, spec.num_microbatches, spec.num_virtual
        )
    except ValueError as error:
        raise PlanError(str(error)) from None
    counts = Counter(schedule.pipeline_of)
    shares = [counts[p] / spec.num_microbatches for p in range(len(schedule.placements))]
    cut = known.cut(source, [s.layers for s in spec.stages], shares)
    shapes: dict[int, Submesh] = {}
    for stage, mesh in zip(spec.stages, schedule.placements[0], strict=True):
        if shapes.setdefault(mesh, stage.submesh) != stage.submesh:
            raise PlanError(
                f"stages on mesh {mesh} have submeshes {shapes[mesh]} and {stage.submesh}; stages "
                "that share a mesh have the same"
            )
    in_order = [shapes[m] for m in range(spec.num_meshes)]
    if len(schedule.placements) > 1 and len({*in_order}) > 1:
        raise PlanError(
            f"schedule {spec.schedule} runs every stage on two meshes, so all must have the same "
            f"shape; found {', '.join(map(str, in_order))}"
        )
    try:
        return schedule, cut, place_submeshes(in_order, cluster.num_hosts, cluster.devices_per_host)
    except ValueError as error:
        raise PlanError(str(error)) from None


def spec_of(plan: PipelinePlan) -> PipelineSpec:
    """The pipeline of a plan."""
    num = plan.num_virtual * len(plan.meshes)
    return PipelineSpec(
        tuple(
            StageSpec(s.layers, plan.meshes[s.mesh].submesh, s.plan.mesh.shape, s.remat)
            for s in plan.stages[:num]
        ),
        plan.num_microbatches, plan.schedule, plan.num_virtual,
    )  # fmt: skip


def restore_pipeline(
    plan: PipelinePlan, call: StepArgs, method: PipelineMethod, *, table: RuleTable
) -> PlannedPipeline:
    """Rebuild the stages and layouts of a loaded plan for a step.

    Raises:
      PlanError: the plan belongs to another step, or an edit is impossible.
      InfeasibleError: a stage needs more memory than its own budget.
    """
    source = layer_step(
        call, plan.num_microbatches, plan.layer_num or "auto", plan.num_pieces, table
    )
    if source.hash != plan.graph_hash or source.graph.num_layers != plan.num_layers:
        raise PlanError(
            f"the plan {plan.name!r} was made for another step: its graph hash is "
            f"{plan.graph_hash} with {plan.num_layers} layers, this step's is {source.hash} with "
            f"{source.graph.num_layers}. Shapes, model code, optimizer, versions or "
            "num_microbatches differ; plan again."
        )
    spec = spec_of(plan)
    known = StageCache()
    schedule, cut, _ = lay_out(source, spec, plan.cluster, known)
    homes = [m for placement in schedule.placements for m in placement]
    if homes != [s.mesh for s in plan.stages]:
        raise PlanError(
            f"the stages of the plan {plan.name!r} are on meshes {[s.mesh for s in plan.stages]}; "
            f"schedule {plan.schedule} puts them on {homes}"
        )
    layouts = StagePlanner(
        source, spec, schedule, cut, plan.meshes, method, plan.cluster, table, known
    )
    stages = [layouts.plan(i, plan.name, given) for i, given in enumerate(plan.stages)]
    found = assemble(
        plan.name, source, spec, schedule, cut, plan.meshes, stages, method, plan.cluster
    )
    kept = replace(
        found.plan, method=plan.method, layer_num=plan.layer_num, gap=plan.gap,
        alternatives=plan.alternatives, versions=plan.versions, wall_s=plan.wall_s,
        notes=plan.notes, memory_budget_bytes=plan.memory_budget_bytes,
    )  # fmt: skip
    return replace(found, plan=kept)


def assemble(
    name: str, source: LayeredStep, spec: PipelineSpec, schedule: Schedule, cut: CutStep,
    meshes: tuple[Placement, ...], stages: Sequence[LaidStage], method: PipelineMethod,
    cluster: Cluster,
) -> PlannedPipeline:  # fmt: skip
    """Simulate the stages under the schedule, and write the plan."""
    times, sent_bytes = task_times(schedule, cut, meshes, stages, cluster)
    timeline = simulate(schedule, times)
    num = len(spec.stages)
    records = tuple(
        PlannedStage(
            layers=tuple(spec.stages[i % num].layers), pipeline=i // num, mesh=laid.mesh,
            remat=spec.stages[i % num].remat, in_flight=laid.in_flight,
            forward_s=laid.cost.forward_s, backward_s=laid.cost.backward_s,
            per_step_s=laid.cost.per_step_s,
            send_s=(*times.forward_transfer_s, 0.0)[i % num],
            return_s=(0.0, *times.backward_transfer_s)[i % num],
            peak_bytes=laid.peak_bytes, stash_bytes=laid.cost.stash_bytes,
            plan=laid.planned.plan,
        )
        for i, laid in enumerate(stages)
    )  # fmt: skip
    on_mesh = [sum(r.peak_bytes for r in records if r.mesh == m) for m in range(len(meshes))]
    notes = list(dict.fromkeys([*source.notes, *cut.split.notes]))
    idle = cluster.num_devices - sum(m.submesh.num_devices for m in meshes)
    if idle:
        notes.append(f"{idle} of {cluster.num_devices} devices are idle")
    notes += dict.fromkeys(n for r in records for n in r.plan.notes)
    plan = PipelinePlan(
        name=name, method=method.label, cluster=cluster, graph_hash=source.hash,
        num_microbatches=spec.num_microbatches, num_layers=source.graph.num_layers,
        layer_num=0 if method.layer_num == "auto" else int(method.layer_num),
        num_pieces=source.places.num_pieces,
        schedule=spec.schedule, num_virtual=spec.num_virtual,
        memory_budget_bytes=float(method.memory_budget_bytes or cluster.usable_hbm_bytes),
        meshes=meshes, stages=records,
        predicted=PipelinePredicted(
            step_s=timeline.step_s, bubble_share=timeline.bubble_share,
            peak_bytes=max(on_mesh), transfer_bytes=sent_bytes * spec.num_microbatches,
        ),
        notes=tuple(dict.fromkeys(notes)), versions=versions(),
    )  # fmt: skip
    return PlannedPipeline(
        plan, source, cut, schedule, tuple(s.step for s in stages),
        tuple(s.planned for s in stages), timeline, times,
    )  # fmt: skip


def task_times(
    schedule: Schedule, cut: CutStep, meshes: Sequence[Placement], stages: Sequence[LaidStage],
    cluster: Cluster,
) -> tuple[TaskTimes, float]:  # fmt: skip
    """Seconds of all tasks and transfers, and bytes sent between meshes per microbatch."""
    num = schedule.num_stages
    first = stages[:num]
    home = schedule.placements[0]
    forward, backward, total = [], [], 0.0
    for i in range(num - 1):
        there, back = link_bytes(cut, i)
        total += (there + back) * (home[i] != home[i + 1])
        forward.append(transfer_s(there, meshes[home[i]], meshes[home[i + 1]], cluster))
        backward.append(transfer_s(back, meshes[home[i + 1]], meshes[home[i]], cluster))
    tails = [0.0] * len(meshes)
    for laid in stages:
        tails[laid.mesh] += laid.cost.per_step_s
    times = TaskTimes(
        forward_s=tuple(s.cost.forward_s for s in first),
        backward_s=tuple(s.cost.backward_s for s in first),
        backward_input_s=tuple(s.cost.backward_input_s for s in first),
        backward_weight_s=tuple(s.cost.backward_weight_s for s in first),
        forward_transfer_s=tuple(forward), backward_transfer_s=tuple(backward),
        tail_s=tuple(tails),
    )  # fmt: skip
    return times, total
