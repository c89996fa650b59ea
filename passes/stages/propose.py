"""The search for stages: which pipelines are worth planning whole.

    trace      step at a number of microbatches  -> LayeredStep     source
    price      kinds of layers, on submeshes     -> LayerCosts      priced_counts, layer_costs
    tabulate   all ranges of layers              -> StageTables     stage_tables
    solve      stages, submeshes, options        -> Proposal        inter_op

Numbers of microbatches are priced one after the other: first a middling one, then the one that
looks best by what has been priced, until the best is one of those priced. So are submeshes: from a
middling size on, until the best stages have neither the largest nor the smallest. Ctrl-C and the
end of the time budget leave what has been priced so far.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError, SolverTimeoutError, StepError
from alpa_lite.ir.trace import TracedStep
from alpa_lite.passes.inter_op import (
    Stage,
    StageProblem,
    Submesh,
    gpipe_in_flight,
    one_f_one_b_in_flight,
    solve_interleaved,
    solve_stages,
)
from alpa_lite.passes.inter_op.stage_problem import InFlight
from alpa_lite.passes.pipeline import Progress, StepArgs
from alpa_lite.passes.pipeline_methods import REMAT_POLICIES, PipeshardParallel
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.schedules import SCHEDULES
from alpa_lite.passes.schedules.registry import check_shape
from alpa_lite.passes.stages.given_spec import balanced_stages
from alpa_lite.passes.stages.grid_search import equal_submesh
from alpa_lite.passes.stages.priced_counts import Priced, PricedCounts
from alpa_lite.passes.stages.search_space import batch_size, first_count, microbatch_counts
from alpa_lite.passes.stages.source import LayeredStep
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec
from alpa_lite.passes.stages.stage_tables import StageTables, costs_at, stage_tables
from alpa_lite.passes.units import format_bytes

# Another number is priced if it looks better than the best by this share.
_WORTH = 0.02

# Larger and smaller submeshes are priced if those at the edge have at least this part of the
# devices of the best stages.
_PART = 0.1

# Numbers of microbatches are compared with those up to this many times larger or smaller.
_NEAR = 4

# The stage program need not be solved closer than the prices are.
_GAP = 0.005

_NUM_PROPOSALS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A pipeline worth planning.

    Attributes:
      source: the step at its number of microbatches.
      spec: the pipeline.
      estimate_s: seconds per step by the prices of layers.
    """

    source: LayeredStep
    spec: PipelineSpec
    estimate_s: float


