"""Layouts of the stages of a pipeline: `StagePlanner`. Those that are alike are planned once.

In: a `CutStep`, a `PipelineSpec` and a schedule. Out: a `LaidStage` per stage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError
from alpa_lite.ir.graph import graph_hash
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.build import Candidate, PlanningInputs
from alpa_lite.passes.decisions import Decisions, decide
from alpa_lite.passes.inter_op import Placement
from alpa_lite.passes.memory import MemoryProfile, profile_memory, with_in_flight
from alpa_lite.passes.methods import Method
from alpa_lite.passes.pipeline import PlannedStep
from alpa_lite.passes.pipeline_methods import PipelineMethod, ThreeDParallel
from alpa_lite.passes.pipeline_plan import PlannedStage
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.pricing import Workload
from alpa_lite.passes.report import assignments_of, make_plan, replan, with_memory
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.schedules import BACKWARD, BACKWARD_WEIGHT, FORWARD, Schedule
from alpa_lite.passes.stages.plan_stage import StagePlan, plan_stage, stage_inputs, subcluster
from alpa_lite.passes.stages.source import CutStep, LayeredStep, cut_step
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec
from alpa_lite.passes.stages.stage_cost import StageCost, phase_work, stage_cost
from alpa_lite.passes.stages.stage_step import StageStep

# Stages need not be solved closer than this: which stage is the slowest matters, and its prices are
# no better.
_GAP = 0.005


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
class LaidStage:
    """A stage with its layouts.

    Attributes:
      step: ports and graph.
      inputs: decision graph.
      work: of `inputs`, by phase.
      planned: plan and layouts.
      cost: seconds and bytes.
      peak_bytes: per device.
      mesh: index of the submesh.
      in_flight: microbatches it holds.
    """

    step: StageStep
    inputs: PlanningInputs
    work: Mapping[str, Workload]
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
      too_many: microbatches in flight with which a stage does not fit, by the same.
      cuts: steps cut into stages, by source, stages and shares.
      signatures: of stages, by cut, stage and rematerialisation.
    """

    stages: dict[tuple[object, ...], list[LaidStage]] = field(default_factory=dict)
    too_many: dict[tuple[object, ...], tuple[int, InfeasibleError]] = field(default_factory=dict)
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


class StagePlanner:
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

    def plan(self, index: int, name: str, given: PlannedStage | None = None) -> LaidStage:
        """The layouts of one stage: searched, or those of a plan."""
        stage = self.spec.stages[index % len(self.spec.stages)]
        mesh, in_flight = self.homes[index], self.in_flight[index]
        count = self.microbatches(index)
        key = self.key(index)
        if given is None and in_flight >= self.most(index):
            raise self.does_not_fit(index, self.known.too_many[key][1])
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
            return LaidStage(
                step, inputs, work, planned, cost, profile.peak_bytes, mesh, in_flight
            )  # fmt: skip
        found = self.search(step, inputs, stage, index).found
        laid = _laid(f"{name}, stage {index}", step, inputs, work, found, mesh, in_flight)
        self.known.stages.setdefault(key, []).append(laid)
        return laid

    def key(self, index: int) -> tuple[object, ...]:
        """All that decides on the layouts of a stage but the microbatches in flight."""
        stage = self.spec.stages[index % len(self.spec.stages)]
        return (
            self.known.signature(self.cut, index, stage.remat), stage.submesh, stage.mesh_shape,
            self.shared[self.homes[index]], self.microbatches(index),
        )  # fmt: skip

    def most(self, index: int) -> float:
        """Microbatches in flight that are known to be too many for a stage."""
        return self.known.too_many.get(self.key(index), (math.inf, None))[0]

    def next_of(self, left: Sequence[int]) -> int:
        """The stage to plan next: the first, or one like it that settles more of them at once.

        Layouts for many microbatches in flight do for fewer, and the slowest of alike stages counts
        for the step. So if what was planned for fewer does not fit the first, the one with the most
        is planned, or one in the middle if that is known not to fit.
        """
        first = left[0]
        alike = self.known.stages.get(self.key(first), [])
        if not alike or self.like(alike, first) is not None:
            return first
        most = self.most(first)
        others = [i for i in left if self.key(i) == self.key(first) and self.in_flight[i] < most]
        if not others:
            return first
        others.sort(key=self.in_flight.__getitem__)
        return others[-1] if math.isinf(most) else others[len(others) // 2]

    def like(self, alike: Sequence[LaidStage], index: int) -> LaidStage | None:
        """An alike stage that is planned, if its layouts do here too.

        They are the best here if no fewer microbatches are in flight here, and they fit: with more
        of them the best can only be slower. Those for more microbatches fit.
        """
        in_flight, budget = self.in_flight[index], self.budget_bytes(index)
        ordered = sorted(alike, key=lambda each: each.in_flight)
        fewer = [laid for laid in ordered if laid.in_flight <= in_flight]
        for laid in (*fewer[-1:], *(laid for laid in ordered if laid.in_flight > in_flight)):
            held = _holding(laid, in_flight)
            if held.peak_bytes <= budget * (1 + 1e-9):
                return held
        return None

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
            self.known.too_many[self.key(index)] = self.in_flight[index], error
            raise self.does_not_fit(index, error) from None

    def does_not_fit(self, index: int, error: InfeasibleError) -> InfeasibleError:
        """The error of a stage's layouts, as one of the pipeline."""
        stage = self.spec.stages[index % len(self.spec.stages)]
        return InfeasibleError(
            f"stage {index} of {len(self.spec.stages)} (layers {stage.layers[0]} to "
            f"{stage.layers[-1]} on {stage.submesh} devices, {self.in_flight[index]} "
            f"microbatches in flight): {error} More stages or rematerialisation make stages "
            "smaller.",
            need_bytes=error.need_bytes, budget_bytes=error.budget_bytes, row=error.row,
            breakdown=error.breakdown,
        )  # fmt: skip


def _laid(
    name: str, step: StageStep, inputs: PlanningInputs, work: Mapping[str, Workload],
    found: Candidate, mesh: int, in_flight: int,
) -> LaidStage:  # fmt: skip
    """A stage with layouts that were found."""
    held = with_in_flight(inputs.contraction, inputs.liveness, in_flight)
    inputs_held = replace(inputs, liveness=held)
    plan = make_plan(
        name, graph_hash(step.traced.graph), inputs_held, found, (), found.wall_s
    )  # fmt: skip
    cost = stage_cost(inputs, found.decisions, found.profile, in_flight, work)
    planned = PlannedStep(plan, found.decisions, step.output_kinds)
    return LaidStage(step, inputs, work, planned, cost, found.profile.peak_bytes, mesh, in_flight)


def _holding(laid: LaidStage, in_flight: int) -> LaidStage:
    """The same layouts with another number of microbatches in flight."""
    if laid.in_flight == in_flight:
        return laid
    c, d = laid.inputs.contraction, laid.planned.decisions
    liveness = with_in_flight(c, laid.inputs.liveness, in_flight)
    profile = profile_memory(c, liveness, d.mesh, d.result_specs, d.operand_specs)
    plan = with_memory(laid.planned.plan, c, profile)
    cost = replace(
        laid.cost,
        resident_bytes=max(0.0, profile.peak_bytes - in_flight * laid.cost.stash_bytes),
    )
    return replace(
        laid, planned=replace(laid.planned, plan=plan), cost=cost, peak_bytes=profile.peak_bytes,
        in_flight=in_flight,
    )  # fmt: skip


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
