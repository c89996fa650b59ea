"""Small train steps for pipelines, and what one device makes of the same microbatches by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import alpa_lite
from tests.runtime.random_plans import QUICK_COMPILE, assert_close, quick_compilation
from tests.runtime.test_equivalence import fast_links

ROWS, WIDTH, LAYERS = 16, 16, 4
# float32 sums in another order; three steps of Adam amplify that (tests/runtime/test_equivalence.py).
RTOL, RTOL_ADAM = 1e-4, 5e-3
STEPS = 3

Tree = Any
Loss = Callable[[Tree, Tree, jax.Array], tuple[jax.Array, dict[str, Any]]]
"""(parameters, batch, PRNG key) -> (loss, aux); aux named `rows...` are per example."""
Update = Callable[[Tree, jax.Array, Tree, Tree], tuple[Tree, Tree]]
"""(state, loss, aux, gradients) -> (state, results)."""


@dataclass(frozen=True, eq=False)
class Case:
    """A train step; its state has parameters `p`, a `key` and a `count`.

    Attributes:
      loss: of one microbatch.
      update: once.
      init: makes the first state.
      batch: makes the batch of a seed.
    """

    loss: Loss
    update: Update
    init: Callable[[], Tree]
    batch: Callable[[int], Tree]
    found: dict[Any, Any] = field(default_factory=dict)

    def step(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """What is parallelized."""
        key = jax.random.fold_in(state["key"], state["count"])

        def loss(params: Tree) -> Any:
            return self.loss(params, batch, key)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state["p"])
        return self.update(state, value, aux, grads)

    def by_hand(self, state: Tree, batch: Tree, count: int) -> tuple[Tree, Tree]:
        """The step on one device, microbatch by microbatch."""
        graded, update = self.compiled()
        key = jax.random.fold_in(state["key"], state["count"])
        values = []
        for m in range(count):
            rows = jax.tree.map(lambda x, m=m: np.split(np.asarray(x), count)[m], batch)
            own = jax.random.fold_in(key, m) if count > 1 else key
            values.append(graded(state["p"], rows, own))
        (loss, aux), grads = jax.tree_util.tree_map_with_path(
            lambda path, *xs: combined(jax.tree_util.keystr(path), xs), *values
        )
        return update(state, loss, aux, grads)

    def compiled(self) -> tuple[Any, Any]:
        if "compiled" not in self.found:
            graded = jax.value_and_grad(self.loss, has_aux=True)
            self.found["compiled"] = tuple(
                jax.jit(f, compiler_options=QUICK_COMPILE) for f in (graded, self.update)
            )
        return self.found["compiled"]

    def steps_by_hand(self, count: int) -> list[tuple[Tree, Tree]]:
        """(state, results) after each step; computed once."""
        if count not in self.found:
            state, self.found[count] = self.init(), []
            for seed in range(STEPS):
                state, results = self.by_hand(state, self.batch(seed), count)
                self.found[count].append((state, results))
        return self.found[count]


def combined(name: str, xs: Sequence[jax.Array]) -> jax.Array:
    """Results of all microbatches as one: rows in order, numbers averaged, counts summed."""
    if "rows" in name:
        return jnp.concatenate(xs)
    total = functools.reduce(jnp.add, xs)
    return total / len(xs) if jnp.issubdtype(total.dtype, jnp.inexact) else total


@functools.cache
def net(
    optimizer: str = "sgd", *, layers: int = LAYERS, tied: bool = False, skip: bool = False,
    dropout: bool = False, dtype: Any = jnp.float32, sizes: bool = False,
) -> Case:  # fmt: skip
    """A deep narrow network.

    Args:
      optimizer: a key of `OPTIMIZERS`.
      layers: matrices of `[16, 16]`.
      tied: the last layer but one has the first layer's matrix; its own is read by no one.
      skip: the first layer's result is added before the last layer.
      dropout: after every layer, with a key of its own.
      dtype: of activations and products; parameters are float32.
      sizes: the loss has a term of every layer, and aux a result of every layer.
    """

    def loss(params: Tree, batch: Tree, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        keys = jax.random.split(key, layers)
        x, first, means = batch["x"].astype(dtype), None, []
        for i in range(layers):
            if skip and i == layers - 1:
                x = x + first
            shared = tied and i == layers - 2
            x = jnp.tanh(x @ params["w0" if shared else f"w{i}"] + params[f"b{i}"])
            if dropout:
                x = jnp.where(jax.random.bernoulli(keys[i], 0.75, x.shape), x / 0.75, 0)
            first = x if i == 0 else first
            means.append(jnp.mean(x.astype(jnp.float32) ** 2))
        x = x.astype(jnp.float32)
        value = jnp.mean((x - batch["y"]) ** 2)
        aux: dict[str, Any] = {"rows": x[:, 0], "hits": jnp.sum(x > batch["y"])}
        if sizes:
            value = value + 0.01 * sum(means)
            aux["means"] = means
        return value, aux

    tx = OPTIMIZERS[optimizer]()

    def init() -> Tree:
        rng = np.random.default_rng(0)
        params = {f"w{i}": 0.4 * rng.normal(size=(WIDTH, WIDTH)) for i in range(layers)}
        params |= {f"b{i}": 0.1 * rng.normal(size=WIDTH) for i in range(layers)}
        params = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
        return {
            "p": params, "opt": tx.init(params), "count": jnp.int32(0), "key": jax.random.key(7),
            "unused": jnp.arange(3.0),
        }  # fmt: skip

    def update(state: Tree, loss: jax.Array, aux: Tree, grads: Tree) -> tuple[Tree, Tree]:
        updates, opt = tx.update(grads, state["opt"], state["p"])
        count = state["count"] + 1
        new = {**state, "p": optax.apply_updates(state["p"], updates), "opt": opt, "count": count}
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        return new, {**aux, "loss": loss, "norm": norm, "rate": 0.1 * state["count"]}

    return Case(loss, update, init, net_batch)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(0.1),
    "adamw": lambda: optax.adamw(1e-2),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "multi": lambda: optax.MultiSteps(OPTIMIZERS["clip"](), 2),
    "finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "flat": lambda: optax.flatten(optax.adam(1e-2)),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lion": lambda: optax.lion(1e-3),
}


def net_batch(seed: int, rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(rows, WIDTH)).astype(np.float32) for name in "xy"}


def run_steps(
    case: Case, method: Any, *, rtol: float = RTOL, floor: float = 1e-3, quick: bool = True
) -> Any:
    """Run three steps as a pipeline and by hand; returns the executable.

    Args:
      case: the step.
      method: the pipeline.
      rtol: allowed difference, relative to the largest element of a leaf.
      floor: magnitude below which differences are relative to it.
      quick: compile without XLA's optimizations.

    Raises:
      AssertionError: a leaf of the state or of the results differs by more than `rtol`.
    """
    parallel = alpa_lite.parallelize(case.step, method=method, cluster=fast_links())
    state = case.init()
    with quick_compilation(quick):
        executable = parallel.compile(state, case.batch(0))
    count = executable.plan.num_microbatches
    for seed, wanted in enumerate(case.steps_by_hand(count)):
        state, results = parallel(state, case.batch(seed))
        assert_close(
            wanted, (state, results), tolerance=rtol, floor=floor, what=f"step {seed}, {method}"
        )
    return executable


def grid(dp: int, tp: int, pp: int, **options: Any) -> alpa_lite.ThreeDParallel:
    """`ThreeDParallel` with four microbatches and as many layers as the small network has."""
    defaults = {"num_microbatches": 4, "layer_num": LAYERS}
    return alpa_lite.ThreeDParallel(dp=dp, tp=tp, pp=pp, **{**defaults, **options})


def by_hand(
    layers: Sequence[Sequence[int]], submeshes: Sequence[tuple[int, int]], **options: Any
) -> alpa_lite.ManualPipeline:
    """`ManualPipeline`, likewise."""
    defaults = {"num_microbatches": 4, "layer_num": LAYERS}
    return alpa_lite.ManualPipeline(layers, submeshes, **{**defaults, **options})
