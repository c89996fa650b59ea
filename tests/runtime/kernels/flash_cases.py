"""Cases of attention, and one call that computes a case and holds it against `dense_attention`."""

from dataclasses import dataclass, field, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from alpa_lite.runtime.kernels.flash.arguments import check_arguments
from alpa_lite.runtime.kernels.flash.primitive import backward, forward
from tests.runtime.kernels.dense_attention import dense_attention, relative_l2, visible_pairs

# Of the output and of the gradients, relative L2. float32: rounding of some hundred sums of terms
# of both signs. 16 bit: p and ds are rounded to 8 (11) bits before they are multiplied.
TOLERANCE = {
    "float64": (1e-12, 1e-12), "float32": (1e-5, 1e-5), "float16": (4e-3, 6e-3),
    "bfloat16": (4e-3, 6e-3),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 2
    q_len: int = 64
    kv_len: int = 64
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    v_dim: int | None = None
    dtype: str = "float32"
    causal: bool = False
    window: object = None
    segments: bool = False
    scale: float | None = None
    softcap: float | None = None
    q_offset: object = None
    kv_offset: object = None
    seed: int = field(default=0, compare=False)

    def arrays(self):
        """q, k, v, dout, dlse, segment ids (or None)."""
        rng = np.random.default_rng(self.seed)
        v_dim = self.v_dim or self.head_dim
        acc = "float64" if self.dtype == "float64" else "float32"

        def normal(*shape, dtype=self.dtype):
            return rng.standard_normal((self.batch, *shape)).astype(jnp.dtype(dtype))

        q = normal(self.q_len, self.heads, self.head_dim)
        k = normal(self.kv_len, self.kv_heads, self.head_dim)
        v = normal(self.kv_len, self.kv_heads, v_dim)
        dout = normal(self.q_len, self.heads, v_dim)
        dlse = normal(self.heads, self.q_len, dtype=acc)
        ids = None
        if self.segments:  # packed, with other lengths in each example and in queries and keys
            lengths = (self.q_len, self.kv_len)
            ids = tuple(
                np.sort(rng.integers(0, 4, (self.batch, n)).astype(np.int32), axis=1)
                for n in lengths
            )
        return q, k, v, dout, dlse, ids

    def spec_and_ids(self, q, k, v, ids, implementation=None):
        return check_arguments(
            q, k, v, causal=self.causal, window=self.window, segment_ids=ids, scale=self.scale,
            softcap=self.softcap, offsets={}, implementation=implementation,
        )  # fmt: skip

    def offsets(self):
        pair = (self.q_offset or 0, self.kv_offset or 0)
        return tuple(np.broadcast_to(np.array(o, np.int32), (self.batch,)) for o in pair)

    def expected(self, arrays):
        q, k, v, dout, dlse, ids = arrays
        spec, _ = self.spec_and_ids(q, k, v, ids)
        left, right = spec.left, None if self.causal else spec.right
        q_offset, kv_offset = self.offsets()
        q_ids, kv_ids = ids or (None, None)
        keep = visible_pairs(
            self.batch, self.q_len, self.kv_len, causal=self.causal, left=left, right=right,
            q_offset=q_offset, kv_offset=kv_offset, q_ids=q_ids, kv_ids=kv_ids,
        )  # fmt: skip
        return dense_attention(
            q, k, v, keep, scale=spec.scale, softcap=self.softcap, dout=dout, dlse=dlse
        )


def run(case, arrays, functions=None, implementation=None):
    """(out, lse, dq, dk, dv) by functions like those of `primitive`."""
    q, k, v, dout, dlse, ids = arrays
    spec, ids = case.spec_and_ids(q, k, v, ids, implementation)
    both = _compiled(spec, functions or (forward, backward))
    return both(q, k, v, dout, dlse, *case.offsets(), *ids)


@cache
def _compiled(spec, functions):
    """Compiled without XLA's optimisations: cases take a second each, and most of it is these."""
    forward_fn, backward_fn = functions

    def both(q, k, v, dout, dlse, *rest):
        out, lse = forward_fn(spec, q, k, v, *rest)
        acc = dlse.dtype
        delta = (out.astype(acc) * dout.astype(acc)).sum(-1).swapaxes(1, 2) - dlse
        return out, lse, *backward_fn(spec, q, k, v, lse, delta, dout, *rest)

    return jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})


def assert_correct(case, functions=None, implementation=None):
    """Values and gradients of a case are those of the dense reference."""
    arrays = case.arrays()
    found = run(case, arrays, functions, implementation)
    expected = case.expected(arrays)
    assert_close(case, found, expected)


def assert_close(case, found, expected):
    """The five results of a case against those of the dense reference."""
    of_output, of_gradients = TOLERANCE[case.dtype]
    lse = np.asarray(found[1])
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected.lse))
    finite = np.isfinite(expected.lse)
    np.testing.assert_allclose(lse[finite], expected.lse[finite], rtol=1e-5, atol=1e-5)
    assert relative_l2(found[0], expected.out) <= of_output, case
    for name, one, other in zip(("dq", "dk", "dv"), found[2:], expected[2:], strict=True):
        assert relative_l2(one, other) <= of_gradients, (name, case)


def covering(factors):
    """Cases in which every two values of two factors meet, made greedily."""
    names = list(factors)
    pairs = {
        (a, i, b, j)
        for n, a in enumerate(names) for b in names[n + 1 :]
        for i in range(len(factors[a])) for j in range(len(factors[b]))
    }  # fmt: skip
    rows = []
    while pairs:
        a, i, b, j = min(pairs)
        row = {a: i, b: j}
        for name in names:
            if name not in row:
                row[name] = max(
                    range(len(factors[name])),
                    key=lambda value: len(pairs & _met({**row, name: value}, names)),
                )
        rows.append(row)
        pairs -= _met(row, names)
    return [{name: factors[name][value] for name, value in row.items()} for row in rows]


def _met(row, names):
    return {
        (a, row[a], b, row[b])
        for n, a in enumerate(names) if a in row
        for b in names[n + 1 :] if b in row
    }  # fmt: skip


def cases_of(rows, **common):
    """Cases from rows whose values are groups of fields."""
    return [
        replace(Case(**common), **{k: v for group in row.values() for k, v in group.items()})
        for row in rows
    ]
