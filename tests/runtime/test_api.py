"""The decorated function as a user meets it: plan, compile, init, run, save, load."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import alpa_lite
from alpa_lite.ir import trace
from alpa_lite.runtime.hlo import collective_bytes

METHOD = alpa_lite.Zero3Parallel(mesh_shape={"fsdp": 8})
X = jax.ShapeDtypeStruct((16, 8), jnp.float32)
STATE = {
    "w": jax.ShapeDtypeStruct((8, 16), jnp.float32),
    "v": jax.ShapeDtypeStruct((16,), jnp.float32),
}


def step(state: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), loss


def init(key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key)
    return {
        k: jax.random.normal(r, STATE[k].shape) for k, r in zip(sorted(STATE), keys, strict=True)
    }


def batch(seed: int = 0, rows: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)


def check_step(parallel: Any, state: Any, x: np.ndarray) -> Any:
    wanted, loss = jax.jit(step)(jax.tree.map(np.asarray, state), x)
    state, sharded_loss = parallel(state, x)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    for name in wanted:
        np.testing.assert_allclose(state[name], wanted[name], rtol=1e-5, atol=1e-6)
    return state


def test_init_after_planning_makes_the_state_sharded() -> None:
    parallel = alpa_lite.parallelize(step, method=METHOD)
    plan = parallel.plan(STATE, X)
    state = parallel.init(init, jax.random.key(0))
    for name, leaf in state.items():
        assert leaf.sharding.spec == plan.inputs[f"state.{name}"].partition_spec()
        assert not leaf.sharding.is_fully_replicated
    np.testing.assert_array_equal(state["w"], init(jax.random.key(0))["w"])
    check_step(parallel, state, batch())


@pytest.mark.parametrize("init_takes_batch", [False, True])
def test_init_plans_by_itself_when_given_the_batch(init_takes_batch: bool) -> None:
    parallel = alpa_lite.parallelize(step, method=METHOD)
    init_fn = (lambda key, x: init(key)) if init_takes_batch else init
    state = parallel.init(init_fn, jax.random.key(0), batch())
    assert not state["w"].sharding.is_fully_replicated


def test_init_without_plan_or_batch_says_what_to_do() -> None:
    with pytest.raises(alpa_lite.StepError, match="init needs a plan"):
        alpa_lite.parallelize(step).init(lambda: init(jax.random.key(0)))


def test_init_of_a_state_that_is_not_the_first_argument() -> None:
    def turned(x: jax.Array, state: dict[str, jax.Array]) -> Any:
        return step(state, x)

    for donate in (1, -1):
        parallel = alpa_lite.parallelize(
            turned, method=METHOD, batch_argnums=(0,), donate_argnums=donate
        )
        state = parallel.init(init, jax.random.key(0), batch())
        assert not state["w"].sharding.is_fully_replicated
        state, _ = parallel(batch(), state)
        state = parallel.init(init, jax.random.key(0))
        parallel(batch(), state)


def test_init_of_a_state_in_several_arguments() -> None:
    def two(w: jax.Array, x: jax.Array, v: jax.Array) -> Any:
        state, loss = step({"w": w, "v": v}, x)
        return state["w"], state["v"], loss

    parallel = alpa_lite.parallelize(two, method=METHOD, donate_argnums=(0, 2))
    w, v = parallel.init(lambda key: (init(key)["w"], init(key)["v"]), jax.random.key(0), batch())
    assert w.shape == (8, 16) and v.shape == (16,) and not w.sharding.is_fully_replicated
    w, v, _ = parallel(w, batch(), v)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [(jnp.zeros((5, 16)), "float32[5, 16]"), (jnp.zeros((8, 16), jnp.bfloat16), "bfloat16[8, 16]")],
)
def test_init_of_another_shape_or_dtype_is_refused(leaf: jax.Array, found: str) -> None:
    parallel = alpa_lite.parallelize(step, method=METHOD)
    parallel.plan(STATE, X)
    with pytest.raises(alpa_lite.StepError) as error:
        parallel.init(lambda: {"w": leaf, "v": jnp.zeros(16)})
    assert f"state.w should be float32[8, 16], found {found}" in str(error.value)


@pytest.mark.parametrize("given", ["plan.json", {"format": "alpa-lite-plan"}, 3])
def test_a_plan_that_is_not_one_is_refused_at_once(given: Any) -> None:
    reader = "Plan.from_json" if isinstance(given, dict) else "load_plan"
    with pytest.raises(TypeError, match=rf"plan must be a Plan, found .*alpa_lite\.{reader}\("):
        alpa_lite.parallelize(step, plan=given)


def test_a_step_that_is_not_a_function_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="takes a function, found 3 of type int"):
        alpa_lite.parallelize(3)


@pytest.mark.parametrize("cluster", ["cpu:8", "h100:2x4", "a100-80:1x8", "h100:2x8"])
def test_a_plan_for_other_hardware_is_refused_at_once(cluster: str) -> None:
    plan = alpa_lite.parallelize(step, method=METHOD, cluster="h100:1x8").plan(STATE, X)
    with pytest.raises(alpa_lite.PlanError, match=r"made for h100:1x8, .* not for .*drop cluster="):
        alpa_lite.parallelize(step, plan=plan, cluster=cluster)
    assert alpa_lite.parallelize(step, plan=plan, cluster="h100:1x8").plan(STATE, X) == plan
    tried = alpa_lite.parallelize(step, plan=plan)
    check_step(tried, init(jax.random.key(0)), batch())


def test_the_old_state_is_donated() -> None:
    parallel = alpa_lite.parallelize(step, method=METHOD)
    state = parallel.init(init, jax.random.key(0), batch())
    parallel(state, batch())
    assert all(leaf.is_deleted() for leaf in state.values())


def test_each_shape_is_compiled_once() -> None:
    parallel = alpa_lite.parallelize(step, method=METHOD)
    state = init(jax.random.key(0))
    first = parallel.compile(state, batch())
    assert parallel.compile(state, batch(1)) is first
    assert parallel.compile(state, batch(0, rows=32)) is not first


def test_keyword_and_static_arguments() -> None:
    def powered(state: jax.Array, power: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** power))(state)
        return state - 0.1 * grad, loss

    parallel = alpa_lite.parallelize(
        powered, method=METHOD, static_argnums=(1,), batch_argnums=(2,)
    )
    w, x = np.ones((8, 16), np.float32), batch()
    for power in (2, 4):
        _, loss = parallel(w.copy(), x=x, power=power)
        np.testing.assert_allclose(loss, powered(w, power, x)[1], rtol=1e-5)


def test_a_function_without_state() -> None:
    parallel = alpa_lite.parallelize(
        lambda w, x: jnp.tanh(x @ w), donate_argnums=(),
        method=alpa_lite.ShardParallel(mesh_shape=(8,)),
    )  # fmt: skip
    w = np.ones((8, 16), np.float32)
    np.testing.assert_allclose(parallel(w, batch()), np.tanh(batch() @ w), rtol=1e-5)


@pytest.mark.smoke
def test_a_saved_plan_runs_the_same(tmp_path: Any) -> None:
    original = alpa_lite.parallelize(step, method=METHOD)
    original.plan(STATE, X).save(tmp_path / "plan.json")
    plan = alpa_lite.Plan.load(tmp_path / "plan.json")
    assert plan == original.plan(STATE, X)
    loaded = alpa_lite.parallelize(step, plan=plan)
    state = init(jax.random.key(0))
    texts = [p.compile(state, batch()).as_text() for p in (original, loaded)]
    assert collective_bytes(texts[0], plan.mesh) == collective_bytes(texts[1], plan.mesh) != {}
    check_step(loaded, state, batch())


def test_an_edited_plan_runs_and_is_priced_again() -> None:
    plan = alpa_lite.parallelize(step, method=METHOD).plan(STATE, X)
    edited = plan.with_inputs({"state.w": [[], []], "state.v": [[]]})
    parallel = alpa_lite.parallelize(step, plan=edited)
    state = check_step(parallel, init(jax.random.key(0)), batch())
    assert state["w"].sharding.is_fully_replicated
    priced = parallel.plan(state, X).predicted
    assert priced.memory_bytes["parameters"] > plan.predicted.memory_bytes["parameters"]


def test_pins_of_some_inputs_are_kept() -> None:
    method = alpa_lite.ManualParallel(
        {"state.w": PartitionSpec(None, "tp")}, mesh_shape={"dp": 2, "tp": 4}
    )
    parallel = alpa_lite.parallelize(step, method=method)
    state = check_step(parallel, init(jax.random.key(0)), batch())
    assert state["w"].sharding.spec == PartitionSpec(None, "tp")


def test_gradients_elsewhere_are_those_of_jax_while_a_step_is_traced() -> None:
    """Capture is bound to the tracing thread, and undone even when the step fails."""
    real = jax.grad, jax.value_and_grad
    seen: list[Any] = []

    def traced_step(w: jax.Array) -> jax.Array:
        other = threading.Thread(target=lambda: seen.append(jax.make_jaxpr(jax.grad(jnp.sin))(1.0)))
        other.start()
        other.join()
        return jax.grad(lambda w: jnp.sum(jnp.sin(w)))(w)

    graph = trace(traced_step, np.ones(4, np.float32)).graph
    assert len(graph.grad_regions) == 1
    assert "value_and_grad" not in str(seen[0])
    assert (jax.grad, jax.value_and_grad) == real

    def failing(w: jax.Array) -> jax.Array:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trace(failing, np.ones(4, np.float32))
    assert (jax.grad, jax.value_and_grad) == real
