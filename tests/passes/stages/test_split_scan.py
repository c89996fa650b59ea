"""A step whose layer scan is in pieces computes what the step did, on pieces."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alpa_lite.models import build
from alpa_lite.passes.stages.split_scan import piece_names
from tests.passes.stages.scanned_steps import (
    LAYERS,
    WIDTH,
    Tree,
    check,
    count,
    equations,
    forward,
    layer,
    line_of,
    loss_fn,
    make_batch,
    make_params,
    scan_lengths,
    traced,
    with_optax,
    with_sgd,
)


def noisy(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), inner)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=5),
    "adafactor over layers": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "lion": lambda: optax.lion(1e-2),
    "schedule": lambda: optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 5)),
    "multi steps": lambda: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)), 2
    ),
    "skip": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "masked": lambda: optax.masked(
        optax.add_decayed_weights(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 2, p)
    ),
    "noise": lambda: noisy(optax.sgd(0.1)),
    "trust": lambda: optax.lamb(1e-2),
    "moments in bf16": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
}


QUICK = ("clip", "multi steps")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
def test_optimizers(name: str) -> None:
    t = with_optax(loss_fn, OPTIMIZERS[name]())
    split = check(t)
    assert split.notes == ()
    assert scan_lengths(split) == [2, 2]
    # Whatever is stacked comes in two pieces, all the rest is as it was.
    for leaf, place in zip(t.state, split.inputs, strict=False):
        stacked = leaf.ndim > 0 and leaf.shape[0] == LAYERS
        assert place.dim == (0 if stacked else None), (leaf.shape, place)
    assert count(split.closed, "concatenate") == count(t.closed, "concatenate")


@pytest.mark.slow
@pytest.mark.parametrize(("num_pieces", "remat"), [(2, True), (4, False)])
def test_llama(num_pieces: int, remat: bool) -> None:
    setup = build("llama-scan-test", clip_norm=1.0, num_layers=4, remat=remat, seq_len=8)
    t = traced(setup.step, setup.init(jax.random.key(0)), setup.make_batch(0, 2))
    split = check(t, num_pieces)
    assert split.notes == ()
    assert scan_lengths(split) == [4 // num_pieces] * num_pieces
    for name, place in zip(t.names, split.inputs, strict=False):
        assert (place.dim == 0) == (".layers." in name), name
    assert count(split.closed, "concatenate") == count(t.closed, "concatenate")


@pytest.mark.slow
def test_flax_scan_with_dropout() -> None:
    setup = build("gpt-test", scan_layers=True, dropout_rate=0.1, num_layers=4, dtype="bfloat16")
    t = traced(setup.step, setup.init(jax.random.key(0)), setup.make_batch(0, 2))
    split = check(t, rtol=2e-2, atol=2e-4)
    assert split.notes == ()
    assert scan_lengths(split) == [2, 2]


# The scan and what it reads.


def test_each_piece_of_a_parameter_goes_to_its_own_scan() -> None:
    split = with_optax(loss_fn, optax.sgd(0.1)).split(4)
    jaxpr = forward(split)
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    stacked = [v for v in jaxpr.invars if v.aval.shape[:1] == (1,)]
    assert len(scans) == 4 and len(stacked) == 8
    readers = [[scans.index(e) for e in jaxpr.eqns if v in e.invars] for v in stacked]
    assert readers == [[0], [1], [2], [3]] * 2


@pytest.mark.slow
def test_compute_in_bf16() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        params, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch))
        return loss_fn(params, batch).astype(jnp.float32)

    split = check(with_optax(loss, optax.adamw(1e-2)), rtol=3e-2, atol=3e-2)
    assert split.notes == ()
    # Every piece is cast by itself.
    casts = [e for e in forward(split).eqns if e.primitive.name == "convert_element_type"]
    assert sum(e.invars[0].aval.shape == (2, WIDTH, WIDTH) for e in casts) == 2


@pytest.mark.slow
def test_cast_before_the_gradient() -> None:
    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        cast = jax.tree.map(lambda p: p * 1.5, state)
        value, grads = jax.value_and_grad(loss_fn)(cast, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    t = traced(step, make_params(), make_batch())
    split = check(t)
    assert split.notes == ()
    assert t.place(split, "layers.w").dim == 0


@pytest.mark.slow
def test_parameters_stacked_along_another_dim() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        layers = {"w": jnp.moveaxis(params["layers"]["w"], 1, 0), "b": params["layers"]["b"].T}
        return loss_fn({**params, "layers": layers}, batch)

    params = make_params()
    params["layers"] = {
        "w": jnp.moveaxis(params["layers"]["w"], 0, 1), "b": params["layers"]["b"].T,
    }  # fmt: skip
    t = with_optax(loss, optax.adamw(1e-2), params)
    split = check(t)
    assert split.notes == ()
    assert [p.dim for p in split.inputs if p.dim is not None] == [1] * 6
    names = piece_names(split.inputs[: len(t.names)], t.names, [x.shape for x in t.state])
    assert "params.layers.w[:,0:2]" in names and "opt.0.mu.layers.b[:,2:4]" in names


@pytest.mark.slow
def test_groups_of_layers() -> None:
    """Two layers per iteration: `[4, ...]` parameters, a scan of length 2."""

    def loss(params: Tree, batch: Tree) -> jax.Array:
        pairs = jax.tree.map(lambda p: p.reshape(2, 2, *p.shape[1:]), params["layers"])

        def body(x: jax.Array, pair: Tree) -> tuple[jax.Array, None]:
            for i in range(2):
                x = layer(x, jax.tree.map(lambda p: p[i], pair))  # noqa: B023
            return x, None

        x, _ = jax.lax.scan(body, batch["x"], pairs)
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    split = check(with_optax(loss, optax.adamw(1e-2)))
    assert split.notes == ()
    assert scan_lengths(split) == [1, 1]


@pytest.mark.parametrize("raw", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_keys_and_indices(raw: bool) -> None:
    def loss(params: Tree, state: Tree, batch: Tree) -> Any:
        keys = jax.random.split(state["key"], LAYERS + 1)

        def body(x: jax.Array, each: Any) -> tuple[jax.Array, None]:
            p, key, index = each
            kept = jax.random.bernoulli(key, 0.8, x.shape)
            return layer(x, p) * kept / (1.0 + index), None

        xs = params["layers"], keys[1:], jnp.arange(LAYERS)
        x, _ = jax.lax.scan(body, batch["x"], xs)
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2), ({"key": keys[0]}, ())

    key = jax.random.PRNGKey(0) if raw else jax.random.key(0)
    split = check(with_sgd(loss, key=key))
    assert split.notes == ()
    assert scan_lengths(split) == [2, 2]


@pytest.mark.slow
def test_keys_kept_per_layer() -> None:
    def loss(params: Tree, state: Tree, batch: Tree) -> Any:
        new = jax.vmap(lambda key: jax.random.fold_in(key, 1))(state["keys"])

        def body(x: jax.Array, each: Any) -> tuple[jax.Array, None]:
            p, key = each
            return layer(x, p) * jax.random.uniform(key, x.shape), None

        x, _ = jax.lax.scan(body, batch["x"], (params["layers"], state["keys"]))
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2), ({"keys": new}, ())

    t = with_sgd(loss, keys=jax.random.split(jax.random.key(0), LAYERS))
    check(t)


def test_outputs_per_layer_stay_in_pieces() -> None:
    """As they come out, unless something needs them whole."""

    def loss(params: Tree, state: Tree, batch: Tree) -> Any:
        def body(x: jax.Array, p: Tree) -> tuple[jax.Array, Any]:
            x = layer(x, p)
            return x, (x.mean(), x.max(0), x.min())

        x, (mean, top, low) = jax.lax.scan(body, batch["x"], params["layers"])
        value = jnp.mean((x @ params["head"] - batch["y"]) ** 2) + 0.1 * mean.sum()
        count = state["count"] + (mean > 0)  # [layers]
        return value, ({"count": count}, (top * 2, jnp.cumsum(low)))

    t = with_sgd(loss, count=jnp.zeros(LAYERS, jnp.int32))
    split = check(t)
    assert [p.dim for p in split.outputs[len(t.state) :]] == [None, 0, None]
    assert t.place(split, "count").dim == 0
    (note,) = split.notes
    assert note.startswith("cumsum at ") and f"shape [{LAYERS}] whole" in note


def loss_with_cumsum(params: Tree, batch: Tree) -> jax.Array:
    spread = jnp.cumsum(params["layers"]["b"], axis=0)
    return loss_fn(params, batch) + jnp.mean(spread**2)


def test_notes_name_what_needs_whole_arrays() -> None:
    t = with_optax(loss_with_cumsum, optax.adamw(1e-2))
    split = t.split(2)
    (note,) = split.notes
    assert note.startswith("cumsum at ")
    assert line_of(loss_with_cumsum, "jnp.cumsum") in note
    assert f"shape [{LAYERS}, {WIDTH}] whole: its 2 pieces are concatenated" in note
    assert t.place(split, "params.layers.b").dim == 0


@pytest.mark.slow
def test_stacked_parameters_elsewhere_in_the_loss() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        layers = params["layers"]
        decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(layers))
        first_and_last = jnp.sum(layers["b"][0]) + jnp.max(layers["w"][-1])
        largest = jnp.max(layers["w"])
        return loss_fn(params, batch) + 0.01 * (decay + first_and_last + largest)

    split = check(with_optax(loss, optax.adamw(1e-2)))
    assert split.notes == ()


@pytest.mark.slow
def test_functions_with_their_own_derivative() -> None:
    """`relu` of a stacked parameter keeps its derivative; the update has none to keep."""

    def loss(params: Tree, batch: Tree) -> jax.Array:
        layers = {**params["layers"], "b": jax.nn.relu(params["layers"]["b"])}
        return loss_fn({**params, "layers": layers}, batch)

    def step(params: Tree, batch: Tree) -> tuple[Tree, Tree]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * jax.nn.silu(g), params, grads), value

    t = traced(step, jax.tree.map(lambda p: p.at[0].set(0.0), make_params()), make_batch())
    split = check(t)
    (note,) = split.notes
    assert note.startswith("custom_jvp_call at ") and line_of(loss, "jax.nn.relu") in note
    assert f"a stacked array of shape [{LAYERS}, {WIDTH}] whole, which is then cut into 2" in note
    assert t.place(split, "layers.b").dim is None
    assert t.place(split, "layers.w").dim == 0


@pytest.mark.parametrize(
    "around",
    [
        pytest.param("body", marks=pytest.mark.slow),
        pytest.param("scan", marks=pytest.mark.slow),
        "more than the scan",
        pytest.param("twice", marks=pytest.mark.slow),
    ],
)
def test_checkpoint(around: str) -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        def body(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
            return layer(x, p), None

        def run(x: jax.Array, layers: Tree) -> jax.Array:
            if around == "more than the scan":
                x, layers = jnp.sin(x), jax.tree.map(lambda p: p * 0.9, layers)
            x, _ = jax.lax.scan(jax.checkpoint(body) if around == "body" else body, x, layers)
            return jnp.cos(x) if around == "more than the scan" else x

        run = run if around == "body" else jax.checkpoint(run, prevent_cse=around != "twice")
        run = jax.checkpoint(jax.jit(run)) if around == "twice" else run
        x = run(batch["x"], params["layers"])
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    split = check(with_optax(loss, optax.adamw(1e-2)), 4)
    assert split.notes == ()
    assert scan_lengths(split) == [1] * 4
    names = [e.primitive.name for e in forward(split).eqns]
    regions = [e for e in equations(forward(split)) if e.primitive.name in ("remat2", "checkpoint")]
    # A stage recomputes its own piece and nothing else.
    expected = {"body": 4, "scan": 4, "more than the scan": 6, "twice": 8}[around]
    assert len(regions) == expected
    assert names.count("scan") == (4 if around == "body" else 0)


# Several scans.


def encoder_decoder(params: Tree, batch: Tree) -> jax.Array:
    def body(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
        return layer(x, p), None

    encoded, _ = jax.lax.scan(body, batch["x"], params["encoder"])
    x, _ = jax.lax.scan(
        lambda x, p: (layer(x, p) + 0.1 * encoded, None),  # the decoder
        batch["x"][:, ::-1],
        params["layers"],
    )
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("every_scan", [False, True])
def test_encoder_and_decoder(every_scan: bool) -> None:
    params = {**make_params(), "encoder": make_params(1, 2)["layers"]}
    t = with_optax(encoder_decoder, optax.adamw(1e-2), params)
    split = check(t, every_scan=every_scan)
    assert scan_lengths(split) == ([1, 1, 2, 2] if every_scan else [2, 2, 2])
    if not every_scan:
        (note,) = split.notes
        where = line_of(encoder_decoder, 'params["encoder"]')
        assert re.match(rf"the scan over 2 layers at .*{where}\b.*, \d+% of the FLOPs", note)
        assert note.endswith("stays whole: the largest alone is cut")


@pytest.mark.slow
def test_scans_that_cannot_be_cut_stay_whole() -> None:
    params = {**make_params(), "encoder": make_params(1, 3)["layers"]}
    split = check(with_optax(encoder_decoder, optax.adamw(1e-2), params), every_scan=True)
    assert scan_lengths(split) == [3, 2, 2]
    (note,) = split.notes
    assert note.endswith("stays whole: 3 is not divisible by 2")


@pytest.mark.slow
def test_layers_used_twice() -> None:
    """A second scan over the same parameters is cut too, even backwards."""

    def loss(params: Tree, batch: Tree) -> jax.Array:
        def body(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
            return jnp.sin(x @ p["w"].T), None

        x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), batch["x"], params["layers"])
        x, _ = jax.lax.scan(body, x, params["layers"], reverse=True)
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    split = check(with_optax(loss, optax.adamw(1e-2)))
    assert scan_lengths(split) == [2] * 4
    assert not [n for n in split.notes if "concatenated" in n]


# What the update combines with pieces.


def test_state_beside_the_optimizer() -> None:
    """Averages become pieces; a frozen copy too; counters stay."""

    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        value, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        pull = jax.tree.map(lambda p, a: 0.01 * (p - a), state["params"], state["anchor"])
        params = jax.tree.map(lambda p, g, d: p - 0.1 * g - d, state["params"], grads, pull)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state["ema"], params)
        rate = state["rate"].at[0].add(1.0)
        new = {**state, "params": params, "ema": ema, "rate": rate, "n": state["n"] + 1}
        return new, value

    state = {
        "params": make_params(), "ema": make_params(2), "anchor": make_params(3),
        "rate": jnp.zeros(LAYERS), "n": jnp.int32(0),
    }  # fmt: skip
    t = traced(step, state, make_batch())
    split = check(t)
    assert split.notes == ()
    for name in t.names:
        assert t.place(split, name).dim == (0 if ".layers." in name else None), name


def test_state_that_stays_whole_is_sliced() -> None:
    """A leaf of which the update needs the whole, and which comes out whole, is not cut."""

    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        value, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        scale = state["scale"]  # [layers]
        grads["layers"] = jax.tree.map(
            lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), grads["layers"]
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
        return {"params": params, "scale": jnp.cumsum(scale) / 4}, value

    t = traced(step, {"params": make_params(), "scale": jnp.ones(LAYERS)}, make_batch())
    split = check(t)
    assert split.notes == ()
    assert t.place(split, "scale").dim is None
    assert t.place(split, "params.layers.w").dim == 0


def test_gradients_per_layer() -> None:
    """Norms, products and branches along other dims run piece by piece."""
    mask = np.random.default_rng(0).random((LAYERS, WIDTH, WIDTH)).astype(np.float32)

    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        value, grads = jax.value_and_grad(loss_fn)(state, batch)
        g = grads["layers"]["w"]
        norms = jnp.linalg.norm(g, axis=(1, 2))
        g = jnp.einsum("lij,ljk->lik", g, g) / norms[:, None, None]
        g = jax.lax.cond(value > 1e3, lambda g: g * 0.0, lambda g: jnp.sort(g, axis=-1), g)
        g = jax.lax.optimization_barrier(g) * mask
        grads["layers"]["w"] = jnp.where(jnp.isfinite(g).all(), g, 0.0)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), {"norms": norms}

    t = traced(step, make_params(), make_batch())
    split = check(t)
    assert split.notes == ()
    assert split.outputs[-1].dim == 0
