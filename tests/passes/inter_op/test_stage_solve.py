import dataclasses
import math
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from alpa_lite.errors import InfeasibleError, SolverTimeoutError
from alpa_lite.passes.inter_op import (
    Stage,
    Submesh,
    brute_force_stages,
    evaluate_stages,
    gpipe_in_flight,
    place_submeshes,
    solve_stage_candidates,
    solve_stages,
    stage_search,
    submesh_shapes,
    verify_placement,
)
from alpa_lite.passes.inter_op.stage_problem import fits
from tests.passes.inter_op.problems import model_problem, random_problem, uniform_problem

inf = math.inf
seeds = st.integers(0, 10_000)


def check_solution(problem, solution):
    terms = evaluate_stages(problem, solution.stages)
    assert fits(problem, terms)
    assert solution.objective_s == terms.objective_s
    assert solution.lower_bound_s <= solution.objective_s
    assert solution.idle_devices == problem.num_devices - terms.num_devices
    shapes = [problem.submeshes[stage.submesh] for stage in solution.stages]
    placed = place_submeshes(shapes, problem.num_hosts, problem.devices_per_host)
    verify_placement(placed, problem.num_hosts, problem.devices_per_host)
    assert solution.proposals[0].stages == solution.stages
    assert len({proposal.stages for proposal in solution.proposals}) == len(solution.proposals)
    values = [proposal.objective_s for proposal in solution.proposals]
    assert values == sorted(values)
    for proposal in solution.proposals:
        proposed = evaluate_stages(problem, proposal.stages)
        assert fits(problem, proposed) and proposed.objective_s == proposal.objective_s


def objective(problem):
    try:
        return solve_stages(problem).objective_s
    except InfeasibleError:
        return inf


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_same_optimum_as_brute_force(first):
    feasible = 0
    for seed in range(first, first + 50):
        problem = random_problem(seed)
        expected = brute_force_stages(problem)
        if expected is None:
            with pytest.raises(InfeasibleError):
                solve_stages(problem)
            continue
        feasible += 1
        solution = solve_stages(problem)
        check_solution(problem, solution)
        assert (solution.status, solution.gap) == ("optimal", 0.0)
        assert solution.objective_s == pytest.approx(expected.objective_s, rel=2e-9)
        assert solution.lower_bound_s == pytest.approx(expected.objective_s, rel=2e-9)
    assert 25 < feasible < 50


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_same_optimum_as_brute_force_with_a_given_number_of_stages(first):
    feasible = 0
    for seed in range(first, first + 50):
        problem = random_problem(seed)
        for num_stages in range(1, min(3, problem.num_layers) + 1):
            expected = brute_force_stages(problem, num_stages)
            if expected is None:
                with pytest.raises(InfeasibleError):
                    solve_stages(problem, num_stages=num_stages)
                continue
            feasible += 1
            solution = solve_stages(problem, num_stages=num_stages)
            check_solution(problem, solution)
            assert {len(p.stages) for p in solution.proposals} == {num_stages}
            assert solution.objective_s == pytest.approx(expected.objective_s, rel=2e-9)
    assert feasible > 25


@hypothesis.given(seed=seeds)
@hypothesis.settings(max_examples=60)
def test_one_more_option_is_never_worse(seed):
    problem = random_problem(seed)
    rng = np.random.default_rng(seed + 1)
    names = ("latency_s", "fixed_bytes", "in_flight_bytes", "per_step_s")
    more = {
        name: np.concatenate([table, rng.random((*table.shape[:2], 1)) * 5], axis=2)
        for name in names
        for table in [getattr(problem, name)]
    }
    before = objective(problem)
    assert objective(dataclasses.replace(problem, **more)) <= before * (1 + 2e-9)


@hypothesis.given(seed=seeds)
@hypothesis.settings(max_examples=60)
def test_one_more_submesh_is_never_worse(seed):
    larger = random_problem(seed)
    hypothesis.assume(len(larger.submeshes) > 1)
    names = ("latency_s", "fixed_bytes", "in_flight_bytes", "per_step_s")
    smaller = dataclasses.replace(
        larger,
        submeshes=larger.submeshes[:-1],
        boundary_s=larger.boundary_s[:, :-1, :-1],
        **{name: getattr(larger, name)[:, :-1] for name in names},
    )
    assert objective(larger) <= objective(smaller) * (1 + 2e-9)


