"""How a decorated step may be called: argument layouts, shapes, devices, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding

import alpa_lite
from tests.runtime.random_plans import assert_close, quick_compilation

METHOD = alpa_lite.Zero3Parallel(mesh_shape={"fsdp": 8})
ROWS, IN, OUT = 16, 8, 24


@pytest.fixture(autouse=True)
def _quick():
    with quick_compilation():
        yield


def loss_of(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def step(w: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, grad = jax.value_and_grad(loss_of)(w, x, y)
    return w - 0.1 * grad, loss


def arrays(seed: int = 0, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (IN, OUT), (rows, IN), (rows, OUT)
    w, x, y = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return w, x, y


def parallel(**options: Any) -> Any:
    return alpa_lite.parallelize(step, **{"method": METHOD, "batch_argnums": (1, 2), **options})


def test_several_batch_arguments_are_split():
    sharded = parallel()
    w, x, y = arrays()
    assert_close(step(w, x, y), sharded(w, x, y))
    plan = sharded.plan(w, x, y)
    assert [str(plan.inputs[name]) for name in "wxy"] == ["[fsdp, -]", "[fsdp, -]", "[fsdp, -]"]


def test_an_argument_left_out_of_the_batch_is_not_split():
    sharded = parallel(batch_argnums=2)
    w, x, y = arrays()
    plan = sharded.plan(w, x, y)
    assert str(plan.inputs["y"]) == "[fsdp, -]"
    assert_close(step(w, x, y), sharded(w, x, y))


def test_state_in_several_arguments():
    tx = optax.adam(1e-2)

    def adam_step(w: jax.Array, moments: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, grad = jax.value_and_grad(loss_of)(w, x, y)
        update, moments = tx.update(grad, moments)
        return w + update, moments, {"loss": loss}

    w, x, y = arrays()
    sharded = alpa_lite.parallelize(
        adam_step, method=METHOD, donate_argnums=(0, 1), batch_argnums=(2, 3)
    )
    expected = adam_step(w, tx.init(w), x, y)
    first = sharded(w, tx.init(w), x, y)
    # Adam divides by the root of the second moment, which doubles relative errors.
    assert_close(expected, first, tolerance=1e-4)
    second = sharded(*first[:2], x, y)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first[:2]) if leaf.ndim)
    assert_close(adam_step(*expected[:2], x, y), second, tolerance=1e-4)


def test_nothing_is_donated_unless_asked():
    sharded = alpa_lite.parallelize(loss_of, method=METHOD, donate_argnums=(), batch_argnums=(1, 2))
    w, x, y = arrays()
    placed = jax.device_put(w, sharded.compile(w, x, y).in_shardings[0])
    assert_close(loss_of(w, x, y), sharded(placed, x, y))
    assert not placed.is_deleted()
    assert_close(loss_of(w, x, y), sharded(placed, x, y))


def test_only_shapes_and_types_are_compiled_anew():
    sharded = parallel()
    w, x, y = arrays()
    first = sharded.compile(w, x, y)
    same = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (w, x, y)]
    assert sharded.compile(*same) is first
    assert sharded.compile(*map(jnp.asarray, (w, x, y))) is first
    assert sharded.compile(w, y=y, x=x) is first
    assert sharded.compile(w, x.astype(np.float16), y) is not first
    assert sharded.compile(*arrays(rows=32)) is not first
    assert sharded.compile(*same) is first


def test_results_of_one_step_go_into_the_next_without_a_copy():
    sharded = parallel()
    w, x, y = arrays()
    executable = sharded.compile(w, x, y)
    state, _ = sharded(w, x, y)
    assert state.sharding.is_equivalent_to(executable.in_shardings[0], 2)
    pointers = [s.data.unsafe_buffer_pointer() for s in state.addressable_shards]
    after, _ = sharded(state, x, y)
    assert [s.data.unsafe_buffer_pointer() for s in after.addressable_shards] == pointers


@pytest.mark.parametrize("where", ["one device", "another layout", "numpy", "the default device"])
def test_arguments_may_lie_anywhere(where):
    sharded = parallel()
    w, x, y = arrays()
    mesh = sharded.compile(w, x, y).mesh
    place: Any = {
        "one device": lambda a: jax.device_put(a, SingleDeviceSharding(jax.devices()[5])),
        "another layout": lambda a: jax.device_put(
            a, NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
        ),
        "numpy": lambda a: a.astype(a.dtype, order="F"),
        "the default device": jnp.asarray,
    }[where]
    assert_close(step(w, x, y), sharded(*map(place, (w, x, y))))


def tuned(w: jax.Array, x: jax.Array, a: float = 2.0, b: float = 1.0, *, rate: float = 0.1) -> Any:
    loss, grad = jax.value_and_grad(lambda w: a * jnp.mean((b * x @ w) ** 2))(w)
    return w - rate * grad, loss


@pytest.mark.parametrize("options", [{"b": 3.0}, {"rate": 0.5}, {"rate": 0.5, "b": 3.0, "a": 1.0}])
def test_arguments_by_keyword(options):
    """A default may be left out before them, and they may be keyword-only."""
    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(tuned, method=METHOD)
    assert_close(tuned(w, x, **options), sharded(w, x, **options))
    assert_close(tuned(w, x, **options), sharded(w, **options, x=x))
    assert len(sharded._executables) == 1
    assert set(sharded.plan(w, x, **options).inputs) == {"w", "x", *options}


def test_keywords_of_one_type_share_a_program_and_others_do_not():
    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(tuned, method=METHOD)
    first = sharded.compile(w, x, b=3.0)
    assert sharded.compile(w, x, b=4.0) is first
    assert sharded.compile(w, x, a=3.0) is not first
    assert sharded.compile(w, x, rate=3.0) is not first


def test_argument_numbers_reach_arguments_passed_by_keyword():
    def masked(w: jax.Array, x: jax.Array, scale: float = 1.0, mask: Any = None) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2 * mask[:, None]))(w)
        return w - scale * grad, loss

    w, x, y = arrays()
    sharded = alpa_lite.parallelize(masked, method=METHOD, batch_argnums=(1, 3))
    assert_close(masked(w, x, mask=y[:, 0]), sharded(w, x, mask=y[:, 0]))
    assert str(sharded.plan(w, x, mask=y[:, 0]).inputs["mask"]) == "[fsdp]"


@pytest.mark.parametrize("options", [{}, {"power": 3}])
def test_a_static_argument_may_be_left_to_its_default(options):
    def powered(w: jax.Array, x: jax.Array, scale: float = 1.0, power: int = 2) -> Any:
        assert isinstance(power, int)
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** power))(w)
        return w - scale * grad, loss

    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(powered, method=METHOD, static_argnums=3)
    assert_close(powered(w, x, **options), sharded(w, x, **options))


def test_argument_numbers_count_from_the_end():
    w, x, y = arrays()
    sharded = parallel(batch_argnums=(-1, -2), donate_argnums=-3)
    assert_close(step(w, x, y), sharded(w, x, y))
    assert sharded.compile(w, x, y).inputs.donated == {0}
    with pytest.raises(alpa_lite.StepError, match="batch_argnums names argument -4, .* 3 arg"):
        parallel(batch_argnums=-4)(w, x, y)


def test_a_static_argument_that_is_not_hashable_is_named():
    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(tuned, method=METHOD, static_argnums=2)
    with pytest.raises(TypeError, match=r"hashable.*argument 2 \(a\) is \[2.0\], of type list"):
        sharded(w, x, [2.0])


def powered(w: jax.Array, x: jax.Array, scale: float = 1.0, *, power: int = 2, **more: int) -> Any:
    assert isinstance(power, int) and all(isinstance(n, int) for n in more.values())
    loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** power))(w)
    return w - scale * grad / (1 + sum(more.values())), loss


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("power", {"power": 3}),
        (("power",), {}),
        (("power", "scale"), {"power": 3, "scale": 0.5}),
        (["power", "shift", "absent"], {"power": 3, "shift": 2}),
    ],
)
def test_static_arguments_by_name(names, options):
    """They may be keyword-only, one of `**more`, or left to their defaults."""
    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(powered, method=METHOD, static_argnames=names)
    assert_close(powered(w, x, **options), sharded(w, x, **options))
    assert set(sharded.plan(w, x, **options).inputs) == {"w", "x"}


def test_a_static_argument_has_one_program_for_each_of_its_values():
    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(
        powered, method=METHOD, static_argnums=2, static_argnames=("power", "scale")
    )
    first = sharded.compile(w, x, 1.0, power=3)
    assert sharded.compile(w, x, scale=1.0, power=3) is first
    assert sharded.compile(w, x, 1.0, power=2) is not first
    assert sharded.compile(w, x, 2.0, power=3) is not first
    with pytest.raises(TypeError, match=r"hashable.*\(power\) is \[3\], of type list"):
        sharded(w, x, power=[3])
    with pytest.raises(alpa_lite.StepError, match="cannot be both static and in donate_argnums"):
        alpa_lite.parallelize(powered, method=METHOD, static_argnames="w")(w, x)


def test_static_values_that_are_equal_but_of_other_types_differ():
    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(tuned, method=METHOD, static_argnums=2)
    assert sharded.compile(w, x, 2.0) is not sharded.compile(w, x, 2)


def test_a_method_is_wrapped_once_it_is_bound():
    class Trainer:
        def __init__(self) -> None:
            self.step = alpa_lite.parallelize(self.step, method=METHOD, batch_argnums=(1, 2))

        def step(self, w: jax.Array, x: jax.Array, y: jax.Array) -> Any:
            return step(w, x, y)

        @alpa_lite.parallelize
        def decorated(self, w: jax.Array, x: jax.Array) -> Any:
            return w, x.sum()

        @staticmethod
        @alpa_lite.parallelize
        def free(w: jax.Array, x: jax.Array) -> Any:
            return w, x.sum()

    w, x, y = arrays()
    assert_close(step(w, x, y), Trainer().step(w, x, y))
    assert isinstance(Trainer.decorated, alpa_lite.ParallelStep)
    assert isinstance(Trainer().free, alpa_lite.ParallelStep)
    with pytest.raises(TypeError, match=r"takes no self.*self.decorated = parallelize\(self.dec"):
        Trainer().decorated(w, x)


def test_python_scalars():
    def scaled(w: jax.Array, x: jax.Array, rate: Any) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        return w - rate * grad, loss

    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(scaled, method=METHOD)
    for rate in (0.5, 0.25):
        assert_close(scaled(w, x, rate), sharded(w, x, rate))


def test_a_cluster_smaller_than_what_is_attached():
    sharded = parallel(method=alpa_lite.DataParallel(), cluster="cpu:4")
    w, x, y = arrays()
    state, loss = sharded(w, x, y)
    assert len(state.sharding.device_set) == 4
    assert_close(step(w, x, y), (state, loss))


def test_a_cluster_larger_than_what_is_attached_is_planned_but_not_run():
    sharded = parallel(method=alpa_lite.DataParallel(), cluster="cpu:16")
    w, x, y = arrays()
    assert sharded.plan(w, x, y).mesh.num_devices == 16
    with pytest.raises(alpa_lite.PlanError, match="needs 16 devices; 8 are attached"):
        sharded(w, x, y)


def test_another_structure_than_compiled_for_is_refused():
    w, x, y = arrays()
    executable = parallel().compile(w, x, y)
    with pytest.raises(TypeError, match="compiled for arguments"):
        executable({"w": w}, x, y)


def test_init_of_another_structure_is_refused():
    sharded = parallel()
    sharded.plan(*arrays())
    with pytest.raises(alpa_lite.StepError, match="init_fn returns"):
        sharded.init(lambda: {"w": jnp.zeros((IN, OUT))})


def test_a_plan_for_another_step_is_refused():
    plan = parallel().plan(*arrays())
    with pytest.raises(alpa_lite.PlanError, match="another step"):
        parallel(plan=plan).plan(*arrays(rows=32))


def test_keys_stay_typed_and_draw_as_on_one_device():
    def noisy(state: Any, x: jax.Array) -> Any:
        w, key = state
        key, now = jax.random.split(key)
        loss, grad = jax.value_and_grad(
            lambda w: jnp.mean(jax.random.normal(now, (ROWS, OUT)) * (x @ w))
        )(w)
        return (w - grad, key), loss

    w, x, _ = arrays()
    sharded = alpa_lite.parallelize(noisy, method=alpa_lite.DataParallel(mesh_shape=(2, 4)))
    expected, found = (w, jax.random.key(5)), (w, jax.random.key(5))
    for _ in range(3):
        expected, loss = noisy(expected, x)
        found, sharded_loss = sharded(found, x)
        assert jnp.issubdtype(found[1].dtype, jax.dtypes.prng_key)
        assert_close((expected, loss), (found, sharded_loss))


def test_a_flax_nnx_model():
    """NNX takes gradients through `jax.grad` of its own; the step is functional outside."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.hidden = nnx.Linear(IN, 32, rngs=rngs)
            self.norm = nnx.LayerNorm(32, rngs=rngs)
            self.out = nnx.Linear(32, OUT, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(self.norm(nnx.relu(self.hidden(x))))

    definition, state = nnx.split(Model(nnx.Rngs(0)))

    def nnx_step(state: Any, batch: Any) -> Any:
        model = nnx.merge(definition, state)

        def loss_fn(model: Model) -> jax.Array:
            return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        new = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads)
        return new, loss

    _, x, y = arrays()
    batch = {"x": x, "y": y}
    expected = jax.jit(nnx_step)(state, batch)
    for method in (METHOD, alpa_lite.AutoParallel(mesh_shape=(2, 4))):
        sharded = alpa_lite.parallelize(nnx_step, method=method)
        found = sharded(jax.tree.map(jnp.array, state), batch)
        assert_close(jax.tree.leaves(expected), jax.tree.leaves(found))
