"""Plans are kept in a folder, and found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_lite
from alpa_lite import api

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)


def train_step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    def loss(w: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(alpa_lite.mark_layer(jnp.tanh(x @ w)) @ w) ** 2)

    value, grad = jax.value_and_grad(loss)(w)
    return w - 0.1 * grad, value


METHODS = {
    "auto": alpa_lite.AutoParallel(mesh_shape=(2, 2)),
    "pipeline": alpa_lite.ThreeDParallel(dp=2, tp=1, pp=2, num_microbatches=2),
    "searched": alpa_lite.PipeshardParallel(num_microbatches=2, num_stages=2),
}


def step_of(folder: Path, method: str = "auto", **options: Any) -> Any:
    options = {"cluster": "cpu:4", **options}
    return alpa_lite.parallelize(
        train_step, method=METHODS[method], plan_cache=folder / "plans", **options
    )


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("planned again")

    monkeypatch.setattr(api, "plan_step", plan)
    monkeypatch.setattr(api, "plan_pipeline", plan)


@pytest.mark.parametrize("method", METHODS)
def test_the_second_run_does_not_plan(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = jnp.eye(8) * 0.5
    first = step_of(tmp_path, method)
    plan = first.plan(w, X)
    refuse(monkeypatch)
    second = step_of(tmp_path, method)
    assert second.plan(w, X) == plan
    assert len(list((tmp_path / "plans").iterdir())) == 1
    expected, expected_loss = jax.jit(train_step)(w, X)
    new, loss = second(w, X)
    np.testing.assert_allclose(np.asarray(new), np.asarray(expected), rtol=0, atol=1e-6)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)


@pytest.mark.parametrize("change", ["shape", "method", "cluster", "batch"])
def test_another_step_cluster_or_option_is_planned(change: str, tmp_path: Path) -> None:
    w = jnp.eye(8)
    step_of(tmp_path).plan(w, X)
    x = X[:4] if change == "shape" else X
    options = {"cluster": "cpu:8"} if change == "cluster" else {}
    options |= {"batch_argnums": ()} if change == "batch" else {}
    method = "pipeline" if change == "method" else "auto"
    if change == "cluster":
        step = alpa_lite.parallelize(
            train_step, method=alpa_lite.AutoParallel(), plan_cache=tmp_path / "plans", **options
        )
    else:
        step = step_of(tmp_path, method, **options)
    step.plan(w, x)
    assert len(list((tmp_path / "plans").iterdir())) == 2


def test_a_file_that_is_no_plan_is_replaced(tmp_path: Path) -> None:
    w = jnp.eye(8)
    plan = step_of(tmp_path).plan(w, X)
    (file,) = (tmp_path / "plans").iterdir()
    file.write_text("{}")
    with pytest.warns(UserWarning, match="the plan cache is not used: .*planning again"):
        again = step_of(tmp_path).plan(w, X)
    assert again.inputs == plan.inputs
    assert alpa_lite.load_plan(file).inputs == plan.inputs
