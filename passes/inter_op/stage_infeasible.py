"""Why no plan of stages exists, in words a user can act on.

Two reasons exist: the offered layer ranges cannot be put together on the cluster, or no plan fits
into memory. For the second the smallest budget that would do is searched, and the stage that needs
it is named; what would help is tried out before it is suggested.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from alpa_lite.errors import InfeasibleError

from .priced_dp import PricedPlan, fewest_devices
from .stage_problem import StageProblem, StageTerms, evaluate_stages
from .stage_table import make_table, restrict

_GIB = 2.0**30
_BUDGET_RTOL = 1e-7


def infeasible_error(problem: StageProblem, check_time: Callable[[], None]) -> InfeasibleError:
    """The error for a problem without a feasible plan; `check_time` may raise to stop.

    With memory as the reason, `need_bytes` is the smallest budget with which some plan exists (up
    to a relative 1e-7), and `row` names its stage with the largest peak.
    """
    found = _smallest_budget(problem, check_time)
    if found is None:
        return InfeasibleError(_no_cover_message(problem, check_time))
    plan, terms = found
    need_bytes = max(terms.peak_bytes)
    index = terms.peak_bytes.index(need_bytes)
    stage = plan.stages[index]
    cell = (problem.range_class[stage.first_layer, stage.last_layer], stage.submesh, stage.option)
    per_microbatch = float(problem.in_flight_bytes[cell])
    held = problem.in_flight(len(plan.stages) - 1 - index, problem.num_microbatches)
    fixed, budget = float(problem.fixed_bytes[cell]), problem.memory_budget_bytes
    name = f"layers {stage.first_layer}-{stage.last_layer}"
    message = (
        f"No plan fits {_gib(budget)} per device: the closest, of {len(plan.stages)} stages, is "
        f"short of {_gib(need_bytes - budget)} on stage {index} ({name} on submesh "
        f"{problem.submeshes[stage.submesh]}, option {stage.option}): {_gib(fixed)} fixed and "
        f"{_gib(per_microbatch)} for each of {held} microbatches in flight. "
        + " ".join(_remedies(problem, need_bytes, check_time))
    )
    return InfeasibleError(
        message,
        need_bytes=need_bytes,
        budget_bytes=budget,
        row=f"stage {index} ({name})",
        breakdown=dict(
            sorted(
                {"fixed": fixed, "in flight": held * per_microbatch}.items(),
                key=lambda item: -item[1],
            )
        ),
    )


def feasible_plan(problem: StageProblem, check_time: Callable[[], None]) -> PricedPlan | None:
    """The plan with the fewest devices, or None if that is more than there are."""
    plan = _fewest(problem, check_time)
    return plan if plan is not None and plan.num_devices <= problem.num_devices else None


def _fewest(problem: StageProblem, check_time: Callable[[], None]) -> PricedPlan | None:
    return fewest_devices(restrict(make_table(problem), math.inf, math.inf), check_time)


def _smallest_budget(
    problem: StageProblem, check_time: Callable[[], None]
) -> tuple[PricedPlan, StageTerms] | None:
    """A plan whose largest peak is smallest; None if there is none whatever the budget."""
    best = feasible_plan(dataclasses.replace(problem, memory_budget_bytes=math.inf), check_time)
    if best is None:
        return None
    terms = evaluate_stages(problem, best.stages)
    low = problem.memory_budget_bytes
    while max(terms.peak_bytes) - low > _BUDGET_RTOL * low:
        middle = (low + max(terms.peak_bytes)) / 2
        plan = feasible_plan(dataclasses.replace(problem, memory_budget_bytes=middle), check_time)
        if plan is None:
            low = middle
        else:
            terms, best = evaluate_stages(problem, plan.stages), plan
    return best, terms


def _remedies(
    problem: StageProblem, need_bytes: float, check_time: Callable[[], None]
) -> list[str]:
    """What was tried and helps, most specific first."""
    helps = [f"A budget of {_gib(need_bytes)} per device is enough."]
    unlimited = dataclasses.replace(problem, num_hosts=problem.num_hosts * problem.num_layers)
    more_hosts = _fewest(unlimited, check_time)
    if more_hosts is not None:
        helps.append(
            f"So are {more_hosts.num_devices} devices instead of {problem.num_devices}, with the "
            "same submeshes."
        )
    one = dataclasses.replace(problem, in_flight=lambda *_: 1)
    if feasible_plan(one, check_time) is not None:
        helps.append(
            "It would fit with one microbatch in flight: more, hence smaller, microbatches or "
            "rematerialisation may be enough."
        )
    else:
        helps.append(
            "Even one microbatch in flight does not fit: use more devices per stage, or shard or "
            "offload parameters and optimizer state."
        )
    return helps


def _no_cover_message(problem: StageProblem, check_time: Callable[[], None]) -> str:
    plan = _fewest(dataclasses.replace(problem, memory_budget_bytes=math.inf), check_time)
    if plan is not None:
        return (
            f"The layers need at least {plan.num_devices} devices in {len(plan.stages)} stages of "
            f"the offered submeshes, the cluster has {problem.num_devices}. Offer smaller "
            "submeshes, or stages with more layers."
        )
    offered = np.isfinite(problem.latency_s.min(axis=(1, 2)))
    reached = {0}
    for first in range(problem.num_layers):
        if first in reached:
            rows = problem.range_class[first, first:]
            ends = np.flatnonzero((rows >= 0) & offered[rows])
            reached.update((first + 1 + ends).tolist())
    if problem.num_layers not in reached:
        return (
            f"No stage is offered that reaches beyond layer {max(reached) - 1} of "
            f"{problem.num_layers} layers and joins on to earlier ones: all latencies of such "
            "ranges are infinite. Offer a submesh or an option that can run them."
        )
    return (
        "Stages that together hold all layers are offered, but they cannot follow one another: "
        "their boundary_s is infinite. Allow a transfer between their submeshes."
    )


def _gib(size: float) -> str:
    """Bytes as GiB, with enough digits for small test problems."""
    gib = size / _GIB
    return f"{gib:.2f} GiB" if abs(gib) >= 1 else f"{gib:.3g} GiB"
