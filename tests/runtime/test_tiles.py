"""Cuts of arrays over devices, as numbers; nothing is moved."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alpa_lite.runtime.tiles import (
    Cut,
    coarsened,
    cut_of,
    divides,
    grid,
    overlap,
    prime_factors,
    refined,
    size,
    subtiles,
    tiles_of,
)
from tests.runtime.random_shardings import shardings


def sharding(shape: tuple[int, ...], spec: P) -> NamedSharding:
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return NamedSharding(Mesh(devices, ("x", "y", "z")[: len(shape)]), spec)


def test_cut_of_a_sharding():
    cut = cut_of(sharding((2, 4), P(("y", "x"), None)), (16, 3))
    assert cut == Cut((2, 2, 2), ((1, 2, 0), ()))
    assert cut.counts == (8, 1)
    assert cut.num_devices == 8


@given(shardings())
def test_a_cut_laid_over_its_own_devices_is_the_sharding(drawn):
    shape, own = drawn
    again = cut_of(own, shape).sharding(list(own.mesh.devices.flat))
    assert tiles_of(again, shape) == tiles_of(own, shape)
    assert again.is_equivalent_to(own, len(shape))


@given(shardings())
def test_refined_tiles_lie_within_the_old_ones(drawn):
    shape, own = drawn
    cut = cut_of(own, shape)
    finer = refined(cut, shape)
    assert divides(finer.counts, shape)
    assert divides(cut.counts, finer.counts)
    old = tiles_of(own, shape)
    new = tiles_of(finer.sharding(list(own.mesh.devices.flat)), shape)
    assert all(overlap(a, b) == size(b) for a, b in zip(old, new, strict=True))
    left = set(range(len(finer.axes))).difference(*finer.dims)
    for prime in (finer.axes[axis] for axis in left):
        assert all(n % (k * prime) for n, k in zip(shape, finer.counts, strict=True))


def test_refined_stops_at_what_it_is_given():
    cut = cut_of(sharding((2, 2, 2), P("y")), (8, 8))
    assert refined(cut, (8, 8)).counts == (8, 1)
    assert refined(cut, (2, 4)).counts == (2, 4)
    assert refined(cut, (3, 5)).counts == (2, 1)


def test_grid_puts_equal_tiles_side_by_side():
    cut = grid((1, 2), 4)
    tiles = tiles_of(cut.sharding(jax.devices()[:4]), (3, 8))
    left, right = ((0, 3), (0, 4)), ((0, 3), (4, 8))
    assert tiles == (left, left, right, right)


@pytest.mark.parametrize(
    ("counts", "product", "expected"),
    [((2, 4), 4, (2, 2)), ((2, 4), 1, (1, 1)), ((6,), 3, (3,)), ((4,), 3, None), ((), 1, ())],
)
def test_coarsened(counts, product, expected):
    assert coarsened(counts, product) == expected


def test_subtiles_are_row_major():
    assert list(subtiles(((0, 4), (6, 9)), (2, 3))) == [
        ((0, 2), (6, 7)), ((0, 2), (7, 8)), ((0, 2), (8, 9)),
        ((2, 4), (6, 7)), ((2, 4), (7, 8)), ((2, 4), (8, 9)),
    ]  # fmt: skip
    assert list(subtiles((), ())) == [()]


def test_scalars_have_one_tile():
    own = sharding((2, 2), P())
    assert cut_of(own, ()).counts == ()
    assert tiles_of(own, ()) == ((),) * 4
    assert size(()) == overlap((), ()) == 1


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (P("x"), (7,), "even tiles"),
        (P("x", None), (8,), "more dims"),
        (P(P.UNCONSTRAINED), (8,), "every dim placed"),
    ],
)
def test_shardings_that_are_refused(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        cut_of(sharding((2, 2), spec), shape)


@given(st.integers(1, 500))
def test_prime_factors(n):
    factors = prime_factors(n)
    assert np.prod(factors, dtype=int) == n
    assert all(all(f % d for d in range(2, f)) for f in factors)
