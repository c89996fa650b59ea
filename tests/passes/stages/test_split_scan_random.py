"""Random steps with a scan over layers: the split step is the same step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.stages.scanned_steps import Tree, check, make_batch, make_params, traced

Function = Callable[[jax.Array], jax.Array]


def along_layers(x: jax.Array, one: jax.Array) -> jax.Array:
    """`[layers]` numbers against a stacked array."""
    return one.reshape(-1, *[1] * (x.ndim - 1))


# Of stacked arrays, to stacked arrays of the same shape.
STACKED: Mapping[str, Function] = {
    "scale": lambda x: 0.9 * x,
    "cast": lambda x: x.astype(jnp.float16).astype(jnp.float32),
    "there and back": lambda x: jnp.moveaxis(jnp.tanh(jnp.moveaxis(x, 0, -1)), -1, 0),
    "flat": lambda x: jnp.sin(x.reshape(-1)).reshape(x.shape),
    "flat layers": lambda x: jax.nn.softmax(x.reshape(x.shape[0], -1)).reshape(x.shape),
    "softmax over all": lambda x: jax.nn.softmax(x.reshape(-1)).reshape(x.shape),
    "softmax over layers": lambda x: jax.nn.softmax(x, axis=0),
    "centred": lambda x: x - x.mean(0),
    "unit norm": lambda x: x / (1.0 + jnp.linalg.norm(x)),
    "unit rows": lambda x: x / (1.0 + jnp.linalg.norm(x, axis=-1, keepdims=True)),
    "largest": lambda x: x / (1.0 + jnp.max(jnp.abs(x))),
    "relu": jax.nn.relu,
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "cumsum": lambda x: 0.3 * jnp.cumsum(x, axis=0),
    "flipped": lambda x: x[::-1],
    "rolled": lambda x: jnp.roll(x, 1, axis=0),
    "sorted": lambda x: jnp.sort(x, axis=0),
    "first": lambda x: x * x[0].mean(),
    "last row": lambda x: x + x[-1:],
    "two layers": lambda x: x + x[:2].sum(),
    "some layer": lambda x: x + x[jnp.argmax(x.mean(tuple(range(1, x.ndim))))],
    "index": lambda x: x / (1.0 + along_layers(x, jnp.arange(x.shape[0]))),
    "mask": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(3), 0.7, x.shape), x, 0.0),
    "any": lambda x: jnp.where(jnp.any(x > 0.9), 0.5 * x, x),
    "branch": lambda x: jax.lax.cond(x.sum() > 0, lambda x: x * 0.5, lambda x: x - x.mean(0), x),
    "loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, y: y * 0.9, x),
    "scan": lambda x: jax.lax.scan(lambda c, row: (c + row, jnp.cos(row)), 0.0 * x[0], x)[1],
    "barrier": lambda x: jax.lax.optimization_barrier((x, x * 0.5))[1],
    "padded": lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1],
    "padded layers": lambda x: jnp.pad(x, [(1, 0)] + [(0, 0)] * (x.ndim - 1))[:-1],
    "halves": lambda x: jnp.concatenate([x[..., 1:], x[..., :1]], axis=-1),
    "jitted": jax.jit(lambda x: jnp.where(x > 0, x, 0.1 * x)),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
}

# Of the hidden state and one layer's number and key.
BODY: Mapping[str, Callable[[jax.Array, Tree, jax.Array, jax.Array], jax.Array]] = {
    "matmul": lambda x, p, i, key: x + jnp.tanh(x @ p["w"]),
    "bias": lambda x, p, i, key: x + p["b"],
    "index": lambda x, p, i, key: x / (1.0 + i),
    "dropout": lambda x, p, i, key: jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x, 0.0),
    "transposed": lambda x, p, i, key: jnp.sin(x @ p["w"].T),
    "inner scan": lambda x, p, i, key: jax.lax.scan(lambda c, r: (c + r, c), p["b"], x)[1] * 0.1,
}

# Of the outputs per layer and the stacked parameters, to a number.
EXTRAS: Mapping[str, Callable[[jax.Array, Tree], jax.Array]] = {
    "decay": lambda ys, p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)),
    "outputs": lambda ys, p: ys.sum(),
    "products": lambda ys, p: jnp.sum(ys * p["b"].mean(1)),
    "gram": lambda ys, p: jnp.mean((p["b"] @ p["b"].T) ** 2),
    "cumulated outputs": lambda ys, p: jnp.cumsum(ys).mean(),
    "one layer": lambda ys, p: ys[1] + p["w"][0].sum(),
    "logsumexp": lambda ys, p: jax.nn.logsumexp(p["b"], axis=0).sum(),
}


@dataclass(frozen=True)
class Program:
    """What a step does: functions by name."""

    layers: int = 4
    num_pieces: int = 2
    before: Sequence[str] = ()
    body: Sequence[str] = ("matmul",)
    extras: Sequence[str] = ()
    update: Sequence[str] = ()
    moments: Sequence[str] = ()
    checkpoint: str = ""
    in_call: bool = False
    scaled_before: bool = False

    def loss(self, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
        stacked = dict(params["layers"])
        for name in self.before:  # the biases go into the scan as they are
            stacked["w"] = STACKED[name](stacked["w"])

        def body(x: jax.Array, each: Any) -> tuple[jax.Array, jax.Array]:
            p, i, key = each
            for name in self.body:
                x = BODY[name](x, p, i, key)
            return x, x.mean()

        def run(x: jax.Array, stacked: Tree) -> Any:
            keys = jax.random.split(jax.random.key(5), self.layers)
            fun = jax.checkpoint(body) if self.checkpoint == "body" else body
            return jax.lax.scan(fun, x, (stacked, jnp.arange(self.layers), keys))

        run = jax.checkpoint(run) if self.checkpoint == "scan" else run
        x, ys = (jax.jit(run) if self.in_call else run)(batch["x"], stacked)
        value = jnp.mean((x @ params["head"] - batch["y"]) ** 2)
        return value + 0.1 * sum(EXTRAS[name](ys, params["layers"]) for name in self.extras), ys

    def step(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        params = state["params"]
        seen = jax.tree.map(lambda p: 1.1 * p, params) if self.scaled_before else params
        aux, grads = jax.value_and_grad(self.loss, has_aux=True)(seen, batch)

        def updated(g: jax.Array, m: jax.Array) -> jax.Array:
            stacked = g.ndim > 1
            for name in self.update if stacked else ():
                g = STACKED[name](g)
            m = 0.9 * m + g
            for name in self.moments if stacked else ():
                m = STACKED[name](m)
            return m

        moments = jax.tree.map(updated, grads, state["moment"])
        new = jax.tree.map(lambda p, m: p - 0.05 * m, params, moments)
        return {"params": new, "moment": moments}, aux

    def check(self) -> None:
        params = make_params(0, self.layers)
        state = {"params": params, "moment": jax.tree.map(lambda x: 0.1 * x, params)}
        t = traced(self.step, state, make_batch())
        check(t, self.num_pieces, rtol=1e-3, atol=1e-4)


def some(of: Mapping[str, Any], most: int, least: int = 0) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(list(of)), min_size=least, max_size=most)


programs = st.builds(
    lambda lengths, **options: Program(*lengths, **options),
    st.sampled_from([(2, 2), (4, 2), (4, 4), (6, 2), (6, 3)]),
    before=some(STACKED, 2),
    body=some(BODY, 3, 1),
    extras=some(EXTRAS, 2),
    update=some(STACKED, 3),
    moments=some(STACKED, 2),
    checkpoint=st.sampled_from(["", "body", "scan"]),
    in_call=st.booleans(),
    scaled_before=st.booleans(),
)


@pytest.mark.slow
@settings(max_examples=15)
@given(programs)
def test_random_steps(program: Program) -> None:
    program.check()


NAMES = sorted(STACKED)


@pytest.mark.slow
@pytest.mark.parametrize("names", [NAMES[i : i + 3] for i in range(0, len(NAMES), 3)], ids=" ".join)
def test_functions_of_stacked_arrays(names: list[str]) -> None:
    Program(before=names, update=names).check()


@pytest.mark.slow
def test_other_uses_of_stacked_arrays() -> None:
    Program(extras=list(EXTRAS), body=["matmul", "bias"]).check()


@pytest.mark.slow
def test_bodies() -> None:
    Program(body=["matmul", *BODY], num_pieces=4).check()
