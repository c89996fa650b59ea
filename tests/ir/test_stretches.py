"""`ir.stretches`: repeated layers are differentiated once, and the gradient's graph is the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

import alpa_lite
from alpa_lite.ir.stretches import as_function_of_stretches
from alpa_lite.ir.trace import trace
from alpa_lite.models import build

grad_module = sys.modules["alpa_lite.ir.grad"]


def traced_both_ways(step: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The graph as it is, and as JAX alone makes it."""
    found = trace(step, *args).graph
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_module, "as_function_of_stretches", jaxpr_as_fun)
        expected = trace(step, *args).graph
    return found, expected


def assert_same(found: Any, expected: Any) -> None:
    """The same ops in the same order, of the same scopes and source lines."""
    assert str(found) == str(expected)
    assert [op.source for op in found.walk()] == [op.source for op in expected.walk()]


def with_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, x: alpa_lite.value_and_grad(loss)(params, x)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("gpt-test", {"num_layers": 3}),
        ("llama-test", {"num_layers": 3, "remat": True}),
        pytest.param("llama-test", {"num_layers": 4}, marks=pytest.mark.slow),
        pytest.param("moe-test", {"num_layers": 4}, marks=pytest.mark.slow),
        pytest.param("deepseek-test", {}, marks=pytest.mark.slow),
        pytest.param("wide-resnet-test", {}, marks=pytest.mark.slow),
    ],
)
def test_graphs_of_models(preset: str, overrides: dict[str, Any]) -> None:
    setup = build(preset, **overrides)
    assert_same(*traced_both_ways(setup.step, setup.state_shapes(), setup.batch_shapes(8)))


def dense(params, x, key):
    return jnp.tanh(x @ params["w"] + params["b"]) + x


def norm(params, x, key):
    """Reads its input three times, once through a subtraction that hands the cotangent on."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    return (x - jax.lax.stop_gradient(mean)) * jax.lax.rsqrt(jnp.mean(x * x)) * params["b"] + x


def dropout(params, x, key):
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0.0) @ params["w"]


def gathered(params, x, key):
    rows = jnp.argsort(x[:, 0])
    return jax.nn.relu(x[rows] @ params["w"]) + jnp.max(x, axis=0)


def branch(params, x, key):
    return jax.lax.cond(x[0, 0] > 0, lambda y: y @ params["w"], lambda y: y * 2.0, x)


def looped(params, x, key):
    return jax.lax.scan(lambda y, _: (jnp.sin(y @ params["w"]), None), x, length=2)[0]


@jax.custom_vjp
def clipped(x):
    return x * 1.0


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (jnp.clip(g, -1.0, 1.0),))


def own_derivative(params, x, key):
    return clipped(x @ params["w"]) + jax.nn.gelu(x)


LAYERS = (dense, norm, dropout, gathered, branch, looped, own_derivative)


def stack(layers: list[Callable[..., Any]], times: int, remat: bool) -> Callable[..., Any]:
    def block(params, x, key):
        for i, layer in enumerate(layers):
            with jax.named_scope(f"part{i}"):
                x = layer(params, x, key)
        return x

    def loss(params, x):
        keys = jax.random.split(jax.random.key(0), times)
        first = x
        for i, own in enumerate(params):
            with jax.named_scope(f"layer{i}"):
                x = (jax.checkpoint(block) if remat else block)(own, x, keys[i])
        return jnp.mean((x - first) ** 2)

    return loss


@settings(max_examples=10)
@given(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3), st.integers(2, 5), st.booleans())
def test_graphs_of_random_stacks(layers, times, remat):
    own = {"w": jax.ShapeDtypeStruct((6, 6), "float32"), "b": jax.ShapeDtypeStruct((6,), "float32")}
    x = jax.ShapeDtypeStruct((4, 6), "float32")
    loss = stack(layers, times, remat)
    assert_same(*traced_both_ways(with_gradient(loss), [own] * times, x))


def calls(closed: ClosedJaxpr) -> list[Any]:
    """The jaxprs called at the top level of the derived function."""
    again = jax.make_jaxpr(as_function_of_stretches(closed))(*closed.in_avals)
    return [e.params["jaxpr"] for e in again.jaxpr.eqns if e.primitive.name in ("jit", "pjit")]


@pytest.mark.parametrize(("times", "distinct"), [(2, 0), (3, 1), (6, 1)])
def test_repeated_layers_call_one_function(times, distinct):
    own = {"w": jnp.zeros((6, 6)), "b": jnp.zeros((6,))}

    def loss(params, x):
        for i, layer in enumerate(params):
            with jax.named_scope(f"layer{i}"):
                x = jnp.sin(x @ layer["w"]) * layer["b"]
        return x

    found = calls(jax.make_jaxpr(loss)([own] * times, jnp.zeros((4, 6))))
    assert len({id(body) for body in found}) == distinct
    assert len(found) == times * distinct


def test_layers_of_other_lines_or_params_stay_apart():
    def loss(x):
        for scale in (1.0, 2.0, 3.0):
            x = jnp.sin(jnp.cos(x)) * scale
        return x

    def same_line_each(x):
        x = jnp.sin(jnp.cos(x)) * 2.0
        x = jnp.sin(jnp.cos(x)) * 2.0
        return jnp.sin(jnp.cos(x)) * 2.0

    for fun in (loss, same_line_each):
        assert calls(jax.make_jaxpr(fun)(jnp.zeros(4))) == []


def test_values_are_those_of_the_function():
    own = {"w": jnp.full((6, 6), 0.3), "b": jnp.full((6,), 0.5)}
    x = jnp.arange(24.0).reshape(4, 6) / 24
    closed = jax.make_jaxpr(stack([dense, norm], 3, False))([own] * 3, x)
    leaves = jax.tree.leaves(([own] * 3, x))
    found = jax.jit(as_function_of_stretches(closed))(*leaves)
    expected = jax.jit(jaxpr_as_fun(closed))(*leaves)
    assert jnp.allclose(found[0], expected[0]) and expected[0] != 0
