"""Attention on Hopper GPUs: fills arrays up to whole tiles and calls the kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from alpa_lite import compat
from alpa_lite.compat import mosaic_gpu as plgpu
from alpa_lite.runtime.kernels.flash import hopper_dkv, hopper_dq, hopper_forward
from alpa_lite.runtime.kernels.flash.block_sizes import (
    FUSED,
    Blocks,
    blocks_for,
    mask_class,
    supported_head_dim,
)
from alpa_lite.runtime.kernels.flash.bounds import kv_tile_ranges, num_blocks, q_tile_ranges
from alpa_lite.runtime.kernels.flash.choice import cuda_device
from alpa_lite.runtime.kernels.flash.hopper_ops import Hardware, Interpreted, Ops
from alpa_lite.runtime.kernels.flash.padding import cut, fill, masked_rows
from alpa_lite.runtime.kernels.flash.spec import LOG2_E, FlashSpec

Array = Any


def forward(
    spec: FlashSpec, q: Array, k: Array, v: Array, q_offset: Array, kv_offset: Array,
    *ids: Array, blocks: Blocks | None = None, interpret: Any = None, semantics: Any = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(output, log-sum-exp); for shapes see `primitive.forward`.

    Args:
      spec: of the attention.
      q: queries.
      k: keys.
      v: values.
      q_offset: position of the first query.
      kv_offset: position of the first key.
      *ids: segment ids.
      blocks: block sizes, those of `block_sizes` by default.
      interpret: `compat.gpu_interpreter` to run on CPU.
      semantics: `plgpu.LoweringSemantics`; by lanes by default.
    """
    q_len, kv_len, v_dim = q.shape[1], k.shape[1], v.shape[3]
    sizes = (blocks or _blocks(spec, q, v, ids)).forward
    ranges = kv_tile_ranges(
        spec, q_offset, kv_offset, ids, q_len, kv_len, hopper_forward.BLOCK_Q, sizes.block_kv
    )
    last = num_blocks(kv_len, sizes.block_kv) - 1
    q, k, v, ids = _fill_all(q, k, v, ids, hopper_forward.BLOCK_Q, sizes.block_kv)
    out, lse = hopper_forward.forward_kernel(
        spec, q, k, v, q_offset - kv_offset, _at_least_one(ranges, last), ids, kv_len=kv_len,
        blocks=sizes, ops=_ops(interpret), build=_builder(interpret, semantics),
    )  # fmt: skip
    return cut(out, (1, q_len), (3, v_dim)), cut(lse, (2, q_len))