class StageSearch:
    """Proposes pipelines for a step on a cluster.

    Attributes:
      gap: relative distance of the best proposal to the best stages by the prices of layers.
    """

    def __init__(
        self, call: StepArgs, whole: tuple[TracedStep, Any], method: PipeshardParallel,
        cluster: Cluster, table: RuleTable, report: Progress,
    ) -> None:  # fmt: skip
        """Prepares a search.

        Args:
          call: the step.
          whole: `trace_step(call, 1)`.
          method: what is prescribed.
          cluster: the hardware.
          table: sharding rules found so far.
          report: called with what is being done and the fraction done.
        """
        self.call, self.method, self.cluster, self.report = call, method, cluster, report
        self.started = time.monotonic()
        self.gap = 0.0
        self.schedule = "1f1b" if method.schedule == "auto" else method.schedule
        self.remats = REMAT_POLICIES if method.remat == "auto" else (method.remat,)
        self.counts = microbatch_counts(call, method)
        self.layers = PricedCounts(
            call, whole, method, cluster, table, report, self.remats, len(self.counts) > 1
        )
        self.solved: dict[tuple[object, ...], tuple[tuple[Stage, ...], float]] = {}

    @property
    def priced(self) -> dict[int, Priced]:
        """What has been priced, by number of microbatches."""
        return self.layers.priced

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return self.layers.not_priced()

    @property
    def budget_bytes(self) -> float:
        """Memory per device."""
        return float(self.method.memory_budget_bytes or self.cluster.usable_hbm_bytes)

    def run(self) -> None:
        """Price numbers of microbatches and submeshes until the best are among those priced.

        Raises:
          InfeasibleError: the state does not fit even if it is split over all devices.
          SolverTimeoutError: the time ran out before anything was priced.
          StepError: the step cannot be cut into microbatches or layers.
        """
        self._price_first()
        self._check_state()
        while True:
            best_s, count = min(self._estimate(n) for n in self.priced)
            if self.layers.widen(count, self._submeshes(count)):
                continue
            other_s, other = min(map(self._estimate, self._near(count)), default=(math.inf, 0))
            if other and math.isinf(best_s) and math.isinf(other_s):
                other_s, other = 0.0, max(self._near(count))  # small microbatches need least
            if other_s >= best_s * (1 - _WORTH) or not self.layers.has_time():
                break
            self.layers.price(other, self._submeshes(other))

    def proposals(self, memory_share: float) -> list[Proposal]:
        """The best proposals that use so much of the memory budget."""
        _, count = min(self._estimate(n, memory_share) for n in self.priced)
        priced = self.priced[count]
        tables = self._tables(count, memory_share)
        self.report(f"solving for {count} microbatches", 0.6)
        found = []
        for stages, num_virtual, seconds in self._solve(tables, _NUM_PROPOSALS):
            spec = _spec(tables, stages, count, self.schedule, num_virtual)
            found.append(Proposal(priced.source, spec, seconds))
        return found

    def interleaved(self, count: int) -> Proposal | None:
        """The best pipeline with two stages per submesh, if there is one."""
        tables = self._tables(count, 1.0)
        solved = _solve_virtual(tables.problem, 2, self._time_left_s())
        if solved is None:
            return None
        stages, seconds = solved
        spec = _spec(tables, stages, count, "interleaved_1f1b", 2)
        return Proposal(self.priced[count].source, spec, seconds)

    def smallest(self) -> tuple[LayeredStep, PipelineSpec]:
        """A pipeline that needs little memory: many stages, small microbatches, all recomputed."""
        source = self.priced[max(self.priced)].source
        most = min(source.graph.num_layers, self.cluster.num_devices)
        wanted = (most,) if self.method.num_stages == "auto" else (self.method.num_stages,)
        num, submesh = 1, equal_submesh(self.cluster, 1)
        for stages in range(max(wanted), 0, -1):
            if (shape := equal_submesh(self.cluster, stages)) is not None:
                num, submesh = stages, shape
                break
        assert submesh is not None
        stages_of = balanced_stages(source.graph.flops, num)
        specs = [StageSpec(tuple(each), submesh, None, self.remats[-1]) for each in stages_of]
        return source, PipelineSpec(tuple(specs), source.num_microbatches, self.schedule)

    # Price.

    def _price_first(self) -> None:
        """Price the first number of microbatches; one, if there can be no others."""
        try:
            self.layers.price(first_count(self.counts, batch_size(self.call), self.cluster))
        except StepError:
            if self.method.num_microbatches != "auto" or self.counts == (1,):
                raise
            self.counts = (1,)
            self.layers.price(1)

    def _near(self, count: int) -> list[int]:
        """Numbers of microbatches like this one that are not priced."""
        return [
            n
            for n in self.counts
            if n not in self.priced and count <= _NEAR * n <= _NEAR**2 * count
        ]

    def _check_state(self) -> None:
        """Check that all state fits if it is split over all devices."""
        (priced,) = self.priced.values()
        total = sum(priced.pricer.state_bytes[kind] for kind in priced.pricer.kinds)
        need = total / self.cluster.num_devices
        if need > self.budget_bytes:
            raise InfeasibleError(
                f"parameters, optimizer state and sums of gradients take {format_bytes(total)}, "
                f"which is {format_bytes(need)} on each of {self.cluster.num_devices} devices if "
                f"all is split over all of them; {format_bytes(self.budget_bytes)} may be used. "
                "Use more devices, an optimizer with less state, or parameters of a smaller dtype.",
                need_bytes=need, budget_bytes=self.budget_bytes,
            )  # fmt: skip

    def _time_left_s(self) -> float:
        return max(1.0, self.started + self.method.time_limit_s - time.monotonic())

    # Solve.

    def _tables(self, count: int, memory_share: float) -> StageTables:
        near = self._near_priced(count)
        there, back = self.priced[near].crossing
        costs = costs_at(self.priced[near].pricer.costs(), count)
        return stage_tables(
            costs, (there * near / count, back * near / count), self.remats, self.cluster,
            memory_share * self.budget_bytes, _in_flight(self.schedule),
        )  # fmt: skip

    def _estimate(self, count: int, memory_share: float = 1.0) -> tuple[float, int]:
        """Seconds per step of the best stages for a number of microbatches, and the number."""
        return self._best(count, memory_share)[1], count

    def _best(self, count: int, memory_share: float) -> tuple[tuple[Stage, ...], float]:
        """The best stages for a number of microbatches, and seconds per step; none if none fit.

        Lean options that the best stages of a priced number choose are priced.
        """
        near = self._near_priced(count)
        pricer = self.priced[near].pricer
        while True:
            key = count, memory_share, near, len(pricer.submeshes), frozenset(pricer.guesses)
            if key not in self.solved:
                solved = self._solve(self._tables(count, memory_share), 1)
                self.solved[key] = (solved[0][0], solved[0][2]) if solved else ((), math.inf)
            stages, seconds = self.solved[key]
            chosen = {(s.submesh, s.option // len(self.remats)) for s in stages}
            guessed = chosen & pricer.guesses if near == count else set()
            if not guessed:
                return stages, seconds
            for submesh, option in guessed:
                pricer.price_lean(submesh, option)

    def _submeshes(self, count: int) -> list[Submesh]:
        """The submeshes that have a good part of the devices of the best stages."""
        stages, _ = self._best(count, 1.0)
        shapes = self.priced[self._near_priced(count)].pricer.submeshes
        devices: Counter[Submesh] = Counter()
        for stage in stages:
            devices[shapes[stage.submesh]] += shapes[stage.submesh].num_devices
        return [s for s, n in devices.items() if n >= _PART * sum(devices.values())]

    def _near_priced(self, count: int) -> int:
        """The number of microbatches whose prices stand for those of this one."""
        return min(self.priced, key=lambda n: abs(math.log(n / count)))

    def _solve(
        self, tables: StageTables, num_proposals: int
    ) -> list[tuple[tuple[Stage, ...], int, float]]:
        """Stages, stages per submesh and seconds of the best plans, best first."""
        problem, family = tables.problem, SCHEDULES[self.schedule]
        wanted = None if self.method.num_stages == "auto" else self.method.num_stages
        num_virtual = family.num_virtual or max(2, self.method.num_virtual)
        if num_virtual > 1:
            solved = _solve_virtual(problem, num_virtual, self._time_left_s())
            return [] if solved is None else [(solved[0], num_virtual, solved[1])]
        if family.even:
            return [(stages, 1, s) for stages, s in _solve_even(problem, self.schedule, wanted)]
        try:
            found = solve_stages(
                problem, time_limit_s=self._time_left_s(), num_proposals=num_proposals, gap=_GAP,
                num_stages=wanted,
            )  # fmt: skip
        except (InfeasibleError, SolverTimeoutError):
            return []
        if num_proposals > 1:
            self.gap = found.gap
        return [(p.stages, 1, p.objective_s) for p in found.proposals]


def _in_flight(schedule: str) -> InFlight:
    if schedule == "gpipe":
        return gpipe_in_flight
    if schedule == "eager_1f1b":
        return lambda after, count: min(2 * after + 1, count)
    return one_f_one_b_in_flight


def _solve_virtual(
    problem: StageProblem, num_virtual: int, time_limit_s: float
) -> tuple[tuple[Stage, ...], float] | None:
    """Several stages on each of equal submeshes."""
    if problem.num_layers < 2 * num_virtual:
        return None
    try:
        found = solve_interleaved(problem, num_virtual, time_limit_s=time_limit_s, gap=_GAP)
    except (InfeasibleError, SolverTimeoutError):
        return None
    return found.chunks, found.objective_s


def _solve_even(
    problem: StageProblem, schedule: str, wanted: int | None
) -> list[tuple[tuple[Stage, ...], float]]:
    """Two pipelines in opposite directions through an even number of equal submeshes."""
    found = []
    for index, submesh in enumerate(problem.submeshes):
        most = min(problem.num_layers, problem.num_devices // submesh.num_devices)
        num = wanted or most - most % 2
        try:
            check_shape(schedule, num, problem.num_microbatches, 1)
        except ValueError:
            continue
        if num < 2 or num > most:
            continue
        held = SCHEDULES[schedule].in_flight(num, problem.num_microbatches, 1)
        only = slice(index, index + 1)
        one = replace(
            problem, submeshes=(submesh,), latency_s=problem.latency_s[:, only],
            fixed_bytes=2 * problem.fixed_bytes[:, only],
            in_flight_bytes=problem.in_flight_bytes[:, only],
            per_step_s=2 * problem.per_step_s[:, only],
            boundary_s=problem.boundary_s[:, only, only],
            in_flight=_held_by(held),
        )  # fmt: skip
        try:
            best = solve_stages(one, num_proposals=1, gap=_GAP, num_stages=num)
        except (InfeasibleError, SolverTimeoutError):
            continue
        stages = tuple(replace(s, submesh=index) for s in best.stages)
        found.append((stages, best.objective_s))
    return sorted(found, key=lambda pair: pair[1])


def _held_by(meshes: Sequence[int]) -> InFlight:
    """What each mesh holds, first to last, by the number of stages after."""
    return lambda after, _: meshes[len(meshes) - 1 - after]


def _spec(
    tables: StageTables, stages: Sequence[Stage], count: int, schedule: str, num_virtual: int
) -> PipelineSpec:
    found = []
    for stage in stages:
        option = tables.options[stage.submesh][stage.option]
        layers = tuple(range(stage.first_layer, stage.last_layer + 1))
        submesh = tables.problem.submeshes[stage.submesh]
        found.append(StageSpec(layers, submesh, option.layers.mesh_shape, option.remat))
    return PipelineSpec(tuple(found), count, schedule, num_virtual)
