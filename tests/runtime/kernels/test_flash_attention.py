"""`flash_attention` as users call it: transformations, refusals, and which implementation runs."""

import logging
import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import alpa_lite
from alpa_lite import flash_attention
from alpa_lite.runtime.kernels.flash import choice
from alpa_lite.runtime.kernels.flash.primitive import merge
from tests.runtime.kernels.dense_attention import dense_attention, relative_l2, visible_pairs

B, T, S, H, K, D = 2, 24, 24, 4, 2, 8


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


Q, KV = normal(B, T, H, D), normal(2, B, S, K, D, seed=1)
CAUSAL = visible_pairs(B, T, S, causal=True)
DENSE = dense_attention(Q, *KV, CAUSAL, scale=D**-0.5)


def squares(q, k, v, **options):
    return (flash_attention(q, k, v, causal=True, **options) ** 2).sum()


# Values.


@pytest.mark.smoke
def test_is_attention():
    out, lse = flash_attention(Q, *KV, causal=True, return_lse=True)
    np.testing.assert_allclose(out, DENSE.out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, DENSE.lse, rtol=1e-5, atol=1e-5)
    theirs = jax.nn.dot_product_attention(Q, *KV, is_causal=True)
    np.testing.assert_allclose(out, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.smoke
def test_gradients():
    found = jax.grad(squares, argnums=(0, 1, 2))(Q, *KV)
    expected = dense_attention(Q, *KV, CAUSAL, scale=D**-0.5, dout=2 * DENSE.out)
    for one, other in zip(found, expected[2:], strict=True):
        assert relative_l2(one, other) < 1e-5


@pytest.mark.slow
def test_log_sum_exp_is_differentiable():
    """The whole is put together from two halves of the keys; so are its gradients."""

    def in_halves(q, k, v):
        parts = []
        for start in (0, S // 2):
            keys = slice(start, start + S // 2)
            parts += flash_attention(
                q, k[:, keys], v[:, keys], causal=True, kv_offset=start, return_lse=True
            )
        return (merge(*parts)[0] ** 2).sum()

    value, gradients = jax.value_and_grad(in_halves, argnums=(0, 1, 2))(Q, *KV)
    np.testing.assert_allclose(value, (DENSE.out**2).sum(), rtol=1e-5)
    for one, other in zip(gradients, jax.grad(squares, argnums=(0, 1, 2))(Q, *KV), strict=True):
        assert relative_l2(one, other) < 1e-5


def test_merge_with_nothing():
    out, lse = merge(
        DENSE.out, DENSE.lse, np.zeros_like(DENSE.out), np.full_like(DENSE.lse, -np.inf)
    )
    np.testing.assert_allclose(out, DENSE.out, rtol=1e-6)
    np.testing.assert_allclose(lse, DENSE.lse, rtol=1e-6)
    _, lse = merge(DENSE.out, -np.inf + 0 * DENSE.lse, DENSE.out, -np.inf + 0 * DENSE.lse)
    assert np.all(np.isneginf(lse))


def test_offset_continues_a_sequence():
    """The last queries alone, with all keys as in a cache; one position for each example too."""
    last = flash_attention(Q[:, -5:], *KV, causal=True, q_offset=S - 5)
    np.testing.assert_allclose(last, DENSE.out[:, -5:], rtol=1e-4, atol=1e-5)
    each = flash_attention(Q[:, :1], *KV, causal=True, q_offset=jnp.array([3, 9]))
    for b, position in enumerate((3, 9)):
        alone = flash_attention(
            Q[b:, :1][:1], KV[0][b:][:1, : position + 1], KV[1][b:][:1, : position + 1]
        )
        np.testing.assert_allclose(each[b], alone[0], rtol=1e-4, atol=1e-5)


def test_window_with_and_without_causal():
    number = flash_attention(Q, *KV, causal=True, window=5)
    pair = flash_attention(Q, *KV, window=(4, 0))
    np.testing.assert_array_equal(number, pair)
    theirs = jax.nn.dot_product_attention(Q, *KV, local_window_size=(3, 2))
    ours = flash_attention(Q, *KV, window=(3, 2))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_memory_is_linear_in_the_sequence():
    """Of a causal forward and backward pass, without what goes in and comes out."""

    def temporary_bytes(seq):
        x = jax.ShapeDtypeStruct((1, seq, 1, 32), jnp.float32)
        compiled = jax.jit(jax.grad(squares, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(4096), temporary_bytes(16384)
    assert long < 4.2 * short
    assert long < 0.05 * 16384**2 * 4  # of one score matrix


# Transformations.


def test_vmap():
    """Of q along its second dim, segments and offsets; keys and values are the same for all."""
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (3, B, T)), axis=-1)
    q, offsets = normal(B, 3, T, H, D, seed=2), np.array([0, 3, -4])

    def one(q, ids, offset):
        return jax.value_and_grad(squares)(q, *KV, segment_ids=ids, q_offset=offset)

    mapped = jax.jit(jax.vmap(one, in_axes=(1, 0, 0)))(q, ids, offsets)
    alone = jax.jit(one)
    for n in range(3):
        values = alone(q[:, n], ids[n], offsets[n])
        for x, y in zip(mapped, values, strict=True):
            np.testing.assert_allclose(x[n], y, rtol=1e-4, atol=1e-5)


def attentions(jaxpr):
    """Names of the attention primitives of a jaxpr, in order."""
    return re.findall(r"= (flash_attention\w*)\[", str(jaxpr))


@pytest.mark.parametrize(
    ("saved", "forwards"),
    [((), 2), (("flash_attention_out",), 2), (("flash_attention_out", "flash_attention_lse"), 1)],
)
def test_remat_saves_what_is_named(saved, forwards):
    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    layer = jax.checkpoint(lambda q: squares(jnp.sin(q), *KV), policy=policy)
    traced = jax.jit(jax.value_and_grad(layer)).trace(Q).jaxpr
    cleaned = alpa_lite.compat.remove_dead_code(traced)
    assert attentions(cleaned).count("flash_attention") == forwards
    assert attentions(cleaned).count("flash_attention_backward") == 1


@pytest.mark.slow
def test_one_operation_of_a_parallelized_step():
    """Heads over one axis and batch over another, as the rules of the primitives allow."""

    def step(state, batch):
        def loss(w):
            q, k, v = (jnp.einsum("bte,ehd->bthd", batch, w[n]) for n in "qkv")
            out = flash_attention(q, k, v, causal=True)
            return (jnp.einsum("bthd,hde->bte", out, w["o"]) ** 2).mean()

        value, gradients = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda w, g: w - 0.1 * g, state, gradients), value

    width = 64
    shapes = {"q": (width, 8, D), "k": (width, 4, D), "v": (width, 4, D), "o": (8, D, width)}
    state = {n: 0.1 * normal(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    batch = normal(8, 16, width, seed=9)
    heads = {f"state.{n}": P(None, "tp") for n in "qkv"} | {"state.o": P("tp")}
    method = alpa_lite.ManualParallel(heads, mesh_shape={"dp": 2, "tp": 4})
    parallel = alpa_lite.parallelize(step, method=method)
    kinds = {(c.kind, c.axes) for c in parallel.plan(state, batch).predicted.collectives}
    assert ("all_reduce", ("tp",)) in kinds  # of the output projection
    assert ("all_gather", ("tp",)) not in kinds
    expected = step(state, batch)
    found = parallel(state, batch)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_l2(one, other) < 1e-5


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize(
    ("implementation", "check_vma"),
    [("scan", True), pytest.param("pallas", False, marks=pytest.mark.slow)],
)
def test_parts_need_no_collective(implementation, check_vma):
    """Batch and heads over 8 devices, forward and backward."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = P("data", None, "model", None)
    q, (k, v) = normal(4, 40, 8, D), normal(2, 4, 40, 4, D, seed=1)

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(split,) * 3, out_specs=(split,) * 3, check_vma=check_vma
    )
    def gradients(q, k, v):
        options = {"window": 9, "implementation": implementation}
        return jax.grad(partial(squares, **options), argnums=(0, 1, 2))(q, k, v)

    arrays = [jax.device_put(x, jax.NamedSharding(mesh, split)) for x in (q, k, v)]
    compiled = jax.jit(gradients).lower(*arrays).compile()
    assert not [name for name in COLLECTIVES if name in compiled.as_text()]
    expected = jax.grad(partial(squares, window=9), argnums=(0, 1, 2))(q, k, v)
    for one, other in zip(compiled(*arrays), expected, strict=True):
        assert relative_l2(one, other) < 1e-5


def test_explicit_axes():
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    split = P("data", None, "model", None)
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, jax.NamedSharding(mesh, split)) for x in (Q, *KV)]
        shapes = jax.eval_shape(partial(flash_attention, return_lse=True), *arrays)
    assert [x.sharding.spec for x in shapes] == [split, P("data", "model", None)]


# Refusals.


def array(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


GOOD = {"q": array(2, 8, 4, 16), "k": array(2, 8, 2, 16), "v": array(2, 8, 2, 16)}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"q": 3.0}, TypeError, "q is an array [batch, seq, heads, head_dim], not float."),
        ({"k": array(2, 8, 16)}, ValueError, "k has the dims [batch, seq, heads, head_dim]; found q float32[2, 8, 4, 16], k float32[2, 8, 16]"),
        ({"q": array(2, 0, 4, 16)}, ValueError, "No dim of q is empty; found q float32[2, 0, 4, 16]"),
        ({"k": array(3, 8, 2, 16), "v": array(3, 8, 2, 16)}, ValueError, "one batch size; found q float32[2, 8, 4, 16], k float32[3, 8, 2, 16]"),
        ({"v": array(2, 9, 2, 16)}, ValueError, "k and v have the same seq and heads; found"),
        ({"k": array(2, 8, 2, 32)}, ValueError, "q and k have the same head_dim; found q float32[2, 8, 4, 16], k float32[2, 8, 2, 32]"),
        ({"k": array(2, 8, 3, 16), "v": array(2, 8, 3, 16)}, ValueError, "3 does not divide 4"),
        ({"k": GOOD["k"].astype(jnp.bfloat16)}, ValueError, "one dtype; found q float32[2, 8, 4, 16], k bfloat16[2, 8, 2, 16]"),
        ({n: x.astype(jnp.int32) for n, x in GOOD.items()}, ValueError, "dtype is one of bfloat16, float16, float32, float64; found q int32"),
        ({"causal": 1}, TypeError, "causal is True or False, not 1."),
        ({"window": 4}, ValueError, "window=4 counts keys up to the query's own position, so it needs causal=True. For a window without it say (left, right), such as window=(3, 3)."),
        ({"window": 0, "causal": True}, ValueError, "window is from 1 to"),
        ({"window": (1, -1)}, ValueError, "window=(left, right) is from 0 to"),
        ({"window": (1, 2, 3)}, TypeError, "window is a number of keys or (left, right), not (1, 2, 3)."),
        ({"window": (1.5, 2)}, TypeError, "window=(left, right) has integers or None"),
        ({"segment_ids": array(2, 7, dtype=jnp.int32)}, ValueError, "The segment ids of the queries are [batch, seq] = [2, 8]; found int32[2, 7]."),
        ({"segment_ids": array(2, 8)}, TypeError, "Segment ids are integers; found float32[2, 8]."),
        ({"segment_ids": array(2, 8, dtype=jnp.int32), "k": array(2, 9, 2, 16), "v": array(2, 9, 2, 16)}, ValueError, "With 8 queries and 9 keys, segment_ids is a pair"),
        ({"segment_ids": (array(2, 8, dtype=jnp.int32),)}, TypeError, "a pair of them, not 1"),
        ({"scale": 0.0}, ValueError, "scale is positive and finite; got 0.0."),
        ({"scale": array()}, TypeError, "Multiply q for a scale that is computed."),
        ({"softcap": -1.0}, ValueError, "softcap is positive and finite; got -1.0."),
        ({"q_offset": 0.5}, TypeError, "q_offset is an integer"),
        ({"kv_offset": array(3, dtype=jnp.int32)}, ValueError, "kv_offset is one number or [2], one for each example; found (3,)."),
        ({"q_offset": 2**30}, ValueError, "below 2**30"),
        ({"implementation": "cuda"}, ValueError, "implementation is None or one of 'scan', 'pallas', 'mosaic_gpu'; got 'cuda'."),
        ({"implementation": "mosaic_gpu"}, ValueError, "takes bfloat16 or float16, not float32; found q float32[2, 8, 4, 16]"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, kind, message):
    arguments = {**GOOD, **changes}
    with pytest.raises(kind, match=re.escape(message)):
        flash_attention(**arguments)


def test_wide_heads_are_refused_by_the_hopper_kernels():
    x = array(1, 4, 1, 264, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"takes head dims up to 256, not 264"):
        flash_attention(x, x, x, implementation="mosaic_gpu")


def test_hopper_kernels_are_refused_on_other_devices():
    x = array(1, 4, 1, 64, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"needs a GPU with wgmma .* not cpu"):
        flash_attention(x, x, x, implementation="mosaic_gpu")


# Choice by platform.


@dataclass
class FakeDevice:
    device_kind: str
    compute_capability: str


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that the process has a GPU of some kind."""

    def pretend(kind, capability):
        device = FakeDevice(kind, capability)
        monkeypatch.setattr(choice.jax, "local_devices", lambda backend: [device])

    choice._log_fallback.cache_clear()
    return pretend


def chosen(platform, dtype=jnp.bfloat16, head_dim=128, implementation=None):
    return choice.choose(implementation, platform, dtype, head_dim).forward.__module__.split(".")[
        -1
    ]


def test_hopper_runs_its_kernels(gpu):
    gpu("NVIDIA H200", "9.0")
    assert chosen("cuda") == "hopper"
    assert chosen("cuda", jnp.float16, 40) == "hopper"
    assert chosen("cuda", jnp.float32) == "scan"
    assert chosen("cuda", head_dim=257) == "scan"
    assert chosen("cuda", implementation="scan") == "scan"
    assert chosen("cpu") == chosen("tpu") == chosen("rocm") == "scan"


def test_without_a_gpu_programs_are_lowered_for_hopper():
    assert chosen("cuda") == "hopper"


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_gpu_without_wgmma_falls_back_with_one_line(gpu, caplog, capability):
    gpu("NVIDIA other", capability)
    with caplog.at_level(logging.WARNING):
        assert chosen("cuda") == chosen("cuda") == "scan"
    (record,) = caplog.records
    assert record.getMessage() == (
        f"flash_attention: NVIDIA other (compute capability {capability}) has no wgmma; attention runs"
        " as loops of XLA operations (implementation='scan')."
    )
    with pytest.raises(ValueError, match=r"not NVIDIA other \(compute capability"):
        chosen("cuda", implementation="mosaic_gpu")


def test_portable_kernels_have_platforms():
    with pytest.raises(
        ValueError, match=r"runs on CPU \(interpreted\) and on NVIDIA GPUs, not on 'tpu'"
    ):
        chosen("tpu", implementation="pallas")
