"""Acceptance cases of multilayer perceptrons (A) and of gradient accumulation (E)."""

from __future__ import annotations

import pytest

import alpa_lite
from alpa_lite.passes.plan import Plan
from tests.passes.acceptance import (
    BOTH,
    LINES,
    LOSS_BYTES,
    ONE_AXIS,
    SQUARE,
    by_kind,
    gradients_s,
    kernel_pattern,
    optimizer_tensors,
    params,
    seconds,
    solve_plan,
    traffic,
)
from tests.passes.acceptance_models import (
    FLOAT_BYTES,
    mlp,
)

# A: multilayer perceptrons.


@pytest.mark.parametrize("mesh", LINES, ids=str)
def test_a1_wide_batch_is_data_parallel(mesh: dict[str, int]) -> None:
    """A1: MLP L=6 B=256 H=32. Alpa: one all-reduce of the gradients, parameters replicated."""
    case = mlp(6, 256, 32)
    plan = solve_plan(case, mesh)
    axes = ("x",) if mesh["x"] == 4 else ("y",)
    assert traffic(plan) == {("all_reduce", axes): case.param_bytes() + LOSS_BYTES}
    assert plan.predicted.communication_s == pytest.approx(gradients_s(plan, case, axes))
    assert all(s.is_replicated for n, s in plan.inputs.items() if n.startswith("state."))


@pytest.mark.parametrize("mesh", LINES, ids=str)
def test_a2_wide_layers_are_model_parallel(mesh: dict[str, int]) -> None:
    """A2: MLP L=6 B=32 H=256. Alpa: L-1 all-reduces of activations; column, row, column, ..."""
    plan = solve_plan(mlp(6, 32, 256), mesh)
    axes = ("x",) if mesh["x"] == 4 else ("y",)
    activation = 32 * 256 * FLOAT_BYTES
    assert traffic(plan) == {("all_reduce", axes): 5 * activation}
    expected = 5 * seconds(plan, "all_reduce", activation, axes)
    assert plan.predicted.communication_s == pytest.approx(expected)
    assert kernel_pattern(plan, axes[0]) == "crcrcr"


def hybrid_mlp_s(plan: Plan, batch_size: int, hidden: int) -> float:
    """Alpa's A3: gradients of half a kernel on the slow axis, activations on the fast one."""
    kernel, bias = hidden * hidden * FLOAT_BYTES, hidden * FLOAT_BYTES
    gradient = [seconds(plan, "all_reduce", b, ("slow",)) for b in (kernel / 2, bias)]
    activation = batch_size * hidden * FLOAT_BYTES / 2
    return 6 * sum(gradient) + 5 * seconds(plan, "all_reduce", activation, ("fast",))


def test_a3_staged_data_parallel_beats_the_hybrid() -> None:
    """A3: MLP L=6 B=256 H=32 on (2, 2), first axis slow. Alpa: gradients on the slow axis,
    activations on the fast axis, kernels split along it. With all-reduces in stages plain data
    parallel sends as little over slow links and spares the activations; so that is found, and is
    cheaper."""
    case = mlp(6, 256, 32)
    plan = solve_plan(case, SQUARE)
    assert plan.predicted.communication_s < 0.8 * hybrid_mlp_s(plan, 256, 32)
    assert traffic(plan) == {("all_reduce", BOTH): case.param_bytes() + LOSS_BYTES}


