import dataclasses
import math

import numpy as np
import pytest

from alpa_lite.passes.inter_op import brute_force_stages
from alpa_lite.passes.inter_op.device_dp import LabelLimitError, solve_limited
from alpa_lite.passes.inter_op.priced_dp import fewest_devices, solve_priced
from alpa_lite.passes.inter_op.stage_table import make_table, restrict
from tests.passes.inter_op.problems import random_problem


def never():
    pass


def sum_problem(seed):
    """The sum of latencies and transfers is the objective: one microbatch, no update.

    Memory is still that of a pipeline with more of them.
    """
    problem = random_problem(seed)
    return dataclasses.replace(
        problem,
        num_microbatches=1,
        per_step_s=np.zeros_like(problem.per_step_s),
        in_flight=lambda stages_after, _: min(stages_after + 1, 3),
    )


def whole(problem):
    return restrict(make_table(problem), math.inf, math.inf)


@pytest.mark.parametrize("price_s", [0.0, 0.5, 20.0])
def test_limited_sum_is_exact_whatever_the_price(price_s):
    for seed in range(100):
        problem = sum_problem(seed)
        expected = brute_force_stages(problem)
        arguments = {"price_s": price_s, "max_labels": 10_000, "check_time": never}
        plan = solve_limited(whole(problem), cutoff_s=1e9, **arguments)
        if expected is None:
            assert plan is None
            continue
        assert plan.sum_s == pytest.approx(expected.objective_s)
        assert plan.num_devices <= problem.num_devices
        below = solve_limited(whole(problem), cutoff_s=plan.sum_s * (1 - 1e-6), **arguments)
        assert below is None
        above = solve_limited(whole(problem), cutoff_s=plan.sum_s * (1 + 1e-6) + 1e-6, **arguments)
        assert above.sum_s == pytest.approx(plan.sum_s)


def test_priced_plan_is_a_lower_bound():
    for seed in range(100):
        problem = sum_problem(seed)
        expected = brute_force_stages(problem)
        if expected is None:
            continue
        for price_s in (0.0, 0.3, 3.0):
            plan = solve_priced(whole(problem), price_s, never)
            assert plan.priced_s == pytest.approx(plan.sum_s + price_s * plan.num_devices)
            assert plan.priced_s - price_s * problem.num_devices <= expected.objective_s + 1e-9


def test_fewest_devices():
    for seed in range(60):
        problem = random_problem(seed)
        fewest = fewest_devices(whole(problem), never)
        for hosts in range(1, problem.num_hosts + 1):
            shapes = [shape.num_hosts for shape in problem.submeshes]
            if max(shapes) > hosts:
                continue
            smaller = dataclasses.replace(problem, num_hosts=hosts)
            feasible = fewest is not None and fewest.num_devices <= smaller.num_devices
            assert (brute_force_stages(smaller) is not None) == feasible


def test_label_limit():
    problem = next(p for p in map(sum_problem, range(50)) if brute_force_stages(p))
    with pytest.raises(LabelLimitError):
        solve_limited(whole(problem), price_s=0.0, cutoff_s=1e9, max_labels=0, check_time=never)
