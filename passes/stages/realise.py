"""A pipeline of which every stage is planned, simulated and written down: `realise`.

In: a `LayeredStep` and a `PipelineSpec`, or a loaded `PipelinePlan`. Out: a `PlannedPipeline`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError, PlanError
from alpa_lite.ir.graph import graph_hash
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.build import Candidate, PlanningInputs
from alpa_lite.passes.decisions import Decisions, decide
from alpa_lite.passes.inter_op import Placement, Submesh, place_submeshes
from alpa_lite.passes.memory import MemoryProfile, profile_memory, with_in_flight
from alpa_lite.passes.methods import Method
from alpa_lite.passes.pipeline import PlannedStep, Progress, StepArgs
from alpa_lite.passes.pipeline_methods import (
    PipelineMethod,
    ThreeDParallel,
)
from alpa_lite.passes.pipeline_plan import (
    PipelinePlan,
    PipelinePredicted,
    PlannedStage,
)
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.pricing import Workload
from alpa_lite.passes.report import assignments_of, make_plan, replan, versions
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.schedules import (
    BACKWARD,
    BACKWARD_WEIGHT,
    FORWARD,
    Schedule,
    TaskTimes,
    Timeline,
    make_schedule,
    simulate,
)
from alpa_lite.passes.stages.plan_stage import StagePlan, plan_stage, stage_inputs, subcluster
from alpa_lite.passes.stages.source import CutStep, LayeredStep, cut_step, layer_step
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec
from alpa_lite.passes.stages.stage_cost import StageCost, phase_work, stage_cost
from alpa_lite.passes.stages.stage_step import StageStep
from alpa_lite.passes.stages.transfer_cost import link_bytes, transfer_s

# Stages need not be solved closer than this: which stage is the slowest matters, and its prices are
# no better.
_GAP = 0.005


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
    """

    plan: PipelinePlan
    source: LayeredStep
    cut: CutStep
    schedule: Schedule
    steps: tuple[StageStep, ...]
    planned: tuple[PlannedStep, ...]
    timeline: Timeline


