"""Attention as loops of XLA over tiles: any backend, memory linear in the sequence.

The forward pass is the online softmax of Milakov and Gimelshein (arXiv:1805.02867) by tiles, as in
FlashAttention (arXiv:2205.14135, algorithm 1); the backward pass is algorithm 2 of
FlashAttention-2 (arXiv:2307.08691): one pass over key tiles that adds to dq, with five products for
each tile.

All heads and the whole batch go through a tile together. Tiles without a visible pair in any row of
the batch are skipped.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

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
BLOCK = 512  # queries and keys of a tile; large, since every tile is several XLA operations


def forward(
    spec: FlashSpec, q: Array, k: Array, v: Array, q_offset: Array, kv_offset: Array,
    *ids: Array, block_q: int = BLOCK, block_kv: int = BLOCK,
) -> tuple[Array, Array]:  # fmt: skip
    """(output, log-sum-exp); for shapes see `primitive.forward`."""
    shapes = _Shapes(q, k, v, block_q, block_kv)
    acc = accumulator_dtype(q.dtype)
    ranges = kv_tile_ranges(spec, q_offset, kv_offset, ids, *shapes.lengths_and_blocks)
    q, k, v, ids = shapes.fill(q, k, v, ids)
    rows = (shapes.batch, shapes.kv_heads, shapes.group, shapes.block_q)

    def one_query_tile(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        q_tile = shapes.q_tile(q, i)

        def one_kv_tile(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, top, total = carry
            scores, _, keep = shapes.scores(
                spec, q_tile, shapes.kv_tile(k, j), i, j, q_offset, kv_offset, ids
            )
            scores = jnp.where(keep, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # no key seen yet: avoid inf - inf
            p = jnp.exp2(scores - base[..., None])
            shrink = jnp.exp2(top - base)
            v_tile = shapes.kv_tile(v, j)
            update = _dot("bkgts,bskd->bkgtd", p.astype(v.dtype), v_tile)
            return out * shrink[..., None] + update, new_top, total * shrink + p.sum(axis=-1)

        start = (
            jnp.zeros((*rows, shapes.v_dim), acc),
            jnp.full(rows, -jnp.inf, acc),
            jnp.zeros(rows, acc),
        )
        begin, end = ranges[:, i, 0].min(), ranges[:, i, 3].max()
        out, top, total = lax.fori_loop(begin, end, one_kv_tile, start)
        out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
        lse = jnp.where(total == 0.0, -jnp.inf, (top + jnp.log2(total)) * LN_2)
        return None, (out.astype(q.dtype), lse)

    _, (out, lse) = lax.scan(one_query_tile, None, jnp.arange(shapes.q_tiles))
    # [tiles, batch, kv heads, group, block, dim] -> [batch, seq, heads, dim]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(shapes.batch, -1, shapes.heads, shapes.v_dim)
    lse = lse.transpose(1, 2, 3, 0, 4).reshape(shapes.batch, shapes.heads, -1)
    return cut(out, (1, shapes.q_len)), cut(lse, (2, shapes.q_len))


def backward(
    spec: FlashSpec, q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array,
    q_offset: Array, kv_offset: Array, *ids: Array, block_q: int = BLOCK, block_kv: int = BLOCK,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients (dq, dk, dv); for shapes see `primitive.backward`."""
    shapes = _Shapes(q, k, v, block_q, block_kv)
    acc = accumulator_dtype(q.dtype)
    ranges = q_tile_ranges(spec, q_offset, kv_offset, ids, *shapes.lengths_and_blocks)
    q, k, v, ids = shapes.fill(q, k, v, ids)
    dout = fill(dout, (1, q.shape[1]))
    lse, delta = masked_rows(lse, delta, q.shape[1])

    def one_kv_tile(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_tile, v_tile = shapes.kv_tile(k, j), shapes.kv_tile(v, j)

        def one_query_tile(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            dq, dk, dv = carry
            q_tile, dout_tile = shapes.q_tile(q, i), shapes.q_tile(dout, i)
            scores, slope, keep = shapes.scores(
                spec, q_tile, k_tile, i, j, q_offset, kv_offset, ids
            )
            p = jnp.exp2(scores - shapes.row_tile(lse, i)[..., None] * LOG2_E)
            p = jnp.where(keep, p, 0.0)
            dv += _dot("bkgts,btkgd->bskd", p.astype(dout.dtype), dout_tile)
            dp = _dot("btkgd,bskd->bkgts", dout_tile, v_tile)
            ds = p * (dp - shapes.row_tile(delta, i)[..., None])
            ds = (ds if slope is None else ds * slope).astype(q.dtype)
            dk += _dot("bkgts,btkgd->bskd", ds, q_tile)
            update = _dot("bkgts,bskd->btkgd", ds, k_tile).reshape(
                shapes.batch, shapes.block_q, shapes.heads, -1
            )
            start = i * shapes.block_q
            update += lax.dynamic_slice_in_dim(dq, start, shapes.block_q, axis=1)
            return lax.dynamic_update_slice_in_dim(dq, update, start, axis=1), dk, dv

        begin, end = ranges[:, j, 0].min(), ranges[:, j, 3].max()
        zeros = (jnp.zeros(k_tile.shape, acc), jnp.zeros(v_tile.shape, acc))
        dq, dk, dv = lax.fori_loop(begin, end, one_query_tile, (dq, *zeros))
        return dq, (dk, dv)

    dq, (dk, dv) = lax.scan(one_kv_tile, jnp.zeros(q.shape, acc), jnp.arange(shapes.kv_tiles))
    dk, dv = (x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in (dk, dv))
    dq = cut(dq * spec.scale, (1, shapes.q_len)).astype(q.dtype)
    dk = cut(dk * spec.scale, (1, shapes.kv_len)).astype(k.dtype)
    return dq, dk, cut(dv, (1, shapes.kv_len)).astype(v.dtype)


class _Shapes:
    """Sizes of one attention, and tiles cut out of padded arrays."""

    def __init__(self, q: Array, k: Array, v: Array, block_q: int, block_kv: int) -> None:
        self.batch, self.q_len, self.heads, _ = q.shape
        _, self.kv_len, self.kv_heads, self.v_dim = v.shape
        self.group = self.heads // self.kv_heads
        self.block_q, self.block_kv = min(block_q, self.q_len), min(block_kv, self.kv_len)
        self.q_tiles = num_blocks(self.q_len, self.block_q)
        self.kv_tiles = num_blocks(self.kv_len, self.block_kv)
        self.lengths_and_blocks = (self.q_len, self.kv_len, self.block_q, self.block_kv)

    def fill(
        self, q: Array, k: Array, v: Array, ids: tuple[Array, ...]
    ) -> tuple[Array, Array, Array, tuple[Array, ...]]:
        """All in whole tiles; what is filled in is masked."""
        q_len, kv_len = self.q_tiles * self.block_q, self.kv_tiles * self.block_kv
        if ids:
            ids = (fill(ids[0], (1, q_len)), fill(ids[1], (1, kv_len)))
        return fill(q, (1, q_len)), fill(k, (1, kv_len)), fill(v, (1, kv_len)), ids

    def q_tile(self, x: Array, i: Array) -> Array:
        """`[batch, block, kv heads, group, dim]` of `[batch, seq, heads, dim]`."""
        tile = lax.dynamic_slice_in_dim(x, i * self.block_q, self.block_q, axis=1)
        return tile.reshape(self.batch, self.block_q, self.kv_heads, self.group, -1)

    def row_tile(self, x: Array, i: Array) -> Array:
        """`[batch, kv heads, group, block]` of `[batch, heads, seq]`."""
        tile = lax.dynamic_slice_in_dim(x, i * self.block_q, self.block_q, axis=2)
        return tile.reshape(self.batch, self.kv_heads, self.group, self.block_q)

    def kv_tile(self, x: Array, j: Array) -> Array:
        """`[batch, block, kv heads, dim]`."""
        return lax.dynamic_slice_in_dim(x, j * self.block_kv, self.block_kv, axis=1)

    def scores(
        self, spec: FlashSpec, q_tile: Array, k_tile: Array, i: Array, j: Array,
        q_offset: Array, kv_offset: Array, ids: tuple[Array, ...],
    ) -> tuple[Array, Array | None, Array]:  # fmt: skip
        """(base-2 scores, derivative of the cap, which count) `[batch, kv heads, group, q, kv]`."""
        dots = _dot("btkgd,bskd->bkgts", q_tile, k_tile)
        scores, slope = base2_scores(spec, dots)
        rows = i * self.block_q + jnp.arange(self.block_q)
        cols = j * self.block_kv + jnp.arange(self.block_kv)
        keep = jnp.broadcast_to(cols < self.kv_len, (1, 1, 1, 1, self.block_kv))
        distance = (q_offset - kv_offset)[:, None, None] + rows[:, None] - cols
        tiles: tuple[Array | None, Array | None] = (None, None)
        if ids:
            q_ids = lax.dynamic_slice_in_dim(ids[0], i * self.block_q, self.block_q, axis=1)
            tiles = q_ids[:, :, None], self.kv_tile(ids[1], j)[:, None, :]
        mask = visible(spec, distance, *tiles)
        if mask is not None:
            keep = keep & mask[:, None, None]
        return scores, slope, keep


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(
        equation, a, b, precision=precision_of(a.dtype),
        preferred_element_type=accumulator_dtype(a.dtype),
    )  # fmt: skip