def test_a3_hybrid_where_it_pays() -> None:
    """A3 with B=96 H=64, between H and 2H, where the hybrid beats both pure forms even if those
    all-reduce in stages. Alpa's layout: kernels split along the fast axis, gradients on the slow.
    """
    plan = solve_plan(mlp(6, 96, 64), SQUARE)
    assert plan.predicted.communication_s <= hybrid_mlp_s(plan, 96, 64)
    assert "-" not in kernel_pattern(plan, "fast")
    slow_s = sum(c.seconds_per_step for c in plan.predicted.collectives if c.axes == ("slow",))
    kernel, bias = 64 * 64 * FLOAT_BYTES, 64 * FLOAT_BYTES
    assert slow_s <= 6 * sum(seconds(plan, "all_reduce", b, ("slow",)) for b in (kernel / 2, bias))
    pure_data_parallel = gradients_s(plan, mlp(6, 96, 64), BOTH)
    pure_model_parallel = 5 * seconds(plan, "all_reduce", 96 * 64 * FLOAT_BYTES, BOTH)
    assert plan.predicted.communication_s < min(pure_data_parallel, pure_model_parallel)


@pytest.mark.parametrize("mesh", LINES, ids=str)
def test_a4_reduce_scatter_data_parallel(mesh: dict[str, int]) -> None:
    """A4: A1 preferring reduce-scatter. Alpa: one reduce-scatter, one all-gather, no all-reduce,
    every optimizer tensor split."""
    case = mlp(6, 256, 32)
    plan = solve_plan(case, mesh, prefer_reduce_scatter=True)
    num_bytes = case.param_bytes()
    assert by_kind(plan) == {
        "reduce_scatter": num_bytes, "all_gather": num_bytes, "all_reduce": LOSS_BYTES,
    }  # fmt: skip
    assert all(s.num_shards(plan.mesh) == 4 for s in optimizer_tensors(plan, case).values())
    axes = ("x",) if mesh["x"] == 4 else ("y",)
    assert plan.predicted.communication_s == pytest.approx(gradients_s(plan, case, axes))


def test_a5_reduce_scatter_model_parallel() -> None:
    """A5: A2 preferring reduce-scatter. Alpa: AR + RS = L-1 activations, RS = AG."""
    plan = solve_plan(mlp(6, 32, 256), ONE_AXIS, prefer_reduce_scatter=True)
    kinds = {"all_reduce": 0.0, "reduce_scatter": 0.0, "all_gather": 0.0} | by_kind(plan)
    activations = 5 * 32 * 256 * FLOAT_BYTES
    assert kinds["all_reduce"] + kinds["reduce_scatter"] == pytest.approx(activations, abs=8)
    assert kinds["reduce_scatter"] == kinds["all_gather"]


def test_a6_reduce_scatter_on_two_axes() -> None:
    """A6: A3 preferring reduce-scatter. Alpa: AR 5, RS 2, AG <= 2; optimizer matrices on all four
    devices. The plan is data parallel in stages (see A3), with the same optimizer layout."""
    case = mlp(6, 256, 32)
    plan = solve_plan(case, SQUARE, prefer_reduce_scatter=True)
    matrices = {n: s for n, s in optimizer_tensors(plan, case).items() if "kernel" in n}
    assert len(matrices) == 12
    assert all(s.num_shards(plan.mesh) == 4 for s in matrices.values())
    assert plan.predicted.communication_s <= gradients_s(plan, case, BOTH) * (1 + 1e-9)
    assert plan.predicted.communication_s < hybrid_mlp_s(plan, 256, 32)


def test_a7_adafactor() -> None:
    """A7: A1 with Adafactor, preferring reduce-scatter. Alpa: RS 1, AG <= 2, AR <= 2."""
    import optax

    # The default factors only kernels of 128 and more.
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=16)
    case = mlp(6, 256, 32, tx=optimizer)
    plan = solve_plan(case, ONE_AXIS, prefer_reduce_scatter=True)
    # Row and column statistics are means over a split dim: all-reduces of vectors at most.
    vectors = 6 * 4 * 32 * FLOAT_BYTES
    kinds = {"reduce_scatter": 0.0, "all_gather": 0.0} | by_kind(plan)
    assert kinds["reduce_scatter"] <= case.param_bytes()
    assert kinds["all_gather"] <= case.param_bytes() + vectors
    assert plan.predicted.communication_s <= gradients_s(plan, case, ("x",)) * (1 + 1e-9)


