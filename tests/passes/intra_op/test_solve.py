import dataclasses
import math
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from alpa_lite.errors import InfeasibleError, SolverTimeoutError
from alpa_lite.passes.intra_op import available_solvers, brute_force, evaluate, solve_intra_op
from alpa_lite.passes.intra_op import solve as solve_module
from alpa_lite.passes.intra_op.labels import LabelLimitError
from alpa_lite.passes.intra_op.milp import MilpOutcome
from alpa_lite.passes.intra_op.problem import fits_budget
from tests.passes.intra_op.problems import (
    hub_problem,
    layered_problem,
    problem_of,
    random_problem,
    scattered_problem,
)

inf = math.inf
seeds = st.integers(0, 10_000)


def no_labels(*_):
    raise LabelLimitError


@pytest.fixture(params=["default", "without labels", "message passing"])
def route(request, monkeypatch):
    """Small problems rarely reach the later steps: take the earlier ones away."""
    if request.param != "default":
        monkeypatch.setattr(solve_module, "solve_by_labels", no_labels)
    if request.param == "message passing":
        monkeypatch.setattr(solve_module, "plan_elimination", lambda *_: None)


def check_solution(problem, solution):
    objective_s, row_bytes = evaluate(problem, solution.choice)
    assert solution.objective_s == objective_s < inf
    assert fits_budget(row_bytes, problem.memory_budget_bytes)
    assert solution.peak_bytes == row_bytes.max(initial=0.0)
    assert solution.lower_bound_s <= objective_s
    assert solution.gap >= 0
    if solution.status == "optimal":
        assert solution.gap == 0
        assert solution.lower_bound_s == pytest.approx(objective_s, rel=1e-7)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("first", range(0, 240, 24))
def test_same_optimum_as_brute_force(first):
    for seed in range(first, first + 24):
        problem = random_problem(seed)
        expected = brute_force(problem)
        if expected is None:
            with pytest.raises(InfeasibleError):
                solve_intra_op(problem)
            continue
        solution = solve_intra_op(problem)
        check_solution(problem, solution)
        assert solution.status == "optimal"
        assert solution.objective_s == pytest.approx(expected[1], rel=2e-9)


@pytest.mark.parametrize("solver", available_solvers())
def test_solvers_agree(solver, monkeypatch):
    monkeypatch.setattr(solve_module, "solve_by_labels", no_labels)
    problem = layered_problem(18, 8, num_rows=2, room=0.6)
    solution = solve_intra_op(problem, solver=solver)
    check_solution(problem, solution)
    assert solution.status == "optimal"
    assert solution.objective_s == pytest.approx(solve_intra_op(problem).objective_s, rel=1e-8)


def test_unknown_solver_is_refused_before_anything_else():
    with pytest.raises(ValueError, match=r"solver 'cplex'; available: .*highs"):
        solve_intra_op(problem_of([]), solver="cplex")


def test_empty_problem():
    solution = solve_intra_op(problem_of([]))
    assert (solution.choice, solution.objective_s, solution.status) == ((), 0.0, "optimal")
    assert solve_intra_op(problem_of([]), warm_start=()).choice == ()


def test_empty_problem_that_does_not_fit():
    with pytest.raises(InfeasibleError, match="smallest peak"):
        solve_intra_op(problem_of([], rows=[("r", 8, {})], budget=4))


def test_single_node():
    assert solve_intra_op(problem_of([[3, 1, 2]])).choice == (1,)


def test_single_node_with_memory():
    problem = problem_of([[3, 1, 2]], rows=[("r", 0, {0: [1, 9, 5]})], budget=6)
    solution = solve_intra_op(problem)
    assert (solution.choice, solution.binding_row, solution.peak_bytes) == ((2,), "r", 5.0)


def test_all_costs_zero():
    solution = solve_intra_op(problem_of([[0, 0]] * 3, edges=[(0, 1, np.zeros((2, 2)))]))
    assert (solution.objective_s, solution.gap, solution.status) == (0.0, 0.0, "optimal")


def test_aliases_keep_state_layouts_equal():
    alias = np.where(np.eye(3, dtype=bool), 0.0, inf)
    problem = problem_of(
        [[0, 1, 5], [9, 2, 0], [0, 0, 0]],
        edges=[(0, 1, alias), (1, 2, np.ones((3, 3)))],
        rows=[("r", 0, {0: [1, 2, 3], 1: [1, 2, 3]})],
        budget=5,
    )
    solution = solve_intra_op(problem)
    assert solution.choice[:2] == (1, 1)


def test_budget_that_does_not_bind_is_not_named():
    problem = problem_of([[1, 2]], rows=[("r", 0, {0: [4, 1]})], budget=10)
    solution = solve_intra_op(problem)
    assert (solution.binding_row, solution.peak_bytes) == (None, 4.0)