def backward(
    spec: FlashSpec, q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array,
    q_offset: Array, kv_offset: Array, *ids: Array, blocks: Blocks | None = None,
    interpret: Any = None, semantics: Any = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients (dq, dk, dv); for shapes see `primitive.backward`, for the rest `forward`."""
    shapes = (q.shape, k.shape, v.shape)
    sizes = (blocks or _blocks(spec, q, v, ids)).backward
    dim = supported_head_dim(max(q.shape[3], v.shape[3]))
    block_q = hopper_dq.BLOCK_Q
    block_kv = math.lcm(sizes.dq_block_kv, hopper_dkv.block_kv_of(dim))
    kv_len = k.shape[1]
    bounds = (spec, q_offset, kv_offset, ids, q.shape[1], kv_len)
    dkv_ranges = q_tile_ranges(*bounds, hopper_dkv.BLOCK_Q, hopper_dkv.block_kv_of(dim))
    dq_ranges = kv_tile_ranges(*bounds, block_q, sizes.dq_block_kv)
    q, k, v, ids = _fill_all(q, k, v, ids, block_q, block_kv)
    dout = fill(dout, (1, q.shape[1]), (3, dim))
    lse, delta = masked_rows(lse * LOG2_E, delta, q.shape[1])
    operands = (q, k, v, dout, lse, delta)
    shift = q_offset - kv_offset
    common = {"kv_len": kv_len, "blocks": sizes, "ops": _ops(interpret)}
    if sizes.kind == FUSED:
        dq_sum = jax.new_ref(jnp.zeros(q.shape, jnp.float32), **_memory_space(interpret))
        dk, dv = hopper_dkv.dkv_kernel(
            spec, operands, shift, dkv_ranges, ids, **common, dq_sum=dq_sum,
            build=_builder_with_refs(interpret, semantics),
        )  # fmt: skip
        dq = dq_sum[...].astype(q.dtype)
    else:
        build = _builder(interpret, semantics)
        dq = hopper_dq.dq_kernel(spec, operands, shift, dq_ranges, ids, **common, build=build)
        dk, dv = hopper_dkv.dkv_kernel(
            spec, operands, shift, dkv_ranges, ids, **common, build=build
        )
    dq, dk, dv = (
        cut(x, (1, shape[1]), (3, shape[3])) for x, shape in zip((dq, dk, dv), shapes, strict=True)
    )
    return dq, dk, dv


def _blocks(spec: FlashSpec, q: Array, v: Array, ids: tuple[Array, ...]) -> Blocks:
    dim = supported_head_dim(max(q.shape[3], v.shape[3]))
    kind, _ = cuda_device()
    return blocks_for(kind, jnp.dtype(q.dtype).name, dim, mask_class(spec, bool(ids)))


def _fill_all(
    q: Array, k: Array, v: Array, ids: tuple[Array, ...], block_q: int, block_kv: int
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """All in whole tiles and of a head dim that kernels are made for."""
    dim = supported_head_dim(max(q.shape[3], v.shape[3]))
    q_len = num_blocks(q.shape[1], block_q) * block_q
    kv_len = num_blocks(k.shape[1], block_kv) * block_kv
    if ids:
        ids = (fill(ids[0], (1, q_len)), fill(ids[1], (1, kv_len)))
    k, v = (fill(x, (1, kv_len), (3, dim)) for x in (k, v))
    return fill(q, (1, q_len), (3, dim)), k, v, ids


def _at_least_one(ranges: Array, last: int) -> Array:
    """Ranges with a tile each: the forward kernel begins with one before its loop.

    Where no tile is seen it is masked whole, which gives an output of 0 and a log-sum-exp of -inf.
    """
    begin, full_begin, full_end, end = (ranges[..., n] for n in range(4))
    begin = jnp.minimum(begin, last)
    return jnp.stack([begin, full_begin, full_end, jnp.maximum(end, begin + 1)], axis=-1)


def _ops(interpret: Any) -> Ops:
    return Hardware() if interpret is None else Interpreted()


def _options(interpret: Any, semantics: Any) -> dict[str, Any]:
    params = plgpu.CompilerParams(
        approx_math=True, lowering_semantics=semantics or compat.lowering_semantics("Lane")
    )
    options: dict[str, Any] = {"compiler_params": params}
    return options if interpret is None else {**options, "interpret": interpret}


def _builder(interpret: Any, semantics: Any) -> Callable[..., Callable[..., Any]]:
    """`plgpu.kernel` with what is common to all kernels."""
    return functools.partial(plgpu.kernel, thread_name="wg", **_options(interpret, semantics))


def _builder_with_refs(interpret: Any, semantics: Any) -> Callable[..., Callable[..., Any]]:
    """The same for kernels with references among their operands, which `plgpu.kernel` refuses."""

    def build(
        body: Callable[..., None], *, out_type: Any, grid: tuple[int, ...],
        grid_names: tuple[str, ...], num_threads: int, scratch_types: tuple[Any, ...],
    ) -> Callable[..., Any]:  # fmt: skip
        mesh = plgpu.Mesh(
            grid=grid, grid_names=grid_names, num_threads=num_threads, thread_name="wg"
        )

        def with_scratch(*refs: Any) -> None:
            run = functools.partial(body, *refs)
            pl.run_scoped(run, *scratch_types, collective_axes="wg")

        return pl.kernel(
            with_scratch, out_type=out_type, mesh=mesh, **_options(interpret, semantics)
        )

    return build


def _memory_space(interpret: Any) -> dict[str, Any]:
    """The interpreter wants to be told where a reference is."""
    return {} if interpret is None else {"memory_space": plgpu.GMEM}
