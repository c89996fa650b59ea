"""Acceptance cases of BERT (B), mixtures of experts (C) and convolutions (D)."""

from __future__ import annotations

import math

import pytest

import alpa_lite
from alpa_lite.errors import InfeasibleError
from alpa_lite.passes.plan import Plan
from tests.passes.acceptance import (
    BOTH,
    LINES,
    LOSS_BYTES,
    ONE_AXIS,
    SQUARE,
    by_kind,
    kernel_pattern,
    params,
    seconds,
    solve,
    solve_plan,
    traffic,
)
from tests.passes.acceptance_models import (
    FLOAT_BYTES,
    Case,
    bert,
    bert_mlm,
    conv_net,
    moe_layer,
    moe_lm,
    tied_embedding,
)

# B: BERT.

MEGATRON = {
    "attention.qkv.kernel": 2, "attention.qkv.bias": 1, "attention.out.kernel": 0,
    "fc1.kernel": 1, "fc1.bias": 0, "fc2.kernel": 0,
}  # fmt: skip
"""The split dim of each parameter: qkv (its heads) and fc1 by column, out and fc2 by row."""


def assert_megatron(plan: Plan, axes: tuple[str, ...]) -> None:
    """All parameters of `MEGATRON` are split, each along its dim."""
    layers = {n: s for n, s in params(plan).items() if "layer_" in n}
    for end, dim in MEGATRON.items():
        specs = [s for n, s in layers.items() if n.endswith(end)]
        assert specs
        for spec in specs:
            assert spec.dims == tuple(axes if d == dim else () for d in range(len(spec.dims))), end


def assert_tensor_parallel(plan: Plan) -> None:
    """All parameters of `MEGATRON` are split over all devices, their dims there among them."""
    for name, spec in params(plan).items():
        for end, dim in MEGATRON.items():
            if "layer_" in name and name.endswith(end):
                assert spec.dims[dim], name
                assert spec.num_shards(plan.mesh) == plan.mesh.num_devices, name


def test_b1_bert_data_parallel() -> None:
    """B1: BERT L=2 B=S=64 H=32, 8 heads. Alpa: one all-reduce of the gradients."""
    case = bert(64, 64, 32)
    plan = solve_plan(case, ONE_AXIS)
    assert traffic(plan) == {("all_reduce", ("x",)): case.param_bytes() + LOSS_BYTES}
    assert all(s.is_replicated for s in params(plan).values())


@pytest.mark.parametrize("mesh", LINES, ids=str)
def test_b2_bert_megatron(mesh: dict[str, int]) -> None:
    """B2: BERT L=2 B=S=8 H=128. Alpa: 4L-1 all-reduces of activations, Megatron's layout."""
    plan = solve_plan(bert(8, 8, 128), mesh)
    axes = ("x",) if mesh["x"] == 4 else ("y",)
    assert traffic(plan) == {("all_reduce", axes): 7 * 8 * 8 * 128 * FLOAT_BYTES}
    assert_megatron(plan, axes)


@pytest.mark.parametrize("prefer_reduce_scatter", [False, True])
def test_b3_bert_on_two_axes(prefer_reduce_scatter: bool) -> None:
    """B3: B2 on (2, 2). Alpa, which always split the batch over the first axis: 4L-1 all-reduces of
    half an activation on the fast axis and one of half the gradients on the slow one (as RS + AG).
    Gradients weigh 50 times more than activations here, so all four devices split the parameters,
    and nothing but activations crosses the slow links. Splitting some kernels along one dim per
    axis beats Megatron's layout over both axes by a few percent."""
    case = bert(8, 8, 128)
    plan = solve_plan(case, SQUARE, prefer_reduce_scatter=prefer_reduce_scatter)
    activation = 8 * 8 * 128 * FLOAT_BYTES
    split = sum(case.param_bytes(name) for name in MEGATRON)
    on_slow = split / 2 + case.param_bytes() - split
    alpa_s = 7 * seconds(plan, "all_reduce", activation / 2, ("fast",))
    alpa_s += seconds(plan, "all_reduce", on_slow, ("slow",))
    assert plan.predicted.communication_s < 0.25 * alpa_s
    megatron_s = 7 * seconds(plan, "all_reduce", activation, BOTH)
    assert plan.predicted.communication_s <= megatron_s * (1 + 1e-9)
    if not prefer_reduce_scatter:
        assert_tensor_parallel(plan)


