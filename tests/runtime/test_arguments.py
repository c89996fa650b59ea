"""What happens to the arrays a step is given: donation, shared buffers, dtypes, traced values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import alpa_lite
from alpa_lite.runtime.arguments import OwnResults, _buffers
from tests.runtime.random_plans import assert_close, quick_compilation

REPLICATED = alpa_lite.DataParallel()
SPLIT = alpa_lite.Zero3Parallel()
METHODS = pytest.mark.parametrize("method", [REPLICATED, SPLIT], ids=["replicated", "split"])


@pytest.fixture(autouse=True)
def _quick():
    with quick_compilation():
        yield


def batch() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def weights() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32))


def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    return w - 0.1 * grad, loss


def average_step(state: dict[str, jax.Array], x: jax.Array) -> Any:
    p, loss = step(state["p"], x)
    return {"p": p, "ema": 0.9 * state["ema"] + 0.1 * p}, loss


def against(w: jax.Array, x: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w - x @ target) ** 2) + w.sum())(w)
    return w - 0.1 * grad, loss


def replicated(mesh: Any, *spec: None) -> NamedSharding:
    """One layout under as many names as one likes, so that device_put makes another array of it."""
    return NamedSharding(mesh, PartitionSpec(*spec))


# Donation.


@METHODS
def test_a_state_made_by_init_is_used_once(method):
    parallel = alpa_lite.parallelize(step, method=method)
    w = parallel.init(weights, batch())
    state, _ = parallel(w, batch())
    with pytest.raises(ValueError, match=r"w \(float32\[8, 8\]\) was donated by an earlier call"):
        parallel(w, batch())
    parallel(state, batch())


def test_a_state_from_elsewhere_is_used_once_and_named():
    parallel = alpa_lite.parallelize(average_step, method=REPLICATED)
    state = {"p": weights(), "ema": weights()}
    parallel(state, batch())
    assert state["p"].is_deleted()
    with pytest.raises(ValueError, match=r"state\.ema .* was donated by an earlier call"):
        parallel(state, batch())


def test_a_deleted_batch_is_refused():
    parallel = alpa_lite.parallelize(step, method=REPLICATED)
    x = jax.device_put(batch(), parallel.compile(weights(), batch()).in_shardings[1])
    x.delete()
    with pytest.raises(ValueError, match=r"x \(float32\[16, 8\]\) was deleted"):
        parallel(weights(), x)


@METHODS
def test_a_state_may_hold_one_array_twice(method):
    parallel = alpa_lite.parallelize(average_step, method=method)
    wanted = found = {"p": weights(), "ema": weights()}
    for again in range(3):
        wanted, loss = average_step(wanted, batch())
        shared = {"p": found["p"], "ema": found["p"]} if not again else found
        found, sharded_loss = parallel(shared, batch())
        assert_close((wanted, loss), (found, sharded_loss))


def test_a_result_may_come_back_twice():
    """Results of the latest call are trusted not to share buffers, but not to differ."""
    parallel = alpa_lite.parallelize(average_step, method=REPLICATED)
    state, _ = parallel({"p": weights(), "ema": weights()}, batch())
    wanted, loss = average_step(
        {"p": np.asarray(state["p"]), "ema": np.asarray(state["p"])}, batch()
    )
    assert_close((wanted, loss), parallel({"p": state["p"], "ema": state["p"]}, batch()))


def test_other_arrays_on_the_same_buffers_are_found():
    parallel = alpa_lite.parallelize(average_step, method=REPLICATED)
    w = weights()
    mesh = parallel.compile({"p": w, "ema": w}, batch()).mesh
    p = jax.device_put(w, replicated(mesh))
    ema = jax.device_put(p, replicated(mesh, None, None))
    assert p is not ema and _buffers(p) == _buffers(ema)
    wanted = average_step({"p": w, "ema": w}, batch())
    wanted = jax.tree.map(np.asarray, wanted)
    assert_close(wanted, parallel({"p": p, "ema": ema}, batch()))


@METHODS
@pytest.mark.parametrize("start", ["fresh", "result", "another array"])
def test_the_state_may_also_be_another_argument(method, start):
    parallel = alpa_lite.parallelize(against, method=method)
    w = weights()
    if start != "fresh":
        w, _ = parallel(w, batch(), weights())
    target = w
    if start == "another array":
        target = jax.device_put(w, replicated(w.sharding.mesh, None, None))
    values = np.asarray(w)
    wanted = against(values, batch(), values)
    assert_close(wanted, parallel(w, batch(), target))
    if target is not w:
        np.testing.assert_array_equal(target, values)


def test_keys_may_be_shared():
    def draw(state: Any, x: jax.Array) -> Any:
        w, loss = step(state["w"], x)
        noise = jax.random.normal(state["a"], (8, 8)) + jax.random.normal(state["b"], (8, 8))
        return state | {"w": w + noise}, loss

    same = {"w": weights(), "a": jax.random.key(3), "b": jax.random.key(3)}
    wanted = jax.jit(draw)(same, batch())
    parallel = alpa_lite.parallelize(draw, method=REPLICATED)
    key = jax.random.key(3)
    assert_close(wanted, parallel({"w": weights(), "a": key, "b": key}, batch()))


def test_the_usual_loop_looks_at_no_buffers(monkeypatch):
    parallel = alpa_lite.parallelize(average_step, method=REPLICATED)
    state, _ = parallel({"p": weights(), "ema": weights()}, batch())
    monkeypatch.setattr("alpa_lite.runtime.arguments._buffers", None)
    for _ in range(2):
        state, loss = parallel(state, batch())
        assert np.isfinite(loss)


def test_own_results_forget():
    own, x, y = OwnResults(), weights(), weights()
    own.replace([x])
    assert x in own and y not in own
    own.replace([y])
    assert x not in own and y in own


# Compiled for other arguments.


def labelled(w: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    loss, grad = jax.value_and_grad(lambda w: jnp.mean((batch["x"] @ w)[:, 0] * batch["label"]))(w)
    return w - 0.1 * grad, loss


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (np.ones(16, np.float32), r"should be int32\[16\], found float32\[16\]"),
        (np.ones(16), r"should be int32\[16\], found float32\[16\]"),
        (np.ones(8, np.int32), r"should be int32\[16\], found int32\[8\]"),
        (jnp.ones(16), r"should be int32\[16\], found float32\[16\]"),
        (1.0, r"should be int32\[16\], found float32\[\]"),
        ("one", "is 'one', of type str"),
    ],
)
def test_another_shape_or_dtype_than_compiled_for_is_refused(label, found):
    x = {"x": batch(), "label": np.ones(16, np.int32)}
    executable = alpa_lite.parallelize(labelled, method=REPLICATED).compile(weights(), x)
    with pytest.raises(TypeError, match=rf"batch\.label {found}"):
        executable(weights(), x | {"label": label})
    executable(weights(), x | {"label": np.ones(16, np.int64)})  # as JAX reads it without x64


def test_an_argument_that_is_no_array_is_named():
    x = {"x": batch(), "label": "one"}
    with pytest.raises(TypeError, match=r"batch\.label is 'one', of type str.*static_argnums"):
        alpa_lite.parallelize(labelled, method=REPLICATED)(weights(), x)


# Traced values.


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jit(f)(weights(), batch()),
        lambda f: jax.grad(lambda w: f(w, batch())[1])(weights()),
        lambda f: jax.eval_shape(f, weights(), batch()),
        lambda f: jax.vmap(f)(weights()[None], batch()[None]),
        lambda f: alpa_lite.parallelize(f, method=REPLICATED)(weights(), batch()),
    ],
    ids=["jit", "grad", "eval_shape", "vmap", "parallelize"],
)
def test_a_call_inside_a_transformation_is_refused(transform):
    parallel = alpa_lite.parallelize(step, method=REPLICATED)
    with pytest.raises(TypeError, match=r"step is a program .*: w is traced.*step\.__wrapped__"):
        transform(parallel)
    executable = parallel.compile(weights(), batch())
    with pytest.raises(TypeError, match=r"a compiled step is a program .*: w is traced"):
        transform(executable)


def test_a_call_inside_a_transformation_on_plain_values():
    parallel = alpa_lite.parallelize(step, method=REPLICATED)
    w = weights()
    with pytest.raises(TypeError, match="w is traced"):
        jax.jit(lambda y: parallel(w, batch())[1] + y)(1.0)


# Weak types.


@pytest.mark.parametrize("rate", [0.1, jnp.asarray(0.1), np.float32(0.1)])
def test_a_number_does_not_widen_a_narrow_state(rate):
    def scaled(w: jax.Array, x: jax.Array, rate: Any) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        return w - rate * grad, loss

    parallel = alpa_lite.parallelize(scaled, method=REPLICATED)
    w, x = weights().astype(jnp.bfloat16), batch().astype(jnp.bfloat16)
    wanted = jax.jit(scaled)(w, x, rate)
    if wanted[0].dtype != w.dtype:
        with pytest.raises(alpa_lite.StepError, match="goes out as float32"):
            parallel(w, x, rate)
    else:
        assert_close(wanted, parallel(w, x, rate), tolerance=1e-2)


def test_a_weak_state_leaf_stays_weak():
    def scaled(state: Any, x: jax.Array) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(state["w"])
        return {"w": state["w"] - state["rate"] * grad, "rate": state["rate"] * 0.5}, loss

    parallel = alpa_lite.parallelize(scaled, method=REPLICATED)
    x = batch().astype(jnp.bfloat16)
    for rate in (0.1, jnp.asarray(0.1)):
        state = {"w": weights().astype(jnp.bfloat16), "rate": rate}
        wanted = jax.jit(scaled)(jax.jit(scaled)(state, x)[0], x)
        state, _ = parallel(state, x)
        assert state["rate"].weak_type
        assert_close(wanted, parallel(state, x), tolerance=1e-2)
    assert len(parallel._executables) == 1
