"""A step cut at its gradient: which equations run before, per microbatch, and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alpa_lite import compat
from alpa_lite.errors import StepError
from alpa_lite.ir.trace import trace_whole_gradient
from alpa_lite.passes.stages.parts import StepParts, evaluate, read, split_parts, variables
from tests.passes.stages.stage_flow import QUICK_COMPILE

W = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
X = np.linspace(-2, 2, 32, dtype=np.float32).reshape(8, 4)


def parts_of(step: Callable[..., Any], *args: Any) -> StepParts:
    """Parts of a step whose second argument is the batch."""
    traced, closed = trace_whole_gradient(step, *args)
    return split_parts(closed, traced.argument_range(1))


def names(equations: Sequence[Any]) -> list[str]:
    return [eqn.primitive.name for eqn in equations]


def run_parts(parts: StepParts, *args: Any) -> list[Any]:
    """The outputs of a step from its parts."""
    env = {**parts.constants, **dict(zip(parts.inputs, jax.tree.leaves(args), strict=True))}
    evaluate(parts.before, env)
    wrt = variables(parts.wrt)

    def loss(chosen: list[Any]) -> Any:
        inner = {**env, **dict(zip(wrt, chosen, strict=True))}
        evaluate(parts.loop, inner)
        return read(parts.loss, inner), [read(atom, inner) for _, atom in parts.results]

    (_, results), grads = jax.value_and_grad(loss, has_aux=True)([env[v] for v in wrt])
    by_atom = dict(zip(wrt, grads, strict=True))
    env.update((v, x) for (v, _), x in zip(parts.results, results, strict=True))
    env.update((v, by_atom[atom]) for v, atom in parts.grads)
    evaluate(parts.after, env)
    return [read(atom, env) for atom in parts.outputs]


def check_parts(step: Callable[..., Any], *args: Any) -> StepParts:
    """Parts whose evaluation gives what the step gives."""
    parts = parts_of(step, *args)

    def both(*args: Any) -> Any:
        return jax.tree.leaves(step(*args)), run_parts(parts, *args)

    expected, found = jax.jit(both, compiler_options=QUICK_COMPILE)(*args)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    return parts


def plain(w: jax.Array, x: jax.Array) -> Any:
    loss, grad = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
    return w - 0.1 * grad, loss


def test_forward_and_update() -> None:
    parts = check_parts(plain, W, X)
    assert names(parts.before) == []
    assert names(parts.loop)[:2] == ["dot_general", "tanh"]
    assert names(parts.after) == ["mul", "sub"]
    assert parts.batch == {parts.inputs[1]} and parts.wrt == (parts.inputs[0],)
    assert parts.results[0][1] is parts.loss is parts.loop[-1].outvars[0]


def test_calls_are_inlined_wherever_they_are() -> None:
    @jax.jit
    def layer(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.jit(jnp.tanh)(x @ w)

    @jax.jit
    def apply(w: jax.Array, grad: jax.Array) -> jax.Array:
        return w - 0.1 * grad

    def step(w: jax.Array, x: jax.Array) -> Any:
        scale = jax.jit(lambda w: jnp.sum(jnp.sin(w)))(w)
        loss, grad = jax.value_and_grad(lambda w: jnp.mean(layer(w, layer(w, x) @ w.T)) * scale)(w)
        return apply(w, grad), loss

    parts = check_parts(step, W, X)
    every = names((*parts.before, *parts.loop, *parts.after))
    assert not {"pjit", "jit", "closed_call"} & {*every}
    assert names(parts.before) == ["sin", "reduce_sum"]
    assert every.count("dot_general") == 3
    assert names(parts.after) == ["mul", "sub"]


def test_a_jitted_step_is_inlined() -> None:
    parts = check_parts(jax.jit(plain), W, X)
    assert names(parts.after) == ["mul", "sub"]


def test_equations_before_the_gradient_run_per_microbatch_if_they_read_the_batch() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        scale = jnp.exp(state["s"])  # once
        x = jnp.cos(x)  # per microbatch
        x = x * scale  # per microbatch: it reads the line before

        def loss_fn(w: jax.Array) -> jax.Array:
            return jnp.mean((x @ w) ** 2) * scale

        loss, grad = jax.value_and_grad(loss_fn)(state["w"])
        return {"w": state["w"] - grad, "s": state["s"] + 1}, loss

    parts = check_parts(step, {"s": jnp.float32(0.3), "w": W}, X)
    assert names(parts.before) == ["exp"]
    assert names(parts.loop)[:3] == ["cos", "mul", "dot_general"]
    assert parts.before[0].outvars[0] in variables(parts.loop[1].invars)
    # What happens to the counter stands after the gradient although it reads nothing from it.
    assert sorted(names(parts.after)) == ["add", "sub"]


def test_arrays_captured_by_closure() -> None:
    inside, outside = np.linspace(0, 1, 3, dtype=np.float32), np.arange(3.0, dtype=np.float32)

    def step(w: jax.Array, x: jax.Array) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w + inside) ** 2))(w)
        return w - grad * outside, loss

    parts = check_parts(step, W, X)
    assert {v.aval.shape for v in parts.constants} == {(3,)} and len(parts.constants) == 2
    assert set(parts.constants) <= {
        v for e in (*parts.loop, *parts.after) for v in variables(e.invars)
    }


def test_outputs_that_depend_on_the_batch_and_not_on_the_loss() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        y = jnp.cos(x)
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((y @ w) ** 2))(w)
        return w - grad, (loss, x, y, x, 1.0)

    parts = check_parts(step, W, X)
    assert [atom for _, atom in parts.results[1:]] == [parts.inputs[1], parts.loop[0].outvars[0]]


def test_every_result_is_a_variable_of_its_own() -> None:
    """A function called twice is inlined twice."""

    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        return 2.0 * x

    def step(w: jax.Array, x: jax.Array) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean(double(double(x @ w))))(w)
        return w - double(grad), loss

    parts = check_parts(step, W, X)
    made = [v for e in (*parts.before, *parts.loop, *parts.after) for v in e.outvars]
    assert len(made) == len(set(made))


def test_aux_and_gradients_with_their_atoms() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        def loss_fn(p: Any) -> Any:
            y = x @ p["a"]
            return jnp.mean(y**2), {"y": y, "same": p["b"], "three": 3.0}

        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state)
        return jax.tree.map(lambda p, g: p - g, state, grads), (loss, aux)

    state = {"a": W, "b": jnp.ones(2)}
    parts = check_parts(step, state, X)
    a, b = parts.inputs[:2]
    assert [atom for _, atom in parts.grads] == [a, b]
    same = [atom for _, atom in parts.results if atom is b]
    assert len(same) == 1, "an aux output that is a parameter stands for it"
    assert parts.outputs[0] is not a and parts.outputs[0] in {
        v for e in parts.after for v in e.outvars
    }


def test_plain_jax_grad_is_found_and_its_loss_left_out() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        return w - jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), 0.0

    parts = check_parts(step, W, X)
    assert names(parts.after) == ["sub"] and len(parts.grads) == 1


# A `cond` in the update.


def two_params(update: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    def step(state: Any, x: jax.Array) -> Any:
        def loss_fn(p: Any) -> jax.Array:
            return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state["p"])
        return {"p": update(state["p"], grads, state["n"]), "n": state["n"] + 1}, loss

    return step


STATE = {"p": {"a": W, "b": np.ones((3, 2), np.float32)}, "n": np.int32(1)}


def test_a_cond_on_all_gradients_becomes_selections() -> None:
    """MultiSteps branches with every gradient as an operand: it has to be cut."""

    def update(p: Any, g: Any, n: Any) -> Any:
        return jax.lax.cond(
            n > 1, lambda p, g: jax.tree.map(lambda a, b: a - b, p, g), lambda p, g: p, p, g
        )

    for n in (1, 2):
        parts = check_parts(two_params(update), {**STATE, "n": jnp.int32(n)}, X)
    assert "cond" not in names(parts.after)
    assert names(parts.after).count("select_n") == 2, "one for each parameter"


def test_a_switch_with_three_branches_becomes_selections() -> None:
    def update(p: Any, g: Any, n: Any) -> Any:
        branches = [
            lambda p, g, k=k: jax.tree.map(lambda a, b: a - k * b, p, g) for k in (0.1, 0.5, 2.0)
        ]
        return jax.lax.switch(n, branches, p, g)

    for n in (-3, 0, 1, 2, 7):  # the index of a switch is clamped
        parts = check_parts(two_params(update), {**STATE, "n": jnp.int32(n)}, X)
    assert "cond" not in names(parts.after)


def test_a_cond_on_one_gradient_stays() -> None:
    def update(p: Any, g: Any, n: Any) -> Any:
        a = jax.lax.cond(n > 0, lambda a, g: a - g, lambda a, g: a, p["a"], g["a"])
        return {"a": a, "b": p["b"] - g["b"]}

    assert names(check_parts(two_params(update), STATE, X).after).count("cond") == 1


def test_a_cond_on_a_function_of_several_gradients_becomes_selections() -> None:
    """The branch sees one array, but it comes from two gradients."""

    def update(p: Any, g: Any, n: Any) -> Any:
        norm = jnp.sum(g["a"] ** 2) + jnp.sum(g["b"] ** 2)
        scale = jax.lax.cond(n > 0, lambda x: 1.0 / (1.0 + x), lambda x: jnp.float32(1.0), norm)
        return jax.tree.map(lambda a, b: a - scale * b, p, g)

    assert "cond" not in names(check_parts(two_params(update), STATE, X).after)


def test_a_cond_whose_results_are_the_same_array_twice() -> None:
    def update(p: Any, g: Any, n: Any) -> Any:
        def yes(p: Any, g: Any) -> Any:
            total = jnp.sum(g["a"]) + jnp.sum(g["b"])
            return total, total

        one, two = jax.lax.cond(n > 0, yes, lambda p, g: (jnp.float32(0), jnp.float32(0)), p, g)
        return {"a": p["a"] - one, "b": p["b"] - two}

    check_parts(two_params(update), STATE, X)


def test_a_cond_branch_that_hands_an_operand_on() -> None:
    """A result of the selection that is an operand, or a constant, in every branch."""

    def update(p: Any, g: Any, n: Any) -> Any:
        same, a, b = jax.lax.cond(
            n > 0,
            lambda p, g: (p["a"], p["a"] - g["a"], p["b"] - g["b"]),
            lambda p, g: (p["a"], p["a"], p["b"]),
            p, g,
        )  # fmt: skip
        return {"a": a + 0.0 * same, "b": b}

    check_parts(two_params(update), STATE, X)


# What cannot be cut.


def test_no_gradient_and_two() -> None:
    def none(w: jax.Array, x: jax.Array) -> Any:
        return w, jnp.mean(x @ w)

    def two(w: jax.Array, x: jax.Array) -> Any:
        first = jax.grad(lambda w: jnp.mean(x @ w))(w)
        return w - first - jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), 0.0

    for step, found in ((none, 0), (two, 2)):
        with pytest.raises(StepError, match=f"exactly one gradient .* found {found}.*Call alpa"):
            parts_of(step, W, X)


def test_a_gradient_that_was_not_captured() -> None:
    """Under `vmap`, and with integer inputs, JAX's own differentiation has the word."""

    def step(w: jax.Array, x: jax.Array) -> Any:
        grads = jax.vmap(jax.grad(lambda w, row: jnp.mean((row @ w) ** 2)), (None, 0))(w, x)
        return w - jnp.mean(grads, 0), 0.0

    with pytest.raises(StepError, match="exactly one gradient .* found 0"):
        parts_of(step, W, X)


