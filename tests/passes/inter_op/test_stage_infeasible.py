import dataclasses
import math

import numpy as np
import pytest

from alpa_lite.errors import InfeasibleError
from alpa_lite.passes.inter_op import brute_force_stages, solve_stage_candidates, solve_stages
from tests.passes.inter_op.problems import GIB, random_problem, uniform_problem

inf = math.inf


def reason(problem):
    with pytest.raises(InfeasibleError) as error:
        solve_stages(problem)
    return error.value


def test_smallest_budget_is_the_smallest():
    seen = 0
    for seed in range(150):
        problem = random_problem(seed)
        unlimited = dataclasses.replace(problem, memory_budget_bytes=inf)
        if brute_force_stages(problem) is not None or brute_force_stages(unlimited) is None:
            continue
        seen += 1
        need = reason(problem).need_bytes
        enough = dataclasses.replace(problem, memory_budget_bytes=need)
        assert brute_force_stages(enough) is not None
        short = dataclasses.replace(problem, memory_budget_bytes=need * (1 - 1e-6))
        assert brute_force_stages(short) is None
    assert seen > 10


def memory_problem(**changes):
    """Three layers on two devices: two layers on one of them, at least."""
    defaults = {
        "num_layers": 3,
        "submeshes": [(1, 1)],
        "devices": 2,
        "fixed": 4 * GIB,
        "in_flight": 1 * GIB,
        "budget": 9 * GIB,
    }
    return uniform_problem([1.0], **(defaults | changes))


def test_memory_by_hand():
    # The last stage with two layers holds one microbatch: 8 + 2.
    error = reason(memory_problem())
    assert error.need_bytes == pytest.approx(10 * GIB)
    assert error.budget_bytes == 9 * GIB
    assert error.row == "stage 1 (layers 1-2)"
    assert error.breakdown == {"fixed": 8 * GIB, "in flight": 2 * GIB}
    message = str(error)
    assert "No plan fits 9.00 GiB per device" in message
    assert "short of 1.00 GiB on stage 1 (layers 1-2 on submesh 1x1, option 0)" in message
    assert "8.00 GiB fixed and 2.00 GiB for each of 1 microbatches in flight" in message
    assert "A budget of 10.00 GiB per device is enough" in message
    assert "So are 3 devices instead of 2" in message
    assert "Even one microbatch in flight does not fit" in message


def test_fewer_microbatches_in_flight_would_do():
    message = str(reason(memory_problem(fixed=0.0, in_flight=4 * GIB, budget=7.9 * GIB)))
    assert "Even one microbatch" in message
    # One layer each: the first stage holds two microbatches.
    message = str(reason(memory_problem(num_layers=2, fixed=0, in_flight=4 * GIB, budget=7 * GIB)))
    assert "It would fit with one microbatch in flight" in message


def test_no_remedy_is_promised_that_fails():
    message = str(reason(memory_problem(fixed=20 * GIB)))
    assert "devices instead of" not in message
    assert "A budget of 42.00 GiB" in message


def test_more_stages_hold_more_microbatches():
    # From the end: two layers hold 2, one layer of the next 2, one layer of the third already 3.
    changes = {"num_layers": 4, "devices": 1, "fixed": 0.0, "budget": 2 * GIB}
    assert "devices instead of" not in str(reason(memory_problem(**changes)))
    changes["num_layers"] = 3
    assert "So are 2 devices instead of 1" in str(reason(memory_problem(**changes)))


def test_too_few_devices():
    problem = uniform_problem([1.0], num_layers=4, submeshes=[(1, 1)], devices=2)
    problem.latency_s[1:] = inf  # one layer per stage
    error = reason(problem)
    assert error.need_bytes is None
    assert "need at least 4 devices in 4 stages" in str(error)
    assert "the cluster has 2" in str(error)


def test_layer_that_no_stage_can_hold():
    problem = uniform_problem([1.0], num_layers=4, submeshes=[(1, 1)])
    problem.range_class[:3, 2:] = -1
    assert "reaches beyond layer 1 of 4 layers" in str(reason(problem))


def test_transfer_that_is_forbidden():
    problem = uniform_problem([1.0], num_layers=2, submeshes=[(1, 1)], boundary_s=inf)
    problem.latency_s[1:] = inf
    assert "their boundary_s is infinite" in str(reason(problem))


def test_closest_of_several_problems():
    far, near = memory_problem(budget=1 * GIB), memory_problem()
    with pytest.raises(InfeasibleError, match="fits 9.00 GiB"):
        solve_stage_candidates([far, near])
    index, solution = solve_stage_candidates([far, memory_problem(budget=10 * GIB)])
    assert (index, solution.status) == (1, "optimal")
    assert np.isfinite(solution.objective_s)
