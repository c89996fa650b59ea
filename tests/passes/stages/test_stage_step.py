"""A stage as a step of its own: its ports, its graph, and stages that are alike."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_lite
from alpa_lite.ir.graph import graph_hash
from alpa_lite.models import build
from alpa_lite.passes.stages.stage_step import update_rounds
from tests.passes.stages.stage_flow import Staged, check, staged

WIDTH, ROWS, LAYERS = 8, 4, 6
X = np.linspace(-1, 1, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
EACH = [[0], [1], [2], [3], [4], [5, 6]]


def params(num: int = LAYERS) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    made = {f"w{i}": 0.5 * rng.normal(size=(WIDTH, WIDTH)) for i in range(num)}
    return {name: jnp.asarray(w, jnp.float32) for name, w in made.items()}


def make_step(
    *, clip: bool = False, other: int | None = None, key: bool = False, skip: bool = False
) -> Callable[..., Any]:
    """A step over a chain; `other` is a layer with another function."""

    def loss(p: Any, x: jax.Array) -> Any:
        first = mean = x
        for i in range(LAYERS):
            h = x @ p[f"w{i}"]
            if key:
                seed = jax.random.fold_in(jax.random.key(3), i)
                h = jnp.where(jax.random.bernoulli(seed, 0.8, h.shape), h, 0.0)
            mean = jnp.mean(h) if i == 0 else mean
            x = alpa_lite.mark_layer(jnp.sin(h) if i == other else jnp.tanh(h))
            first = x if i == 0 else first
        x = x + first if skip else x
        return jnp.mean(x**2), {"rows": x[:, 0], "mean": mean}

    def step(state: Any, x: jax.Array) -> Any:
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state, x)
        scale = 1.0
        if clip:
            scale = 1.0 / (1.0 + jnp.sqrt(sum(jnp.sum(g**2) for g in grads.values())))
        return {k: p - 0.1 * scale * grads[k] for k, p in state.items()}, {"loss": value, **aux}

    return step


@functools.cache
def cut(remat: str = "none", **options: Any) -> Staged:
    return staged(make_step(**options), params(), X, stages=EACH, remat=remat)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_rematerialisation_changes_nothing_but_what_is_kept(remat: str) -> None:
    """Products of the forward pass are computed again, or not."""
    found = check(staged(make_step(key=True), params(), X, stages=[[0, 1, 2], [3, 4, 5, 6]],
                         remat=remat))  # fmt: skip
    names = Counter(op.name for op in found.steps[0].traced.graph.walk())
    # Three forward, five backward (the rows need no cotangent), and three again.
    assert names["dot_general"] == {"none": 8, "dots": 8, "full": 11}[remat]
    assert names["tanh"] == {"none": 3, "dots": 6, "full": 6}[remat]


def test_the_users_own_checkpoint_is_kept() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        def loss(p: Any) -> jax.Array:
            h = jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))(p["w0"], x)
            return jnp.mean(alpa_lite.mark_layer(h) @ p["w1"])

        value, grads = jax.value_and_grad(loss)(state)
        return {k: p - 0.1 * grads[k] for k, p in state.items()}, value

    found = check(staged(step, params(2), X, stages=2))
    names = Counter(op.name for op in found.steps[0].traced.graph.walk())
    assert names["tanh"] == 4 and names["optimization_barrier"] > 0


def test_ports() -> None:
    found = cut(skip=True)
    first, middle, last = (found.steps[i] for i in (0, 2, 5))
    kinds = [[p.kind for p in step.inputs] for step in (first, middle, last)]
    assert kinds[0] == ["state", "row", "cotangent", "cotangent"]
    assert kinds[1] == ["state", "activation", "cotangent"]
    assert kinds[2] == ["state", "activation", "activation"]
    kinds = [[p.kind for p in step.outputs] for step in (first, middle, last)]
    assert kinds[0] == ["state", "result", "activation"], "one value, however many read it"
    assert kinds[1] == ["state", "activation", "cotangent"]
    assert kinds[2] == ["state", "result", "result", "cotangent", "cotangent"]
    # Every output is a step output, or is somebody's input.
    names = [n for step in found.steps for n in step.traced.graph.input_names]
    assert "state.w2" in names and "activation from stage 1 to 2" in names


def test_names_are_distinct() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        def loss(p: Any) -> jax.Array:
            a, b = x @ p["w0"], x @ p["w1"]
            a = alpa_lite.mark_layer(a)
            return jnp.mean(jnp.tanh(a @ p["w2"]) * b + a)

        value, grads = jax.value_and_grad(loss)(state)
        return {k: p - 0.1 * grads[k] for k, p in state.items()}, value

    found = check(staged(step, params(3), X, stages=2))
    for each in found.steps:
        for names in (each.traced.graph.input_names, each.traced.graph.output_names):
            assert len(set(names)) == len(names)


def test_output_kinds_of_a_stage() -> None:
    found = cut()
    middle = found.steps[2]
    assert dict(zip((p.kind for p in middle.outputs), middle.output_kinds, strict=True)) == {
        "state": "", "activation": "concatenate", "cotangent": "concatenate",
    }  # fmt: skip


def test_equal_layers_make_equal_stages() -> None:
    found = cut()
    signatures = [found.cut.signature(i, "none") for i in range(6)]
    assert len({*signatures[1:5]}) == 1
    assert len({*signatures}) == 3
    hashes = [graph_hash(found.steps[i].traced.graph) for i in range(1, 5)]
    assert len({*hashes}) == 1, "equal signatures mean equal graphs"


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_signatures_know_the_rematerialisation(remat: str) -> None:
    found = cut()
    assert found.cut.signature(2, remat) != found.cut.signature(2, "none")
    assert found.cut.signature(2, remat) == found.cut.signature(3, remat)


def test_signatures_know_what_a_layer_computes_and_what_it_hands_on() -> None:
    other = cut(other=2)
    assert other.cut.signature(2, "none") != other.cut.signature(3, "none")
    assert other.cut.signature(1, "none") == other.cut.signature(3, "none")
    # Another graph: the same stage reads one more value.
    skip = cut(skip=True)
    assert skip.cut.signature(0, "none") != cut().cut.signature(0, "none")


def test_signatures_know_literals_and_constants() -> None:
    def step_with(scales: list[Any]) -> Callable[..., Any]:
        def step(state: Any, x: jax.Array) -> Any:
            def loss(p: Any) -> jax.Array:
                y = x
                for i, scale in enumerate(scales):
                    y = alpa_lite.mark_layer(jnp.tanh(y @ p[f"w{i}"] * scale))
                return jnp.mean(y)

            value, grads = jax.value_and_grad(loss)(state)
            return {k: p - 0.1 * grads[k] for k, p in state.items()}, value

        return step

    def signatures(scales: list[Any]) -> list[str]:
        found = check(staged(step_with(scales), params(4), X, stages=[[0], [1], [2], [3, 4]]))
        return [found.cut.signature(i, "none") for i in (1, 2)]

    one, two = signatures([1.0, 2.0, 2.0, 1.0])
    assert one == two
    one, two = signatures([1.0, 2.0, 3.0, 1.0])
    assert one != two
    arrays = [np.full(WIDTH, 2.0, np.float32), np.full(WIDTH, 3.0, np.float32)]
    one, two = signatures([1.0, arrays[0], arrays[0], 1.0])
    assert one == two
    one, two = signatures([1.0, *arrays, 1.0])
    assert one != two, "arrays of equal shapes and other values"


def test_signatures_know_the_update() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        def loss(p: Any) -> jax.Array:
            y = x
            for i in range(4):
                y = alpa_lite.mark_layer(jnp.tanh(y @ p[f"w{i}"]))
            return jnp.mean(y)

        value, grads = jax.value_and_grad(loss)(state)
        rates = {"w0": 0.1, "w1": 0.1, "w2": 0.2, "w3": 0.1}
        return {k: p - rates[k] * grads[k] for k, p in state.items()}, value

    found = check(staged(step, params(4), X, stages=[[0], [1], [2], [3, 4]]))
    assert found.cut.signature(1, "none") != found.cut.signature(2, "none")


def test_a_stage_like_another_shares_its_graph() -> None:
    found = cut()
    again = found.cut.stage(3, "none", like=found.steps[2])
    mine, theirs = again.traced.graph, found.steps[2].traced.graph
    assert mine.ops is theirs.ops and mine.values is theirs.values
    assert mine.input_names == found.steps[3].traced.graph.input_names
    assert again.inputs == found.steps[3].inputs and again.outputs == found.steps[3].outputs
    swapped = Staged(
        found.fun, found.args, found.cut,
        tuple(again if i == 3 else step for i, step in enumerate(found.steps)),
    )  # fmt: skip
    check(swapped)


def test_rounds_of_the_update() -> None:
    """What waits for another stage runs later than what does not."""
    found = cut(clip=True)
    step = found.steps[1]
    arrival = {i: 2 for i, p in enumerate(step.inputs) if p.kind == "update"}
    assert len(arrival) == 1, "the norm of all gradients"
    graph = step.traced.graph
    rounds = update_rounds(graph, arrival)
    assert {*rounds.values()} == {0, 2}
    first = max(r.last_op for r in graph.grad_regions)
    assert min(rounds) == first and len(rounds) == len(graph.ops) - first
    of = {graph.ops[i].name: r for i, r in rounds.items()}
    assert of["reduce_sum"] == 0, "the own part of the norm"
    assert of["sub"] == 2, "the new parameter"
    assert {*update_rounds(graph, {}).values()} == {0}


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param("gpt-test", {"dropout_rate": 0.1, "clip_norm": 0.5}, marks=pytest.mark.slow),
        pytest.param("llama-test", {}, marks=pytest.mark.slow),
        pytest.param("moe-test", {}, marks=pytest.mark.slow),
        pytest.param("deepseek-test", {}, marks=pytest.mark.slow),
        pytest.param("wide-resnet-test", {}, marks=pytest.mark.slow),
        ("mlp-test", {}),
    ],
)
def test_models(model: str, options: dict[str, Any], remat: str) -> None:
    # Adam would divide the gradient of a bias of keys, which is zero but for rounding, by itself.
    setup = build(model, optimizer="sgd", **options)
    state = jax.jit(setup.init)(jax.random.key(0))
    found = staged(setup.step, state, setup.make_batch(0, 4), stages=3, remat=remat)
    check(found, rtol=1e-4)
