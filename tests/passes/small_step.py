"""A small step to plan, and how, for tests of what may go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import alpa_lite
from alpa_lite.passes.plan import Plan

Step = Callable[..., Any]


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


W, X = floats(8, 4), floats(16, 8)


def good_step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    return w - 0.1 * gradient, loss


def solve_plan(
    step: Step = good_step, args: tuple[Any, ...] = (W, X), cluster: Any = "cpu:4", **options: Any
) -> Plan:
    return alpa_lite.parallelize(step, cluster=cluster, **options).plan(*args)


def step_with_aux(aux: Callable[[jax.Array, jax.Array], Any]) -> Step:
    """A step that returns `aux(w, x)`, computed in the loss function, next to the loss."""

    def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        def loss(w: jax.Array) -> tuple[jax.Array, Any]:
            return jnp.mean((x @ w) ** 2), aux(w, x)

        (value, extra), gradient = jax.value_and_grad(loss, has_aux=True)(w)
        return w - gradient, {"loss": value, "extra": extra}

    return step
