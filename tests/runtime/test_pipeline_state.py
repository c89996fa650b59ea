"""A running pipeline as a user meets it: state, batches, further arguments, saved plans."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_lite
from alpa_lite.passes.pipeline_plan import PipelinePlan
from tests.runtime.pipeline_cases import (
    QUICK_COMPILE,
    RTOL,
    Case,
    by_hand,
    combined,
    grid,
    net,
    net_batch,
    quick_compilation,
)
from tests.runtime.random_plans import assert_close
from tests.runtime.test_equivalence import fast_links, to_numpy

Tree = Any
METHOD = grid(2, 2, 2)


def case() -> Case:
    return net("clip", tied=True, skip=True)


@functools.cache
def compiled() -> Any:
    """The step as a pipeline, compiled."""
    return ready(alpa_lite.parallelize(case().step, method=METHOD, cluster=fast_links()))


def ready(parallel: Any) -> Any:
    with quick_compilation():
        parallel.compile(case().init(), net_batch(0))
    return parallel


def executable() -> Any:
    return compiled().compile(case().init(), net_batch(0))


def train(parallel: Any, state: Tree, steps: range) -> tuple[Tree, Tree]:
    results = None
    for seed in steps:
        state, results = parallel(state, net_batch(seed))
    return state, results


def values(tree: Tree) -> list[np.ndarray]:
    return [to_numpy(x) for x in jax.tree.leaves(tree)]


def assert_equal(a: Tree, b: Tree) -> None:
    for x, y in zip(values(a), values(b), strict=True):
        np.testing.assert_array_equal(x, y)


# State.


def test_state_leaves_lie_on_their_stage() -> None:
    state, _ = train(compiled(), case().init(), range(1))
    meshes = [set(mesh.devices.flat) for mesh in executable().meshes]
    assert len(meshes[0] | meshes[1]) == 8
    for name, stage in {"w0": 0, "w1": 0, "w3": 1, "b0": 0, "b2": 1, "b3": 1}.items():
        assert state["p"][name].sharding.device_set == meshes[stage], name
        assert state["opt"][1][0].mu[name].sharding.device_set == meshes[stage], name
    for leaf in jax.tree.leaves(state):
        assert leaf.committed and leaf.sharding.device_set in meshes


def test_state_leaves_are_ordinary_arrays() -> None:
    state, results = train(compiled(), case().init(), range(1))
    (wanted, numbers), *_ = case().steps_by_hand(4)
    w3 = state["p"]["w3"]
    np.testing.assert_allclose(np.asarray(w3), wanted["p"]["w3"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(float(jnp.sum(w3)), float(jnp.sum(wanted["p"]["w3"])), rtol=1e-3)
    assert float(results["loss"]) == pytest.approx(float(numbers["loss"]), rel=RTOL)
    assert isinstance(state["key"].dtype, type(jax.random.key(0).dtype))


def test_a_state_saved_and_read_back_goes_on_the_same(tmp_path: Path) -> None:
    state, _ = train(compiled(), case().init(), range(2))
    leaves, tree = jax.tree.flatten(state)
    for i, leaf in enumerate(leaves):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        np.save(tmp_path / f"{i}.npy", np.asarray(jax.random.key_data(leaf) if is_key else leaf))
    wanted = train(compiled(), state, range(2, 4))

    restored: list[Any] = [np.load(tmp_path / f"{i}.npy") for i in range(len(leaves))]
    restored = [
        jax.random.wrap_key_data(jnp.asarray(x)) if x.dtype == np.uint32 else x for x in restored
    ]
    found = train(compiled(), jax.tree.unflatten(tree, restored), range(2, 4))
    assert_equal(found, wanted)


def test_a_state_with_one_leaf_replaced() -> None:
    """As after a look at it, or a change of the learning rate that is kept in the state."""
    state, _ = train(compiled(), case().init(), range(1))
    copied = jax.tree.map(jnp.copy, state)
    changed = {**copied, "p": {**copied["p"], "w3": np.asarray(copied["p"]["w3"])}}
    assert_equal(train(compiled(), changed, range(1, 2)), train(compiled(), state, range(1, 2)))


def test_an_old_state_is_refused() -> None:
    state = jax.tree.map(jnp.copy, case().init())
    train(compiled(), state, range(1))
    new, _ = train(compiled(), case().init(), range(1))
    train(compiled(), new, range(1))
    with pytest.raises(ValueError, match=r"a state is used once: state\.\S+ .* was donated by an"):
        compiled()(new, net_batch(1))
    with pytest.raises(ValueError, match="copy the state before the call to keep it"):
        compiled()({**case().init(), "p": new["p"]}, net_batch(1))


def test_a_copied_state_can_be_used_again() -> None:
    state, _ = train(compiled(), case().init(), range(1))
    kept = jax.tree.map(jnp.copy, state)
    first = train(compiled(), state, range(1, 2))
    assert_equal(train(compiled(), kept, range(1, 2)), first)


def test_a_state_whose_leaves_share_a_buffer() -> None:
    """One array in two places: both are donated, so one is copied."""
    state = case().init()
    zeros = jnp.zeros((16, 16))
    mu = {k: zeros if k.startswith("w") else x for k, x in state["opt"][1][0].mu.items()}
    adam = state["opt"][1][0]._replace(mu=mu)
    shared = {**state, "opt": (state["opt"][0], (adam, *state["opt"][1][1:]))}
    assert_equal(train(compiled(), shared, range(1)), train(compiled(), case().init(), range(1)))


def test_results_stay_when_the_state_goes_on() -> None:
    state, results = train(compiled(), case().init(), range(1))
    before = values(results)
    train(compiled(), state, range(1, 3))
    for a, b in zip(before, values(results), strict=True):
        np.testing.assert_array_equal(a, b)


def test_init_makes_the_state_where_it_lies() -> None:
    parallel = compiled()
    state = parallel.init(case().init)
    assert_equal(state, case().init())
    trained, _ = train(parallel, state, range(1))
    for a, b in zip(jax.tree.leaves(parallel.init(case().init)), jax.tree.leaves(trained),
                    strict=True):  # fmt: skip
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert_equal(trained, train(parallel, case().init(), range(1))[0])


def test_init_plans_by_itself_when_given_the_batch() -> None:
    parallel = alpa_lite.parallelize(case().step, method=METHOD, cluster=fast_links())
    state = parallel.init(lambda seed: case().init(), 0, net_batch(0))
    devices = [leaf.sharding.device_set for leaf in jax.tree.leaves(state)]
    assert len({frozenset(each) for each in devices}) == 2


# Batches.


@pytest.mark.parametrize("kind", ["numpy", "jax", "replicated", "split", "float64"])
def test_batches_of_all_kinds(kind: str) -> None:
    batch: Any = net_batch(0)
    if kind == "jax":
        batch = jax.tree.map(jnp.asarray, batch)
    elif kind in ("replicated", "split"):
        mesh = jax.make_mesh((8,), ("d",))
        spec = jax.sharding.PartitionSpec("d" if kind == "split" else None)
        batch = jax.device_put(batch, jax.sharding.NamedSharding(mesh, spec))
    elif kind == "float64":
        batch = {**batch, "x": np.asarray(batch["x"], np.float64)}  # JAX takes it as float32
    assert_equal(compiled()(case().init(), batch), compiled()(case().init(), net_batch(0)))


def test_a_deleted_batch_is_refused() -> None:
    batch = jax.tree.map(jnp.asarray, net_batch(0))
    batch["y"].delete()
    with pytest.raises(ValueError, match=r"batch\.y was deleted; pass an array that is alive"):
        compiled()(case().init(), batch)


def test_a_batch_of_another_shape_for_a_compiled_step() -> None:
    batch = {**net_batch(0), "y": np.zeros((16, 3), np.float32)}
    with pytest.raises(TypeError, match=r"batch\.y should be float32\[16, 16\], found float32\[16"):
        executable()(case().init(), batch)
    with pytest.raises(TypeError, match="the step was compiled for arguments .* called with"):
        executable()(case().init(), {"x": batch["x"]})


# Further arguments and other outputs.


def with_arguments(state: Tree, batch: Tree, key: jax.Array, rate: Any, scale: Any = 1.0) -> Any:
    """A key and numbers from outside; outputs that are inputs, constants, and rows of the batch."""

    def loss(p: Tree) -> tuple[jax.Array, Tree]:
        h = jnp.tanh(batch["x"] @ p["w0"])
        h = jnp.where(jax.random.bernoulli(key, 0.75, h.shape), h, 0.0)
        h = jnp.tanh(h @ p["w1"]) * scale
        return jnp.mean((h @ p["w2"] - batch["y"]) ** 2), {
            "rows": h[:, :2],
            "count": jnp.sum(h > 0),
        }

    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state)
    new = {k: p - rate * grads[k] for k, p in state.items()}
    return new, {"loss": value, **aux, "rate": rate, "three": 3, "double": rate * 2}


def three_matrices() -> Tree:
    rng = np.random.default_rng(0)
    return {f"w{i}": (0.4 * rng.normal(size=(16, 16))).astype(np.float32) for i in range(3)}


def arguments_by_hand(state: Tree, batch: Tree, key: Any, rate: Any, scale: Any) -> Any:
    step = jax.jit(with_arguments, compiler_options=QUICK_COMPILE)
    found = [
        step(
            state, jax.tree.map(lambda x, m=m: np.split(x, 4)[m], batch),
            jax.random.fold_in(key, m), rate, scale,
        )
        for m in range(4)
    ]  # fmt: skip
    # The update is linear in the gradients.
    new, results = jax.tree_util.tree_map_with_path(
        lambda path, *xs: combined(jax.tree_util.keystr(path), xs), *found
    )
    return new, {**results, "three": found[0][1]["three"]}


@pytest.mark.parametrize(
    "method",
    [
        grid(2, 2, 2, layer_num=3),
        pytest.param(grid(1, 4, 2, layer_num=3, schedule="chimera"), marks=pytest.mark.slow),
    ],
    ids=["1f1b", "chimera"],
)  # fmt: skip
def test_keys_and_numbers_per_call(method: Any) -> None:
    parallel = alpa_lite.parallelize(with_arguments, method=method, cluster=fast_links())
    state = wanted = three_matrices()
    with quick_compilation():
        parallel.compile(state, net_batch(0), jax.random.key(0), 0.1, scale=1.0)
    for seed, rate in enumerate((0.1, 0.05)):
        key = jax.random.key(seed)
        wanted, results = arguments_by_hand(wanted, net_batch(seed), key, rate, 1.0)
        state, found = parallel(state, net_batch(seed), key, rate, scale=1.0)
        assert_close((wanted, results), (state, found), tolerance=RTOL, floor=1e-3)


def test_outputs_that_are_inputs() -> None:
    def step(state: Tree, batch: Tree, other: Any) -> Any:
        new, results = with_arguments(state["p"], batch, jax.random.key(0), 0.1)
        passed = {"x": batch["x"], "same": state["kept"], "old": state["p"]["w0"], "other": other}
        return {"p": new, "kept": state["kept"]}, {**results, **passed}

    parallel = alpa_lite.parallelize(
        step, method=grid(2, 2, 2, layer_num=3), cluster=fast_links()
    )  # fmt: skip
    state = {"p": three_matrices(), "kept": np.arange(4.0, dtype=np.float32)}
    other = np.full((2, 2), 7.0, np.float32)
    with quick_compilation():
        parallel.compile(state, net_batch(0), other)
    for _ in range(2):
        old = np.asarray(state["p"]["w0"])
        state, results = parallel(state, net_batch(0), other)
        np.testing.assert_array_equal(results["x"], net_batch(0)["x"])
        np.testing.assert_array_equal(results["same"], state["kept"])
        np.testing.assert_array_equal(results["old"], old)
        np.testing.assert_array_equal(results["other"], other)


def test_state_in_two_arguments() -> None:
    def step(params: Tree, batch: Tree, momentum: Tree) -> Any:
        new, results = with_arguments(params, batch, jax.random.key(0), 1.0)
        moved = {k: 0.9 * momentum[k] + (params[k] - new[k]) for k in params}
        return {k: params[k] - 0.1 * moved[k] for k in params}, moved, results["loss"]

    parallel = alpa_lite.parallelize(
        step, method=by_hand([[0], [1, 2]], [(1, 2), (1, 2)], layer_num=3, num_microbatches=1),
        cluster=fast_links(), donate_argnums=(0, 2),
    )  # fmt: skip
    params = three_matrices()
    momentum = jax.tree.map(np.zeros_like, params)
    with quick_compilation():
        parallel.compile(params, net_batch(0), momentum)
    wanted = params, momentum
    found: Any = params, momentum
    for seed in range(2):
        *wanted, loss = jax.jit(step)(wanted[0], net_batch(seed), wanted[1])
        *found, value = parallel(found[0], net_batch(seed), found[1])
        assert_close((wanted, loss), (found, value), tolerance=RTOL, floor=1e-3)


# Plans.


def test_a_saved_plan_runs_the_same(tmp_path: Path) -> None:
    plan = executable().plan
    plan.save(tmp_path / "plan.json")
    loaded = alpa_lite.load_plan(tmp_path / "plan.json")
    assert isinstance(loaded, PipelinePlan) and loaded == plan
    again = ready(alpa_lite.parallelize(case().step, plan=loaded))
    assert again.plan(case().init(), net_batch(0)) == plan
    assert_equal(train(again, case().init(), range(2)), train(compiled(), case().init(), range(2)))


def test_planning_needs_shapes_only() -> None:
    shapes = jax.eval_shape(case().init)
    batch = jax.eval_shape(lambda: net_batch(0))
    plan = alpa_lite.parallelize(case().step, method=METHOD, cluster="h100:1x8").plan(shapes, batch)
    assert [stage.layers for stage in plan.stages] == [(0, 1), (2, 3)]
    assert [stage.mesh for stage in plan.stages] == [0, 1]
    assert plan.num_microbatches == 4 and plan.idle_devices == 0
