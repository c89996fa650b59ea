"""The kernel for dq on Hopper: each warpgroup owns 64 queries and walks along their keys.

Products per tile: scores, `dout @ v^T`, and `ds @ k` added up in registers. Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from alpa_lite.compat import mosaic_gpu as plgpu
from alpa_lite.runtime.kernels.flash.block_sizes import BackwardBlocks
from alpa_lite.runtime.kernels.flash.hopper_ops import (
    WARPGROUP_ROWS,
    Ops,
    Product,
    shared_tile,
)
from alpa_lite.runtime.kernels.flash.hopper_tile import ScoreTile
from alpa_lite.runtime.kernels.flash.spec import FlashSpec

Array = Any
COMPUTE_WARPGROUPS = 2
BLOCK_Q = COMPUTE_WARPGROUPS * WARPGROUP_ROWS
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24


def dq_kernel(
    spec: FlashSpec, operands: tuple[Array, ...], shift: Array, ranges: Array,
    ids: tuple[Array, ...], *, kv_len: int, blocks: BackwardBlocks, ops: Ops,
    build: Callable[..., Callable[..., Any]],
) -> Array:  # fmt: skip
    """`[batch, q_len, heads, dim]`.

    Args:
      spec: of the attention.
      operands: q, k, v, dout in whole tiles; base-2 log-sum-exp and delta `[batch, heads, q_len]`.
      shift: position of the first query minus that of the first key, `[batch]`.
      ranges: key tiles of each query tile, `bounds.kv_tile_ranges`.
      ids: padded segment ids of queries and keys, or nothing.
      kv_len: number of keys that exist.
      blocks: block sizes.
      ops: hardware or interpreted.
      build: `plgpu.kernel` with what is common to all kernels.
    """
    q, k = operands[:2]
    batch, q_len, heads, dim = q.shape
    group = heads // k.shape[2]
    block_kv = blocks.dq_block_kv
    stages = min(blocks.dq_stages, k.shape[1] // block_kv)
    q_tiles = q_len // BLOCK_Q
    tile_shape = (WARPGROUP_ROWS, block_kv)

    def program(q, k, v, dout, lse, delta, shift, ranges, *rest):  # type: ignore[no-untyped-def]
        ids, (dq, *scratch) = rest[:num_ids], rest[num_ids:]
        q_tile, dout_tile, lse_tile, delta_tile, k_tiles, v_tiles, *barriers = scratch
        rows_ready, k_ready, v_ready, k_done, v_done = barriers
        b, h, wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
        i = lax.axis_index("i")
        if spec.right is not None:
            i = q_tiles - 1 - i  # the longest rows first
        begin, full_begin, full_end, end = (ranges[b, i, n] for n in range(4))

        def slot_of(j: Array) -> Array:
            return lax.rem(j, jnp.int32(stages))

        @pl.when(wg < COMPUTE_WARPGROUPS)
        def compute() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            first = i * BLOCK_Q + wg * WARPGROUP_ROWS
            rows = pl.ds(first, WARPGROUP_ROWS)
            ready = rows_ready.at[wg]
            plgpu.copy_gmem_to_smem(q.at[b, rows, h], q_tile.at[wg], ready)
            plgpu.copy_gmem_to_smem(dout.at[b, rows, h], dout_tile.at[wg], ready)
            plgpu.copy_gmem_to_smem(lse.at[b, h, rows], lse_tile.at[wg], ready)
            plgpu.copy_gmem_to_smem(delta.at[b, h, rows], delta_tile.at[wg], ready)
            plgpu.barrier_wait(ready)
            tile = ScoreTile(
                spec=spec, ops=ops, kv_len=kv_len, block_kv=block_kv, shift=shift[b],
                ids=tuple(x.at[b] for x in ids),
            )  # fmt: skip
            lse_rows, delta_rows = (ops.load_rows(x.at[wg]) for x in (lse_tile, delta_tile))

            def step(j, total):  # type: ignore[no-untyped-def]
                slot = slot_of(j)
                plgpu.barrier_wait(k_ready.at[slot])
                (dots,) = ops.products(Product(q_tile.at[wg], k_tiles.at[slot], transpose_b=True))
                partial = (j < full_begin) | (j >= full_end)
                scores, slope = tile.scores(dots, first, j * block_kv, partial)
                p = jnp.exp2(scores - lax.broadcast_in_dim(lse_rows, tile_shape, [0]))
                plgpu.barrier_wait(v_ready.at[slot])
                (dp,) = ops.products(Product(dout_tile.at[wg], v_tiles.at[slot], transpose_b=True))
                plgpu.barrier_arrive(v_done.at[slot])
                ds = p * (dp - lax.broadcast_in_dim(delta_rows, tile_shape, [0]))
                ds = ds if slope is None else ds * slope
                (total,) = ops.products(Product(ds.astype(dq.dtype), k_tiles.at[slot], start=total))
                plgpu.barrier_arrive(k_done.at[slot])
                return total

            total = lax.fori_loop(begin, end, step, ops.zeros((WARPGROUP_ROWS, dim)))
            q_tile.at[wg][...] = (total * spec.scale).astype(dq.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile.at[wg], dq.at[b, rows, h])
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
                plgpu.barrier_wait(k_done.at[slot_of(j)])
                plgpu.barrier_wait(v_done.at[slot_of(j)])

            lax.fori_loop(lax.max(begin, end - stages), end, see_the_end, None)

    num_ids = len(ids)
    rows_shape = (COMPUTE_WARPGROUPS, WARPGROUP_ROWS)
    done = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages)
    kernel = build(
        program,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(heads, q_tiles, batch),
        grid_names=("h", "i", "b"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        scratch_types=(
            shared_tile((*rows_shape, dim), q.dtype),
            shared_tile((*rows_shape, dim), q.dtype),
            plgpu.SMEM(rows_shape, jnp.float32),
            plgpu.SMEM(rows_shape, jnp.float32),
            shared_tile((stages, block_kv, dim), q.dtype),
            shared_tile((stages, block_kv, dim), q.dtype),
            plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            done,
            done,
        ),
    )
    return kernel(*operands, shift, ranges, *ids)
