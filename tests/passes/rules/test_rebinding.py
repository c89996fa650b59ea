"""Rules are right: binding the primitive to slices computes slices of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.lax import linalg

from alpa_lite.passes.rules import Factor, FactorKind, derive_rules
from alpa_lite.passes.rules.rule import map_factors
from alpa_lite.passes.rules.table import equation_key
from tests.passes.rules.rebinding import check_cuts, check_indexed, cuts
from tests.passes.rules.samples import LAX_SAMPLES, Call, Recorded, record


def distinct(calls: list[Call]) -> list[Recorded]:
    """The equations of some calls, each once."""
    return list({equation_key(r.equation): r for r in record(calls)}.values())


def check_rules(calls: list[Call]) -> int:
    """Cut every factor of every equation; returns how many cuts were compared."""
    recorded = distinct(calls)
    rules = derive_rules([r.equation for r in recorded])
    work = [cut for r, rule in zip(recorded, rules, strict=True) for cut in cuts(r, rule)]
    check_cuts(work)
    for r, rule in zip(recorded, rules, strict=True):
        check_indexed(r, rule) if rule.indexed else None
    return len(work)


def test_rules_of_lax_functions_hold_on_slices() -> None:
    assert check_rules([call for calls in LAX_SAMPLES.values() for call in calls]) > 400


@pytest.mark.smoke
def test_rules_of_linear_algebra_hold_on_slices() -> None:
    rng = np.random.default_rng(1)
    square = jnp.asarray(rng.uniform(0, 1, (4, 3, 3)) + 3 * np.eye(3), jnp.float32)
    spd = square @ square.swapaxes(1, 2)
    calls: list[Call] = [
        (linalg.cholesky, (spd,)),
        (linalg.eigh, (spd,)),
        (linalg.qr, (square,)),
        (linalg.svd, (square,)),
        (lambda a, b: linalg.triangular_solve(a, b, left_side=True), (square, square)),
    ]
    assert check_rules(calls) >= 5


@pytest.mark.parametrize("seed", range(2))
def test_rules_of_random_equations_hold_on_slices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert check_rules([call for _ in range(2) for call in _random_calls(rng)]) > 50


def test_a_wrong_rule_is_noticed() -> None:
    (recorded,) = record([(lambda x: lax.cumsum(x), (jnp.arange(4.0),))])
    (rule,) = derive_rules([recorded.equation])
    wrong = map_factors(rule, lambda i, f: Factor(f.size, FactorKind.PASS))
    check_cuts(cuts(recorded, rule))
    with pytest.raises(AssertionError, match="cumsum"):
        check_cuts(cuts(recorded, wrong))


def test_a_wrong_combination_is_noticed() -> None:
    (recorded,) = record([(lambda x: lax.reduce_sum(x, (0,)), (jnp.arange(4.0),))])
    (rule,) = derive_rules([recorded.equation])
    wrong = map_factors(rule, lambda i, f: dataclasses.replace(f, combine="max"))
    with pytest.raises(AssertionError, match="reduce_sum"):
        check_cuts(cuts(recorded, wrong))


def _random_calls(rng: np.random.Generator) -> Iterator[Call]:
    """One call of each kind with random sizes and dimension numbers."""

    def sizes(count: int) -> list[int]:
        return [int(n) for n in rng.choice([2, 3, 4, 6], count)]

    def floats(*shape: int) -> jax.Array:
        return jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32)

    def ints(high: int, *shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(0, high, shape), jnp.int32)

    yield _random_dot(rng, floats)
    yield _random_reshape(rng, floats)
    shape = sizes(4)
    x, permutation = floats(*shape), tuple(int(d) for d in rng.permutation(4))
    axes = tuple(int(d) for d in rng.permutation(4)[:2])
    yield (lambda v: lax.transpose(v, permutation)), (x,)
    yield (lambda v: lax.reduce_sum(v, axes)), (x,)
    yield (lambda v: lax.reduce_max(v, axes)), (x,)
    yield (lambda v: jnp.cumsum(v, axes[0])), (x,)
    yield (lambda v: lax.sort(v, dimension=axes[0])), (x,)
    yield (lambda v: lax.argmax(v, axes[0], jnp.int32)), (x,)
    yield (lambda v: jax.nn.softmax(v, axes)), (x,)
    yield (lambda v: jnp.var(v, axes, keepdims=True)), (x,)
    start = int(rng.integers(0, 2))
    yield (lambda v: lax.slice_in_dim(v, start, shape[axes[0]], axis=axes[0])), (x,)
    rows, width = sizes(2)
    table, index = floats(rows * 2, width), ints(rows * 2, *sizes(2))
    yield (lambda t, i: t[i]), (table, index)
    yield jax.grad(lambda t, i: (t[i] ** 2).sum()), (table, index)
    labels = ints(shape[3], *shape[:3], 1)
    yield (lambda v, i: jnp.take_along_axis(v, i, -1)), (x, labels)
    yield jax.grad(lambda v, i: jnp.take_along_axis(v, i, -1).sum()), (x, labels)


def _random_dot(rng: np.random.Generator, floats: object) -> Call:
    """A `dot_general` with random batch, contracting and free dims in random order."""
    kinds = {name: int(rng.choice([2, 3, 4])) for name in "bckmn"}
    lhs = list(rng.permutation(["b", "c", "k", "m"]))
    rhs = list(rng.permutation(["b", "c", "k", "n"]))

    def dims(names: list[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(names.index(d) for d in "ck"), (names.index("b"),)

    (lhs_contract, lhs_batch), (rhs_contract, rhs_batch) = dims(lhs), dims(rhs)
    numbers = ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))
    arrays = tuple(floats(*(kinds[d] for d in side)) for side in (lhs, rhs))  # type: ignore[operator]
    return (lambda a, b: lax.dot_general(a, b, numbers)), arrays


def _random_reshape(rng: np.random.Generator, floats: object) -> Call:
    """A reshape between two random groupings of the same prime factors."""
    primes = [int(p) for p in rng.choice([2, 2, 3], 5)]

    def group() -> tuple[int, ...]:
        cuts_at = sorted(rng.choice(range(1, 5), int(rng.integers(1, 4)), replace=False))
        return tuple(int(np.prod(part)) for part in np.split(primes, cuts_at))

    new_shape = group()
    return (lambda v: lax.reshape(v, new_shape)), (floats(*group()),)  # type: ignore[operator]
