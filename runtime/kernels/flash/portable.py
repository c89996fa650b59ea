"""Attention as plain Pallas kernels: nothing of them is tied to one GPU.

Interpreted, they run on CPU and on several devices, which the interpreter of the Hopper kernels
cannot do; compiled, they go through JAX's Triton backend for as long as JAX has it. Their structure
is that of the Hopper kernels: one program for a row of tiles, no program writes what another does,
so that results do not depend on the order of programs.

Kernels see whole tiles: sequences and head dims are filled up here and results cut back.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from alpa_lite import compat
from alpa_lite.runtime.kernels.flash.bounds import kv_tile_ranges, num_blocks, q_tile_ranges
from alpa_lite.runtime.kernels.flash.padding import cut, fill, masked_rows
from alpa_lite.runtime.kernels.flash.spec import LN_2, LOG2_E, FlashSpec
from alpa_lite.runtime.kernels.flash.tile import (
    accumulator_dtype,
    base2_scores,
    precision_of,
    visible,
)

Array = Any
BLOCK = 64  # queries and keys of a tile
_SMALLEST = 16  # Triton's products want dims of at least this, and powers of two


def forward(
    spec: FlashSpec, q: Array, k: Array, v: Array, q_offset: Array, kv_offset: Array,
    *ids: Array, interpret: bool, block_q: int = BLOCK, block_kv: int = BLOCK,
) -> tuple[Array, Array]:  # fmt: skip
    """(output, log-sum-exp); for shapes see `primitive.forward`."""
    (batch, q_len, heads, _), (kv_len, v_dim) = q.shape, v.shape[1::2]
    group = heads // k.shape[2]
    ranges = kv_tile_ranges(spec, q_offset, kv_offset, ids, q_len, kv_len, block_q, block_kv)
    shift = (q_offset - kv_offset)[:, None]
    q, k, v, ids = _fill_all(q, k, v, ids, block_q, block_kv)
    q_tiles = q.shape[1] // block_q

    def program(shift, ranges, q, k, v, *rest):  # type: ignore[no-untyped-def]
        *ids, out, lse = rest
        i = pl.program_id(2)
        q_tile, q_ids = q[...], ids[0][...] if ids else None
        rows = shift[0] + i * block_q + lax.iota(jnp.int32, block_q)

        def step(j, carry):  # type: ignore[no-untyped-def]
            acc, top, total = carry
            keys = pl.ds(j * block_kv, block_kv)
            scores, _ = base2_scores(spec, _dot(q_tile, k[keys, :].T))
            keep = _keep(
                spec, rows, j * block_kv, kv_len, q_ids, ids[1][keys] if ids else None, block_kv
            )
            scores = jnp.where(keep, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            p = jnp.exp2(scores - base[:, None])
            shrink = jnp.exp2(top - base)
            acc = acc * shrink[:, None] + _dot(p.astype(v.dtype), v[keys, :])
            return acc, new_top, total * shrink + p.sum(axis=1)

        dtype = accumulator_dtype(q.dtype)
        start = (
            jnp.zeros(out.shape, dtype), jnp.full((block_q,), -jnp.inf, dtype),
            jnp.zeros((block_q,), dtype),
        )  # fmt: skip
        acc, top, total = lax.fori_loop(ranges[0], ranges[3], step, start)
        safe = jnp.where(total == 0.0, 1.0, total)
        out[...] = (acc / safe[:, None]).astype(out.dtype)
        lse[...] = jnp.where(total == 0.0, -jnp.inf, (top + jnp.log2(safe)) * LN_2)

    q_spec, k_spec, v_spec, out_spec, row_spec = _query_specs(q, k, v, group, block_q)
    out, lse = pl.pallas_call(
        program,
        grid=(batch, heads, q_tiles),
        in_specs=[
            pl.BlockSpec((None, 1), lambda b, h, i: (b, 0)),
            pl.BlockSpec((None, None, 4), lambda b, h, i: (b, i, 0)),
            q_spec, k_spec, v_spec, *_id_specs(ids, block_q, None),
        ],
        out_specs=[out_spec, row_spec],
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, q.shape[1]), accumulator_dtype(q.dtype)),
        ],
        **compat.triton_or_interpreted(interpret),
        name="flash_attention_forward",
    )(shift, ranges, q, k, v, *ids)  # fmt: skip
    return cut(out, (1, q_len), (3, v_dim)), cut(lse, (2, q_len))


def backward(
    spec: FlashSpec, q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array,
    q_offset: Array, kv_offset: Array, *ids: Array, interpret: bool, block_q: int = BLOCK,
    block_kv: int = BLOCK,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients (dq, dk, dv); for shapes see `primitive.backward`."""
    shapes = (q.shape, k.shape, v.shape)
    lengths = (q.shape[1], k.shape[1], block_q, block_kv)
    bounds = (spec, q_offset, kv_offset, ids, *lengths)
    kv_ranges, q_ranges = kv_tile_ranges(*bounds), q_tile_ranges(*bounds)
    shift = (q_offset - kv_offset)[:, None]
    q, k, v, ids = _fill_all(q, k, v, ids, block_q, block_kv)
    dout = fill(dout, (1, q.shape[1]), (3, v.shape[3]))
    lse, delta = masked_rows(lse, delta, q.shape[1])
    operands = (q, k, v, lse, delta, dout, *ids)
    kernel = functools.partial(
        _run_backward, spec, operands, shift, lengths[1], block_q, block_kv, interpret
    )
    dq = kernel(kv_ranges, transposed=False)[0]
    dk, dv = kernel(q_ranges, transposed=True)
    dq, dk, dv = (
        cut(x, (1, shape[1]), (3, shape[3])) for x, shape in zip((dq, dk, dv), shapes, strict=True)
    )
    return dq, dk, dv