@hypothesis.given(
    seed=seeds, counts=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3)
)
@hypothesis.settings(max_examples=40)
def test_candidates_are_as_good_as_the_best_alone(seed, counts):
    problems = [dataclasses.replace(random_problem(seed), num_microbatches=n) for n in counts]
    problems = [
        dataclasses.replace(p, latency_s=p.latency_s / n)
        for p, n in zip(problems, counts, strict=True)
    ]
    alone = [objective(problem) for problem in problems]
    if min(alone) == inf:
        with pytest.raises(InfeasibleError):
            solve_stage_candidates(problems)
        return
    index, solution = solve_stage_candidates(problems)
    check_solution(problems[index], solution)
    assert solution.objective_s == pytest.approx(min(alone), rel=2e-9)
    assert solution.lower_bound_s == pytest.approx(min(alone), rel=2e-9)
    assert solution.status == "optimal"


@hypothesis.given(seed=seeds, gap=st.sampled_from([0.01, 0.1, 0.5]))
@hypothesis.settings(max_examples=60)
def test_gap_holds(seed, gap):
    problem = random_problem(seed)
    best = objective(problem)
    hypothesis.assume(best < inf)
    solution = solve_stages(problem, gap=gap)
    check_solution(problem, solution)
    assert solution.gap <= gap
    assert solution.lower_bound_s <= best * (1 + 2e-9)
    assert best <= solution.objective_s * (1 + 2e-9)
    assert solution.status in ("optimal", "within_gap")


def test_pipeline_by_hand():
    # 1 s per layer on any submesh: 4 stages, 4 + (B - 1) 1, beat 1 stage, 4 B, from B = 2 on.
    problem = uniform_problem([1.0, 1.0], num_layers=4, submeshes=[(1, 1), (1, 4)], microbatches=8)
    solution = solve_stages(problem)
    assert solution.stages == tuple(Stage(i, i, 0, 0) for i in range(4))
    assert (solution.objective_s, solution.idle_devices) == (11.0, 0)


def test_one_stage_if_parallelism_within_is_perfect():
    problem = uniform_problem(
        [4.0, 1.0], num_layers=4, submeshes=[(1, 1), (1, 4)], microbatches=8, boundary_s=0.1
    )
    assert solve_stages(problem).stages == (Stage(0, 3, 1, 0),)


def test_leaves_devices_idle_if_that_is_faster():
    problem = uniform_problem([1.0, 3.0], num_layers=1, submeshes=[(1, 1), (1, 4)])
    solution = solve_stages(problem)
    assert (solution.stages, solution.idle_devices) == ((Stage(0, 0, 0, 0),), 3)


def test_last_stage_holds_fewest_microbatches():
    # Of six layers the first stage holds two microbatches per layer, the last one only one.
    problem = uniform_problem(
        [1.0], num_layers=6, submeshes=[(1, 1)], devices=2, in_flight=1.0, budget=4.0
    )
    assert solve_stages(problem).stages == (Stage(0, 1, 0, 0), Stage(2, 5, 0, 0))
    with pytest.raises(InfeasibleError):
        solve_stages(dataclasses.replace(problem, in_flight=gpipe_in_flight))


def test_update_time_counts_once_and_only_the_largest():
    # Halves update at the same time; one stage would take 4 + 4 * 3 and then 8.
    problem = uniform_problem(
        [1.0], num_layers=4, submeshes=[(1, 1)], devices=2, per_step_s=2.0, microbatches=4
    )
    assert solve_stages(problem).objective_s == 4 + 2 * 3 + 4


def test_several_proposals():
    problem = model_problem(14, 4, hidden=8192)
    solution = solve_stages(problem, num_proposals=3)
    check_solution(problem, solution)
    assert len(solution.proposals) == 3
    # Plans to compare, not the first one over again or leftovers of the search.
    largest = [
        max(problem.submeshes[stage.submesh].num_devices for stage in proposal.stages)
        for proposal in solution.proposals
    ]
    assert largest == [32, 16, 8]
    assert len(solve_stages(problem, num_proposals=1).proposals) == 1


def test_same_answer_every_time():
    problem = model_problem(14, 4, hidden=8192)
    first, second = solve_stages(problem), solve_stages(problem)
    assert dataclasses.replace(first, wall_s=0) == dataclasses.replace(second, wall_s=0)