@hypothesis.given(seed=seeds)
@hypothesis.settings(max_examples=60)
def test_one_more_strategy_is_never_worse(seed):
    problem = random_problem(seed)
    rng = np.random.default_rng(seed + 1)
    node = int(rng.integers(len(problem.names)))
    larger = with_strategy(problem, node, rng)
    try:
        before = solve_intra_op(problem).objective_s
    except InfeasibleError:
        return
    assert solve_intra_op(larger).objective_s <= before + 2e-9 * abs(before)


def with_strategy(problem, node, rng):
    """A copy in which one node has one more strategy of random cost and bytes."""
    size_s = float(np.nanmax(np.where(np.isfinite(problem.node_cost_s[node]), 1, np.nan)))
    cost = list(problem.node_cost_s)
    cost[node] = np.append(cost[node], size_s * rng.random())
    edges = []
    for edge in problem.edges:
        grown = edge.cost_s
        if edge.u == node:
            grown = np.vstack([grown, rng.random((1, grown.shape[1]))])
        if edge.v == node:
            grown = np.column_stack([grown, rng.random((grown.shape[0], 1))])
        edges.append(dataclasses.replace(edge, cost_s=grown))
    memory = tuple(
        dataclasses.replace(
            row,
            terms={
                v: np.append(t, rng.random() * t.max()) if v == node else t
                for v, t in row.terms.items()
            },
        )
        for row in problem.memory
    )
    return dataclasses.replace(problem, node_cost_s=tuple(cost), edges=tuple(edges), memory=memory)


@hypothesis.given(seed=seeds, growth=st.floats(1.0, 2.0))
@hypothesis.settings(max_examples=60)
def test_a_larger_budget_is_never_worse(seed, growth):
    problem = random_problem(seed)
    larger = dataclasses.replace(problem, memory_budget_bytes=problem.memory_budget_bytes * growth)
    try:
        before = solve_intra_op(problem).objective_s
    except InfeasibleError:
        return
    assert solve_intra_op(larger).objective_s <= before + 2e-9 * abs(before)


def test_the_order_of_nodes_does_not_matter():
    problem = layered_problem(12, 6, num_rows=1, room=0.6)
    order = np.random.default_rng(0).permutation(12).tolist()
    position = {node: index for index, node in enumerate(order)}
    shuffled = dataclasses.replace(
        problem,
        node_cost_s=tuple(problem.node_cost_s[v] for v in order),
        edges=tuple(
            dataclasses.replace(e, u=position[e.u], v=position[e.v]) for e in problem.edges
        ),
        memory=tuple(
            dataclasses.replace(row, terms={position[v]: t for v, t in row.terms.items()})
            for row in problem.memory
        ),
    )
    expected = solve_intra_op(problem).objective_s
    assert solve_intra_op(shuffled).objective_s == pytest.approx(expected, rel=1e-9)


def test_same_answer_every_time():
    problem = layered_problem(24, 8, num_rows=2, room=0.6)
    first, second = solve_intra_op(problem), solve_intra_op(problem)
    assert first.choice == second.choice
    assert dataclasses.replace(first, wall_s=0) == dataclasses.replace(second, wall_s=0)


def test_never_worse_than_a_feasible_warm_start():
    problem = scattered_problem(30, 10, 70, layouts=None)
    best = solve_intra_op(problem, time_limit_s=2)
    again = solve_intra_op(problem, warm_start=best.choice, time_limit_s=0.0)
    assert again.objective_s <= best.objective_s


def test_infeasible_warm_start_is_only_a_hint():
    problem = problem_of([[3, 1]], rows=[("r", 0, {0: [1, 9]})], budget=5)
    assert solve_intra_op(problem, warm_start=(1,)).choice == (0,)


@pytest.mark.parametrize("warm_start", [(0, 0), (2,), (-1,), ()])
def test_malformed_warm_start_is_refused(warm_start):
    with pytest.raises(ValueError, match=r"warm_start must hold one .* \(1 nodes\)"):
        solve_intra_op(problem_of([[3, 1]]), warm_start=warm_start)


def test_time_limit_returns_the_incumbent_with_its_gap():
    problem = scattered_problem(40, 10, 100, layouts=None)
    started_s = time.monotonic()
    solution = solve_intra_op(problem, time_limit_s=1.0)
    assert time.monotonic() - started_s < 10
    check_solution(problem, solution)
    assert solution.status == "time_limit"
    assert 0 < solution.gap < 1
    assert solution.gap == pytest.approx(1 - solution.lower_bound_s / solution.objective_s)


def test_no_time_at_all_still_gives_a_choice():
    problem = layered_problem(24, 8, num_rows=1, room=0.6)
    solution = solve_intra_op(problem, time_limit_s=0.0)
    check_solution(problem, solution)
    assert solution.status == "time_limit"


