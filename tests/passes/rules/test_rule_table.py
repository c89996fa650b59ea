"""Rules of a whole train step: coverage, caching, time."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from alpa_lite.passes.rules import Equation, RuleTable, verify_rule
from alpa_lite.passes.rules.table import equation_key
from tests.passes.rules.samples import equations_of

nn = pytest.importorskip("flax.linen")
optax = pytest.importorskip("optax")


class Block(nn.Module):
    """A pre-norm transformer block."""

    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        x = x + nn.Dropout(self.dropout, deterministic=self.dropout == 0)(y)
        return x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))


class Gpt(nn.Module):
    """Embedding, two blocks, readout."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(256, 64)(tokens)
        for _ in range(2):
            x = Block(self.dropout)(x)
        return nn.Dense(256)(nn.LayerNorm()(x))


@cache
def train_step_equations(dropout: float = 0.0) -> tuple[Equation, ...]:
    """Every equation of a GPT train step with AdamW."""
    model, optimizer = Gpt(dropout), optax.adamw(1e-3)
    tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.eval_shape(model.init, keys, tokens)
    state = params, jax.eval_shape(optimizer.init, params)

    def step(state: Any, batch: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model.apply(params, batch, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(state[0])
        updates, opt_state = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    key = jax.ShapeDtypeStruct((), keys["params"].dtype)
    return tuple(equations_of(step, state, tokens, tokens, key))


@pytest.mark.smoke
def test_every_equation_of_a_train_step_has_a_derived_rule() -> None:
    equations = train_step_equations()
    rules = RuleTable().lookup_many(equations)
    assert len(equations) > 1000
    assert {e.primitive.name for e, r in zip(equations, rules, strict=True) if r.note} == set()
    for equation, rule in zip(equations, rules, strict=True):
        verify_rule(rule, equation.operand_shapes, equation.result_shapes)


def test_dropout_adds_only_key_handling_to_the_fallbacks() -> None:
    equations = train_step_equations(0.1)
    rules = RuleTable().lookup_many(equations)
    replicated = {
        (e.primitive.name, r.note)
        for e, r in zip(equations, rules, strict=True)
        if r.origin == "replicated"
    }
    assert {note for _, note in replicated} <= {"PRNG keys are replicated"}
    assert "random_bits" not in {name for name, _ in replicated}
    assert "random_bits" in {e.primitive.name for e in equations}


def test_distinct_equations_are_derived_once() -> None:
    table = RuleTable()
    equations = train_step_equations()
    first = table.lookup_many(equations)
    count = len(table)
    second = table.lookup_many(equations)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert len(table) == count < 250


def test_equal_equations_of_two_traces_share_a_key() -> None:
    def scatter(x: jax.Array, i: jax.Array) -> jax.Array:
        return x.at[i].add(1.0)

    args = jnp.ones((8, 4)), jnp.ones(3, jnp.int32)
    keys = [[equation_key(e) for e in equations_of(scatter, *args)] for _ in range(2)]
    jax.clear_caches()
    keys.append([equation_key(e) for e in equations_of(scatter, *args)])
    assert keys[0] == keys[1] == keys[2]


def test_shapes_dtypes_and_params_tell_equations_apart() -> None:
    table = RuleTable()
    x = jnp.ones((8, 4))
    for fn, arg in (
        (lambda v: lax.cumsum(v, 0), x),
        (lambda v: lax.cumsum(v, 1), x),
        (lambda v: lax.cumsum(v, 1), x.astype(jnp.bfloat16)),
        (lambda v: lax.cumsum(v, 1), x[:4]),
    ):
        table.lookup_many(equations_of(fn, arg))
    assert len(table) == 4


def test_unhashable_params_are_accepted() -> None:
    (equation,) = equations_of(lambda x: lax.reduce_sum(x, (0,)), jnp.ones((8, 4)))
    listed = Equation(
        equation.primitive,
        {**equation.params, "axes": [0]},
        equation.in_avals,
        equation.out_avals,
    )
    table = RuleTable()
    assert str(table.lookup(listed)) == str(table.lookup(equation))
    assert hash(equation_key(listed)) is not None


def test_threads_share_a_table() -> None:
    table, equations = RuleTable(), train_step_equations()[:200]
    answers: list[list[str]] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append([str(r) for r in table.lookup_many(equations)])
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert all(a == answers[0] for a in answers)
