"""Interleaved stages: equal submeshes, each with several chunks of layers that are far apart.

With S meshes and v chunks on each, the layers are cut into `S v` chunks, mesh p holding the chunks
`p, p + S, ...`, and the pipeline fills v times sooner (Narayanan et al. 2021, section 2.2). The
model, exact for chunks that are alike, which is what interleaving is for:

    minimise   sum_c (t_c + b_c) / v + (B v - 1) max(max_c t_c, max_c b_c) + v max_c p_c    seconds
    subject to v fixed_c + held_p * bytes per microbatch_c <= budget  for every chunk c of mesh p

For equal chunks without transfers this is `(B v + S - 1) t`; for v = 1 it is the objective of
`stage_problem`. `held_p` is the number of chunks of activations mesh p holds at its fullest; memory
and once-per-step work are counted as if all chunks of a mesh were like the one looked at. All S
meshes have the same submesh; options may differ between chunks. S, submesh, cuts and options are
searched and the result is optimal for this model; the schedule simulator has the last word.

As each mesh is on the same submesh, this is a stage problem with a prescribed number of stages and
other numbers, and `stage_search` solves it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from alpa_lite.errors import InfeasibleError, SolverTimeoutError

from .stage_problem import Stage, StageProblem, memory_limit, verify_stage_problem
from .stage_search import NoPlanError, StageSearch, StopSearchError


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedSolution:
    """Chunks in the order of the layers; chunk c runs on mesh `c % num_meshes`.

    Attributes:
        chunks: Layers, submesh and option of each chunk.
        num_meshes: S.
        num_virtual: v, chunks per mesh.
        objective_s: Seconds per step in the model of the module docstring.
        lower_bound_s: No such plan takes less, seconds.
        idle_devices: Devices of the cluster no mesh uses.
        wall_s: Seconds spent.
    """

    chunks: tuple[Stage, ...]
    num_meshes: int
    num_virtual: int
    objective_s: float
    lower_bound_s: float
    idle_devices: int
    wall_s: float


def interleaved_in_flight(
    mesh: int, num_meshes: int, num_virtual: int, num_microbatches: int
) -> int:
    """Chunks of activations a mesh holds at its fullest under interleaved 1F1B: its warm-up.

    Example:
        >>> [interleaved_in_flight(mesh, 4, 2, 8) for mesh in range(4)]
        [11, 9, 7, 5]
    """
    groups = max(1, num_microbatches // num_meshes)
    group = -(-num_microbatches // groups)
    warm_up = (num_virtual - 1) * group + 2 * (num_meshes - 1 - mesh) + 1
    return min(warm_up, num_virtual * num_microbatches)


def evaluate_interleaved(problem: StageProblem, chunks: Sequence[Stage], num_virtual: int) -> float:
    """The objective of the module docstring from its definition, seconds; `inf` if not feasible.

    Args:
        problem: The problem; `in_flight` is ignored, the schedule is interleaved 1F1B.
        chunks: Chunks in the order of the layers, all on the same submesh.
        num_virtual: Chunks per mesh; their number must be a multiple of it.
    """
    num_meshes = len(chunks) // num_virtual
    num_devices = num_meshes * problem.submeshes[chunks[0].submesh].num_devices
    if num_devices > problem.num_devices:
        return math.inf
    terms_s: list[float] = []
    per_step_s = 0.0
    for index, chunk in enumerate(chunks):
        row = int(problem.range_class[chunk.first_layer, chunk.last_layer])
        cell = row, chunk.submesh, chunk.option
        mesh = index % num_meshes
        held = interleaved_in_flight(mesh, num_meshes, num_virtual, problem.num_microbatches)
        need = num_virtual * problem.fixed_bytes[cell] + held * problem.in_flight_bytes[cell]
        if row < 0 or need > memory_limit(problem.memory_budget_bytes):
            return math.inf
        terms_s.append(float(problem.latency_s[cell]))
        per_step_s = max(per_step_s, num_virtual * float(problem.per_step_s[cell]))
        if index:
            pair = chunk.first_layer - 1, chunk.submesh, chunk.submesh
            terms_s.append(float(problem.boundary_s[pair]))
    repeats = problem.num_microbatches * num_virtual - 1
    return math.fsum(terms_s) / num_virtual + repeats * max(terms_s) + per_step_s


def solve_interleaved(
    problem: StageProblem,
    num_virtual: int,
    *,
    time_limit_s: float | None = None,
    gap: float = 0.0,
) -> InterleavedSolution:
    """The best interleaved plan with `num_virtual` chunks per mesh, on two or more meshes.

    Args:
        problem: The problem; `in_flight` is ignored, the schedule is interleaved 1F1B.
        num_virtual: v, at least 2: one chunk per mesh is what `solve_stages` is for.
        time_limit_s: Seconds after which the best plan so far is returned.
        gap: Relative gap at which to stop.

    Raises:
        InfeasibleError: If there is no such plan.
        SolverTimeoutError: If the time limit ran out before a plan was found.
        ValueError: If the problem is malformed or `num_virtual` below 2.
    """
    verify_stage_problem(problem)
    if num_virtual < 2:
        raise ValueError(f"num_virtual is {num_virtual}; use solve_stages for one chunk per mesh.")
    start_s = time.perf_counter()
    deadline_s = math.inf if time_limit_s is None else start_s + time_limit_s
    best_s = lower_bound_s = math.inf
    best: tuple[int, tuple[Stage, ...]] | None = None
    for submesh, shape in enumerate(problem.submeshes):
        most = min(problem.num_layers // num_virtual, problem.num_devices // shape.num_devices)
        for num_meshes in range(2, most + 1):
            search = StageSearch(
                _as_stages(problem, submesh, num_meshes, num_virtual),
                deadline_s=deadline_s,
                should_stop=None,
                num_proposals=1,
                gap=gap,
                cutoff_s=best_s,
                num_stages=num_meshes * num_virtual,
            )
            try:
                search.run()
            except NoPlanError:
                continue
            except StopSearchError:
                pass
            lower_bound_s = min(lower_bound_s, search.lower_bound_s)
            if search.proposals and search.proposals[0].objective_s < best_s:
                found = search.proposals[0]
                chunks = [dataclasses.replace(s, submesh=submesh) for s in found.stages]
                best, best_s = (num_meshes, tuple(chunks)), found.objective_s
    if best is None:
        if time.perf_counter() > deadline_s:
            raise SolverTimeoutError(
                "The search was ended before feasible interleaved stages were found. Raise "
                "time_limit_s."
            )
        raise InfeasibleError(
            f"No plan with {num_virtual} chunks of layers on each of two or more equal submeshes "
            f"is offered, fits {problem.num_devices} devices and the memory budget. Use fewer "
            "chunks per mesh, or a schedule that is not interleaved: it holds fewer microbatches."
        )
    num_meshes, chosen = best
    return InterleavedSolution(
        chunks=chosen,
        num_meshes=num_meshes,
        num_virtual=num_virtual,
        objective_s=best_s,
        lower_bound_s=min(best_s, lower_bound_s),
        idle_devices=problem.num_devices
        - num_meshes * problem.submeshes[chosen[0].submesh].num_devices,
        wall_s=time.perf_counter() - start_s,
    )


def _as_stages(
    problem: StageProblem, submesh: int, num_meshes: int, num_virtual: int
) -> StageProblem:
    """The stage problem with `num_meshes * num_virtual` stages that stands for the model.

    With all seconds per microbatch divided by v, the maximum counts `v (B v - 1)` times. Devices
    do not matter any more, so the cluster is as large as all stages together.
    """
    only = slice(submesh, submesh + 1)
    num_chunks, num_microbatches = num_meshes * num_virtual, problem.num_microbatches

    def held(stages_after: int, _: int) -> int:
        mesh = (num_chunks - 1 - stages_after) % num_meshes
        return interleaved_in_flight(mesh, num_meshes, num_virtual, num_microbatches)

    shape = problem.submeshes[submesh]
    return dataclasses.replace(
        problem,
        num_hosts=num_chunks * shape.num_hosts,
        submeshes=(shape,),
        latency_s=problem.latency_s[:, only] / num_virtual,
        fixed_bytes=problem.fixed_bytes[:, only] * num_virtual,
        in_flight_bytes=problem.in_flight_bytes[:, only],
        per_step_s=problem.per_step_s[:, only] * num_virtual,
        boundary_s=problem.boundary_s[:, only, only] / num_virtual,
        num_microbatches=num_virtual * (num_microbatches * num_virtual - 1) + 1,
        in_flight=held,
    )