def test_no_time_and_no_choice_says_so(monkeypatch):
    monkeypatch.setattr(solve_module._Search, "offer", lambda *_, **__: inf)
    problem = layered_problem(24, 8, num_rows=1, room=0.6)
    with pytest.raises(SolverTimeoutError, match="Raise time_limit_s"):
        solve_intra_op(problem, time_limit_s=0.0)


def test_too_large_for_the_integer_program_returns_the_gap(monkeypatch):
    monkeypatch.setattr(solve_module, "MAX_MILP_VARIABLES", 100)
    problem = scattered_problem(40, 10, 100, layouts=None)
    solution = solve_intra_op(problem)
    check_solution(problem, solution)
    assert solution.status == "unproven"
    assert solution.gap > 0


def test_a_gap_is_enough_if_asked_for():
    problem = layered_problem(24, 8, num_rows=2, room=0.6)
    exact = solve_intra_op(problem)
    rough = solve_intra_op(problem, gap=0.05)
    check_solution(problem, rough)
    assert rough.status in ("within_gap", "optimal")
    assert rough.gap <= 0.05
    assert exact.objective_s <= rough.objective_s <= exact.objective_s * 1.05 + 1e-15
    assert rough.lower_bound_s <= exact.objective_s * (1 + 1e-9)


def test_progress_is_told_bounds_that_close():
    calls = []
    problem = layered_problem(24, 8, num_rows=2, room=0.6)
    solution = solve_intra_op(problem, progress=lambda *call: calls.append(call))
    assert calls[0][0] == "presolve"
    assert len(calls) > 2
    assert all(bound_s <= solution.objective_s * (1 + 1e-9) for _, bound_s, _ in calls)
    assert all(best_s >= solution.objective_s * (1 - 1e-9) for _, _, best_s in calls)


@pytest.fixture
def only_milp(monkeypatch):
    """Leaves the decision to the integer program."""
    monkeypatch.setattr(solve_module, "_run_rounds", lambda _: None)


MEMORY_BINDS = layered_problem(8, 5, num_rows=2, room=0.6)


def test_a_solver_that_wrongly_says_infeasible_is_not_believed(monkeypatch, only_milp):
    expected = solve_intra_op(MEMORY_BINDS)
    lie = MilpOutcome(status="infeasible", lower_bound_s=-inf)
    monkeypatch.setattr(solve_module, "solve_milp", lambda *_, **__: lie)
    monkeypatch.setattr(solve_module, "read_solution", lambda _: None)
    without = solve_intra_op(MEMORY_BINDS)
    check_solution(MEMORY_BINDS, without)
    monkeypatch.setattr(solve_module, "honours_cutoff", lambda _: False)
    warm = solve_intra_op(MEMORY_BINDS, warm_start=expected.choice)
    assert warm.objective_s == expected.objective_s
    assert warm.status == "unproven"


def test_a_solver_that_returns_nonsense_is_not_believed(monkeypatch, only_milp):
    expected = solve_intra_op(MEMORY_BINDS)
    largest = tuple(int(term.argmax()) for term in largest_terms(MEMORY_BINDS))
    assert not fits_budget(evaluate(MEMORY_BINDS, largest)[1], MEMORY_BINDS.memory_budget_bytes)
    lie = MilpOutcome(status="stopped", lower_bound_s=-inf)
    monkeypatch.setattr(solve_module, "solve_milp", lambda *_, **__: lie)
    monkeypatch.setattr(solve_module, "read_solution", lambda v: (0,) * len(v.strategy))
    solution = solve_intra_op(MEMORY_BINDS, warm_start=expected.choice)
    check_solution(MEMORY_BINDS, solution)


def largest_terms(problem):
    return [
        max((row.terms.get(v, np.zeros(k)) for row in problem.memory), key=np.max)
        for v, k in enumerate(problem.num_strategies)
    ]


@pytest.mark.parametrize(
    "problem",
    [
        layered_problem(),
        layered_problem(num_rows=1, room=0.6),
        layered_problem(num_rows=4, room=0.6),
        hub_problem(),
        hub_problem(num_rows=1, room=0.6),
        layered_problem(600, 12, num_rows=2, room=0.6),
        scattered_problem(60, 64, 120),
        scattered_problem(60, 64, 120, num_rows=1, room=0.6),
    ],
    ids=[
        "layers",
        "layers, 1 row",
        "layers, 4 rows",
        "hub",
        "hub, 1 row",
        "many layers, 2 rows",
        "wide",
        "wide, 1 row",
    ],
)
def test_large_problems_of_the_usual_shapes_are_proven_optimal(problem):
    solution = solve_intra_op(problem)
    check_solution(problem, solution)
    assert solution.status == "optimal"
    assert (solution.binding_row is not None) == bool(problem.memory)


def test_hard_problems_come_back_with_a_gap():
    problem = scattered_problem(60, 64, 120, layouts=None)
    solution = solve_intra_op(problem)
    check_solution(problem, solution)
    assert solution.status == "unproven"
    assert 0 < solution.gap < 1
