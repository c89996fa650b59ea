import itertools
import math

import pytest

from alpa_lite.errors import InfeasibleError, SolverTimeoutError
from alpa_lite.passes.inter_op import (
    Stage,
    evaluate_interleaved,
    interleaved_in_flight,
    solve_interleaved,
)
from tests.passes.inter_op.problems import model_problem, random_problem, uniform_problem


def brute_force(problem, num_virtual):
    """The best objective over all submeshes, numbers of meshes, cuts and options."""
    best = math.inf
    num_layers, num_options = problem.num_layers, problem.latency_s.shape[2]
    for submesh in range(len(problem.submeshes)):
        for count in range(2 * num_virtual, num_layers + 1, num_virtual):
            for cuts in itertools.combinations(range(1, num_layers), count - 1):
                ranges = list(itertools.pairwise([0, *cuts, num_layers]))
                for options in itertools.product(range(num_options), repeat=count):
                    chunks = [
                        Stage(first, end - 1, submesh, option)
                        for (first, end), option in zip(ranges, options, strict=True)
                    ]
                    best = min(best, evaluate_interleaved(problem, chunks, num_virtual))
    return best


def test_same_optimum_as_brute_force():
    feasible = 0
    for seed in range(800):
        problem = random_problem(seed)
        if problem.num_layers < 4:
            continue
        expected = brute_force(problem, 2)
        if expected == math.inf:
            with pytest.raises(InfeasibleError, match="2 chunks of layers"):
                solve_interleaved(problem, 2)
            continue
        feasible += 1
        solution = solve_interleaved(problem, 2)
        assert solution.objective_s == pytest.approx(expected, rel=2e-9)
        assert solution.lower_bound_s == pytest.approx(expected, rel=2e-9)
        assert evaluate_interleaved(problem, solution.chunks, 2) == pytest.approx(expected)
        assert len(solution.chunks) == 2 * solution.num_meshes
    assert feasible > 30


def test_equal_chunks_by_hand():
    # Two meshes of two chunks, each 1 s, 4 microbatches: (B v + S - 1) t.
    problem = uniform_problem([1.0], num_layers=4, submeshes=[(1, 1)], devices=2, per_step_s=0.5)
    solution = solve_interleaved(problem, 2)
    assert solution.objective_s == (4 * 2 + 2 - 1) + 2 * 0.5
    assert solution.chunks == tuple(Stage(i, i, 0, 0) for i in range(4))
    assert (solution.num_meshes, solution.idle_devices) == (2, 0)


def test_memory_by_hand():
    # Mesh 0 holds 2 + 2 + 1 chunks of activations and the parameters of two chunks.
    assert [interleaved_in_flight(mesh, 2, 2, 4) for mesh in range(2)] == [5, 3]
    arguments = {"num_layers": 4, "submeshes": [(1, 1)], "devices": 2, "fixed": 10, "in_flight": 1}
    assert solve_interleaved(uniform_problem([1.0], **arguments, budget=25), 2).num_meshes == 2
    with pytest.raises(InfeasibleError):
        solve_interleaved(uniform_problem([1.0], **arguments, budget=24.9), 2)


def test_never_holds_more_than_there_is():
    assert interleaved_in_flight(0, 8, 2, 1) == 2


def test_more_meshes_than_devices_is_not_feasible():
    problem = uniform_problem([1.0], num_layers=4, submeshes=[(1, 1)], devices=1)
    chunks = [Stage(i, i, 0, 0) for i in range(4)]
    assert evaluate_interleaved(problem, chunks, 2) == math.inf
    with pytest.raises(InfeasibleError):
        solve_interleaved(problem, 2)


def test_one_chunk_per_mesh_is_refused():
    problem = uniform_problem([1.0], num_layers=4, submeshes=[(1, 1)])
    with pytest.raises(ValueError, match="use solve_stages"):
        solve_interleaved(problem, 1)


def test_time_limit():
    with pytest.raises(SolverTimeoutError, match="interleaved"):
        solve_interleaved(model_problem(14, 4), 2, time_limit_s=0)


def test_medium_model():
    problem = model_problem(22, 4, hidden=8192, microbatches=32)
    solution = solve_interleaved(problem, 2)
    assert solution.num_meshes * 2 == len(solution.chunks)
    assert solution.objective_s == pytest.approx(evaluate_interleaved(problem, solution.chunks, 2))
