"""More plans than the best one, for a simulation of the schedule to choose from.

The search meets few plans close to the best one, most of them with its submeshes. Where objective
and simulation may disagree is how deep the pipeline is, so the proposals differ in that: each has
only stages with at most half as many devices as the largest stage of the one before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from .stage_problem import StageProblem, StageProposal
from .stage_search import NoPlanError, StageSearch, StopSearchError

# A proposal need not be the very best of its kind.
_GAP = 0.02


def deeper_pipelines(
    problem: StageProblem,
    best: StageProposal,
    count: int,
    *,
    deadline_s: float,
    should_stop: Callable[[], bool] | None,
) -> list[StageProposal]:
    """Up to `count` plans with smaller and smaller stages, each within 2 % of the best such plan.

    Args:
        problem: The problem.
        best: The plan to start from.
        count: How many further plans to look for.
        deadline_s: When to stop, by `time.perf_counter()`.
        should_stop: Asked often; True stops.
    """
    found: list[StageProposal] = []
    devices = np.array([shape.num_devices for shape in problem.submeshes])
    while len(found) < count:
        last = found[-1] if found else best
        largest = max(int(devices[stage.submesh]) for stage in last.stages)
        small = devices <= largest // 2
        search = StageSearch(
            dataclasses.replace(
                problem, latency_s=np.where(small[None, :, None], problem.latency_s, np.inf)
            ),
            deadline_s=deadline_s,
            should_stop=should_stop,
            num_proposals=1,
            gap=_GAP,
            cutoff_s=math.inf,
        )
        try:
            search.run()
        except (NoPlanError, StopSearchError, KeyboardInterrupt):
            break
        found.append(search.proposals[0])
    return found


def best_distinct(proposals: Sequence[StageProposal], count: int) -> tuple[StageProposal, ...]:
    """The best `count` of them, best first, each once."""
    distinct = {proposal.stages: proposal for proposal in proposals}.values()
    order = sorted(distinct, key=lambda p: (p.objective_s, len(p.stages), p.stages))
    return tuple(order[:count])
