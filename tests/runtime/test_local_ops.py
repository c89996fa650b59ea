"""Ops that depend on where a device's part lies, and what random programs found out.

Each step is run under a number of random plans, which between them split every dim that can be
split, and put layout changes before and after every op.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import alpa_lite
from alpa_lite.errors import StepError
from alpa_lite.runtime.local_ops import _multiply_64
from tests.runtime.random_plans import (
    assert_close,
    mesh_of,
    prepare_step,
    random_planned_step,
)

PLANS = 6
X = jax.ShapeDtypeStruct((16, 8), np.float32)


def check(step: Callable[..., Any], state: Any, batch: Any, *, exactly: bool = False) -> None:
    """Compare under random plans; `step(state, batch)` returns anything, the state is added."""

    def whole(state: Any, batch: Any) -> Any:
        return state, step(state, batch)

    expected = jax.jit(whole)(state, batch)
    prepared = prepare_step(whole, (state, batch))
    for seed in range(PLANS):
        shape = ((2, 2, 2), (2, 4), (8,))[seed % 3]
        found = random_planned_step(prepared, mesh_of(shape), seed)(state, batch)
        assert_close(expected, found, tolerance=0.0 if exactly else 1e-5, what=f"seed {seed}:")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize("start", [-20, -3, 3, 8, 17])
def test_starts_out_of_bounds_are_clamped_before_the_slice_is_split(start):
    """XLA joins a slice of a slice by adding the starts, as if the inner one were not clamped."""

    def step(state, start):
        cut = jax.lax.dynamic_slice_in_dim(state, start, 8)
        return cut, jax.lax.dynamic_update_slice_in_dim(state, 2 * cut, start + 1, 0)

    check(step, normal(16), np.int32(start), exactly=True)


@pytest.mark.parametrize("mode", ["clip", "drop"])
@pytest.mark.parametrize("index", [(-9,), (0,), (7,), (9,), (1, 6, 6, -3, 11, 0, 8, 2)], ids=str)
def test_scatter_add_into_a_split_dim(mode, index):
    """A single index is a slice to XLA, which must not be joined with those of layout changes."""

    def step(state, index):
        operand, updates = state
        return operand.at[index].add(updates, mode=mode), operand.at[:, index % 3].add(1.0)

    check(step, (normal(8, 16), normal(len(index), 16, seed=1)), integers(*index))


@pytest.mark.parametrize("index", [((1, 8), (0, 0)), ((1, 7, 8, -9), (15, 16, 3, 4))], ids=str)
@pytest.mark.parametrize("fill", [None, 0.5])
def test_gather_fills_where_any_index_component_is_out_of_bounds(index, fill):
    """Also where the component out of bounds belongs to a dim that is not split."""

    def step(state, index):
        floats, small = state
        filled = floats.at[index].get(mode="fill", fill_value=fill)
        cut = small.at[index[0], index[1] % 4].get(mode="fill", fill_value=7)
        return filled, cut, floats.at[index].get(mode="clip")

    state = normal(8, 16), np.arange(24, dtype=np.int32).reshape(8, 3)
    check(step, state, tuple(integers(*i) for i in index), exactly=True)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.float32])
def test_gather_fills_with_the_default_of_the_type(dtype):
    """NaN, the smallest signed, the largest unsigned, or True."""
    table = (np.arange(32).reshape(8, 4) % 2).astype(dtype)
    check(
        lambda table, i: jnp.take(table, i, axis=0, mode="fill"), table, integers(0, 9, 7, 8),
        exactly=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.float32])
def test_unchecked_indices_out_of_bounds(dtype):
    """`table[i]` promises that indices are in bounds; where they are not, XLA clamps them."""

    def step(table, ids):
        high = ids.astype(jnp.uint32) + jnp.uint32(2**31)
        return table[ids], table[:, ids % 8], table[ids, ids], table[high], table[ids, :2]

    table = (np.arange(128).reshape(16, 8) % 3).astype(dtype)
    check(step, table, integers(0, 5, 15, 16, 99, -1, -20, 3), exactly=True)


def test_gradients_of_unchecked_indices_out_of_bounds():
    """The lookup is clamped; its gradient drops what is out of bounds, as XLA's scatter does."""

    def step(table, ids):
        def loss(table):
            return jnp.sum(table[ids] ** 2) + jnp.sum(table[:, ids] ** 3)

        return jax.grad(loss)(table), jax.jvp(loss, (table,), (2 * table,))

    check(step, normal(16, 8), integers(0, 5, 15, 16, 99, -1, -20, 3))


def test_a_split_table_by_unchecked_indices():
    def step(e, ids):
        return e, e[ids].sum(-1)

    method = alpa_lite.ManualParallel({"e": PartitionSpec("tp")}, mesh_shape={"tp": 8})
    table = jnp.arange(1.0, 65.0).reshape(16, 4)
    ids = integers(0, 5, 15, 16, 99, -1, -20, 3)
    _, found = alpa_lite.parallelize(step, method=method)(jnp.copy(table), ids)
    assert found.tolist() == jax.jit(step)(table, ids)[1].tolist()


def test_rows_by_index_in_every_row():
    """Batched gathers and scatters: dims that operand and indices share."""

    def step(state, index):
        picked = jnp.take_along_axis(state, index, axis=1, mode="clip")
        rows = jax.vmap(lambda row, i: row.at[i].add(row[i] * 2.0))(state, index)
        return picked, rows, jnp.argsort(state, axis=1), jax.lax.top_k(state, 3)

    index = np.random.default_rng(2).integers(-2, 20, (8, 4)).astype(np.int32)
    check(step, normal(8, 16), index)


