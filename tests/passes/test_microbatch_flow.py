"""What several microbatches may combine, and what they must refuse."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_lite
from alpa_lite.errors import InfeasibleError, StepError
from alpa_lite.passes import microbatch, microbatch_flow

ROWS, WIDTH = 16, 8
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def state_of(**leaves: Any) -> dict[str, jax.ShapeDtypeStruct]:
    params = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    return {"w": params, **leaves}


INTEGER = jax.ShapeDtypeStruct((), jnp.int32)
COUNTS = jax.ShapeDtypeStruct((4,), jnp.int32)
FLOAT = jax.ShapeDtypeStruct((), jnp.float32)
QUEUE = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)


def step_with(make: Any, loss: Any = lambda out: jnp.mean(out**2)) -> Any:
    """A step whose loss function also computes `make(state, x, out)`: new state leaves, aux."""

    def step(state: Any, x: jax.Array) -> Any:
        def loss_fn(w: jax.Array) -> Any:
            out = jnp.tanh(x @ w)
            return loss(out), make(state, x, out)

        (value, (new, aux)), grad = jax.value_and_grad(loss_fn, has_aux=True)(state["w"])
        return {**state, **new, "w": state["w"] - 0.1 * grad}, {"loss": value, "extra": aux}

    return step


def plan_of(step: Any, state: Any = None, count: Any = 2, **options: Any) -> Any:
    method = alpa_lite.AutoParallel(mesh_shape=(8,), num_microbatches=count, **options)
    return alpa_lite.parallelize(step, method=method).plan(state or state_of(), X)


def refuse(step: Any, message: str, state: Any = None) -> None:
    """With two microbatches an error, with one a plan."""
    assert plan_of(step, state, count=1).num_microbatches == 1
    with pytest.raises(StepError, match=message):
        plan_of(step, state)


def test_the_flow_is_followed_once_per_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def counted(*args: Any) -> Any:
        found.append(microbatch_flow.batch_flow(*args))
        return found[-1]

    monkeypatch.setattr(microbatch, "batch_flow", counted)
    plan = plan_of(step_with(lambda state, x, out: ({}, jnp.mean(out))))
    assert any("the loss is taken to be a mean" in note for note in plan.notes)
    assert len(found) == 1 and found[0] is not None


def aux(make: Any) -> Any:
    return step_with(lambda state, x, out: ({}, make(out)))


@pytest.mark.parametrize(
    ("make", "op"),
    [
        (jnp.max, "reduce_max"),
        (lambda out: jnp.min(out, 0), "reduce_min"),
        (lambda out: jnp.argmax(out, 0), "argmax"),
        (lambda out: jnp.argmin(out[:, 0]) + 1, "argmin"),
        (lambda out: jnp.any(out > 0).astype(jnp.float32), "reduce_or"),
        (lambda out: jnp.all(out > 0).astype(jnp.int32), "reduce_and"),
        (lambda out: jnp.prod(jax.lax.stop_gradient(out)), "reduce_prod"),
        (jax.nn.logsumexp, "reduce_max"),
        (lambda out: jnp.median(out[:, 0]), "sort"),
        (lambda out: jnp.sort(out, 0), "sort"),
        (lambda out: 2.0 * jnp.cumsum(out, 0), "cumsum"),
        (lambda out: jax.lax.top_k(out[:, 0], 3)[0], "top_k"),
        (lambda out: out[0], "slice|squeeze|gather|dynamic_slice"),
        (lambda out: jax.lax.cond(out.sum() > 0, jnp.max, jnp.min, out), "reduce_m.."),
        (lambda out: jax.lax.scan(lambda c, _: (c, jnp.max(out)), 0.0, None, 3)[1], "reduce_max"),
    ],
)  # fmt: skip
def test_aux_that_is_no_sum_over_the_rows(make, op):
    message = rf"output 1\.extra cannot be combined over \d+ microbatches: ({op}) at .*\.py:\d+"
    refuse(aux(make), message)


@pytest.mark.parametrize(
    ("make", "op"),
    [
        (lambda out: jnp.sum(out > 0) + 1, "add"),
        (lambda out: jnp.maximum(jnp.sum(out > 0), 3), "max"),
        (lambda out: jnp.sum(out > 0) * 100 // jnp.sum(out > -1), "mul|div|sign"),
        (lambda out: jnp.max(jnp.sum(out > 0, axis=0)), "reduce_max"),
        (lambda out: jnp.argmax(jnp.sum(out, axis=0)), "argmax"),
        (lambda out: jnp.ones(4, jnp.int32).at[jnp.argmax(out, 1)].add(1), "scatter-add"),
    ],
)
def test_integer_aux_that_is_no_sum_over_microbatches(make, op):
    refuse(aux(make), rf"output 1\.extra .* integers are summed .* ({op}) at .*\.py:\d+")


def test_a_counter_of_the_state_made_in_the_loss_function():
    step = step_with(lambda state, x, out: ({"n": state["n"] + jnp.sum(x > 0)}, ()))
    refuse(step, r"output 0\.n .* add at .* go on from it after the gradient", state_of(n=INTEGER))
    step = step_with(
        lambda state, x, out: ({"n": state["n"].at[jnp.argmax(out, 1) % 4].add(1)}, ())
    )
    refuse(step, r"output 0\.n .* scatter-add at", state_of(n=COUNTS))


def test_microbatches_of_one_row():
    for make in (jnp.max, lambda out: jnp.sum(out > 0) + 1):
        with pytest.raises(StepError, match=r"output 1\.extra .* 16 microbatches"):
            plan_of(aux(make), count=ROWS)


def test_a_queue_of_rows_in_the_state():
    def make(state, x, out):
        return {"q": jnp.concatenate([state["q"][len(out) :], out])}, ()

    def full_size(state, x, out):
        return {"q": jax.lax.dynamic_update_slice(state["q"], out, (0, 0))}, ()

    refuse(step_with(full_size), r"output 0\.q .* dynamic_update_slice", state_of(q=QUEUE))
    refuse(step_with(make), r"output 0\.q .* concatenate", state_of(q=QUEUE))


def test_rows_that_meet_other_rows():
    step = step_with(lambda state, x, out: ({}, ()), lambda out: jnp.mean(jnp.exp(out @ out.T)))
    refuse(step, r"rows of the batch interact: dot_general at .*\.py:\d+")


def test_a_loss_that_is_a_maximum_over_the_batch():
    step = step_with(lambda state, x, out: ({}, ()), jnp.max)
    refuse(step, "the loss cannot be combined|output 1.loss cannot be combined")


def test_an_update_that_reads_a_maximum_over_the_batch():
    def step(w, x):
        def loss_fn(w):
            out = x @ w
            return jnp.mean(out**2), jnp.max(out)

        (loss, largest), grad = jax.value_and_grad(loss_fn, has_aux=True)(w)
        return w - grad / largest, loss

    refuse(step, "an aux output of the loss function cannot be combined", state_of()["w"])


@pytest.mark.parametrize(
    "make",
    [
        lambda out: jnp.sum(jnp.argmax(out, 1) == 3),
        lambda out: jnp.bincount(jnp.argmax(out, 1), length=8),
        lambda out: jnp.zeros(8, jnp.int32).at[jnp.argmax(out, 1)].add(1) * 2,
        lambda out: jnp.sum(out > 0) - jnp.sum(out < 0),
        lambda out: (jnp.max(out, 1), jnp.sort(out, 1), jnp.cumsum(out, 1), out[:, 0]),
        lambda out: jnp.mean(jnp.max(out, 1)),
        lambda out: jnp.sum(out) / jnp.maximum(jnp.sum(out > 0), 1),
        lambda out: jax.lax.scan(lambda c, row: (c + jnp.max(row), row * 2), 0.0, out),
        lambda out: jax.lax.map(lambda row: jnp.argmax(row), out),
        lambda out: jnp.where(jnp.any(out > 0), jnp.mean(out), 0.0),
        lambda out: jnp.float32(0.9) * 1.0 + 0.1 * jnp.mean(out, 0),
    ],
)
def test_aux_that_is_a_sum_or_per_example(make):
    assert plan_of(aux(make)).num_microbatches == 2


def test_running_statistics_are_averaged():
    step = step_with(lambda state, x, out: ({"m": 0.9 * state["m"] + 0.1 * jnp.mean(x)}, ()))
    method = alpa_lite.AutoParallel(mesh_shape=(8,), num_microbatches=2)
    rng = np.random.default_rng(0)
    state = {"w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), "m": np.float32(3.0)}
    x = rng.normal(size=X.shape).astype(np.float32)
    expected, _ = jax.jit(step)(state, x)
    found, _ = alpa_lite.parallelize(step, method=method)(jax.tree.map(jnp.asarray, state), x)
    np.testing.assert_allclose(found["m"], expected["m"], rtol=1e-5)


def test_sorting_inside_of_the_model_is_a_note():
    def make(state, x, out):
        chosen = (out > 0).astype(jnp.int32)
        slot = (jnp.cumsum(chosen, 0) - 1) * chosen
        kept = jnp.where(slot < 4, out, 0.0)
        return {}, (jnp.mean(kept), jnp.mean(out / jnp.max(jnp.abs(out))))

    notes = plan_of(step_with(make)).notes
    for op in ("cumsum", "reduce_max"):
        assert any(re.match(rf"{op} at .*\.py:\d+.* acts across the rows", note) for note in notes)


def test_the_plan_says_how_outputs_were_combined():
    plan = plan_of(aux(lambda out: {"hits": jnp.sum(out > 0), "rows": out, "size": out.std()}))
    (note,) = (n for n in plan.notes if "2 microbatches" in n)
    assert "the loss is taken to be a mean over the batch" in note
    assert "averaged: 1.extra.size, 1.loss" in note
    assert "summed: 1.extra.hits" in note
    assert "put back in the order of the batch: 1.extra.rows" in note
    assert not any("microbatches" in n for n in plan_of(aux(jnp.max), count=1).notes)


def test_traces_that_are_not_alike_are_a_note():
    def make(out):
        return jnp.mean(out) if out.shape[0] == ROWS else jnp.mean(out) * 1.0 + 0.0

    assert any("not traced alike" in note for note in plan_of(aux(make)).notes)


def test_automatic_microbatches_give_up_on_such_a_step():
    with pytest.raises(InfeasibleError, match="too much"):
        plan_of(aux(jnp.max), count="auto", memory_budget_bytes=100)
    assert plan_of(aux(jnp.max), state_of(s=FLOAT), count="auto").num_microbatches == 1
