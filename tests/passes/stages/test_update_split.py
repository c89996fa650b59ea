"""Where the update runs: next to the parameters, and what is sent for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alpa_lite
from tests.passes.stages.stage_flow import Staged, check, staged

WIDTH, ROWS = 8, 4
X = np.linspace(-1, 1, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
STAGES = [[0], [1], [2, 3]]


def params(num: int = 3) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    made = {f"w{i}": 0.5 * rng.normal(size=(WIDTH, WIDTH)) for i in range(num)}
    return {name: jnp.asarray(w, jnp.float32) for name, w in made.items()}


def chain(p: Any, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = alpa_lite.mark_layer(jnp.tanh(x @ p[f"w{i}"]))
    return jnp.mean(x**2)


def tied(p: Any, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = alpa_lite.mark_layer(jnp.tanh(x @ p[f"w{i}"]))
    return jnp.mean((x @ p["w0"]) ** 2)


def norm_of(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def with_optax(tx: Any, loss: Callable[..., Any] = chain) -> tuple[Callable[..., Any], Any]:
    def step(state: Any, x: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(state["p"], x)
        updates, opt = tx.update(grads, state["opt"], state["p"])
        return {"p": optax.apply_updates(state["p"], updates), "opt": opt}, value

    p = params()
    return step, {"p": p, "opt": tx.init(p)}


def cut(step: Any, state: Any, stages: Any = STAGES, **options: Any) -> Staged:
    return check(staged(step, state, X, stages=stages, **options))


def sent(found: Staged) -> list[tuple[str, int, int]]:
    """(type, source, target) of what is sent once per step."""
    of = [
        (getattr(what, "variable", what).aval.str_short(), source, target)
        for what, source, target in found.cut.split.sends
    ]
    return sorted(of)


def test_each_stage_updates_its_own() -> None:
    found = cut(*with_optax(optax.sgd(0.1, momentum=0.9)))
    for stage in range(3):
        assert found.state_of(stage) == {f"p.w{stage}", f"opt.0.trace.w{stage}"}
        assert "update" not in found.kinds(stage)
    assert sent(found) == [] and not found.cut.split.notes


def test_tied_gradients_meet_at_the_first_reader() -> None:
    found = cut(*with_optax(optax.sgd(0.1), tied))
    assert found.state_of(0) == {"p.w0"} and found.state_of(2) == {"p.w2"}
    assert sent(found) == [("float32[8,8]", 0, 2), ("float32[8,8]", 2, 0)], (
        "the parameter at the start, its gradient at the end"
    )


def test_a_norm_over_all_gradients_sends_scalars() -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1))
    found = cut(*with_optax(tx))
    assert {text for text, *_ in sent(found)} <= {"float32[]", "bool[]"}
    assert [len([s for s in sent(found) if s[1:] == (stage, 0)]) for stage in (1, 2)] == [1, 1]
    assert not found.cut.split.notes
    assert found.kinds(0) == ["cotangent", "update", "update"]


def test_a_norm_with_tied_parameters() -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.adam(0.1))
    found = cut(*with_optax(tx, tied))
    arrays = [s for s in sent(found) if s[0] == "float32[8,8]"]
    assert arrays == [("float32[8,8]", 0, 2), ("float32[8,8]", 2, 0)]


def test_counters_run_wherever_they_are_needed() -> None:
    tx = optax.adam(optax.cosine_decay_schedule(0.1, 10))
    found = cut(*with_optax(tx))
    homes = [s for s in range(3) if "opt.0.count" in found.state_of(s)]
    assert homes == [0], "it lives on one stage"
    scalars = [s for s in sent(found) if s[0].startswith("int32")]
    assert {target for *_, target in scalars} == {1, 2}, "the counter itself is sent"
    assert {text for text, *_ in sent(found)} == {"int32[]"}, "and no result of a schedule"


@pytest.mark.parametrize("every", [1, 2])
def test_multi_steps(every: int) -> None:
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)), every)
    step, state = with_optax(tx, tied)
    state = jax.jit(step)(state, X)[0]  # the second step applies the update
    found = cut(step, state)
    assert len([s for s in sent(found) if s[0] == "float32[8,8]"]) == 2, "the tied one's only"


def test_apply_if_finite() -> None:
    tx = optax.apply_if_finite(optax.adam(0.1), 3)
    step, state = with_optax(tx)
    found = cut(step, state)
    assert {text for text, *_ in sent(found)} <= {"bool[]", "bool[1]", "int32[]"}
    assert not found.cut.split.notes
    # Not finite on one stage: nobody updates.
    found = cut(step, {**state, "p": {**state["p"], "w1": jnp.full((WIDTH, WIDTH), jnp.nan)}})
    assert int(jax.jit(step)(*found.args)[0]["opt"].notfinite_count) == 1


def test_an_optimizer_on_one_flat_vector() -> None:
    """`optax.flatten` ravels all parameters into one: it lives on one stage, and is noted."""
    found = cut(*with_optax(optax.flatten(optax.adam(0.1))))
    note = found.cut.split.notes[0]
    assert "concatenate" in note and "reads arrays of several stages" in note
    assert "bytes are sent for it once per step" in note


def test_adafactor_and_lion() -> None:
    for tx in (optax.adafactor(0.1, min_dim_size_to_factor=4), optax.lion(0.01)):
        found = cut(*with_optax(tx))
        assert not found.cut.split.notes


def test_parameters_that_the_loss_does_not_read() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(chain)(state, x)
        return jax.tree.map(lambda p, g: p - 0.1 * (g + p), state, grads), loss

    found = cut(step, {**params(), "frozen": jnp.ones(5)})
    assert "frozen" in found.state_of(0)


def test_state_that_goes_through() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(chain)(state["p"], x)
        p = jax.tree.map(lambda p, g: p - 0.1 * g, state["p"], grads)
        swapped = {"a": state["b"], "b": state["a"]}
        return {**state, **swapped, "p": p, "n": jnp.zeros_like(state["n"])}, loss

    cut(step, {"p": params(), "a": jnp.ones(3), "b": jnp.zeros(3), "n": jnp.ones(2), "same": X})


def test_an_average_of_the_parameters() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(chain)(state["p"], x)
        p = jax.tree.map(lambda p, g: p - 0.1 * g, state["p"], grads)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state["ema"], p)
        return {"p": p, "ema": ema}, loss

    found = cut(step, {"p": params(), "ema": params()})
    assert [found.state_of(i) for i in range(3)] == [{f"p.w{i}", f"ema.w{i}"} for i in range(3)]
    assert sent(found) == []


def test_an_array_made_of_a_number() -> None:
    """The norm is sent, and not the arrays of its size."""

    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(chain)(state, x)
        norm = norm_of(grads)
        new = {k: state[k] - grads[k] / jnp.broadcast_to(norm, (WIDTH, WIDTH)) for k in state}
        return new, loss

    assert {text for text, *_ in sent(cut(step, params()))} == {"float32[]"}


def test_a_loss_scale_that_follows_the_gradients() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        scale = state["scale"]
        loss, grads = jax.value_and_grad(lambda p: chain(p, x) * scale)(state["p"])
        grads = jax.tree.map(lambda g: g / scale, grads)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
        p = jax.tree.map(lambda p, g: jnp.where(finite, p - 0.1 * g, p), state["p"], grads)
        return {"p": p, "scale": jnp.where(finite, scale * 2, scale / 2)}, loss / scale

    found = cut(step, {"p": params(), "scale": jnp.float32(8.0)})
    assert {text for text, *_ in sent(found)} <= {"bool[]", "float32[]", "bool[1]"}
    cut(step, {"p": params(), "scale": jnp.float32(3e38)})  # overflows: the update is skipped


def test_metrics_of_all_stages() -> None:
    """A learning rate from the loss, and the norms of updates of all stages in one metric."""

    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(tied)(state["p"], x)
        rate = 0.1 * jax.lax.stop_gradient(loss)
        p = jax.tree.map(lambda p, g: p - rate * g, state["p"], grads)
        norms = {k: jnp.linalg.norm(g) for k, g in grads.items()}
        return {"p": p}, {"loss": loss, "norms": norms, "all": norm_of(grads)}

    found = cut(step, {"p": params()})
    arrays = [s for s in sent(found) if s[0] == "float32[8,8]"]
    assert arrays == [("float32[8,8]", 0, 2), ("float32[8,8]", 2, 0)]


def test_orthogonalized_momentum() -> None:
    """Muon: an iteration on every matrix by itself, which stays on its stage."""

    def orthogonal(m: jax.Array) -> jax.Array:
        m = m / (jnp.linalg.norm(m) + 1e-6)
        for _ in range(3):
            m = 1.5 * m - 0.5 * m @ m.T @ m
        return m

    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(chain)(state["p"], x)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["m"], grads)
        p = jax.tree.map(lambda p, m: p - 0.1 * orthogonal(m), state["p"], momentum)
        return {"p": p, "m": momentum}, loss

    found = cut(step, {"p": params(), "m": jax.tree.map(jnp.zeros_like, params())})
    assert sent(found) == []


def test_an_update_that_mixes_parameters_of_two_stages() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(chain)(state, x)
        new = {k: state[k] - 0.1 * grads[k] for k in state}
        new["w2"] = new["w2"] + 0.1 * state["w0"]
        return new, loss

    found = cut(step, params())
    (note,) = found.cut.split.notes
    assert "test_update_split.py" in note and "256 bytes are sent" in note


def test_an_update_without_the_gradient() -> None:
    """Everything after the gradient that reads none of it."""

    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(chain)(state["p"], x)
        key = jax.random.split(state["key"])[0]
        p = jax.tree.map(lambda p, g: p - 0.1 * g, state["p"], grads)
        noise = jax.random.normal(key, (3,))
        return {"p": p, "key": key, "noise": noise}, (loss, 0.5, state["noise"] + 1)

    state = {"p": params(), "key": jax.random.key(0), "noise": jnp.ones(3)}
    cut(step, state)


def test_two_pipelines_share_the_gradients() -> None:
    """Stages twice, each with half of the microbatches: sums are weighted."""
    step, state = with_optax(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)), tied)
    found = cut(step, state, shares=(0.5, 0.5))
    assert len(found.steps) == 6
    assert all(not found.state_of(i) for i in (3, 4, 5)), "the state lives with the first pipeline"
    contributions = found.cut.split.contributions
    tied_ones = [each for each in contributions.values() if len(each) == 4]
    assert len(tied_ones) == 1 and {c.share for c in tied_ones[0]} == {0.5}
    uneven = cut(step, state, shares=(0.25, 0.75))
    shares = {c.share for each in uneven.cut.split.contributions.values() for c in each}
    assert shares == {0.25, 0.75}


def test_two_pipelines_add_up_integers() -> None:
    """Counts of both halves are summed; here both see the same rows."""

    def step(state: Any, x: jax.Array) -> Any:
        def loss(p: Any) -> Any:
            return chain(p, x), jnp.sum(x > 0)

        (value, count), grads = jax.value_and_grad(loss, has_aux=True)(state)
        new = jax.tree.map(lambda p, g: p - 0.1 * g, state, grads)
        return new, {"loss": value, "twice": 2 * count if state is None else count}

    found = staged(step, params(), X, stages=STAGES, shares=(0.5, 0.5))
    with pytest.raises(AssertionError, match="twice"):
        check(found)