@pytest.mark.parametrize("bits", ["uint8", "uint16", "uint32"])
def test_random_bits_of_every_width(bits):
    def step(state, _):
        return jax.random.bits(state, (8, 3, 16), bits), jax.random.bits(state, (16,), bits)

    check(step, jax.random.key(3), (), exactly=True)


def test_arrays_of_keys_and_other_generators_are_drawn_whole():
    def step(state, _):
        threefry, counter = state
        keys = jax.random.split(threefry, 8)
        rows = jax.vmap(lambda k: jax.random.normal(k, (4, 8)))(keys)
        return rows, jax.random.normal(counter, (8, 16)), jax.random.permutation(threefry, 16)

    check(step, (jax.random.key(0), jax.random.key(1, impl="rbg")), ())


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_multiplication_of_positions_in_64_bits(x, factor):
    high, low = _multiply_64(jnp.uint32(x), factor)
    assert (int(high) << 32) + int(low) == x * factor % 2**64


def test_constants_are_cut_like_anything_else():
    """Arrays captured by closure, at the top level and in bodies of loops and branches."""
    table = normal(8, 16, seed=4)
    index = integers(1, 7)

    def step(state, flag):
        def body(carry, x):
            return carry * 0.5 + table, carry.at[index].multiply(x)

        final, stacked = jax.lax.scan(body, state, jnp.arange(4.0))
        looped = jax.lax.while_loop(
            lambda s: s[1] < 3, lambda s: (s[0] + table * 2.0, s[1] + 1), (state, 0)
        )
        chosen = jax.lax.cond(flag > 0, lambda x: x - table, lambda x: x * table, state)
        return final, stacked, looped, chosen, state @ table.T

    check(step, normal(8, 16), np.int32(1))


def test_arrays_without_elements():
    def step(state, batch):
        nothing = state[:, :0]
        grown = jnp.concatenate([nothing, state, nothing], axis=1)
        return nothing, grown, nothing @ batch[:0], jnp.sum(nothing, axis=0), nothing.reshape(0, 8)

    check(step, normal(8, 16), normal(16, 8))


def test_reductions_that_are_no_sums():
    def step(state, batch):
        flags = batch > 0
        return (
            jnp.max(state, 0), jnp.min(state, (0, 1)), jnp.prod(1 + 0.1 * state, 1),
            jnp.any(flags, 0), jnp.all(flags, 1), jnp.argmax(state, 1), jnp.argmin(state, 0),
            jnp.max(batch, 0), jnp.sum(batch), jnp.bitwise_or.reduce(batch, axis=0),
        )  # fmt: skip

    batch = np.random.default_rng(0).integers(-9, 9, (16, 8)).astype(np.int32)
    check(step, normal(8, 16), batch)


def test_a_pad_that_shifts():
    def step(state, _):
        return jax.lax.pad(state, 0.5, ((1, -1, 0), (0, 0, 0)))

    check(step, normal(8, 16), ())


def test_batches_of_loops_run_until_the_last_is_done():
    """Under `vmap` a loop has a predicate per row; rows that are done keep their values."""

    def step(state, x):
        doubled = jax.vmap(
            lambda row: jax.lax.while_loop(lambda v: v < 100.0, lambda v: v * 2.0 + 1.0, row)
        )(x)
        counted = jax.vmap(lambda row, n: jax.lax.fori_loop(0, n, lambda i, v: v * 2.0 + i, row))(
            state, jnp.arange(16) % 5
        )
        nested = jax.vmap(
            jax.vmap(lambda v: jax.lax.while_loop(lambda u: u[0] < v, _add_one, (0.0, v)))
        )(state)
        return doubled, counted, nested

    check(step, np.abs(normal(16, 8)), np.abs(normal(16, seed=1)), exactly=True)


def _add_one(pair):
    return pair[0] + 1.0, pair[1] * 0.5


@pytest.mark.slow
def test_loops_with_a_predicate_per_row_inside_of_random_numbers():
    def step(key, rates):
        return jax.vmap(jax.random.poisson)(jax.random.split(key, 16), rates)

    check(step, jax.random.key(0), 20 * np.abs(normal(16)), exactly=True)


def test_sharding_constraints_of_the_user_are_the_identity():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("z",))
    sharding = NamedSharding(mesh, PartitionSpec("z"))

    def step(state, batch):
        def loss(state):
            return jnp.sum(jax.lax.with_sharding_constraint(state * 2.0, sharding) * batch)

        return jax.value_and_grad(loss)(state)

    check(step, normal(16, 8), normal(16, 8, seed=1))
    notes = alpa_lite.parallelize(lambda s, b: (s, step(s, b))).plan(normal(16, 8), X).notes
    assert any(
        re.match(r"sharding_constraint at .*test_local_ops\.py:\d+.* is ignored", note)
        for note in notes
    )


def test_a_shard_map_inside_of_the_step_is_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("z",))
    spec = PartitionSpec("z")

    def step(state, batch):
        twice = jax.shard_map(lambda x: x * 2, mesh=mesh, in_specs=spec, out_specs=spec)
        return state, twice(batch)

    with pytest.raises(StepError, match=r"shard_map at .*test_local_ops\.py:\d+.* outside of the"):
        alpa_lite.parallelize(step).plan(normal(16, 8), X)


def test_linear_solves():
    def step(state, _):
        return jnp.linalg.inv(jnp.eye(4) + 0.1 * state @ jnp.swapaxes(state, 1, 2))

    check(step, normal(8, 4, 4), ())


def test_ragged_dot_of_one_group():
    def step(state, batch):
        return jax.lax.ragged_dot(state, batch, jnp.array([5], jnp.int32))

    check(step, normal(8, 4), normal(1, 4, 16))
