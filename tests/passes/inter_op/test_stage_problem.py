import dataclasses
import math
import re

import numpy as np
import pytest

from alpa_lite.passes.inter_op import (
    Stage,
    Submesh,
    brute_force_stages,
    evaluate_stages,
    gpipe_in_flight,
    one_f_one_b_in_flight,
    submesh_shapes,
    verify_stage_problem,
)
from alpa_lite.passes.inter_op.stage_problem import fits
from tests.passes.inter_op.problems import model_problem, random_problem, uniform_problem

inf = math.inf


def two_meshes(**changes):
    """Four layers; submeshes of one and two devices take 2 s and 1 s per layer."""
    defaults = {"num_layers": 4, "submeshes": [(1, 1), (1, 2)], "boundary_s": 0.25}
    return uniform_problem([2.0, 1.0], **(defaults | changes))


def test_objective_by_hand():
    problem = two_meshes(per_step_s=0.5, fixed=10.0, in_flight=1.0, microbatches=8)
    terms = evaluate_stages(problem, [Stage(0, 0, 0, 0), Stage(1, 3, 1, 0)])
    # 2 + 0.25 + 3, then 7 times the slowest (3), then the update of three layers.
    assert terms.objective_s == 5.25 + 21 + 1.5
    assert (terms.latency_s, terms.boundary_s, terms.per_step_s) == ((2, 3), (0.25,), (0.5, 1.5))
    assert terms.peak_bytes == (10 + 2, 30 + 3)
    assert terms.num_devices == 3


def test_slow_link_is_a_station():
    problem = two_meshes(boundary_s=5.0, microbatches=3)
    terms = evaluate_stages(problem, [Stage(0, 1, 1, 0), Stage(2, 3, 1, 0)])
    assert terms.objective_s == 2 + 5 + 2 + 2 * 5


def test_one_microbatch_has_no_steady_state():
    terms = evaluate_stages(two_meshes(microbatches=1), [Stage(0, 3, 1, 0)])
    assert terms.objective_s == 4


def test_what_does_not_fit():
    stages = [Stage(0, 3, 1, 0)]
    for changes, expected in [
        ({}, True),
        ({"budget": 4.0, "fixed": 1.0}, True),
        ({"budget": 3.9, "fixed": 1.0}, False),
        ({"devices": 1, "submeshes": [(1, 1), (1, 1)]}, True),
    ]:
        problem = two_meshes(**changes)
        assert fits(problem, evaluate_stages(problem, stages)) == expected
    problem = two_meshes(devices=2)
    crowded = [Stage(0, 1, 1, 0), Stage(2, 3, 1, 0)]
    assert not fits(problem, evaluate_stages(problem, crowded))


def test_range_that_is_not_offered():
    problem = two_meshes()
    problem.range_class[0, 3] = -1
    assert evaluate_stages(problem, [Stage(0, 3, 1, 0)]).objective_s == inf


@pytest.mark.parametrize("stages", [[], [(0, 2)], [(0, 1), (1, 3)], [(1, 3)], [(0, 3), (4, 3)]])
def test_stages_must_cover_the_layers(stages):
    with pytest.raises(ValueError, match="do not cover 4 layers in order"):
        evaluate_stages(two_meshes(), [Stage(first, last, 0, 0) for first, last in stages])


def test_in_flight_by_schedule():
    assert [one_f_one_b_in_flight(after, 3) for after in range(5)] == [1, 2, 3, 3, 3]
    assert [gpipe_in_flight(after, 3) for after in range(3)] == [3, 3, 3]


def test_brute_force_by_hand():
    # Two stages of two layers on two devices each: 2 + 0.25 + 2 + 3 * 2; one stage: 4 + 3 * 4.
    found = brute_force_stages(two_meshes())
    assert found.objective_s == 10.25
    assert found.stages == (Stage(0, 1, 1, 0), Stage(2, 3, 1, 0))
    assert brute_force_stages(two_meshes(budget=1.0, fixed=2.0)) is None


def test_brute_force_refuses_large_problems():
    with pytest.raises(ValueError, match="too many for brute force"):
        brute_force_stages(model_problem(8, 2))


@pytest.mark.parametrize(
    ("hosts", "devices", "expected"),
    [
        (1, 1, "1x1"),
        (2, 8, "1x1 1x2 1x4 1x8 2x8"),
        (3, 6, "1x1 1x2 1x6 2x6 3x6"),
        (2048, 8, "1x1 1x2 1x4 " + " ".join(f"{1 << k}x8" for k in range(12))),
    ],
)
def test_submesh_shapes(hosts, devices, expected):
    assert " ".join(map(str, submesh_shapes(hosts, devices))) == expected


@pytest.mark.parametrize("seed", range(40))
def test_generated_problems_are_well_formed(seed):
    verify_stage_problem(random_problem(seed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"range_class": np.zeros((2, 3), dtype=int)}, "range_class has shape (2, 3)"),
        ({"range_class": np.full((4, 4), 9)}, "outside of the 4 rows"),
        ({"num_microbatches": 0}, "num_microbatches is 0"),
        ({"memory_budget_bytes": 0.0}, "use inf for no budget"),
        ({"memory_budget_bytes": math.nan}, "memory_budget_bytes is nan"),
        ({"latency_s": np.ones((4, 1, 1))}, "expected [rows, 2 submeshes, options]"),
        ({"latency_s": np.full((4, 2, 1), -1.0)}, "latency_s contains"),
        ({"latency_s": np.full((4, 2, 1), math.nan)}, "latency_s contains"),
        ({"fixed_bytes": np.full((4, 2, 1), inf)}, "fixed_bytes contains"),
        ({"per_step_s": np.zeros((4, 2, 2))}, "per_step_s has shape"),
        ({"boundary_s": np.zeros((4, 2, 2))}, "boundary_s has shape"),
        ({"num_hosts": 0}, "has no devices"),
        ({"submeshes": (Submesh(2, 4), Submesh(1, 1))}, "Submesh 2x4 does not fit on 1x4"),
        ({"submeshes": (Submesh(1, 3), Submesh(1, 1))}, "each size must divide the next"),
        ({"submeshes": (Submesh(2, 2), Submesh(1, 1)), "num_hosts": 2}, "part of several hosts"),
    ],
)
def test_malformed_problems(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        verify_stage_problem(dataclasses.replace(two_meshes(), **change))
