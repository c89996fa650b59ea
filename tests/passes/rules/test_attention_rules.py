"""Fused attention in the planner: its rules, its operations, and what its layouts communicate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_lite
from alpa_lite.ir.flops import equation_flops, visible_pairs
from alpa_lite.passes.rules import derive_rules
from alpa_lite.passes.rules.equation import Equation
from tests.passes.rules.samples import equations_of


def attention(heads: int, kv_heads: int, **options: object) -> dict[str, Equation]:
    """Both primitives of an attention over 4 sequences."""
    q = jax.ShapeDtypeStruct((4, 6, heads, 8), jnp.float32)
    kv = jax.ShapeDtypeStruct((4, 10, kv_heads, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((4, 6), jnp.int32), jax.ShapeDtypeStruct((4, 10), jnp.int32)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> object:
        return jax.grad(
            lambda *qkv: alpa_lite.flash_attention(*qkv, segment_ids=ids or None, **options).sum(),
            argnums=(0, 1, 2),
        )(q, k, v)

    arguments = (q, kv, kv, *ids) if options.pop("segments", False) else (q, kv, kv)
    found = {e.primitive.name: e for e in equations_of(gradients, *arguments)}
    return {n: e for n, e in found.items() if n.startswith("flash_attention")}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "splits_forward", "splits_backward"),
    [(8, 8, 8, 8), (8, 2, 2, 2), (8, 1, 8, 1), (1, 1, 1, 1)],
)
@pytest.mark.parametrize("segments", [False, True])
def test_batch_and_heads_pass(
    heads: int, kv_heads: int, splits_forward: int, splits_backward: int, segments: bool
) -> None:
    equations = attention(heads, kv_heads, segments=segments)
    forward, backward = derive_rules(list(equations.values()))
    assert [*equations] == ["flash_attention", "flash_attention_backward"]
    for rule, splits in ((forward, splits_forward), (backward, splits_backward)):
        free = {f.size for f in rule.factors if f.kind.name == "PASS" and f.size > 1}
        assert free == {4, splits} - {1}
        batch = next(i for i, f in enumerate(rule.factors) if f.size == 4)
        assert all(array[0] == (batch,) for array in (*rule.operands, *rule.results))
        assert not rule.note


@pytest.mark.parametrize("left", [None, 0, 3])
@pytest.mark.parametrize("right", [None, 0, 2])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 9), (9, 3)])
def test_visible_pairs_are_those_of_the_mask(
    left: int | None, right: int | None, lengths: tuple[int, int]
) -> None:
    q, k = np.indices(lengths)
    mask = np.ones(lengths, bool)
    if left is not None:
        mask &= q - k <= left
    if right is not None:
        mask &= k - q <= right
    assert visible_pairs(*lengths, left, right) == mask.sum()


def test_operations_are_those_of_the_matrix_products() -> None:
    """Forward q @ k and p @ v; backward these scores again, dq, dk, dp and dv: 2 + 5 products."""
    equations = attention(8, 2)
    flops = {
        name: equation_flops(name, e.params, e.in_avals, e.out_avals)
        for name, e in equations.items()
    }
    product = 2 * 4 * 8 * (6 * 10) * 8  # batch x heads x pairs x head dim
    assert flops == {"flash_attention": 2 * product, "flash_attention_backward": 5 * product}
    causal = attention(8, 2, causal=True)["flash_attention"]
    share = equation_flops(causal.primitive.name, causal.params, causal.in_avals, causal.out_avals)
    assert share == 2 * product * (6 * 7 / 2) / 60


def test_heads_on_one_axis_and_batch_on_another_move_no_scores() -> None:
    """A plan of attention layers has Megatron's all-reduces and those of gradients, no others."""
    width, heads, dim = 64, 8, 16

    def step(state: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        def loss(w: dict[str, jax.Array]) -> jax.Array:
            q, k, v = (jnp.einsum("bte,ehd->bthd", x, w[n]) for n in "qkv")
            out = alpa_lite.flash_attention(q, k, v, causal=True)
            return jnp.mean(jnp.einsum("bthd,hde->bte", out, w["o"]) ** 2)

        value, grads = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda w, g: w - 0.1 * g, state, grads), value

    spec = jax.sharding.PartitionSpec
    pins = {f"state.{n}": spec(None, "tp") for n in "qkv"} | {
        "state.o": spec("tp"),
        "x": spec("dp"),
    }
    state = {n: jax.ShapeDtypeStruct((width, heads, dim), jnp.float32) for n in "qkv"}
    state["o"] = jax.ShapeDtypeStruct((heads, dim, width), jnp.float32)
    batch = jax.ShapeDtypeStruct((8, 32, width), jnp.float32)
    method = alpa_lite.ManualParallel(pins, mesh_shape={"dp": 2, "tp": 4})
    plan = alpa_lite.parallelize(step, method=method, cluster="h100:1x8").plan(state, batch)
    assert not any("attention" in note for note in plan.notes)
    tp = [c for c in plan.predicted.collectives if "tp" in c.axes]
    assert {c.kind for c in tp} == {"all_reduce"}
    assert sum(c.times_per_step for c in tp) == 1  # of the output; the batch has no gradient
    kinds = {c.kind for c in plan.predicted.collectives if c.axes == ("dp",)}
    assert kinds <= {"all_reduce", "reduce_scatter", "all_gather"} and kinds  # of gradients
