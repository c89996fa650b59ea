import math

import numpy as np
import pytest

from alpa_lite.errors import AlpaLiteError, InfeasibleError
from alpa_lite.passes.intra_op import brute_force, evaluate, smallest_peak, solve_intra_op
from tests.passes.intra_op.problems import problem_of, random_problem

inf = math.inf
GIB = 2.0**30
EQUAL = [[0, inf], [inf, 0]]


def test_memory_message_says_how_much_where_what_and_what_helps():
    problem = problem_of(
        [[1, 2], [1, 1]],
        rows=[
            ("forward of layer 3", 0, {0: [GIB, GIB]}),
            ("update", 4 * GIB, {0: [30 * GIB, 10 * GIB], 1: [8 * GIB, 7.5 * GIB]}),
        ],
        budget=16 * GIB,
    )
    with pytest.raises(InfeasibleError) as caught:
        solve_intra_op(problem)
    message = str(caught.value)
    assert "fits 16 GiB per device" in message
    assert "smallest peak is 21.5 GiB, 5.50 GiB too much, at 'update'" in message
    assert "Largest there: a 10 GiB, b 7.50 GiB, fixed 4 GiB." in message
    for help_ in ("more devices", "memory_budget_bytes", "more microbatches", "rematerialisation"):
        assert help_ in message
    error = caught.value
    assert (error.need_bytes, error.budget_bytes) == (21.5 * GIB, 16 * GIB)
    assert error.row == "update"
    assert dict(error.breakdown) == {"a": 10 * GIB, "b": 7.5 * GIB, "fixed": 4 * GIB}
    assert isinstance(error, ValueError)
    assert isinstance(error, AlpaLiteError)


def test_rows_that_only_conflict_together():
    # Either row alone fits; they want opposite strategies.
    problem = problem_of(
        [[0, 0]], rows=[("first", 0, {0: [9, 1]}), ("second", 0, {0: [1, 9]})], budget=5
    )
    with pytest.raises(InfeasibleError, match="smallest peak") as caught:
        solve_intra_op(problem)
    assert caught.value.need_bytes == 9


def test_memory_that_forbidden_pairs_force():
    problem = problem_of(
        [[0, 0], [0, 0]],
        edges=[(0, 1, [[inf, 0], [0, inf]])],
        rows=[("r", 0, {0: [1, 5], 1: [1, 5]})],
        budget=5,
    )
    with pytest.raises(InfeasibleError, match="at 'r'") as caught:
        solve_intra_op(problem)
    assert caught.value.need_bytes == 6


def test_node_without_a_strategy_is_named():
    with pytest.raises(InfeasibleError, match="Node 'b' has no allowed strategy"):
        solve_intra_op(problem_of([[1, 2], [inf, inf]]))


def test_pinned_pair_is_named_alone():
    problem = problem_of(
        [[0, 0], [0, inf], [inf, 0], [0, 0]],
        edges=[(0, 1, [[1, 2], [3, 4]]), (1, 2, EQUAL), (2, 3, [[1, 2], [3, 4]])],
    )
    with pytest.raises(InfeasibleError, match="Nodes 'b' and 'c' have no allowed combination") as e:
        solve_intra_op(problem)
    assert e.value.need_bytes is None
    assert not e.value.breakdown


def test_pins_at_the_ends_of_an_alias_chain_name_the_chain():
    problem = problem_of(
        [[0, inf], [0, 0], [inf, 0], [5, 6]],
        edges=[(0, 1, EQUAL), (1, 2, EQUAL), (2, 3, [[0, 0]] * 2)],
    )
    with pytest.raises(InfeasibleError, match="Nodes 'a', 'b' and 'c' have no allowed combination"):
        solve_intra_op(problem)


def test_odd_cycle_of_two_colours_is_named():
    differ = [[inf, 0], [0, inf]]
    problem = problem_of(
        [[0, 0]] * 4, edges=[(0, 1, differ), (1, 2, differ), (0, 2, differ), (2, 3, differ)]
    )
    with pytest.raises(
        InfeasibleError, match=r"Nodes 'a', 'b' and 'c' have no allowed.*each neigh"
    ):
        solve_intra_op(problem)


@pytest.mark.parametrize("first", range(0, 90, 30))
def test_smallest_peak_by_enumeration(first):
    for seed in range(first, first + 30):
        problem = random_problem(seed, rows=1 + seed % 3)
        found = smallest_peak(problem, time_limit_s=10)
        choices = np.ndindex(*problem.num_strategies)
        peaks = [
            evaluate(problem, choice)[1].max()
            for choice in choices
            if evaluate(problem, choice)[0] < inf
        ]
        if found is None:
            assert not peaks
        else:
            assert found.proven
            assert found.peak_bytes == pytest.approx(min(peaks), rel=1e-6)
            assert evaluate(problem, found.choice)[1].max() == found.peak_bytes


def test_the_error_is_raised_exactly_when_nothing_is_feasible():
    infeasible = 0
    for seed in range(60):
        problem = random_problem(seed)
        if brute_force(problem) is None:
            infeasible += 1
            with pytest.raises(InfeasibleError):
                solve_intra_op(problem)
        else:
            solve_intra_op(problem)
    assert infeasible > 5