def test_b4_bert_with_remat() -> None:
    """B4: B2 with remat per layer. Alpa: 6L-1 all-reduces, two more per layer when it runs again."""
    plan = solve_plan(bert(8, 8, 128, remat=True), ONE_AXIS)
    assert traffic(plan) == {("all_reduce", ("x",)): 11 * 8 * 8 * 128 * FLOAT_BYTES}
    assert_megatron(plan, ("x",))


@pytest.mark.parametrize("mesh", LINES, ids=str)
def test_b5_bert_with_forced_batch_axis(mesh: dict[str, int]) -> None:
    """B5: B2 with the batch forced onto an axis. Alpa: the batch dim obeys."""
    case = bert(8, 8, 128)
    plan = solve_plan(case, mesh, method=alpa_lite.DataParallel)
    axes = ("x",) if mesh["x"] == 4 else ("y",)
    for name in ("batch.x", "batch.y"):
        assert plan.mesh.size(plan.inputs[name].dims[0]) == 4
    assert traffic(plan) == {("all_reduce", axes): case.param_bytes() + LOSS_BYTES}


def test_b5_bert_with_batch_size_one() -> None:
    """B5 with one example (of 64 tokens). Alpa: falls back to the model-parallel pattern; here a
    search finds that, while a method that prescribes splitting the batch says that it cannot."""
    case = bert(1, 64, 128)
    plan = solve_plan(case, ONE_AXIS)
    assert traffic(plan) == {("all_reduce", ("x",)): 7 * 64 * 128 * FLOAT_BYTES}
    assert_megatron(plan, ("x",))
    with pytest.raises(
        InfeasibleError, match=r"all 4 devices, but dim 0 of batch\.x \(1, 64, 128\)"
    ):
        solve_plan(case, ONE_AXIS, method=alpa_lite.DataParallel)


@pytest.mark.parametrize("mesh", [ONE_AXIS, SQUARE], ids=str)
def test_b6_tied_embedding(mesh: dict[str, int]) -> None:
    """B6: tied embedding V=1024 H=8. Alpa: only all-reduces, vocabulary dim split. The bytes are
    those of the activations, once for the lookup and once for the head's input gradient, and of
    four numbers per token for the loss (maximum, sum, picked logit, and their backward)."""
    plan = solve_plan(tied_embedding(8, 8, vocab=1024, hidden=8), mesh)
    (table,) = params(plan, "embedding").values()
    assert table.dims == (tuple(mesh), ())
    assert set(by_kind(plan)) == {"all_reduce"}
    tokens = 8 * 8
    assert by_kind(plan)["all_reduce"] <= (2 * 8 + 4) * tokens * FLOAT_BYTES


def test_b7_bert_mlm_data_parallel() -> None:
    """B7: BERT MLM L=2 B=S=32 H=16 V=128. Alpa: one all-reduce of the gradients."""
    case = bert_mlm(32, 32, 16, vocab=128)
    plan = solve_plan(case, ONE_AXIS)
    assert traffic(plan) == {("all_reduce", ("x",)): case.param_bytes() + LOSS_BYTES}


