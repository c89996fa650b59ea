"""Steps with a scan over layers, and what it means that a split step is the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxpr_as_fun

from alpa_lite import compat
from alpa_lite.ir.grad import capture_gradients, value_and_grad_p
from alpa_lite.passes.stages.split_scan import Place, SplitStep, split_scan

LAYERS, WIDTH, ROWS = 4, 6, 8

Tree = Any
Loss = Callable[[Tree, Tree], Any]
Step = Callable[[Tree, Tree], tuple[Tree, Tree]]


@dataclass(frozen=True)
class Traced:
    """A step, its first state and one batch, flat."""

    closed: Any
    state: list[jax.Array]
    batch: list[jax.Array]
    names: list[str]

    @property
    def aliases(self) -> Mapping[int, int]:
        return {i: i for i in range(len(self.state))}

    def split(self, num_pieces: int, **options: Any) -> SplitStep:
        return split_scan(self.closed, num_pieces, aliases=self.aliases, **options)

    def place(self, split: SplitStep, name: str) -> Place:
        return split.inputs[self.names.index(name)]


def traced(step: Step, state: Tree, batch: Tree) -> Traced:
    with capture_gradients():
        closed = jax.make_jaxpr(step)(state, batch)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    return Traced(closed, jax.tree.leaves(state), jax.tree.leaves(batch), names)


def check(
    t: Traced, num_pieces: int = 2, *, rtol: float = 2e-5, atol: float = 2e-6, **options: Any
) -> SplitStep:
    """Split, run three steps of both with the state kept in pieces, compare every leaf.

    `atol` is for arrays of numbers up to one.
    """
    split = t.split(num_pieces, **options)
    assert split.num_pieces == num_pieces
    whole, pieces = (
        jax.jit(jaxpr_as_fun(c), compiler_options={"xla_backend_optimization_level": 0})
        for c in (t.closed, split.closed)
    )
    state = list(t.state)
    parts = split.split_inputs([*t.state, *t.batch])
    for _ in range(3):
        expected = whole(*state, *t.batch)
        outs = pieces(*parts)
        for name, a, b in zip(
            [*t.names, *(f"aux {i}" for i in range(len(expected)))],
            expected,
            split.join_outputs(outs),
            strict=False,
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            size = max(1.0, float(np.max(np.abs(a), initial=0.0)))
            np.testing.assert_allclose(b, a, rtol=rtol, atol=atol * size, err_msg=name)
        state = list(expected[: len(state)])
        for i, o in split.aliases.items():
            parts[i] = outs[o]
    return split


def equations(jaxpr: Any, *, in_loops: bool = True) -> Iterator[Any]:
    """All equations, nested ones included."""
    for eqn in compat.jaxpr_parts(jaxpr)[0].eqns:
        yield eqn
        if eqn.primitive.name in ("scan", "while") and not in_loops:
            continue
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "forward", item)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, in_loops=in_loops)


def count(jaxpr: Any, name: str) -> int:
    """How many equations of a name there are outside of loops."""
    return sum(eqn.primitive.name == name for eqn in equations(jaxpr, in_loops=False))


def forward(split: SplitStep) -> Any:
    (eqn,) = (e for e in split.closed.jaxpr.eqns if e.primitive is value_and_grad_p)
    return eqn.params["spec"].forward.jaxpr


def scan_lengths(split: SplitStep) -> list[int]:
    return [e.params["length"] for e in equations(forward(split)) if e.primitive.name == "scan"]


def line_of(fun: Callable[..., Any], text: str) -> str:
    """`file.py:line` of the line of a function that holds a text."""
    lines, start = inspect.getsourcelines(fun)
    offset = next(i for i, line in enumerate(lines) if text in line)
    return f"{Path(inspect.getfile(fun)).name}:{start + offset}"


# A scanned MLP in plain JAX.


def make_params(seed: int = 0, layers: int = LAYERS) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)

    return {
        "layers": {"w": draw(layers, WIDTH, WIDTH), "b": draw(layers, WIDTH)},
        "head": draw(WIDTH),
    }


def make_batch(seed: int = 1) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=ROWS), jnp.float32),
    }


def layer(x: jax.Array, p: Tree) -> jax.Array:
    return x + jnp.tanh(x @ p["w"] + p["b"])


def loss_fn(params: Tree, batch: Tree) -> jax.Array:
    x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), batch["x"], params["layers"])
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


def optax_step(loss: Loss, tx: Any) -> tuple[Step, Callable[[Tree], Tree]]:
    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        value, grads = jax.value_and_grad(loss)(state["params"], batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value

    return step, lambda params: {"params": params, "opt": tx.init(params)}


def with_optax(loss: Loss, tx: Any, params: Tree | None = None) -> Traced:
    step, init = optax_step(loss, tx)
    return traced(step, init(make_params() if params is None else params), make_batch())


def with_sgd(loss: Callable[..., Any], **more_state: Any) -> Traced:
    """Gradient descent on `loss(params, state, batch) -> loss, (new state, aux)`."""

    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        graded = jax.value_and_grad(loss, has_aux=True)
        (value, (new, aux)), grads = graded(state["params"], state, batch)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
        return {**state, **new, "params": params}, (value, aux)

    return traced(step, {"params": make_params(), **more_state}, make_batch())