def stop_after(calls, action):
    def should_stop():
        nonlocal calls
        calls -= 1
        return calls < 0 and action()

    return should_stop


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("action", [interrupt, lambda: True])
def test_stopped_search_returns_the_best_so_far(action):
    problem = model_problem(30, 8, hidden=12288)
    best_s = solve_stages(problem).objective_s
    # The first plan takes 32 layers, one question each.
    solution = solve_stages(problem, should_stop=stop_after(100, action))
    check_solution(problem, solution)
    assert solution.status == "interrupted"
    assert solution.lower_bound_s <= best_s <= solution.objective_s
    assert solution.gap == pytest.approx(1 - solution.lower_bound_s / solution.objective_s)
    assert solution.gap > 0


def test_stopped_before_the_first_plan():
    problem = model_problem(30, 8)
    with pytest.raises(KeyboardInterrupt):
        solve_stages(problem, should_stop=interrupt)
    with pytest.raises(SolverTimeoutError, match="before a feasible plan"):
        solve_stages(problem, should_stop=lambda: True)
    with pytest.raises(SolverTimeoutError, match="Raise time_limit_s"):
        solve_stages(problem, time_limit_s=0)


def test_stopped_candidates_know_nothing_of_the_rest():
    problems = [model_problem(30, 8, hidden=8192, microbatches=n) for n in (32, 64)]
    index, solution = solve_stage_candidates(problems, should_stop=stop_after(100, lambda: True))
    assert (index, solution.status, solution.lower_bound_s, solution.gap) == (
        0,
        "interrupted",
        0,
        1,
    )


def test_no_candidates():
    with pytest.raises(ValueError, match="no stage problem"):
        solve_stage_candidates([])


def test_dynamic_program_that_is_too_large_leaves_a_gap(monkeypatch):
    monkeypatch.setattr(stage_search, "_MAX_LABELS", 0)
    left_open = 0
    for seed in range(300):
        problem = random_problem(seed)
        expected = brute_force_stages(problem)
        if expected is None:
            continue
        solution = solve_stages(problem)
        check_solution(problem, solution)
        assert solution.lower_bound_s <= expected.objective_s * (1 + 2e-9)
        if solution.status == "unproven":
            assert solution.gap > 0
            left_open += 1
    assert left_open


@pytest.mark.parametrize("seed", range(6))
def test_enough_devices_are_found_where_a_price_cannot(seed):
    """Two sizes that do not fill the cluster together: the priced bound is not reached."""
    rng = np.random.default_rng(seed)
    shapes = submesh_shapes(3, 2)
    shape = (10, len(shapes), 1)
    first, last = np.indices((4, 4))
    rows = np.full((4, 4), -1)
    rows[np.triu_indices(4)] = np.arange(10)
    devices = np.array([s.num_devices for s in shapes])[None, :, None]
    work = (last - first + 1)[np.triu_indices(4)][:, None, None]
    problem = dataclasses.replace(
        random_problem(0),
        num_hosts=3,
        devices_per_host=2,
        submeshes=shapes,
        range_class=rows,
        latency_s=work / devices**0.6 * (1 + 0.1 * rng.random(shape)),
        fixed_bytes=work / devices * np.ones(shape),
        in_flight_bytes=np.zeros(shape),
        per_step_s=rng.random(shape) * 0.3,
        boundary_s=np.zeros((3, len(shapes), len(shapes))),
        memory_budget_bytes=1.5,
        num_microbatches=8,
    )
    expected = brute_force_stages(problem)
    assert solve_stages(problem).objective_s == pytest.approx(expected.objective_s, rel=2e-9)


@pytest.mark.parametrize(
    ("blocks", "hosts", "hidden", "microbatches", "limit_s"),
    [(46, 8, 8192, 64, 5), (126, 2048, 16384, 64, 50)],
)
def test_large_models(blocks, hosts, hidden, microbatches, limit_s):
    problem = model_problem(blocks, hosts, hidden=hidden, microbatches=microbatches)
    start_s = time.process_time()
    solution = solve_stages(problem)
    assert time.process_time() - start_s < limit_s
    check_solution(problem, solution)
    assert solution.status == "optimal"


def test_submesh_indices_are_those_of_the_problem():
    problem = uniform_problem([2.0, 1.0], num_layers=1, submeshes=[(1, 1), (1, 2)])
    stage = solve_stages(problem).stages[0]
    assert problem.submeshes[stage.submesh] == Submesh(1, 2)
