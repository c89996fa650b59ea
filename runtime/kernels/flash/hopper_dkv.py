"""The kernel for dk and dv on Hopper, which can add up dq as well.

A program owns a tile of keys and walks along the queries of all heads that read it, so that the sum
over a group of heads is made in registers. Scores are transposed, keys by queries: then the
probabilities and `ds` are left operands of their products and need not leave the registers.

Three forms:

- Head dims up to 128: two warpgroups own 64 keys each, dk and dv of them in registers.
- Larger ones, where both do not fit: two warpgroups share 64 keys, one owns dk, the other dv.
  Scores are made twice, five products for four.
- Fused, head dim 128: `ds` of both warpgroups goes through shared memory, each makes half of the
  columns of the tile's share of dq, and TMA adds it to float32 numbers in global memory. Five
  products where two kernels take seven; the order of the additions is not fixed. This is the
  backward pass of FlashAttention-3 (arXiv:2407.08608, section 3.1 and appendix B).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from alpa_lite.compat import mosaic_gpu as plgpu
from alpa_lite.runtime.kernels.flash.block_sizes import FUSED, BackwardBlocks
from alpa_lite.runtime.kernels.flash.hopper_ops import (
    WARPGROUP_ROWS,
    Ops,
    Product,
    shared_tile,
)
from alpa_lite.runtime.kernels.flash.hopper_tile import ScoreTile
from alpa_lite.runtime.kernels.flash.spec import FlashSpec

Array = Any
WARPGROUPS = 2  # that compute
BLOCK_Q = 64
MAX_UNSHARED_DIM = 128  # 64 rows of dk and of dv take 2 * dim / 2 registers of each lane
FUSED_DIM = 128
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24


def block_kv_of(dim: int) -> int:
    """Keys of a program."""
    return WARPGROUP_ROWS * (WARPGROUPS if dim <= MAX_UNSHARED_DIM else 1)


def dkv_kernel(
    spec: FlashSpec, operands: tuple[Array, ...], shift: Array, ranges: Array,
    ids: tuple[Array, ...], *, kv_len: int, blocks: BackwardBlocks, ops: Ops,
    build: Callable[..., Callable[..., Any]], dq_sum: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(dk, dv) of the shape of k.

    Args:
      spec: of the attention.
      operands: as of `dq_kernel`.
      shift: position of the first query minus that of the first key, `[batch]`.
      ranges: query tiles of each key tile, `bounds.q_tile_ranges`.
      ids: padded segment ids of queries and keys, or nothing.
      kv_len: number of keys that exist.
      blocks: block sizes.
      ops: hardware or interpreted.
      build: `plgpu.kernel` with what is common to all kernels.
      dq_sum: a reference to float32 zeros of the shape of q that dq is added to (fused form), or
        None.
    """
    q, k = operands[:2]
    batch, _, kv_heads, dim = k.shape
    group = q.shape[2] // kv_heads
    shared = dim > MAX_UNSHARED_DIM
    fused = dq_sum is not None
    assert not fused or (dim == FUSED_DIM and blocks.kind == FUSED)
    block_kv = block_kv_of(dim)
    stages = blocks.dkv_stages
    half = dim // WARPGROUPS
    shape = (WARPGROUP_ROWS, BLOCK_Q)
    num_inputs = len(operands) + 2 + len(ids) + fused

    def program(*refs):  # type: ignore[no-untyped-def]
        inputs, (dk, dv, *scratch) = refs[:num_inputs], refs[num_inputs:]
        q, k, v, dout, lse, delta, shift, ranges, *more = inputs
        ids, dq = more[: len(more) - fused], more[-1] if fused else None
        k_tile, v_tile, q_tiles, dout_tiles, lse_tiles, delta_tiles, *scratch = scratch
        kv_ready, q_ready, dout_ready, q_done, dout_done, together, *scratch = scratch
        b, kv_head, wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
        j = lax.axis_index("j")
        begin, full_begin, full_end, end = (ranges[b, j, n] for n in range(4))
        per_head = end - begin
        steps = per_head * group

        def slot_of(t: Array) -> Array:
            return lax.rem(t, jnp.int32(stages))

        def head_and_tile(t: Array) -> tuple[Array, Array]:
            return kv_head * group + lax.div(t, per_head), begin + lax.rem(t, per_head)

        def meet() -> None:
            plgpu.barrier_arrive(together)
            plgpu.barrier_wait(together)

        def compute(owns_dk: bool, owns_dv: bool) -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            start = 0 if shared else wg * WARPGROUP_ROWS
            first = j * block_kv + start
            mine = pl.ds(start, WARPGROUP_ROWS)
            my_k, my_v = k_tile.at[mine], v_tile.at[mine]
            tile = ScoreTile(
                spec=spec, ops=ops, kv_len=kv_len, block_kv=block_kv, shift=shift[b],
                ids=tuple(x.at[b] for x in ids), transposed=True,
            )  # fmt: skip
            plgpu.barrier_wait(kv_ready)

            def step(t, totals):  # type: ignore[no-untyped-def]
                slot, (head, i) = slot_of(t), head_and_tile(t)
                plgpu.barrier_wait(q_ready.at[slot])
                (dots,) = ops.products(Product(my_k, q_tiles.at[slot], transpose_b=True))
                lse_cols = ops.load_cols(lse_tiles.at[slot])
                partial = (i < full_begin) | (i >= full_end)
                scores, slope = tile.scores(dots, i * BLOCK_Q, first, partial)
                p = jnp.exp2(scores - lax.broadcast_in_dim(lse_cols, shape, [1]))
                plgpu.barrier_wait(dout_ready.at[slot])
                products = []
                if owns_dk:
                    delta_cols = ops.load_cols(delta_tiles.at[slot])
                    products += [Product(my_v, dout_tiles.at[slot], transpose_b=True)]
                if owns_dv:
                    products += [Product(p.astype(dv.dtype), dout_tiles.at[slot], start=totals[-1])]
                dp, *dv_total = results = ops.products(*products)
                plgpu.barrier_arrive(dout_done.at[slot])
                if not owns_dk:
                    plgpu.barrier_arrive(q_done.at[slot])
                    return tuple(results)
                ds = p * (dp - lax.broadcast_in_dim(delta_cols, shape, [1]))
                ds = (ds if slope is None else ds * slope).astype(dk.dtype)
                if fused:
                    share_ds(t, ds)
                (dk_total,) = ops.products(Product(ds, q_tiles.at[slot], start=totals[0]))
                plgpu.barrier_arrive(q_done.at[slot])
                if fused:
                    add_dq(t, head, i)
                return (dk_total, *dv_total)

            def share_ds(t, ds):  # type: ignore[no-untyped-def]
                scratch[0].at[lax.rem(t, jnp.int32(2)), mine][...] = ds
                plgpu.commit_smem()
                plgpu.barrier_arrive(together)

            def add_dq(t, head, i):  # type: ignore[no-untyped-def]
                ds_tiles, dq_tiles = scratch
                columns = pl.ds(wg * half, half)
                plgpu.barrier_wait(together)
                (dq_part,) = ops.products(
                    Product(
                        ds_tiles.at[lax.rem(t, jnp.int32(2))], k_tile.at[:, columns],
                        transpose_a=True,
                    )
                )  # fmt: skip
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                assert dq is not None
                target = dq.at[b, pl.ds(i * BLOCK_Q, BLOCK_Q), head, columns]
                ops.add_to_global(dq_tiles.at[wg], target, dq_part * spec.scale)

            zeros = ops.zeros((WARPGROUP_ROWS, dim))
            totals = lax.fori_loop(0, steps, step, (zeros,) * (owns_dk + owns_dv))
            plgpu.wait_smem_to_gmem(0)
            if shared or fused:
                meet()  # the other warpgroup may still read the keys and values
            rows = pl.ds(first, WARPGROUP_ROWS)
            if owns_dk:
                my_k[...] = (totals[0] * spec.scale).astype(dk.dtype)
            if owns_dv:
                my_v[...] = totals[-1].astype(dv.dtype)
            plgpu.commit_smem()
            if owns_dk:
                plgpu.copy_smem_to_gmem(my_k, dk.at[b, rows, kv_head])
            if owns_dv:
                plgpu.copy_smem_to_gmem(my_v, dv.at[b, rows, kv_head])
            plgpu.wait_smem_to_gmem(0)

        if shared:
            pl.when(wg == 0)(lambda: compute(owns_dk=True, owns_dv=False))
            pl.when(wg == 1)(lambda: compute(owns_dk=False, owns_dv=True))
        else:
            pl.when(wg < WARPGROUPS)(lambda: compute(owns_dk=True, owns_dv=True))

        @pl.when(wg == WARPGROUPS)
        def copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            keys = pl.ds(j * block_kv, block_kv)
            plgpu.copy_gmem_to_smem(k.at[b, keys, kv_head], k_tile, kv_ready)
            plgpu.copy_gmem_to_smem(v.at[b, keys, kv_head], v_tile, kv_ready)

            def step(t, _):  # type: ignore[no-untyped-def]
                slot, (head, i) = slot_of(t), head_and_tile(t)
                queries = pl.ds(i * BLOCK_Q, BLOCK_Q)
                for tiles, rows, tile_slots, row_slots, ready, done in (
                    (q, lse, q_tiles, lse_tiles, q_ready, q_done),
                    (dout, delta, dout_tiles, delta_tiles, dout_ready, dout_done),
                ):

                    @pl.when(t >= stages)
                    def wait_until_free(done=done) -> None:  # type: ignore[no-untyped-def]
                        plgpu.barrier_wait(done.at[slot])

                    arrived = ready.at[slot]
                    plgpu.copy_gmem_to_smem(
                        tiles.at[b, queries, head], tile_slots.at[slot], arrived
                    )
                    plgpu.copy_gmem_to_smem(rows.at[b, head, queries], row_slots.at[slot], arrived)

            lax.fori_loop(0, steps, step, None)

            def see_the_end(t, _):  # type: ignore[no-untyped-def]
                plgpu.barrier_wait(q_done.at[slot_of(t)])
                plgpu.barrier_wait(dout_done.at[slot_of(t)])

            lax.fori_loop(lax.max(steps - stages, jnp.int32(0)), steps, see_the_end, None)

    ready = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    done = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    scratch = [
        shared_tile((block_kv, dim), q.dtype),
        shared_tile((block_kv, dim), q.dtype),
        shared_tile((stages, BLOCK_Q, dim), q.dtype),
        shared_tile((stages, BLOCK_Q, dim), q.dtype),
        plgpu.SMEM((stages, BLOCK_Q), jnp.float32),
        plgpu.SMEM((stages, BLOCK_Q), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
        ready,
        ready,
        done,
        done,
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]
    if fused:
        scratch += [
            shared_tile((2, block_kv, BLOCK_Q), q.dtype),
            shared_tile((WARPGROUPS, BLOCK_Q, half), jnp.float32),
        ]
    kernel = build(
        program,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)),
        grid=(kv_heads, ranges.shape[1], batch),  # the dq kernel may want more keys filled in
        grid_names=("h", "j", "b"),
        num_threads=WARPGROUPS + 1,
        scratch_types=tuple(scratch),
    )
    dk, dv = kernel(*operands, shift, ranges, *ids, *([dq_sum] if fused else []))
    return dk, dv