def test_b7_bert_mlm_zero3() -> None:
    """B7 under ZeRO-3. Alpa: reduce-scatters and all-gathers instead, parameters split."""
    case = bert_mlm(32, 32, 16, vocab=128)
    plan = solve_plan(case, ONE_AXIS, method=alpa_lite.Zero3Parallel)
    kinds = by_kind(plan)
    shapes = case.leaves()
    small = [n for n, s in params(plan).items() if s.is_replicated]
    # Biases of shape (3, 8, 2) are split along their heads; nothing of this model is left whole.
    assert small == [], [shapes[n] for n in small]
    assert kinds["reduce_scatter"] == case.param_bytes()
    assert kinds["all_reduce"] == LOSS_BYTES
    assert kinds["all_gather"] <= 3 * case.param_bytes()


def test_b8_bert_mlm_large_vocabulary() -> None:
    """B8: BERT MLM V=4096 H=512 B=S=4 on (2, 2). Alpa: 4L+5 all-reduces, labels never one-hot whole.

    The pattern: 4L of activations in the layers (the first layer's input has a gradient here), one
    for the lookup, one for the head's input gradient; the dense layer before the head takes an
    all-reduce forward and an all-gather backward; the loss takes a few numbers per token.
    """
    case = bert_mlm(4, 4, 512, vocab=4096)
    planned = solve(case, SQUARE)
    plan = planned.plan
    tokens = 4 * 4
    activation = tokens * 512 * FLOAT_BYTES
    alpa_s = 11 * seconds(plan, "all_reduce", activation, BOTH)
    alpa_s += seconds(plan, "all_gather", activation, BOTH)
    alpa_s += 4 * seconds(plan, "all_reduce", tokens * FLOAT_BYTES, BOTH)
    assert plan.predicted.communication_s <= alpa_s
    assert_tensor_parallel(plan)
    (table,) = params(plan, "embedding").values()
    assert table.dims == (BOTH, ())
    # Whatever has the vocabulary as a dim (logits, one-hot labels and their iota) is split.
    decisions = planned.decisions
    c = decisions.contraction
    for op in c.ops:
        for value, spec in zip(op.results, decisions.result_specs[op.id], strict=True):
            if 4096 in c.values[value].shape:
                assert spec.num_shards(plan.mesh) == 4, (op.name, spec)


# C: mixtures of experts.

MOE = {"heads": 16, "num_experts": 16, "group": 32}
MOE_SENT = 64 * 16 // 32 * 16 * 4 * 64 * FLOAT_BYTES
"""Bytes of the tokens sent to experts: groups x experts x capacity x hidden."""


def dense_bytes(case: Case) -> int:
    """Bytes of the parameters that are not experts'."""
    return case.param_bytes() - case.param_bytes(".wi") - case.param_bytes(".wo")


def test_c1_moe_layer() -> None:
    """C1: MoE layer B=64 S=16 H=64, 16 heads, groups of 32, 16 experts. Alpa: one all-reduce (of
    the gradients of all but the experts) and four all-to-alls, experts split on the expert dim."""
    case = moe_layer(64, 16, 64, **MOE)
    plan = solve_plan(case, ONE_AXIS)
    assert traffic(plan) == {
        ("all_reduce", ("x",)): dense_bytes(case) + LOSS_BYTES,
        ("all_to_all", ("x",)): 4 * MOE_SENT / 4,
    }
    assert params(plan, ".wi")["state.params.experts.wi"].dims == (("x",), (), ())
    assert params(plan, ".wo")["state.params.experts.wo"].dims == (("x",), (), ())


def test_c2_moe_layer_on_two_axes() -> None:
    """C2: C1 on (2, 2). Alpa, with tilings of one dim over both axes: 2 AR and some A2A, experts
    split. The pattern of C1 with both axes taken together is one of the plans, so none may cost
    more."""
    case = moe_layer(64, 16, 64, **MOE)
    plan = solve_plan(case, SQUARE)
    assert params(plan, ".wi")["state.params.experts.wi"].dims[0]
    assert params(plan, ".wo")["state.params.experts.wo"].dims[0]
    dense = [s for n, s in case.leaves().items() if ".params." in n and ".w" not in n]
    sizes = [FLOAT_BYTES * math.prod(s) for s in dense]
    alpa_s = 4 * seconds(plan, "all_to_all", MOE_SENT / 4, BOTH)
    alpa_s += sum(seconds(plan, "all_reduce", b, BOTH) for b in (*sizes, LOSS_BYTES))
    assert plan.predicted.communication_s <= alpa_s * (1 + 1e-9)


