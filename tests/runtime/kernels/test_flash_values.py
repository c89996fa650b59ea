"""Values and gradients of the two portable implementations against float64."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpa_lite.runtime.kernels.flash import portable, scan
from tests.runtime.kernels.flash_cases import Case, assert_correct, cases_of, covering, run

FACTORS = {
    "mask": [
        {},
        {"causal": True},
        {"causal": True, "window": 24},
        {"window": (9, 30)},
        {"segments": True},
        {"segments": True, "causal": True, "window": 40},
        {"causal": True, "q_offset": 37, "kv_offset": (5, 60)},
    ],
    "dtype": [{"dtype": d} for d in ("float32", "bfloat16", "float16")],
    "lengths": [
        {"q_len": 128, "kv_len": 128},
        {"q_len": 70, "kv_len": 150},
        {"q_len": 150, "kv_len": 70},
        {"q_len": 1, "kv_len": 65},
    ],
    "heads": [{"heads": 4, "kv_heads": n} for n in (4, 2, 1)],
    "dim": [{"head_dim": 64}, {"head_dim": 96}, {"head_dim": 128}, {"head_dim": 24, "v_dim": 40}],
    "cap": [{}, {"softcap": 2.5, "scale": 0.3}],
}
COVERING = covering(FACTORS)
SMALL = {"block_q": 32, "block_kv": 32}  # several tiles of the short sequences here
SCAN = (partial(scan.forward, **SMALL), partial(scan.backward, **SMALL))
PALLAS = tuple(partial(f, interpret=True, **SMALL) for f in (portable.forward, portable.backward))


BOTH = [
    pytest.param(SCAN, id="scan"),
    pytest.param(PALLAS, id="pallas", marks=pytest.mark.slow),
]


def test_covering_meets_every_pair():
    values = {name: range(len(options)) for name, options in FACTORS.items()}
    rows = [{name: FACTORS[name].index(value) for name, value in row.items()} for row in COVERING]
    for a in values:
        for b in values:
            if a < b:
                met = {(row[a], row[b]) for row in rows}
                assert met == {(i, j) for i in values[a] for j in values[b]}


@pytest.mark.parametrize("case", cases_of(COVERING)[::7], ids=str)
def test_scan(case):
    assert_correct(case, SCAN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for n, c in enumerate(cases_of(COVERING)) if n % 7 and n % 2], ids=str
)
def test_scan_all(case):
    assert_correct(case, SCAN)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases_of(COVERING)[::4], ids=str)
def test_pallas_all(case):
    assert_correct(case, PALLAS)


@pytest.mark.parametrize("case", cases_of(COVERING)[3:4], ids=str)
def test_pallas(case):
    assert_correct(case, PALLAS)


@pytest.mark.parametrize("functions", BOTH)
def test_rows_that_see_nothing(functions):
    """Half of the queries are before every key, one example sees none at all."""
    case = Case(q_len=70, kv_len=70, causal=True, q_offset=-35, kv_offset=(0, 100))
    assert_correct(case, functions)
    arrays = case.arrays()
    out, lse, dq, dk, dv = run(case, arrays, functions)
    assert np.all(np.asarray(out)[0, :35] == 0) and np.all(np.asarray(out)[1] == 0)
    assert np.all(np.isneginf(np.asarray(lse)[1])) and np.all(
        np.isneginf(np.asarray(lse)[0, :, :35])
    )
    assert np.all(np.asarray(dq)[1] == 0) and np.all(np.asarray(dk)[1] == 0)
    assert np.all(np.asarray(dv)[1] == 0) and np.all(np.asarray(dq)[0, :35] == 0)


@pytest.mark.parametrize("functions", BOTH)
def test_what_no_tile_shows_may_be_nan(functions):
    """Tiles outside the window and the rest of the last tile are neither read nor multiplied."""
    case = Case(q_len=32, kv_len=200, causal=True, window=32, q_offset=96)
    q, k, v, dout, dlse, ids = case.arrays()
    # Queries at 96 to 127 see keys 65 to 127, in the tiles 64 to 127.
    unseen = (np.arange(200) < 64) | (np.arange(200) >= 128)
    poison = [np.where(unseen[None, :, None, None], np.float32(np.nan), x) for x in (k, v)]
    clean = run(case, (q, k, v, dout, dlse, ids), functions)
    poisoned = run(case, (q, *poison, dout, dlse, ids), functions)
    for one, other in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("functions", BOTH)
def test_scores_of_any_size(functions):
    """Scores of +-1e4 neither overflow nor leave the filled-in keys with weight."""
    case = Case(q_len=40, kv_len=50, scale=2000.0)
    q, k, v, dout, _, _ = case.arrays()
    k = -np.abs(k)
    arrays = (np.abs(q), k, v, dout, np.zeros((2, 2, 40), np.float32), None)
    expected = case.expected(arrays)
    out, lse, *gradients = run(case, arrays, functions)
    np.testing.assert_allclose(out, expected.out, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(lse, expected.lse, rtol=1e-5)
    assert all(np.all(np.isfinite(np.asarray(g))) for g in gradients)


WINDOWS = ({"causal": True}, {"window": (7, 25)}, {"causal": True, "window": 30})


@st.composite
def random_cases(draw, lengths, windows):
    """Offsets, segments and values are operands; the rest of a case costs a compilation."""
    offsets = st.integers(-90, 90)
    q_len, kv_len, heads, kv_heads = draw(st.sampled_from(lengths))
    return Case(
        q_len=q_len, kv_len=kv_len, heads=heads, kv_heads=kv_heads, head_dim=8,
        segments=draw(st.booleans()), q_offset=(draw(offsets), draw(offsets)),
        kv_offset=draw(offsets), seed=draw(st.integers(0, 99)), **draw(windows),
    )  # fmt: skip


@settings(max_examples=25)
@given(random_cases([(70, 50, 2, 1)], st.sampled_from(WINDOWS[2:])))
def test_random_positions_and_segments(case):
    assert_correct(case, SCAN)


@pytest.mark.slow
@settings(max_examples=4)
@given(
    random_cases(
        [(1, 33, 3, 1), (33, 1, 1, 1), (95, 97, 2, 2), (64, 64, 6, 2)],
        st.one_of(
            st.sampled_from(WINDOWS),
            st.builds(lambda left, right: {"window": (left, right)},
                      st.integers(0, 40), st.one_of(st.none(), st.integers(0, 40))),
        ),
    )
)  # fmt: skip
def test_random_shapes_and_windows(case):
    assert_correct(case, SCAN)
    assert_correct(case, PALLAS)


def test_float64_is_kept():
    with jax.enable_x64(True):
        assert_correct(Case(q_len=50, kv_len=40, causal=True, dtype="float64"), SCAN)