def realise(
    name: str, source: LayeredStep, spec: PipelineSpec, method: PipelineMethod, cluster: Cluster,
    table: RuleTable, report: Progress, known: StageCache | None = None,
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
    """
    known = known or StageCache()
    schedule, cut, meshes = lay_out(source, spec, cluster, known)
    layouts = _StagePlanner(source, spec, schedule, cut, meshes, method, cluster, table, known)
    stages: dict[int, _Laid] = {}
    # The best layouts with few microbatches in flight are the best with more, if they fit.
    for done, index in enumerate(sorted(range(len(cut.cuts)), key=layouts.in_flight.__getitem__)):
        report(f"planning stage {index} of {len(cut.cuts)}", (done + 1) / len(cut.cuts))
        stages[index] = layouts.plan(index, name)
    in_order = [stages[i] for i in range(len(cut.cuts))]
    return assemble(name, source, spec, schedule, cut, meshes, in_order, method, cluster)


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


def stages_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per stage of every pipeline, the most microbatches between forward and backward."""
    num = schedule.num_stages
    now: Counter[int] = Counter()
    most: Counter[int] = Counter()
    ends = (BACKWARD, BACKWARD_WEIGHT)
    for tasks in schedule.tasks:
        for task in tasks:
            index = schedule.pipeline_of[task.microbatch] * num + task.stage
            if task.kind == FORWARD:
                now[index] += 1
                most[index] = max(most[index], now[index])
            elif task.kind in ends:
                now[index] -= 1
    return tuple(max(1, most[i]) for i in range(num * len(schedule.placements)))


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """A stage with its layouts.

    Attributes:
      step: ports and graph.
      inputs: decision graph.
      work: of `inputs`, by phase.
      found: layouts, prices and memory; None if they are those of a loaded plan.
      planned: plan and layouts.
      cost: seconds and bytes.
      peak_bytes: per device.
      mesh: index of the submesh.
      in_flight: microbatches it holds.
    """

    step: StageStep
    inputs: PlanningInputs
    work: Mapping[str, Workload]
    found: Candidate | None
    planned: PlannedStep
    cost: StageCost
    peak_bytes: float
    mesh: int
    in_flight: int


@dataclass(slots=True, eq=False)
class StageCache:
    """What was worked out for other pipelines of the same step and method.

    Attributes:
      stages: planned stages by all that decides on their layouts but the microbatches in flight.
      cuts: steps cut into stages, by source, stages and shares.
      signatures: of stages, by cut, stage and rematerialisation.
    """

    stages: dict[tuple[object, ...], list[_Laid]] = field(default_factory=dict)
    cuts: dict[tuple[LayeredStep, object, object], CutStep] = field(default_factory=dict)
    signatures: dict[tuple[CutStep, int, str], str] = field(default_factory=dict)

    def cut(
        self, source: LayeredStep, stages: Sequence[Sequence[int]], shares: Sequence[float]
    ) -> CutStep:
        """See `cut_step`."""
        key = source, tuple(map(tuple, stages)), tuple(shares)
        if key not in self.cuts:
            self.cuts[key] = cut_step(source, stages, shares)
        return self.cuts[key]

    def signature(self, cut: CutStep, index: int, remat: str) -> str:
        """See `CutStep.signature`."""
        key = cut, index, remat
        if key not in self.signatures:
            self.signatures[key] = cut.signature(index, remat)
        return self.signatures[key]


class _StagePlanner:
    """Plans stages; those that are alike are planned once."""

    def __init__(
        self, source: LayeredStep, spec: PipelineSpec, schedule: Schedule, cut: CutStep,
        meshes: Sequence[Placement], method: PipelineMethod, cluster: Cluster, table: RuleTable,
        known: StageCache,
    ) -> None:  # fmt: skip
        self.source, self.spec, self.schedule, self.cut = source, spec, schedule, cut
        self.meshes, self.method, self.cluster, self.table = meshes, method, cluster, table
        self.in_flight = stages_in_flight(schedule)
        self.known = known
        homes = [m for placement in schedule.placements for m in placement]
        self.homes = homes
        # Stages that share a mesh share its memory.
        self.shared = Counter(homes)

    def budget_bytes(self, index: int) -> float:
        """Memory per device that a stage may use."""
        whole = self.method.memory_budget_bytes or self.cluster.usable_hbm_bytes
        return float(whole) / self.shared[self.homes[index]]

    def microbatches(self, index: int) -> int:
        """Microbatches that go through a stage."""
        pipeline = index // len(self.spec.stages)
        return sum(p == pipeline for p in self.schedule.pipeline_of)

    def plan(self, index: int, name: str, given: PlannedStage | None = None) -> _Laid:
        """The layouts of one stage: searched, or those of a plan."""
        stage = self.spec.stages[index % len(self.spec.stages)]
        mesh, in_flight = self.homes[index], self.in_flight[index]
        count = self.microbatches(index)
        key = (
            self.known.signature(self.cut, index, stage.remat), stage.submesh, stage.mesh_shape,
            self.shared[mesh], count,
        )  # fmt: skip
        alike = self.known.stages.get(key, []) if given is None else []
        step = self.cut.stage(index, stage.remat, alike[0].step if alike else None)
        same = self.like(alike, index)
        if same is not None:
            names = step.traced.graph.input_names
            specs = dict(zip(names, same.planned.plan.inputs.values(), strict=True))
            plan = replace(same.planned.plan, name=f"{name}, stage {index}", inputs=specs)
            return replace(same, step=step, planned=replace(same.planned, plan=plan), mesh=mesh)
        if alike:
            inputs, work = alike[0].inputs, alike[0].work
        else:
            submesh = stage.submesh
            part = subcluster(self.cluster, submesh.num_hosts, submesh.devices_per_host)
            method = replace(self.method, memory_budget_bytes=self.budget_bytes(index))
            inputs = stage_inputs(
                step, count, method, part, self.table, folds_keys=self.spec.num_microbatches > 1
            )
            work = phase_work(inputs)
        if given is not None:
            plan, decisions, profile = _restored(step, inputs, in_flight, given.plan)
            cost = stage_cost(inputs, decisions, profile, in_flight, work)
            planned = PlannedStep(plan, decisions, step.output_kinds)
            return _Laid(
                step, inputs, work, None, planned, cost, profile.peak_bytes, mesh, in_flight
            )  # fmt: skip
        found = self.search(step, inputs, stage, index).found
        laid = _laid(f"{name}, stage {index}", step, inputs, work, found, mesh, in_flight)
        self.known.stages.setdefault(key, []).append(laid)
        return laid

    def like(self, alike: Sequence[_Laid], index: int) -> _Laid | None:
        """An alike stage that is planned, if its layouts are the best here too.

        They are if no fewer microbatches are in flight here, and they fit: with more of them the
        best can only be slower.
        """
        in_flight, budget = self.in_flight[index], self.budget_bytes(index)
        fewer = [laid for laid in alike if laid.in_flight <= in_flight]
        if not fewer:
            return None
        laid = max(fewer, key=lambda each: each.in_flight)
        if laid.in_flight == in_flight:
            return laid
        assert laid.found is not None
        c, d = laid.inputs.contraction, laid.found.decisions
        liveness = with_in_flight(c, laid.inputs.liveness, in_flight)
        profile = profile_memory(c, liveness, d.mesh, d.result_specs, d.operand_specs)
        if profile.peak_bytes > budget * (1 + 1e-9):
            return None
        found = replace(laid.found, profile=profile)
        return _laid(
            laid.planned.plan.name, laid.step, laid.inputs, laid.work, found, laid.mesh, in_flight
        )

    def search(
        self, step: StageStep, inputs: PlanningInputs, stage: StageSpec, index: int
    ) -> StagePlan:
        """The best layouts of a stage."""
        meshes = None if stage.mesh_shape is None else [_mesh(self.method, stage.mesh_shape)]
        try:
            return plan_stage(
                step, inputs, self.in_flight[index], meshes, self.method.time_limit_s, _GAP
            )
        except InfeasibleError as error:
            raise InfeasibleError(
                f"stage {index} of {len(self.spec.stages)} (layers {stage.layers[0]} to "
                f"{stage.layers[-1]} on {stage.submesh} devices, {self.in_flight[index]} "
                f"microbatches in flight): {error} More stages or rematerialisation make stages "
                "smaller.",
                need_bytes=error.need_bytes, budget_bytes=error.budget_bytes, row=error.row,
                breakdown=error.breakdown,
            ) from None  # fmt: skip


def _laid(
    name: str, step: StageStep, inputs: PlanningInputs, work: Mapping[str, Workload],
    found: Candidate, mesh: int, in_flight: int,
) -> _Laid:  # fmt: skip
    """A stage with layouts that were found."""
    held = with_in_flight(inputs.contraction, inputs.liveness, in_flight)
    inputs_held = replace(inputs, liveness=held)
    plan = make_plan(
        name, graph_hash(step.traced.graph), inputs_held, found, (), found.wall_s
    )  # fmt: skip
    cost = stage_cost(inputs, found.decisions, found.profile, in_flight, work)
    planned = PlannedStep(plan, found.decisions, step.output_kinds)
    return _Laid(
        step, inputs, work, found, planned, cost, found.profile.peak_bytes, mesh, in_flight
    )


def _mesh(method: Method, shape: Sequence[int]) -> Mesh:
    if isinstance(method, ThreeDParallel):
        named = tuple((n, s) for n, s in (("dp", method.dp), ("tp", method.tp)) if s > 1)
        return Mesh(named or (("dp", 1),))
    return Mesh(tuple((f"x{i}", n) for i, n in enumerate(shape)))


def _restored(
    step: StageStep, inputs: PlanningInputs, in_flight: int, plan: Plan
) -> tuple[Plan, Decisions, MemoryProfile]:
    """The layouts of a loaded plan."""
    c = inputs.contraction
    inputs = replace(inputs, liveness=with_in_flight(c, inputs.liveness, in_flight))
    assignments, overridden = assignments_of(plan, c, inputs.classes, graph_hash(step.traced.graph))
    decisions = decide(c, plan.mesh, assignments)
    profile = profile_memory(
        c, inputs.liveness, plan.mesh, decisions.result_specs, decisions.operand_specs
    )
    return replan(plan, inputs, decisions, overridden), decisions, profile


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
    layouts = _StagePlanner(
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
    meshes: tuple[Placement, ...], stages: Sequence[_Laid], method: PipelineMethod,
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
        tuple(s.planned for s in stages), timeline,
    )  # fmt: skip


def task_times(
    schedule: Schedule, cut: CutStep, meshes: Sequence[Placement], stages: Sequence[_Laid],
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
