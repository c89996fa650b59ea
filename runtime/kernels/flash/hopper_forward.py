"""The forward kernel for Hopper.

Two warpgroups compute, 64 queries each, and a third one copies tiles of keys and values into a ring
of shared memory by TMA ahead of them (warp specialisation). A computing warpgroup issues the scores
of tile `j` and behind them the product of the probabilities of tile `j-1` with its values; while
the tensor cores do the second, the other units do the softmax of the first. This is the overlap
within a warpgroup of FlashAttention-3 (arXiv:2407.08608, section 3.2); the two warpgroups overlap
with each other too. The factor by which a new maximum shrinks the output is applied after that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from alpa_lite.compat import mosaic_gpu as plgpu
from alpa_lite.runtime.kernels.flash.block_sizes import ForwardBlocks
from alpa_lite.runtime.kernels.flash.hopper_ops import (
    WARPGROUP_ROWS,
    Ops,
    Product,
    shared_tile,
)
from alpa_lite.runtime.kernels.flash.hopper_tile import ScoreTile
from alpa_lite.runtime.kernels.flash.spec import LN_2, FlashSpec

Array = Any
COMPUTE_WARPGROUPS = 2
BLOCK_Q = COMPUTE_WARPGROUPS * WARPGROUP_ROWS
# A multiprocessor has 512 registers for each lane of a warpgroup; the copying one needs few.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 232, 40


def forward_kernel(
    spec: FlashSpec, q: Array, k: Array, v: Array, shift: Array, ranges: Array,
    ids: tuple[Array, ...], *, kv_len: int, blocks: ForwardBlocks, ops: Ops,
    build: Callable[..., Callable[..., Any]],
) -> tuple[Array, Array]:  # fmt: skip
    """(output, natural log-sum-exp `[batch, heads, q_len]`).

    Args:
      spec: of the attention.
      q: `[batch, q_len, heads, dim]`, `q_len` a multiple of `BLOCK_Q`.
      k: `[batch, padded kv_len, kv_heads, dim]`, a multiple of the block size.
      v: of the shape of k.
      shift: position of the first query minus that of the first key, `[batch]`.
      ranges: key tiles of each query tile, `bounds.kv_tile_ranges`, none of them empty.
      ids: padded segment ids of queries and keys, or nothing.
      kv_len: number of keys that exist.
      blocks: block sizes.
      ops: hardware or interpreted.
      build: `plgpu.kernel` with what is common to all kernels.
    """
    batch, q_len, heads, dim = q.shape
    group = heads // k.shape[2]
    block_kv = blocks.block_kv
    stages = min(blocks.stages, k.shape[1] // block_kv)
    q_tiles = q_len // BLOCK_Q
    tile_shape = (WARPGROUP_ROWS, block_kv)

    def program(q, k, v, shift, ranges, *rest):  # type: ignore[no-untyped-def]
        ids, (out, lse, *scratch) = rest[:num_ids], rest[num_ids:]
        q_tile, k_tiles, v_tiles, lse_tile, q_ready, k_ready, v_ready, k_done, v_done = scratch
        b, h, wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
        i = lax.axis_index("i")
        if spec.right is not None:
            i = (
                q_tiles - 1 - i
            )  # under a causal mask late queries have most to do: they start first
        begin, full_begin, full_end, end = (ranges[b, i, n] for n in range(4))

        def slot_of(j: Array) -> Array:
            return lax.rem(j, jnp.int32(stages))

        @pl.when(wg < COMPUTE_WARPGROUPS)
        def compute() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            first = i * BLOCK_Q + wg * WARPGROUP_ROWS
            rows = pl.ds(first, WARPGROUP_ROWS)
            mine = q_tile.at[wg]
            plgpu.copy_gmem_to_smem(q.at[b, rows, h], mine, q_ready.at[wg])
            tile = ScoreTile(
                spec=spec, ops=ops, kv_len=kv_len, block_kv=block_kv, shift=shift[b],
                ids=tuple(x.at[b] for x in ids),
            )  # fmt: skip

            def softmax(dots, j, top, total):  # type: ignore[no-untyped-def]
                """(new maximum, new sum, factor for what was summed before, probabilities)."""
                partial = (j < full_begin) | (j >= full_end)
                scores, _ = tile.scores(dots, first, j * block_kv, partial)
                new_top = jnp.maximum(top, scores.max(axis=1))
                # A row that has seen no key yet has the maximum -inf, and inf - inf is no number.
                base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                p = jnp.exp2(scores - lax.broadcast_in_dim(base, tile_shape, [0]))
                shrink = jnp.exp2(top - base)
                return new_top, total * shrink + p.sum(axis=1), shrink, p.astype(q_tile.dtype)

            plgpu.barrier_wait(q_ready.at[wg])
            slot = slot_of(begin)
            plgpu.barrier_wait(k_ready.at[slot])
            (dots,) = ops.products(Product(mine, k_tiles.at[slot], transpose_b=True))
            plgpu.barrier_arrive(k_done.at[slot])
            top, total = ops.full(tile_shape[:1], -jnp.inf), ops.zeros(tile_shape[:1])
            top, total, _, p = softmax(dots, begin, top, total)

            def step(j, carry):  # type: ignore[no-untyped-def]
                acc, top, total, p = carry
                slot, before = slot_of(j), slot_of(j - 1)
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(v_ready.at[before])

                def use(dots):  # type: ignore[no-untyped-def]
                    plgpu.barrier_arrive(k_done.at[slot])
                    return softmax(dots, j, top, total)

                acc, (top, total, shrink, p) = ops.overlapped(
                    Product(mine, k_tiles.at[slot], transpose_b=True),
                    Product(p, v_tiles.at[before], start=acc),
                    (top, total, top, p),
                    use,
                )
                plgpu.barrier_arrive(v_done.at[before])
                return acc * lax.broadcast_in_dim(shrink, acc.shape, [0]), top, total, p

            carry = (ops.zeros((WARPGROUP_ROWS, dim)), top, total, p)
            acc, top, total, p = lax.fori_loop(begin + 1, end, step, carry)
            last = slot_of(end - 1)
            plgpu.barrier_wait(v_ready.at[last])
            (acc,) = ops.products(Product(p, v_tiles.at[last], start=acc))
            plgpu.barrier_arrive(v_done.at[last])

            safe = jnp.where(total == 0.0, 1.0, total)  # then the maximum is -inf, and so is lse
            mine[...] = (acc * lax.broadcast_in_dim(1.0 / safe, acc.shape, [0])).astype(out.dtype)
            lse_tile.at[wg][...] = top * LN_2 + jnp.log(safe)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_tile.at[wg], lse.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE_WARPGROUPS)
        def copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            kv_head = lax.div(h, jnp.int32(group))

            def step(j, _):  # type: ignore[no-untyped-def]
                slot, keys = slot_of(j), pl.ds(j * block_kv, block_kv)
                for source, tiles, ready, done in (
                    (k, k_tiles, k_ready, k_done), (v, v_tiles, v_ready, v_done),
                ):  # fmt: skip

                    @pl.when(j >= begin + stages)
                    def wait_until_free(done=done) -> None:  # type: ignore[no-untyped-def]
                        plgpu.barrier_wait(done.at[slot])

                    plgpu.copy_gmem_to_smem(
                        source.at[b, keys, kv_head], tiles.at[slot], ready.at[slot]
                    )

            lax.fori_loop(begin, end, step, None)

            def see_the_end(j, _):  # type: ignore[no-untyped-def]
                """A barrier's every completion has to be waited for by somebody."""
                plgpu.barrier_wait(k_done.at[slot_of(j)])
                plgpu.barrier_wait(v_done.at[slot_of(j)])

            lax.fori_loop(lax.max(begin, end - stages), end, see_the_end, None)

    num_ids = len(ids)
    kernel = build(
        program,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
        ),
        grid=(heads, q_tiles, batch),
        grid_names=("h", "i", "b"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        scratch_types=(
            shared_tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, dim), q.dtype),
            shared_tile((stages, block_kv, dim), q.dtype),
            shared_tile((stages, block_kv, dim), q.dtype),
            plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        ),
    )
    out, lse = kernel(q, k, v, shift, ranges, *ids)
    return out, lse
