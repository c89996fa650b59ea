"""Steps that do not keep the contract, or do not let themselves be planned: what is said then."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import alpa_lite
from alpa_lite import AutoParallel, DataParallel, ShardParallel
from alpa_lite.errors import StepError
from alpa_lite.passes.rules.registry import DEFAULT_REGISTRY
from tests.passes.small_step import Step, W, X, floats, good_step, solve_plan, step_with_aux

# The step contract.


def no_state(w: jax.Array, x: jax.Array) -> None:
    return None


def renamed_state(w: jax.Array, x: jax.Array) -> Any:
    return {"w": w}, jnp.mean(x @ w)


@pytest.mark.parametrize(
    ("step", "found"), [(no_state, r"PyTreeDef\(None\)"), (renamed_state, r"PyTreeDef\(\{'w'")]
)
def test_a_state_of_another_structure(step: Step, found: str) -> None:
    message = "must return its state first: output 0 should have the structure of argument 0"
    with pytest.raises(StepError, match=f"{message}.*found {found}.*donate_argnums=\\(\\)"):
        solve_plan(step)


def test_a_second_state_that_does_not_come_back() -> None:
    with pytest.raises(StepError, match="output 1 should have the structure of argument 1"):
        solve_plan(lambda w, x: (w, {"x": x}), donate_argnums=(0, 1), batch_argnums=())


def test_a_loss_in_the_place_of_the_state() -> None:
    message = r"state leaf w comes in as float32\[8, 4\] and goes out as float32\[\]"
    with pytest.raises(StepError, match=message):
        solve_plan(lambda w, x: jnp.mean(x @ w))


def test_a_state_leaf_that_changes_shape_or_dtype_is_named() -> None:
    state = {"a": {"b": W}, "c": W}

    def halved(state: Any, x: jax.Array) -> Any:
        return {"a": {"b": state["a"]["b"][:4]}, "c": state["c"]}, jnp.sum(x)

    def rounded(state: Any, x: jax.Array) -> Any:
        return {"a": {"b": state["a"]["b"]}, "c": state["c"].astype(jnp.bfloat16)}, jnp.sum(x)

    message = r"leaf state\.a\.b comes in as float32\[8, 4\] and goes out as float32\[4, 4\]"
    with pytest.raises(StepError, match=message):
        solve_plan(halved, (state, X))
    message = r"leaf state\.c comes in as float32\[8, 4\] and goes out as bfloat16\[8, 4\]"
    with pytest.raises(StepError, match=message):
        solve_plan(rounded, (state, X))


def test_a_function_without_state_needs_no_contract() -> None:
    plan = solve_plan(lambda w, x: jnp.mean(x @ w), donate_argnums=())
    assert set(plan.inputs) == {"w", "x"}


# Python control flow on traced values.


def branching_loss(w: jax.Array, x: jax.Array) -> jax.Array:
    loss = jnp.mean((x @ w) ** 2)
    return loss * 2 if loss > 0 else loss


def test_control_flow_in_the_loss_function_names_the_users_code() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        gradient = jax.grad(branching_loss)(w, x)
        return w - gradient, 0.0

    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        solve_plan(step)
    text = str(caught.value)
    assert "Attempted boolean conversion of traced array with shape bool[]" in text
    assert re.search(r"tracing the function branching_loss at \S*test_bad_steps\.py:\d+", text)
    assert "arguments w and x" in text and "alpa_lite" not in text
    assert caught.value.__cause__ is None


def test_control_flow_in_the_step_names_the_users_code() -> None:
    def branching_step(w: jax.Array, x: jax.Array) -> Any:
        return good_step(w, x) if x.sum() > 0 else (w, 0.0)

    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        solve_plan(branching_step)
    text = str(caught.value)
    assert re.search(r"tracing the function branching_step at \S*test_bad_steps\.py:\d+", text)
    assert "argument x" in text and "alpa_lite" not in text


def test_errors_of_the_users_code_come_through_unchanged() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        solve_plan(step)


# Side effects.


def printing_step(w: jax.Array, x: jax.Array) -> Any:
    def loss(w: jax.Array) -> jax.Array:
        out = x @ w
        jax.debug.print("first column {}", out[:, 0])
        return jnp.mean(out**2)

    value, gradient = jax.value_and_grad(loss)(w)
    return w - 0.1 * gradient, value


def test_a_side_effect_is_noted() -> None:
    (note,) = solve_plan(printing_step).notes
    assert re.match(r"debug_print at \S*test_bad_steps\.py:\d+.* has a side effect", note)
    assert "every device runs it, on whole arrays" in note


def test_a_side_effect_in_a_loop_is_noted() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        def body(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            jax.debug.print("{}", carry)
            return carry + row.sum(), None

        return w, jax.lax.scan(body, jnp.float32(0), x)[0]

    assert any("side effect" in note for note in solve_plan(step).notes)


def test_debug_print_shows_whole_arrays_on_every_device(capfd: pytest.CaptureFixture[str]) -> None:
    """It works, as often as there are devices; nothing else has a meaning on split arrays."""
    w, x = np.eye(8, 4, dtype=np.float32), np.arange(128, dtype=np.float32).reshape(16, 8)
    step = alpa_lite.parallelize(printing_step, cluster="cpu:4", method=DataParallel())
    _, loss = step(w, x)
    jax.effects_barrier()
    printed = capfd.readouterr().out
    column = " ".join(f"{v:g}." for v in x[:, 0])
    assert " ".join(printed.split()).replace("[ ", "[").count(f"first column [{column}]") == 4
    assert float(loss) == pytest.approx(float(np.mean((x @ w) ** 2)))


# Primitives without a rule.


@pytest.fixture
def opaque() -> Iterator[Primitive]:
    """A row-wise primitive that lowers to a call nobody can look into."""
    primitive = Primitive("opaque_test_call")
    primitive.def_abstract_eval(lambda x: x)

    def lower(ctx: Any, x: Any) -> Any:
        types = [mlir.aval_to_ir_type(aval) for aval in ctx.avals_out]
        return mlir.custom_call("opaque_test_call", result_types=types, operands=[x]).results

    mlir.register_lowering(primitive, lower)
    yield primitive
    DEFAULT_REGISTRY.unregister(primitive)


def test_a_primitive_without_a_rule_is_replicated_until_it_gets_one(opaque: Primitive) -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        return w, jnp.mean((opaque.bind(x @ w)) ** 2)

    args = floats(4096, 4096), floats(4096, 4096)
    method = ShardParallel(mesh_shape={"dp": 4})
    blind = solve_plan(step, args, method=method)
    (note,) = blind.notes
    assert re.match(r"opaque_test_call at \S*test_bad_steps\.py:\d+.* is replicated: ", note)
    gathered = {c.kind for c in blind.predicted.collectives} & {"all_gather", "all_reduce"}
    assert gathered, blind.describe()

    alpa_lite.register_sharding_rule(opaque, lambda ins, outs, params: "i j -> i j; blocked=j")
    seeing = solve_plan(step, args, method=method)
    assert not seeing.notes
    assert seeing.predicted.step_s < blind.predicted.step_s
    (decision,) = [d for d in seeing.decisions if "opaque_test_call" in d.name]
    assert list(decision.factors.values()) == [4096] and decision.axes


def test_a_registered_rule_that_does_not_fit_names_the_primitive(opaque: Primitive) -> None:
    alpa_lite.register_sharding_rule(opaque, lambda ins, outs, params: "i j k -> i j k")
    with pytest.raises(ValueError, match="rule registered for 'opaque_test_call'.*Rank 3"):
        solve_plan(lambda w, x: (w, opaque.bind(x @ w).sum()))


# Microbatches.

TWO = AutoParallel(num_microbatches=2)


def test_two_gradients_cannot_be_accumulated() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        first = jax.grad(lambda w: jnp.mean(x @ w))(w)
        return w - first - jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), 0.0

    assert solve_plan(step).num_microbatches == 1
    with pytest.raises(StepError, match="exactly one gradient computation.*found 2"):
        solve_plan(step, method=TWO)
    with pytest.raises(StepError, match="exactly one gradient computation.*found 0"):
        solve_plan(lambda w, x: (w, jnp.mean(x @ w)), method=TWO)


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        (lambda w, x: (x @ w).T, r"output 1\.extra has shape \[4, 16\] for the whole batch and"),
        (lambda w, x: jnp.arange(x.shape[0] + 1), r"output 1\.extra has shape \[17\] for the"),
        (lambda w, x: jnp.any(x > 0), r"output 1\.extra is of type bool: floats are averaged"),
        (lambda w, x: jnp.int32(x.shape[0]), r"output 1\.extra is 16 for the whole batch and 8"),
        (lambda w, x: jnp.arange(x.shape[0]), r"output 1\.extra has a row .* depends on no row of"),
        (
            lambda w, x: jax.random.fold_in(jax.random.key(0), jnp.int32(x.sum())),
            r"output 1\.extra is of type key<fry>",
        ),
    ],
)
def test_outputs_without_a_meaning_for_microbatches(aux: Any, message: str) -> None:
    step = step_with_aux(aux)
    assert solve_plan(step).num_microbatches == 1
    with pytest.raises(StepError, match=message):
        solve_plan(step, method=TWO)


@pytest.mark.parametrize(
    "aux",
    [
        lambda w, x: x @ w,
        lambda w, x: jnp.sum(x > 0),
        lambda w, x: {"norm": jnp.linalg.norm(w), "constant": jnp.int32(3), "nothing": None},
    ],
)
def test_outputs_with_a_meaning_for_microbatches(aux: Any) -> None:
    assert solve_plan(step_with_aux(aux), method=TWO).num_microbatches == 2


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda w, aux, x: (w, x.sum()), "reduce_sum at .* reads the batch after the gradient"),
        (lambda w, aux, x: (w, aux.max()), "reduce_max at .* reads an aux output .* after the"),
        (lambda w, aux, x: (w * x.shape[0], 0.0), "mul at .* depends on the batch size"),
        (lambda w, aux, x: (w, jnp.ones(x.shape[0]) * w[0, 0]), "depends on the batch size"),
    ],
)
def test_updates_that_need_the_whole_batch(update: Any, message: str) -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        def loss(w: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = x @ w
            return jnp.mean(out**2), out[:, 0]

        (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(w)
        return update(w - gradient, aux, x)

    assert solve_plan(step).num_microbatches == 1
    with pytest.raises(StepError, match=message):
        solve_plan(step, method=TWO)


def test_an_update_that_reads_a_boolean_of_the_loss_function() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        def loss(w: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = jnp.mean((x @ w) ** 2)
            return value, jnp.isfinite(value)

        (value, finite), gradient = jax.value_and_grad(loss, has_aux=True)(w)
        return jnp.where(finite, w - gradient, w), value

    with pytest.raises(StepError, match="an aux output of the loss function, read by .* bool"):
        solve_plan(step, method=TWO)
