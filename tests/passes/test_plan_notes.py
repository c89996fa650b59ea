"""What a plan tells its user besides numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import value_and_grad

import alpa_lite

W, X = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32)


def loss(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean((x @ w) ** 2)


def notes(step: Any) -> str:
    return "\n".join(alpa_lite.parallelize(step, cluster="cpu:8").plan(W, X).notes)


def test_a_gradient_that_is_not_captured_is_noted() -> None:
    def imported_before(w: jax.Array, x: jax.Array) -> Any:
        value, grads = value_and_grad(loss)(w, x)
        return w - 0.1 * grads, value

    def looked_up(w: jax.Array, x: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(w, x)
        return w - 0.1 * grads, value

    assert "no gradient computation was captured" in notes(imported_before)
    assert "no gradient computation was captured" not in notes(looked_up)
    assert "no gradient computation was captured" not in notes(lambda w, x: (w, loss(w, x)))
