"""Random small train steps, as values that hypothesis draws and shrinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import alpa_lite

ROWS, WIDTH = 16, 8


@dataclass(frozen=True)
class Layer:
    """One layer: `h = act(x @ w)`, and what else it does.

    Attributes:
      weight: which matrix; several layers may have one.
      other: which earlier layer's result is added, modulo their number; None for none.
      gate: which earlier layer's result is multiplied.
      scale: multiplies by a vector of the state that is made from another before the gradient.
      dropout: draws a mask.
      choose: picks columns by integers computed from the activations.
      stop: of the earlier result that is added, no gradient.
      cast: the product in bfloat16-sized steps: a cast of parameter and activation and back.
      loss: adds to the loss.
      aux: what it returns: nothing, a `mean`, its `rows`, or a `count`.
      scanned: the product in a `scan` of two steps.
    """

    weight: int
    other: int | None
    gate: int | None
    scale: bool
    dropout: bool
    choose: bool
    stop: bool
    cast: bool
    loss: bool
    aux: str | None
    scanned: bool


@dataclass(frozen=True)
class Update:
    """What happens after the gradient."""

    momentum: bool
    clip: bool
    average: bool
    skip: bool
    decay: bool
    every: bool
    mix: bool


@dataclass(frozen=True)
class RandomStep:
    """A step, and where it is cut.

    Attributes:
      layers: in order.
      update: after the gradient.
      cuts: whether a stage ends after each layer.
    """

    layers: tuple[Layer, ...]
    update: Update
    cuts: tuple[bool, ...]

    @property
    def stages(self) -> list[list[int]]:
        """Layers by stage; behind the last one is the loss."""
        found: list[list[int]] = [[]]
        for i in range(len(self.layers)):
            found[-1].append(i)
            if self.cuts[i]:
                found.append([])
        found[-1].append(len(self.layers))
        return found

    @property
    def num_weights(self) -> int:
        return 1 + max(layer.weight for layer in self.layers)


def maybe(values: st.SearchStrategy[Any], share: int = 3) -> st.SearchStrategy[Any]:
    """None most of the time: once in `share` a value."""
    return st.one_of(*[st.none()] * (share - 1), values)


rarely = st.sampled_from([False, False, False, True])
layers = st.builds(
    Layer,
    weight=st.integers(0, 4),
    other=maybe(st.integers(0, 3), 2),
    gate=maybe(st.integers(0, 3), 4),
    scale=rarely,
    dropout=rarely,
    choose=rarely,
    stop=st.booleans(),
    cast=rarely,
    loss=rarely,
    aux=maybe(st.sampled_from(["mean", "rows", "count"])),
    scanned=rarely,
)
updates = st.builds(Update, **dict.fromkeys(Update.__dataclass_fields__, rarely))


@st.composite
def random_steps(draw: Any, max_layers: int = 5) -> RandomStep:
    chosen = draw(st.lists(layers, min_size=2, max_size=max_layers))
    cuts = draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
    return RandomStep(tuple(chosen), draw(updates), tuple(cuts))


def make_state(step: RandomStep) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)

    params = {f"w{i}": draw(WIDTH, WIDTH) for i in range(step.num_weights)}
    params["v"] = 1.0 + draw(WIDTH)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {
        "p": params, "m": zeros, "average": jax.tree.map(jnp.copy, params), "count": jnp.int32(1),
        "key": jax.random.key(5), "kept": jnp.arange(3.0),
    }  # fmt: skip


def make_batch(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(size=(ROWS, WIDTH)).astype(np.float32) for _ in range(2))
    return {"x": x, "y": y, "mask": rng.random((ROWS, 1)) < 0.7}


def loss_of(step: RandomStep) -> Callable[..., Any]:
    """`(parameters, batch, key) -> (loss, aux)`."""

    def loss(p: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        x = jnp.where(batch["mask"], batch["x"], 0.0)
        keys = jax.random.split(key, len(step.layers))
        made: list[jax.Array] = []
        total, aux = jnp.float32(0), {}
        for i, layer in enumerate(step.layers):
            x = apply(layer, p, x, made, keys[i])
            if layer.loss:
                total = total + 0.1 * jnp.mean(x**2)
            if layer.aux == "mean":
                aux[f"mean{i}"] = jnp.mean(x)
            elif layer.aux == "rows":
                aux[f"rows{i}"] = x[:, :2]
            elif layer.aux == "count":
                aux[f"count{i}"] = jnp.sum(x > 0)
            x = alpa_lite.mark_layer(x)
            made.append(x)
        return total + jnp.mean((x - batch["y"]) ** 2), aux

    return loss


def apply(layer: Layer, p: Any, x: jax.Array, made: list[jax.Array], key: jax.Array) -> jax.Array:
    w = p[f"w{layer.weight}"]
    if layer.choose:
        x = jnp.take_along_axis(x, jnp.argsort(jnp.round(x, 1), axis=1, stable=True), axis=1)
    if layer.cast:
        h = (x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32)
    elif layer.scanned:
        h = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0]
    else:
        h = x @ w
    h = jnp.tanh(h)
    if layer.scale:
        h = h * p["v"]
    if layer.dropout:
        h = jnp.where(jax.random.bernoulli(key, 0.75, h.shape), h / 0.75, 0.0)
    if layer.gate is not None and made:
        h = h * jnp.cos(made[layer.gate % len(made)])
    if layer.other is not None and made:
        other = made[layer.other % len(made)]
        h = h + (jax.lax.stop_gradient(other) if layer.stop else other)
    return h


def make_update(step: RandomStep) -> Callable[..., Any]:
    """`(state, loss, aux, gradients) -> (state, results)`."""
    u = step.update

    def update(state: Any, loss: jax.Array, aux: Any, grads: Any) -> tuple[Any, Any]:
        p, results = state["p"], {"loss": loss, **aux}
        if u.clip:
            norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads.values()))
            grads = {k: g / (1.0 + norm) for k, g in grads.items()}
            results["norm"] = norm
        m = state["m"]
        if u.momentum:
            grads = m = {k: 0.5 * m[k] + g for k, g in grads.items()}
        rate = 0.1 / (1.0 + state["count"]) if u.decay else 0.1
        new = {k: p[k] - rate * g for k, g in grads.items()}
        if u.skip:
            finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in grads.values()]))
            new = {k: jnp.where(finite, new[k], p[k]) for k in p}
        if u.every:
            new, m = jax.lax.cond(
                state["count"] % 2 == 1, lambda a, b: a, lambda a, b: b, (new, m), (p, m)
            )
        if u.mix:
            new["w0"] = new["w0"] + 0.01 * p[f"w{step.num_weights - 1}"] * jnp.mean(new["v"])
        average = state["average"]
        if u.average:
            average = {k: 0.9 * average[k] + 0.1 * new[k] for k in new}
        key = jax.random.fold_in(state["key"], 1)
        return {
            **state, "p": new, "m": m, "average": average, "count": state["count"] + 1, "key": key
        }, results  # fmt: skip

    return update


def as_function(step: RandomStep) -> Callable[..., Any]:
    """The whole step: `(state, batch) -> (state, results)`."""
    loss, update = loss_of(step), make_update(step)

    def run(state: Any, batch: Any) -> Any:
        key = jax.random.fold_in(state["key"], state["count"])
        grad = jax.value_and_grad(lambda p: loss(p, batch, key), has_aux=True)
        (value, aux), grads = grad(state["p"])
        return update(state, value, aux, grads)

    return run
