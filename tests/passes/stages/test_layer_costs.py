"""Prices of layers, and the tables of the stage program made of them."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest

from alpa_lite.cost_model import Cluster
from alpa_lite.models import build
from alpa_lite.passes.inter_op import Submesh, one_f_one_b_in_flight, solve_stages
from alpa_lite.passes.inter_op.stage_problem import Stage, evaluate_stages
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.pipeline_methods import REMAT_POLICIES, PipeshardParallel
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.layer_costs import LayerPricer
from alpa_lite.passes.stages.realise import realise
from alpa_lite.passes.stages.search_space import (
    first_count,
    mesh_shapes,
    microbatch_counts,
    offered_submeshes,
)
from alpa_lite.passes.stages.source import layer_step
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec
from alpa_lite.passes.stages.stage_tables import StageTables, costs_at, crossing, stage_tables
from tests.passes.preset_call import call_of

TABLE = RuleTable()
CLUSTER = Cluster.resolve("h100:2x2")
FOREVER = math.inf
GIB = 2.0**30


def priced(call: StepArgs, count: int = 4, **options: object) -> LayerPricer:
    method = PipeshardParallel(**options)  # type: ignore[arg-type]
    source = layer_step(call, count, table=TABLE)
    pricer = LayerPricer(source, method, CLUSTER, TABLE, REMAT_POLICIES)
    for submesh in offered_submeshes(CLUSTER, source.graph.num_layers):
        assert pricer.price(submesh, FOREVER)
    return pricer


@functools.cache
def gpt() -> LayerPricer:
    """Four layers; nobody prices its lean options."""
    return priced(call_of("gpt-test", num_layers=4))


def tables_of(pricer: LayerPricer, budget_bytes: float = 80 * GIB) -> StageTables:
    return stage_tables(
        pricer.costs(), crossing(pricer.cut), REMAT_POLICIES, CLUSTER, budget_bytes,
        one_f_one_b_in_flight,
    )  # fmt: skip


def test_counts_are_powers_of_two_that_divide_the_batch() -> None:
    call = call_of("mlp-test", 24)
    assert microbatch_counts(call, PipeshardParallel()) == (1, 2, 4, 8)
    assert microbatch_counts(call, PipeshardParallel(num_microbatches=3)) == (3,)
    assert first_count((1, 2, 4, 8), 8, CLUSTER) == 4  # 8 leaves microbatches of one row
    assert first_count((1, 2, 4, 8), 64, CLUSTER) == 4
    assert first_count((1,), 1, CLUSTER) == 1
    assert first_count((1, 32, 64, 128, 256), 4096, Cluster.resolve("h100:1024x8")) == 128


def test_submeshes_that_would_waste_devices_are_not_offered() -> None:
    large = Cluster.resolve("h100:64x8")
    assert [str(s) for s in offered_submeshes(large, 8)] == ["2x8", "4x8", "8x8", "16x8", "32x8",
                                                            "64x8"]  # fmt: skip
    assert Submesh(1, 1) in offered_submeshes(CLUSTER, 4)


def test_a_prescribed_mesh_is_for_submeshes_of_its_size() -> None:
    method = PipeshardParallel(mesh_shape=(2, 1))
    assert mesh_shapes(method, CLUSTER, Submesh(1, 2)) == [(2, 1)]
    assert mesh_shapes(method, CLUSTER, Submesh(2, 2)) == []


def test_alike_layers_are_priced_once() -> None:
    pricer = gpt()
    assert len(pricer.costs().costs) == len({*pricer.kinds}) < len(pricer.kinds)


def test_a_row_of_the_tables_is_the_sum_of_its_layers() -> None:
    pricer = gpt()
    costs, tables = pricer.costs(), tables_of(pricer)
    problem = tables.problem
    row = problem.range_class[0, 2]
    for m in range(len(costs.submeshes)):
        for o, option in enumerate(tables.options[m]):
            own = [
                costs.costs[k][m][costs.options[m].index(option.layers)] for k in costs.kinds[:3]
            ]
            if any(c is None for c in own):
                assert math.isinf(problem.latency_s[row, m, o])
            elif option.remat == "none":
                both = [c.forward_s + c.backward_s for c in own]
                assert problem.latency_s[row, m, o] == pytest.approx(sum(both))
                stash = sum(c.stash_bytes for c in own)
                assert problem.in_flight_bytes[row, m, o] == pytest.approx(stash)
                fixed = sum(c.state_bytes for c in own) + max(c.temporary_bytes for c in own)
                assert problem.fixed_bytes[row, m, o] == pytest.approx(fixed)


def test_rematerialisation_takes_time_and_saves_memory() -> None:
    pricer = gpt()
    problem, options = tables_of(pricer).problem, tables_of(pricer).options
    row = problem.range_class[1, 2]
    by_policy = {
        o.remat: (problem.latency_s[row, 0, i], problem.in_flight_bytes[row, 0, i])
        for i, o in enumerate(options[0])
        if not o.layers.is_lean
    }
    assert by_policy["full"][0] > by_policy["none"][0]
    assert by_policy["full"][1] < by_policy["dots"][1] < by_policy["none"][1]


@pytest.mark.parametrize(
    ("submesh", "remat", "rtol"),
    [
        (Submesh(1, 2), "none", 0.05),
        # What is computed again is known for one device.
        pytest.param(Submesh(1, 1), "full", 0.2, marks=pytest.mark.slow),
        pytest.param(Submesh(1, 2), "full", 0.2, marks=pytest.mark.slow),
        pytest.param(Submesh(1, 2), "dots", 0.2, marks=pytest.mark.slow),
    ],
)
def test_estimates_are_close_to_what_is_planned(submesh: Submesh, remat: str, rtol: float) -> None:
    # GPT of a size at which work outweighs what is done once: what the estimate leaves out.
    call = call_of("gpt-125m", 16, num_layers=4)
    pricer = priced(call)
    tables = tables_of(pricer)
    shape = (submesh.num_devices,)
    num = len(pricer.kinds)
    m = tables.problem.submeshes.index(submesh)
    option = next(
        i for i, o in enumerate(tables.options[m])
        if o.remat == remat and o.layers.mesh_shape == shape and not o.layers.is_lean
    )  # fmt: skip
    ranges = [(0, 1), (2, num - 1)]
    stages = [Stage(a, b, m, option) for a, b in ranges]
    estimate = evaluate_stages(tables.problem, stages)
    spec = PipelineSpec(
        tuple(StageSpec(tuple(range(a, b + 1)), submesh, shape, remat) for a, b in ranges),
        4,
        "1f1b",
    )
    found = realise(
        "step", pricer.source, spec, PipeshardParallel(), CLUSTER, TABLE, lambda what, done: None
    ).plan
    for stage, seconds, peak in zip(
        found.stages, estimate.latency_s, estimate.peak_bytes, strict=True
    ):
        assert stage.forward_s + stage.backward_s == pytest.approx(seconds, rel=rtol)
        assert stage.peak_bytes == pytest.approx(peak, rel=0.25)


def test_crossing_bytes_are_what_stages_send() -> None:
    pricer = gpt()
    there, back = crossing(pricer.cut)
    config = build("gpt-test").config
    rows = 16 // 4
    activation = rows * config.seq_len * config.hidden_size * 4
    assert (there >= activation).all() and (back >= activation).all()
    assert there[1] == there[2]


def test_costs_at_other_counts() -> None:
    call = call_of("gpt-125m", 64, num_layers=2)
    source = layer_step(call, 4, table=TABLE)
    whole = layer_step(call, 1, table=TABLE)
    pricer = LayerPricer(source, PipeshardParallel(), CLUSTER, TABLE, ("none",), whole)
    assert pricer.price(Submesh(1, 2), FOREVER)
    costs = pricer.costs()
    assert costs_at(costs, 4) is costs
    there = priced(call, 8).costs()
    m = there.submeshes.index(Submesh(1, 2))
    for kind in range(len(costs.costs)):
        (guess, *_), (found, *_) = costs_at(costs, 8).costs[kind][0], there.costs[kind][m]
        assert guess is not None and found is not None
        assert guess.forward_s == pytest.approx(found.forward_s, rel=0.2)
        assert guess.backward_s == pytest.approx(found.backward_s, rel=0.2)
        assert guess.stash_bytes == pytest.approx(found.stash_bytes, rel=0.2)
        assert guess.state_bytes == pytest.approx(found.state_bytes, rel=0.2)


def test_without_the_whole_batch_costs_are_proportional() -> None:
    costs = priced(call_of("mlp-test")).costs()
    half = costs_at(costs, 8)
    for here, there in zip(costs.costs[0][0], half.costs[0][0], strict=True):
        assert here is not None and there is not None
        assert there.forward_s == pytest.approx(here.forward_s / 2)
        assert there.per_step_s == here.per_step_s


def test_lean_options_are_guessed_until_they_are_asked_for() -> None:
    call = call_of("gpt-test", num_layers=2)
    state = sum(
        math.prod(x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(call.args[0])
        if x.dtype == np.float32
    )
    pricer = priced(call, memory_budget_bytes=1.2 * state)
    assert pricer.guesses, "no layer has more state than its share"
    index, option = min(pricer.guesses)
    before = pricer.costs()
    pricer.price_lean(index, option)
    after = pricer.costs()
    assert (index, option) in before.guesses and (index, option) not in after.guesses
    for kind in range(len(after.costs)):
        fast, guess = before.costs[kind][index][option - 1], before.costs[kind][index][option]
        lean = after.costs[kind][index][option]
        if fast is None or lean is None or guess == fast:
            continue
        assert guess.forward_s == fast.forward_s
        assert guess.state_bytes <= lean.state_bytes * (1 + 1e-9)
        assert lean.forward_s + lean.backward_s + lean.per_step_s >= 0.99 * (
            fast.forward_s + fast.backward_s + fast.per_step_s
        )


def test_the_deadline_leaves_out_a_whole_submesh() -> None:
    source = layer_step(call_of("mlp-test"), 4, table=TABLE)
    pricer = LayerPricer(source, PipeshardParallel(), CLUSTER, TABLE, ("none",))
    assert pricer.price(Submesh(1, 1), FOREVER)
    assert not pricer.price(Submesh(1, 2), 0.0)
    assert pricer.costs().submeshes == (Submesh(1, 1),)


def test_another_submesh_is_never_worse() -> None:
    pricer = gpt()
    problem = tables_of(pricer).problem
    best = solve_stages(problem).objective_s
    for m in range(len(problem.submeshes)):
        without = np.array(problem.latency_s)
        without[:, m] = np.inf
        fewer = type(problem)(
            **{n: getattr(problem, n) for n in problem.__slots__} | {"latency_s": without}
        )
        assert best <= solve_stages(fewer).objective_s * (1 + 1e-9)
