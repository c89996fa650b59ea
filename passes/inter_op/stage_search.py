"""Branch and bound over the slowest station: a dynamic program for each box of thresholds.

The objective is a sum plus two maxima: the slowest station (times B - 1) and the largest
once-per-step time. Alpa (OSDI'22, section 5.2) enumerates thresholds for its maximum in ascending
order, a DP for each, and skips thresholds closer than epsilon. Here *boxes* of thresholds are split
where it matters: a DP under the upper ends of a box finds a plan and, with the lower ends, a bound
for all plans of the box. The box with the smallest bound comes first, so there is a plan, a lower
bound and hence a gap at any time, and a proof at the end.

The DP of a box is the one with a price per device (`priced_dp`); where the price leaves a gap that
matters, the one with a limit on devices (`device_dp`).
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .device_dp import LabelLimitError, solve_limited
from .priced_dp import PricedPlan, fewest_devices, solve_priced
from .stage_problem import (
    OBJECTIVE_RTOL,
    StageProblem,
    StageProposal,
    StageStatus,
    evaluate_stages,
    fits,
)
from .stage_table import BoxTable, make_table, per_step_candidates, restrict, slowest_candidates

# Labels of one `solve_limited`; a box that needs more is split, or left with its gap.
_MAX_LABELS = 3_000_000

# Steps towards the best price. Each moves to a corner of the lower envelope; few are needed.
_MAX_PRICE_STEPS = 50

# The price is good enough once it could raise the bound by less than this part of what splitting
# the box could.
_PRICE_SLACK = 0.02


class NoPlanError(Exception):
    """There is no feasible plan."""


class StopSearchError(Exception):
    """The time limit or the caller ended the search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Plans whose slowest station and largest once-per-step time lie in two ranges.

    Attributes:
        slow_low: First index into the candidates for the slowest station.
        slow_high: Last index, included.
        step_low: First index into the candidates for the once-per-step time.
        step_high: Last index, included.
        sum_s: No plan of the box has a smaller sum of latencies and transfers, seconds.
        price_s: A price per device that is probably about right, seconds.
    """

    slow_low: int
    slow_high: int
    step_low: int
    step_high: int
    sum_s: float = 0.0
    price_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The bound of the sums of a box, its price, and the plan of the box with the least sum."""

    lower_s: float
    price_s: float
    plan: PricedPlan