def test_c3_moe_language_model() -> None:
    """C3: MoE LM L=2 V=32. Alpa: AR <= 4 and A2A = 4."""
    case = moe_lm(64, 16, 64, vocab=32, **MOE)
    plan = solve_plan(case, ONE_AXIS)
    assert traffic(plan) == {
        ("all_reduce", ("x",)): dense_bytes(case) + LOSS_BYTES,
        ("all_to_all", ("x",)): 4 * MOE_SENT / 4,
    }
    assert params(plan, ".wi")["state.params.layer_0.experts.wi"].dims[0] == ("x",)


def test_c3_moe_language_model_data_parallel() -> None:
    """C3 with data parallel forced. Alpa: one all-reduce."""
    case = moe_lm(64, 16, 64, vocab=32, **MOE)
    plan = solve_plan(case, ONE_AXIS, method=alpa_lite.DataParallel)
    assert traffic(plan) == {("all_reduce", ("x",)): case.param_bytes() + LOSS_BYTES}


def test_c3_moe_language_model_reduce_scatter() -> None:
    """C3 preferring reduce-scatter. Alpa: the gradients in one reduce-scatter."""
    case = moe_lm(64, 16, 64, vocab=32, **MOE)
    plan = solve_plan(case, ONE_AXIS, prefer_reduce_scatter=True)
    assert by_kind(plan) == {
        "reduce_scatter": dense_bytes(case), "all_gather": dense_bytes(case),
        "all_reduce": LOSS_BYTES, "all_to_all": 4 * MOE_SENT / 4,
    }  # fmt: skip


# D: convolutions.


def test_d1_batch_norm_statistics_are_all_reduced() -> None:
    """D1: three convolutions with batch norm, data parallel. Alpa: 1 + 2 #BN all-reduces, one for
    the gradients, one per norm and direction for the statistics. Those are the mean and the mean of
    squares forward, and at most as much backward (scale and bias gradients serve there too)."""
    case = conv_net(3, 64, 8, 16, batch_norm=True)
    for method in (alpa_lite.ShardParallel, alpa_lite.DataParallel):
        plan = solve_plan(case, ONE_AXIS, method=method)
        assert set(traffic(plan)) == {("all_reduce", ("x",))}
        channel = 3 * 16 * FLOAT_BYTES
        statistics = by_kind(plan)["all_reduce"] - case.param_bytes() - LOSS_BYTES
        assert 2 * channel <= statistics <= 4 * channel
        stats = {n: s for n, s in plan.inputs.items() if ".batch_stats." in n}
        assert len(stats) == 6 and all(s.is_replicated for s in stats.values())


def test_d2_wide_convolutions_are_model_parallel() -> None:
    """D2: four convolutions of 256 channels, B=8. Alpa: L-1 all-reduces of activations."""
    plan = solve_plan(conv_net(4, 8, 4, 256), ONE_AXIS)
    assert traffic(plan) == {("all_reduce", ("x",)): 3 * 8 * 4 * 4 * 256 * FLOAT_BYTES}
    assert kernel_pattern(plan, "x") == "crcr"


def test_d2_depthwise_convolutions_split_channels() -> None:
    """D2, two depthwise convolutions. Alpa: one all-reduce. Channels stay split throughout, so that
    is the one of the loss."""
    plan = solve_plan(conv_net(2, 8, 8, 256, depthwise=True), ONE_AXIS)
    assert traffic(plan) == {("all_reduce", ("x",)): LOSS_BYTES}
    assert kernel_pattern(plan, "x") == "cc"
