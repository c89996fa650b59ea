"""Solves stage problems: one of them, or several alternatives of the same step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from alpa_lite.errors import InfeasibleError, SolverTimeoutError

from .stage_infeasible import infeasible_error
from .stage_problem import (
    StageProblem,
    StageProposal,
    StageSolution,
    StageStatus,
    verify_stage_problem,
)
from .stage_proposals import best_distinct, deeper_pipelines
from .stage_search import NoPlanError, StageSearch, StopSearchError


def solve_stages(
    problem: StageProblem,
    *,
    time_limit_s: float | None = None,
    should_stop: Callable[[], bool] | None = None,
    num_proposals: int = 4,
    gap: float = 0.0,
    num_stages: int | None = None,
) -> StageSolution:
    """Cuts the layers into stages and gives each a submesh and an option.

    The same problem gives the same answer unless a time limit or a stop cuts it short. Ctrl-C
    (KeyboardInterrupt) ends the search with the best plan so far once there is one.

    Args:
        problem: The problem.
        time_limit_s: Seconds after which the best plan found so far is returned.
        should_stop: Asked often; True ends the search.
        num_proposals: How many plans to keep for the caller to judge.
        gap: Relative gap at which to stop; 0 asks for a proof of optimality.
        num_stages: The number of stages there must be, None if it is free.

    Returns:
        The solution; see `StageSolution.status` for how it ended.

    Raises:
        InfeasibleError: If no plan is offered or none fits, with the reason.
        SolverTimeoutError: If the search was ended before a feasible plan was found.
        ValueError: If the problem is malformed.

    Example:
        >>> import numpy as np
        >>> from alpa_lite.passes.inter_op import Submesh
        >>> problem = StageProblem(  # two layers, two devices: one stage each
        ...     num_hosts=1, devices_per_host=2, submeshes=(Submesh(1, 1),),
        ...     range_class=np.array([[0, 1], [-1, 0]]),
        ...     latency_s=np.array([[[1.0]], [[2.0]]]),
        ...     fixed_bytes=np.zeros((2, 1, 1)), in_flight_bytes=np.zeros((2, 1, 1)),
        ...     per_step_s=np.zeros((2, 1, 1)), boundary_s=np.full((1, 1, 1), 0.5),
        ...     memory_budget_bytes=np.inf, num_microbatches=4,
        ... )
        >>> solve_stages(problem).objective_s  # 1 + 0.5 + 1 + 3 * 1
        5.5
    """
    return solve_stage_candidates(
        [problem],
        time_limit_s=time_limit_s,
        should_stop=should_stop,
        num_proposals=num_proposals,
        gap=gap,
        num_stages=num_stages,
    )[1]


def solve_stage_candidates(
    problems: Sequence[StageProblem],
    *,
    time_limit_s: float | None = None,
    should_stop: Callable[[], bool] | None = None,
    num_proposals: int = 4,
    gap: float = 0.0,
    num_stages: int | None = None,
) -> tuple[int, StageSolution]:
    """Solves alternatives of one step (microbatch counts, schedules) and takes the best.

    What one achieves cuts short the search of the next. The time limit is for all of them; each
    gets an equal share of what is left.

    Args:
        problems: The alternatives; of equally good ones the first wins.
        time_limit_s: See `solve_stages`; likewise for the other arguments.
        should_stop: See `solve_stages`.
        num_proposals: Plans to keep, of the problem that wins.
        gap: Relative gap at which to stop each search.
        num_stages: See `solve_stages`.

    Returns:
        Index of the problem and its solution, whose `lower_bound_s`, `gap` and `status` are about
        all problems together.

    Raises:
        InfeasibleError: If no problem is feasible; the reason is that of the problem that misses
            the fewest bytes.
        SolverTimeoutError: If the search was ended before a feasible plan was found.
        ValueError: If there is no problem, or one is malformed.
    """
    if not problems:
        raise ValueError("There is no stage problem to solve.")
    for problem in problems:
        verify_stage_problem(problem)
    start_s = time.perf_counter()
    best: tuple[int, StageSearch] | None = None
    best_s = lower_bound_s = math.inf
    num_proposals = max(1, num_proposals)
    errors: list[InfeasibleError] = []
    statuses: list[StageStatus] = []
    for index, problem in enumerate(problems):
        search = StageSearch(
            problem,
            deadline_s=_deadline_s(start_s, time_limit_s, len(problems) - index),
            should_stop=should_stop,
            num_proposals=num_proposals,
            gap=gap,
            cutoff_s=best_s,
            num_stages=num_stages,
        )
        try:
            try:
                statuses.append(search.run())
            except NoPlanError:
                if num_stages is None:
                    errors.append(infeasible_error(problem, search.check_time))
                else:
                    errors.append(
                        InfeasibleError(
                            f"No plan of exactly {num_stages} stages is offered, fits "
                            f"{problem.num_devices} devices and the memory budget. Use another "
                            "number of stages."
                        )
                    )
                continue
        except StopSearchError:
            stopped = should_stop is not None and should_stop()
            statuses.append("interrupted" if stopped else "time_limit")
        except KeyboardInterrupt:
            if best is None and not search.proposals:
                raise
            statuses.append("interrupted")
        lower_bound_s = min(lower_bound_s, search.lower_bound_s)
        if search.proposals and search.proposals[0].objective_s < best_s:
            best, best_s = (index, search), search.proposals[0].objective_s
        if statuses[-1] == "interrupted":
            # Nothing is known about the problems that were not looked at.
            lower_bound_s = lower_bound_s if index + 1 == len(problems) else 0.0
            break
    if best is None:
        if statuses:
            raise SolverTimeoutError(
                "The search was ended before a feasible plan of stages was found. Raise "
                "time_limit_s."
            )
        raise min(errors, key=_missing_bytes)
    index, search = best
    proposals = search.proposals
    if num_proposals > 1 and num_stages is None and "interrupted" not in statuses:
        # These come first: what the search met on the way only fills up.
        deeper = deeper_pipelines(
            problems[index],
            proposals[0],
            num_proposals - 1,
            deadline_s=_deadline_s(start_s, time_limit_s, 1),
            should_stop=should_stop,
        )
        met = proposals[1 : num_proposals - len(deeper)]
        proposals = [proposals[0], *deeper, *met]
    wall_s = time.perf_counter() - start_s
    solution = _solution(
        problems[index],
        best_distinct(proposals, num_proposals),
        lower_bound_s,
        statuses,
        wall_s,
    )
    return index, solution


def _deadline_s(start_s: float, time_limit_s: float | None, num_left: int) -> float:
    if time_limit_s is None:
        return math.inf
    now_s = time.perf_counter()
    return now_s + max(0.0, start_s + time_limit_s - now_s) / num_left


def _solution(
    problem: StageProblem,
    proposals: tuple[StageProposal, ...],
    lower_bound_s: float,
    statuses: Sequence[StageStatus],
    wall_s: float,
) -> StageSolution:
    best = proposals[0]
    lower_bound_s = min(lower_bound_s, best.objective_s)
    used = sum(problem.submeshes[stage.submesh].num_devices for stage in best.stages)
    proven = all(status == "optimal" for status in statuses)
    worst_first: tuple[StageStatus, ...] = ("interrupted", "time_limit", "unproven", "within_gap")
    return StageSolution(
        stages=best.stages,
        objective_s=best.objective_s,
        lower_bound_s=lower_bound_s,
        gap=0.0 if proven else (best.objective_s - lower_bound_s) / max(best.objective_s, 1e-300),
        status=next((status for status in worst_first if status in statuses), "optimal"),
        idle_devices=problem.num_devices - used,
        proposals=proposals,
        wall_s=wall_s,
    )


def _missing_bytes(error: InfeasibleError) -> float:
    if error.need_bytes is None or error.budget_bytes is None:
        return math.inf
    return error.need_bytes - error.budget_bytes