def test_a8_zero3() -> None:
    """A8: A1 under ZeRO-3. Alpa: AR 0, AG 2, RS 1, parameters split. Gathers are for the forward
    pass and again for the backward pass, where only the input gradients of layers 2 to 6 need them.
    """
    case = mlp(6, 256, 32)
    plan = solve_plan(case, ONE_AXIS, method=alpa_lite.Zero3Parallel)
    again = 5 * 32 * 32 * FLOAT_BYTES
    assert by_kind(plan) == {
        "reduce_scatter": case.param_bytes(), "all_gather": case.param_bytes() + again,
        "all_reduce": LOSS_BYTES,
    }  # fmt: skip
    assert all(s.num_shards(plan.mesh) == 4 for s in params(plan).values())
    assert all(s.num_shards(plan.mesh) == 4 for s in optimizer_tensors(plan, case).values())


@pytest.mark.parametrize("mesh", [ONE_AXIS, SQUARE], ids=str)
def test_a9_forced_data_parallel(mesh: dict[str, int]) -> None:
    """A9: MLP B=32 H=256, data parallel forced. Alpa: as A1, although model parallel is cheaper."""
    case = mlp(6, 32, 256)
    forced = solve_plan(case, mesh, method=alpa_lite.DataParallel)
    axes = tuple(mesh)
    assert traffic(forced) == {("all_reduce", axes): case.param_bytes() + LOSS_BYTES}
    assert all(s.is_replicated for n, s in forced.inputs.items() if n.startswith("state."))
    assert all(s.dims[0] == axes for n, s in forced.inputs.items() if n.startswith("batch."))
    free = solve_plan(case, mesh)
    assert free.predicted.communication_s < 0.2 * forced.predicted.communication_s


# E: gradient accumulation.


@pytest.mark.parametrize("prefer_reduce_scatter", [False, True])
def test_e1_gradients_are_reduced_once_per_step(prefer_reduce_scatter: bool) -> None:
    """E1: MLP L=2, two microbatches. Alpa: gradients reduced once (in its last accumulation),
    nothing in the update but one all-gather in the reduce-scatter form. The loss is reduced per
    microbatch."""
    case = mlp(2, 256, 32)
    once, twice = (
        solve_plan(
            case, ONE_AXIS, prefer_reduce_scatter=prefer_reduce_scatter, num_microbatches=count
        )
        for count in (1, 2)
    )
    expected = dict.fromkeys(by_kind(once), float(case.param_bytes()))
    expected["all_reduce"] = 2 * LOSS_BYTES + (0 if prefer_reduce_scatter else case.param_bytes())
    assert by_kind(twice) == expected
    gradients = ("reduce_scatter", "all_gather") if prefer_reduce_scatter else ()
    assert all(by_kind(once)[k] == by_kind(twice)[k] for k in gradients)


def test_e1_forced_data_parallel() -> None:
    """E1 with data parallel forced, where all of Alpa's bytes are gradients."""
    case = mlp(2, 32, 256)
    plan = solve_plan(case, ONE_AXIS, method=alpa_lite.DataParallel, num_microbatches=2)
    assert traffic(plan) == {("all_reduce", ("x",)): case.param_bytes() + 2 * LOSS_BYTES}
    assert plan.num_microbatches == 2


def test_e1_activations_are_reduced_per_microbatch() -> None:
    """E1 under model parallel: activations of each microbatch, together those of the batch."""
    case = mlp(2, 32, 256)
    plans = [solve_plan(case, ONE_AXIS, num_microbatches=n) for n in (1, 2)]
    for plan in plans:
        volume = by_kind(plan)["all_reduce"] + by_kind(plan).get("reduce_scatter", 0.0)
        assert volume == pytest.approx(32 * 256 * FLOAT_BYTES, abs=4 * LOSS_BYTES)
