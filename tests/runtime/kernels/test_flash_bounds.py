"""Which tiles the loops run over, against the score matrix pair by pair."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpa_lite.runtime.kernels.flash.bounds import kv_tile_ranges, num_blocks, q_tile_ranges
from alpa_lite.runtime.kernels.flash.spec import FlashSpec
from tests.runtime.kernels.dense_attention import visible_pairs

BATCH = 3
_of_queries = jax.jit(kv_tile_ranges, static_argnums=(0, 4, 5, 6, 7))
FAR = 10_000  # as good as no limit, and compiled once for all


@st.composite
def problems(draw):
    side = st.one_of(st.none(), st.integers(0, 60))
    offsets = st.lists(st.integers(-70, 70), min_size=BATCH, max_size=BATCH)
    sizes = st.sampled_from([(1, 9, 4, 2), (37, 50, 16, 8), (64, 30, 5, 7)])
    q_len, kv_len, block_q, block_kv = draw(sizes)
    ids = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 999)))
        ids = [rng.integers(0, 4, (BATCH, n)).astype(np.int32) for n in (q_len, kv_len)]
        if draw(st.booleans()):
            ids = [np.sort(x, axis=1) for x in ids]
    return (
        draw(side),
        draw(side),
        draw(offsets),
        draw(offsets),
        ids,
        (q_len, kv_len, block_q, block_kv),
    )


def tiles(pairs, block_q, block_kv):
    """(tiles that show a pair, tiles that show all) `[batch, q tiles, kv tiles]`.

    Queries that do not exist count as seeing all, keys that do not exist as seen by none.
    """
    batch, q_len, kv_len = pairs.shape
    rows, cols = num_blocks(q_len, block_q), num_blocks(kv_len, block_kv)
    some = np.zeros((batch, rows * block_q, cols * block_kv), bool)
    whole = np.ones_like(some)
    some[:, :q_len, :kv_len] = pairs
    whole[:, :q_len, :kv_len] = pairs
    whole[:, :, kv_len:] = False
    cut = (batch, rows, block_q, cols, block_kv)
    return some.reshape(cut).any((2, 4)), whole.reshape(cut).all((2, 4))


def assert_ranges(ranges, some, whole, exact):
    for b, i in np.ndindex(*some.shape[:2]):
        begin, full_begin, full_end, end = ranges[b, i]
        assert begin <= full_begin <= full_end <= end
        shown = np.flatnonzero(some[b, i])
        assert all(begin <= j < end for j in shown)
        assert whole[b, i, full_begin:full_end].all()
        if exact:  # no tile more, and no mask more
            assert end - begin == (shown[-1] + 1 - shown[0] if len(shown) else 0)
            assert full_end - full_begin == whole[b, i].sum()


@partial(jax.jit, static_argnums=5)
def _ranges(left, right, q_offset, kv_offset, ids, sizes):
    spec = FlashSpec(scale=1.0, left=left, right=right)
    arguments = (spec, q_offset, kv_offset, tuple(ids or ()), *sizes)
    return kv_tile_ranges(*arguments), q_tile_ranges(*arguments)


@settings(max_examples=80)
@given(problems())
def test_ranges(problem):
    left, right, q_offset, kv_offset, ids, sizes = problem
    q_len, kv_len, block_q, block_kv = sizes
    pairs = visible_pairs(
        BATCH, q_len, kv_len, left=left, right=right, q_offset=q_offset, kv_offset=kv_offset,
        q_ids=ids and ids[0], kv_ids=ids and ids[1],
    )  # fmt: skip
    sides = [FAR if side is None else side for side in (left, right)]
    of_queries, of_keys = _ranges(*sides, np.array(q_offset), np.array(kv_offset), ids, sizes)
    of_queries, of_keys = np.asarray(of_queries), np.asarray(of_keys)
    exact = ids is None
    assert_ranges(of_queries, *tiles(pairs, block_q, block_kv), exact)
    assert_ranges(of_keys, *tiles(pairs.swapaxes(1, 2), block_kv, block_q), exact)


def test_causal_halves_the_tiles():
    spec = FlashSpec(scale=1.0, right=0)
    zeros = np.zeros(1, np.int32)
    ranges = np.asarray(_of_queries(spec, zeros, zeros, (), 512, 512, 128, 128))[0]
    np.testing.assert_array_equal(ranges, [[0, 0, i, i + 1] for i in range(4)])


def test_packed_segments_meet_their_own_tiles_only():
    ids = np.repeat(np.arange(4, dtype=np.int32), 64)[None]
    zeros = np.zeros(1, np.int32)
    ranges = _of_queries(FlashSpec(scale=1.0), zeros, zeros, (ids, ids), 256, 256, 32, 64)
    expected = [[i // 2, i // 2, i // 2 + 1, i // 2 + 1] for i in range(8)]
    np.testing.assert_array_equal(np.asarray(ranges)[0], expected)


@pytest.mark.parametrize("left", [0, 5])
def test_offsets_out_of_sight(left):
    spec = FlashSpec(scale=1.0, left=left, right=0)
    before, after = np.array([-1000], np.int32), np.array([1000], np.int32)
    for offset in (before, after):
        ranges = _of_queries(spec, offset, np.zeros(1, np.int32), (), 64, 64, 16, 16)
        assert not np.asarray(ranges).any()