class StageSearch:
    """The state of one search: open boxes, the best plans, the bound.

    Attributes:
        proposals: The best distinct plans found, best first.
        lower_bound_s: No feasible plan takes less, unless it takes at least `cutoff_s`; seconds.
    """

    def __init__(
        self,
        problem: StageProblem,
        *,
        deadline_s: float,
        should_stop: Callable[[], bool] | None,
        num_proposals: int,
        gap: float,
        cutoff_s: float,
        num_stages: int | None = None,
    ) -> None:
        """Prepares a search.

        Args:
            problem: The problem.
            deadline_s: When to stop, by `time.perf_counter()`.
            should_stop: Asked often; True stops.
            num_proposals: How many plans to keep.
            gap: Relative gap at which to stop.
            cutoff_s: Only plans below this are of interest, seconds.
            num_stages: The number of stages there must be, None if it is free.
        """
        self.problem = problem
        self.proposals: list[StageProposal] = []
        self.lower_bound_s = 0.0
        self._deadline_s = deadline_s
        self._should_stop = should_stop
        self._num_proposals = num_proposals
        self._gap = gap
        self._cutoff_s = cutoff_s
        self._repeats = problem.num_microbatches - 1
        self._unresolved_s = math.inf
        self._table = make_table(problem, num_stages)
        self._slow = slowest_candidates(self._table)
        self._step = per_step_candidates(self._table)

    def run(self) -> StageStatus:
        """Searches until the gap asked for is reached.

        Raises:
            NoPlanError: If there is no feasible plan.
            StopSearchError: If the search was ended from outside.
        """
        plan = fewest_devices(restrict(self._table, math.inf, math.inf), self.check_time)
        if plan is None or plan.num_devices > self.problem.num_devices:
            raise NoPlanError
        self._offer(plan)
        counter = itertools.count()
        root = _Box(
            slow_low=0,
            slow_high=len(self._slow) - 1,
            step_low=0,
            step_high=len(self._step) - 1,
        )
        heap = [(self._bound(root), next(counter), root)]
        while heap:
            bound_s, _, box = heapq.heappop(heap)
            # Boxes come in ascending order, and children are never below their parent.
            known_s = min(bound_s, self._limit_s(), self._unresolved_s)
            self.lower_bound_s = max(self.lower_bound_s, known_s)
            if bound_s >= self._limit_s() * (1 - self._gap):
                return self._status()
            for child in self._explore(box):
                heapq.heappush(heap, (self._bound(child), next(counter), child))
        self.lower_bound_s = min(self._limit_s(), self._unresolved_s)
        return self._status()

    def _status(self) -> StageStatus:
        slack_s = self._limit_s() - self.lower_bound_s
        if slack_s <= OBJECTIVE_RTOL * abs(self._limit_s()):
            return "optimal"
        return "within_gap" if slack_s <= self._gap * self._limit_s() else "unproven"

    def _limit_s(self) -> float:
        """Plans that are not below this are of no interest, seconds."""
        best_s = self.proposals[0].objective_s if self.proposals else math.inf
        return min(best_s, self._cutoff_s)

    def _floor_s(self, box: _Box) -> float:
        """The maxima contribute at least this to the objective, seconds."""
        return self._repeats * float(self._slow[box.slow_low]) + float(self._step[box.step_low])

    def _slack_s(self, box: _Box) -> float:
        """What the maxima may contribute beyond their floor, seconds."""
        slow_s = float(self._slow[box.slow_high] - self._slow[box.slow_low])
        return self._repeats * slow_s + float(self._step[box.step_high] - self._step[box.step_low])

    def _bound(self, box: _Box) -> float:
        return box.sum_s + self._floor_s(box)

    def _hopeless(self, box: _Box) -> bool:
        return self._bound(box) >= self._limit_s() * (1 - OBJECTIVE_RTOL)

    def check_time(self) -> None:
        """Raises StopSearchError if the search is to end."""
        if time.perf_counter() > self._deadline_s or (self._should_stop and self._should_stop()):
            raise StopSearchError

    def _offer(self, plan: PricedPlan) -> None:
        """Keeps a plan if it is feasible and among the best."""
        terms = evaluate_stages(self.problem, plan.stages)
        if not fits(self.problem, terms):
            return
        proposal = StageProposal(plan.stages, terms.objective_s)
        if proposal not in self.proposals:
            self.proposals.append(proposal)
            self.proposals.sort(key=lambda p: (p.objective_s, len(p.stages), p.stages))
            del self.proposals[self._num_proposals :]

    def _explore(self, box: _Box) -> list[_Box]:
        """Bounds a box, finds plans in it, and returns the parts that may hold better ones."""
        trimmed = self._trim(box)
        if trimmed is None:
            return []
        box = trimmed
        allowed = restrict(
            self._table, float(self._slow[box.slow_high]), float(self._step[box.step_high])
        )
        relaxed = self._relax(box, allowed)
        if relaxed is None:
            return []
        box = dataclasses.replace(
            box, sum_s=max(box.sum_s, relaxed.lower_s), price_s=relaxed.price_s
        )
        if self._hopeless(box):
            return []
        if self._bound(box) >= self._limit_s() * (1 - self._gap):
            return [box]
        plan, open_s = relaxed.plan, relaxed.plan.sum_s - box.sum_s
        exact = open_s <= OBJECTIVE_RTOL * abs(plan.sum_s)
        if not exact and open_s >= self._slack_s(box):
            try:
                found = self._limited(box, allowed)
            except LabelLimitError:
                if _is_cell(box):
                    self._unresolved_s = min(self._unresolved_s, self._bound(box))
                    return []
            else:
                if found is None:
                    return []
                plan, exact = found, True
                box = dataclasses.replace(box, sum_s=max(box.sum_s, found.sum_s))
        parts = self._without(box, plan) if exact else self._halves(box)
        return [part for part in parts if not self._hopeless(part)]

    def _limited(self, box: _Box, allowed: BoxTable) -> PricedPlan | None:
        """The plan of a box with the least sum, or None if that cannot be the best plan."""
        plan = solve_limited(
            allowed,
            price_s=box.price_s,
            cutoff_s=self._limit_s() - self._floor_s(box),
            max_labels=_MAX_LABELS,
            check_time=self.check_time,
        )
        if plan is not None:
            self._offer(plan)
        return plan

    def _relax(self, box: _Box, allowed: BoxTable) -> _Relaxed | None:
        """The best bound of the priced DP; None if the box holds no plan better than the best.

        The bound as a function of the price is the lower envelope of one line per plan. `many` and
        `few` are plans with more, and not more, devices than there are; where their lines meet is
        the next price, until no line is below.
        """
        limit = self.problem.num_devices
        many: PricedPlan | None = None
        few: PricedPlan | None = None
        best: PricedPlan | None = None
        lower_s, best_price_s, price_s = -math.inf, 0.0, box.price_s
        for _ in range(_MAX_PRICE_STEPS):
            plan = solve_priced(allowed, price_s, self.check_time)
            if plan is None:
                return None
            if plan.priced_s - price_s * limit > lower_s:
                lower_s, best_price_s = plan.priced_s - price_s * limit, price_s
            if plan.num_devices > limit:
                many = plan
            else:
                few = plan
                best = self._better(best, plan)
                if price_s == 0:
                    break
            if lower_s + self._floor_s(box) >= self._limit_s() * (1 - OBJECTIVE_RTOL):
                return None
            if many is None:
                price_s = 0.0
                continue
            if few is None:
                few = fewest_devices(allowed, self.check_time)
                if few is None or few.num_devices > limit:
                    return None
                best = self._better(best, few)
            price_s = (few.sum_s - many.sum_s) / (many.num_devices - few.num_devices)
            envelope_s = many.sum_s + price_s * (many.num_devices - limit)
            enough_s = max(OBJECTIVE_RTOL * abs(envelope_s), _PRICE_SLACK * self._slack_s(box))
            if envelope_s - lower_s <= enough_s:
                break
        return None if best is None else _Relaxed(lower_s, best_price_s, best)

    def _better(self, best: PricedPlan | None, plan: PricedPlan) -> PricedPlan:
        self._offer(plan)
        return plan if best is None or plan.sum_s < best.sum_s else best

    def _trim(self, box: _Box) -> _Box | None:
        """Lowers the upper ends to what the best plan leaves of interest."""
        left_s = self._limit_s() - self._bound(box)
        if left_s <= 0:
            return None
        step_s = float(self._step[box.step_low]) + left_s
        step_high = min(box.step_high, _last_up_to(self._step, step_s))
        slow_high = box.slow_high
        if self._repeats:
            slow_s = float(self._slow[box.slow_low]) + left_s / self._repeats
            slow_high = min(slow_high, _last_up_to(self._slow, slow_s))
        return dataclasses.replace(
            box,
            slow_high=max(slow_high, box.slow_low),
            step_high=max(step_high, box.step_low),
        )

    def _without(self, box: _Box, plan: PricedPlan) -> list[_Box]:
        """The box less the plans with both maxima no smaller than those of its least sum."""
        terms = evaluate_stages(self.problem, plan.stages)
        slow = int(np.searchsorted(self._slow, max(terms.latency_s + terms.boundary_s)))
        step = int(np.searchsorted(self._step, max(terms.per_step_s)))
        parts = []
        if slow > box.slow_low:
            parts += self._halves(dataclasses.replace(box, slow_high=slow - 1))
        if step > box.step_low:
            slow_low = max(slow, box.slow_low)
            parts.append(dataclasses.replace(box, slow_low=slow_low, step_high=step - 1))
        return parts

    def _halves(self, box: _Box) -> list[_Box]:
        """Two parts of a box, cut where it is longest; a single cell stays as it is."""
        slow_s = self._repeats * float(self._slow[box.slow_high] - self._slow[box.slow_low])
        step_s = float(self._step[box.step_high] - self._step[box.step_low])
        if box.slow_high > box.slow_low and (slow_s >= step_s or box.step_high == box.step_low):
            middle = _middle(self._slow, box.slow_low, box.slow_high)
            return [
                dataclasses.replace(box, slow_high=middle),
                dataclasses.replace(box, slow_low=middle + 1),
            ]
        if box.step_high > box.step_low:
            middle = _middle(self._step, box.step_low, box.step_high)
            return [
                dataclasses.replace(box, step_high=middle),
                dataclasses.replace(box, step_low=middle + 1),
            ]
        return [box]


def _is_cell(box: _Box) -> bool:
    return box.slow_low == box.slow_high and box.step_low == box.step_high


def _last_up_to(values: np.ndarray, value: float) -> int:
    """Index of the last of the ascending values that is not above, -1 if there is none."""
    return int(np.searchsorted(values, value, side="right")) - 1


def _middle(values: np.ndarray, low: int, high: int) -> int:
    """The last index of the lower half, by value; `low <= result < high`."""
    middle = _last_up_to(values, float(values[low] + values[high]) / 2)
    return min(max(middle, low), high - 1)