def _run_backward(
    spec: FlashSpec, operands: tuple[Array, ...], shift: Array, kv_len: int, block_q: int,
    block_kv: int, interpret: bool, ranges: Array, transposed: bool,
) -> list[Array]:  # fmt: skip
    """`[dq]`, a program per query tile and head, or `[dk, dv]`, one per key tile and key head."""
    q, k, v, *_ = operands
    ids = operands[6:]
    batch, kv_heads = k.shape[0], k.shape[2]
    group = q.shape[2] // kv_heads
    acc = accumulator_dtype(q.dtype)

    def scores_of(q_tile, k_tile, lse_tile, rows, start, q_ids, kv_ids):  # type: ignore[no-untyped-def]
        scores, slope = base2_scores(spec, _dot(q_tile, k_tile.T))
        keep = _keep(spec, rows, start, kv_len, q_ids, kv_ids, block_kv)
        p = jnp.where(keep, jnp.exp2(scores - lse_tile[:, None] * LOG2_E), 0.0)
        return p, slope

    def score_gradients(p, slope, dout_tile, v_tile, delta_tile):  # type: ignore[no-untyped-def]
        ds = p * (_dot(dout_tile, v_tile.T) - delta_tile[:, None])
        return (ds if slope is None else ds * slope).astype(q.dtype)

    def dq_program(shift, ranges, q, k, v, lse, delta, dout, *rest):  # type: ignore[no-untyped-def]
        *ids, dq = rest
        q_tile, dout_tile, lse_tile, delta_tile = q[...], dout[...], lse[...], delta[...]
        rows = shift[0] + pl.program_id(2) * block_q + lax.iota(jnp.int32, block_q)
        q_ids = ids[0][...] if ids else None

        def step(j, total):  # type: ignore[no-untyped-def]
            keys = pl.ds(j * block_kv, block_kv)
            k_tile, kv_ids = k[keys, :], ids[1][keys] if ids else None
            p, slope = scores_of(q_tile, k_tile, lse_tile, rows, j * block_kv, q_ids, kv_ids)
            ds = score_gradients(p, slope, dout_tile, v[keys, :], delta_tile)
            return total + _dot(ds, k_tile)

        total = lax.fori_loop(ranges[0], ranges[3], step, jnp.zeros(dq.shape, acc))
        dq[...] = (total * spec.scale).astype(dq.dtype)

    def dkv_program(shift, ranges, q, k, v, lse, delta, dout, *rest):  # type: ignore[no-untyped-def]
        *ids, dk, dv = rest
        k_tile, v_tile = k[...], v[...]
        first, per_head = ranges[0], ranges[3] - ranges[0]
        kv_ids = ids[1][...] if ids else None
        start = pl.program_id(2) * block_kv

        def step(t, totals):  # type: ignore[no-untyped-def]
            dk, dv = totals
            head, i = lax.div(t, per_head), first + lax.rem(t, per_head)
            queries = pl.ds(i * block_q, block_q)
            q_tile, dout_tile = q[queries, head, :], dout[queries, head, :]
            rows = shift[0] + i * block_q + lax.iota(jnp.int32, block_q)
            q_ids = ids[0][queries] if ids else None
            p, slope = scores_of(q_tile, k_tile, lse[head, queries], rows, start, q_ids, kv_ids)
            dv = dv + _dot(p.astype(dout_tile.dtype).T, dout_tile)
            ds = score_gradients(p, slope, dout_tile, v_tile, delta[head, queries])
            return dk + _dot(ds.T, q_tile), dv

        zeros = (jnp.zeros(dk.shape, acc), jnp.zeros(dv.shape, acc))
        dk_total, dv_total = lax.fori_loop(0, group * per_head, step, zeros)
        dk[...] = (dk_total * spec.scale).astype(dk.dtype)
        dv[...] = dv_total.astype(dv.dtype)

    common = [
        pl.BlockSpec((None, 1), lambda b, h, i: (b, 0)),
        pl.BlockSpec((None, None, 4), lambda b, h, i: (b, i, 0)),
    ]
    if not transposed:
        q_spec, k_spec, v_spec, dout_spec, row_spec = _query_specs(q, k, v, group, block_q)
        return pl.pallas_call(
            dq_program,
            grid=(batch, q.shape[2], q.shape[1] // block_q),
            in_specs=[
                *common, q_spec, k_spec, v_spec, row_spec, row_spec, dout_spec,
                *_id_specs(ids, block_q, None),
            ],
            out_specs=[q_spec],
            out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
            **compat.triton_or_interpreted(interpret),
            name="flash_attention_dq",
        )(shift, ranges, *operands)  # fmt: skip

    def heads_of(x: Array) -> pl.BlockSpec:  # all queries of the heads that read one key head
        return pl.BlockSpec((None, x.shape[1], group, x.shape[3]), lambda b, h, j: (b, 0, h, 0))

    def tile_of(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, block_kv, None, x.shape[3]), lambda b, h, j: (b, j, h, 0))

    rows_spec = pl.BlockSpec((None, group, q.shape[1]), lambda b, h, j: (b, h, 0))
    return pl.pallas_call(
        dkv_program,
        grid=(batch, kv_heads, k.shape[1] // block_kv),
        in_specs=[
            *common, heads_of(q), tile_of(k), tile_of(v), rows_spec, rows_spec,
            heads_of(operands[5]), *_id_specs(ids, None, block_kv),
        ],
        out_specs=[tile_of(k), tile_of(v)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        **compat.triton_or_interpreted(interpret),
        name="flash_attention_dkv",
    )(shift, ranges, *operands)  # fmt: skip


def _query_specs(q: Array, k: Array, v: Array, group: int, block_q: int) -> list[pl.BlockSpec]:
    """Of q, k, v, output and rows, for programs (batch, head, query tile)."""

    def queries(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, block_q, None, dim), lambda b, h, i: (b, i, h, 0))

    def keys(x: Array) -> pl.BlockSpec:
        shape = (None, x.shape[1], None, x.shape[3])
        return pl.BlockSpec(shape, lambda b, h, i: (b, 0, h // group, 0))

    rows = pl.BlockSpec((None, None, block_q), lambda b, h, i: (b, h, i))
    return [queries(q.shape[3]), keys(k), keys(v), queries(v.shape[3]), rows]


def _id_specs(
    ids: tuple[Array, ...], block_q: int | None, block_kv: int | None
) -> list[pl.BlockSpec]:
    """Tiles of segment ids, or all of an example's where there is no block size."""

    def spec(x: Array, block: int | None) -> pl.BlockSpec:
        if block is None:
            return pl.BlockSpec((None, x.shape[1]), lambda b, h, i: (b, 0))
        return pl.BlockSpec((None, block), lambda b, h, i: (b, i))

    return [spec(x, block) for x, block in zip(ids, (block_q, block_kv), strict=False)]


def _fill_all(
    q: Array, k: Array, v: Array, ids: tuple[Array, ...], block_q: int, block_kv: int
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    q_len = num_blocks(q.shape[1], block_q) * block_q
    kv_len = num_blocks(k.shape[1], block_kv) * block_kv
    qk_dim, v_dim = (max(_SMALLEST, 1 << (x.shape[3] - 1).bit_length()) for x in (q, v))
    if ids:
        ids = (fill(ids[0], (1, q_len)), fill(ids[1], (1, kv_len)))
    return (
        fill(q, (1, q_len), (3, qk_dim)), fill(k, (1, kv_len), (3, qk_dim)),
        fill(v, (1, kv_len), (3, v_dim)), ids,
    )  # fmt: skip


def _keep(
    spec: FlashSpec, rows: Array, start: Array, kv_len: int, q_ids: Any, kv_ids: Any, block_kv: int
) -> Array:  # fmt: skip
    """Which pairs of a tile count, `[queries, keys]`."""
    cols = start + lax.iota(jnp.int32, block_kv)
    keep = jnp.broadcast_to((cols < kv_len)[None, :], (rows.shape[0], block_kv))
    ids = (None, None) if q_ids is None else (q_ids[:, None], kv_ids[None, :])
    mask = visible(spec, rows[:, None] - cols[None, :], *ids)
    return keep if mask is None else keep & mask


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(
        a, b, precision=precision_of(a.dtype), preferred_element_type=accumulator_dtype(a.dtype)
    )
