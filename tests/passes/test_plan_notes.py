"""What a plan tells its user besides numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import value_and_grad

import alpa_lite
from alpa_lite.cost_model import Cluster
from alpa_lite.passes.meshes import search_notes

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


@pytest.mark.parametrize(
    ("method", "cluster", "noted"),
    [
        (alpa_lite.AutoParallel(), "cpu:8", True),
        (alpa_lite.AutoParallel(), "h100:3x6", True),
        (alpa_lite.AutoParallel(), "cpu:4", False),  # no three axes
        (alpa_lite.AutoParallel(), "h100:3x5", False),
        (alpa_lite.AutoParallel(mesh_shape=(2, 4)), "cpu:8", False),
        (alpa_lite.DataParallel(), "cpu:8", False),
    ],
)
def test_a_search_says_which_meshes_it_left_out(method: Any, cluster: str, noted: bool) -> None:
    found = search_notes(method, Cluster.parse(cluster))
    assert found == ("meshes of one and two axes were searched; mesh_shape takes up to 4",) * noted


def test_a_searched_plan_has_the_note() -> None:
    assert "meshes of one and two axes were searched" in notes(lambda w, x: (w, loss(w, x)))