def test_a_gradient_by_something_of_the_batch() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2), (0, 1))(w, x)
        return w - grads[0], loss

    def indirect(w: jax.Array, x: jax.Array) -> Any:
        scaled = w * jnp.mean(x)
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(scaled)
        return w - grad, loss

    def returned(w: jax.Array, x: jax.Array) -> Any:
        grads = jax.grad(lambda w, x: jnp.mean((x @ w) ** 2), (0, 1))(w, x)
        return w - grads[0], grads[1]

    assert len(parts_of(step, W, X).grads) == 1, "a gradient that nobody uses is left out"
    for bad in (returned, indirect):
        with pytest.raises(StepError, match="differentiate by something that depends on the batch"):
            parts_of(bad, W, X)


def test_an_update_that_reads_the_batch_is_named() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        new, loss = plain(w, x)
        return new, loss + jnp.max(x)

    with pytest.raises(StepError, match=r"reduce_max at .*test_parts\.py:\d+.* reads the batch af"):
        parts_of(step, W, X)


def test_variables_are_not_literals() -> None:
    (eqn,) = jax.make_jaxpr(lambda x: x + 1.0)(1.0).jaxpr.eqns
    assert variables(eqn.invars) == [eqn.invars[0]] and compat.is_literal(eqn.invars[1])
