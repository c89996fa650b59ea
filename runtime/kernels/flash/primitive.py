"""The primitives `flash_attention` and `flash_attention_backward`.

To the compiler an attention is one operation: a planner prices it by its primitive, gives it a
sharding rule, and binds it again on the parts of its operands. Both primitives are local: they know
nothing of meshes. What joins parts of one attention, in a ring for instance, is the offsets that
every operand carries, and the log-sum-exp (`merge`).

Operands have a batch dim throughout, offsets too, so that `vmap` is a matter of reshaping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from alpa_lite import compat
from alpa_lite.runtime.kernels.flash.choice import choose
from alpa_lite.runtime.kernels.flash.spec import FlashSpec
from alpa_lite.runtime.kernels.flash.tile import accumulator_dtype

Array = Any

flash_attention_p = Primitive("flash_attention")
flash_attention_p.multiple_results = True
flash_attention_backward_p = Primitive("flash_attention_backward")
flash_attention_backward_p.multiple_results = True


def forward(
    spec: FlashSpec, q: Array, k: Array, v: Array, q_offset: Array, kv_offset: Array, *ids: Array
) -> tuple[Array, Array]:
    """Attention and the logarithm of the sum over its exponentials. Not differentiable.

    Args:
      spec: of the attention.
      q: `[batch, q_len, heads, head_dim]`.
      k: `[batch, kv_len, kv_heads, head_dim]`; query head `h` reads key head
        `h // (heads // kv_heads)`.
      v: `[batch, kv_len, kv_heads, v_dim]`.
      q_offset: position of the first query, `[batch]`, int32.
      kv_offset: position of the first key, `[batch]`, int32.
      *ids: segment ids `[batch, q_len]` and `[batch, kv_len]`, int32, or nothing.

    Returns:
      `[batch, q_len, heads, v_dim]`, and natural logarithms `[batch, heads, q_len]` in float32. A
      query that sees no key has output 0 and log-sum-exp `-inf`.
    """
    out, lse = flash_attention_p.bind(q, k, v, q_offset, kv_offset, *ids, spec=spec)
    return out, lse


def backward(
    spec: FlashSpec, q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array,
    q_offset: Array, kv_offset: Array, *ids: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of q, k and v.

    Linear in (`delta`, `dout`) and additive over parts of the keys, given the log-sum-exp of all.

    Args:
      spec: of the attention.
      q: as in `forward`.
      k: as in `forward`.
      v: as in `forward`.
      lse: log-sum-exp, `[batch, heads, q_len]`.
      delta: `sum(out * dout, axis=-1) - dlse`, of the shape of `lse`.
      dout: gradient of the output.
      q_offset: as in `forward`.
      kv_offset: as in `forward`.
      *ids: as in `forward`.
    """
    dq, dk, dv = flash_attention_backward_p.bind(
        q, k, v, lse, delta, dout, q_offset, kv_offset, *ids, spec=spec
    )
    return dq, dk, dv


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """The attention over two disjoint sets of keys, from those over each.

    Args:
      out_a: `[batch, seq, heads, v_dim]`; float32, or what is added up loses digits.
      lse_a: `[batch, heads, seq]`.
      out_b: likewise.
      lse_b: likewise.
    """
    lse = jnp.logaddexp(lse_a, lse_b)
    base = jnp.where(lse == -jnp.inf, 0.0, lse)

    def weighted(out: Array, part: Array) -> Array:
        return out * jnp.exp(part - base).swapaxes(1, 2)[..., None]

    return weighted(out_a, lse_a) + weighted(out_b, lse_b), lse


@flash_attention_p.def_abstract_eval
def _forward_shapes(q: Any, k: Any, v: Any, *_: Any, spec: FlashSpec) -> list[Any]:
    batch, q_len, heads, _ = q.shape
    out = compat.like(q, (batch, q_len, heads, v.shape[-1]), q.dtype, dims=(0, 1, 2, None))
    lse = compat.like(q, (batch, heads, q_len), accumulator_dtype(q.dtype), dims=(0, 2, 1))
    return [out, lse]


@flash_attention_backward_p.def_abstract_eval
def _backward_shapes(q: Any, k: Any, v: Any, *_: Any, spec: FlashSpec) -> list[Any]:
    return [q, k, v]


@functools.partial(jax.jit, static_argnames=("primitive", "spec"))
def _jitted(*operands: Array, primitive: Primitive, spec: FlashSpec) -> list[Array]:
    return primitive.bind(*operands, spec=spec)


def _batch(
    operands: Sequence[Array], dims: Sequence[int | None], *, primitive: Primitive, spec: FlashSpec
) -> tuple[list[Array], list[int]]:
    """Every operand and result begins with the batch: the mapped dim becomes part of it."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)

    def fold(x: Array, dim: int | None) -> Array:
        full = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        return full.reshape(-1, *full.shape[2:])

    results = primitive.bind(*map(fold, operands, dims), spec=spec)
    return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)


def _register(primitive: Primitive, pick: Callable[[Any], Callable[..., Any]]) -> None:
    def lower(platform: str) -> Any:
        def run(*operands: Array, spec: FlashSpec) -> Any:
            q, _, v = operands[:3]
            head_dim = max(q.shape[-1], v.shape[-1])
            functions = choose(spec.implementation, platform, q.dtype, head_dim)
            return pick(functions)(spec, *operands)

        return compat.lower_unmapped(run)

    primitive.def_impl(functools.partial(_jitted, primitive=primitive))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive=primitive)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        mlir.register_lowering(primitive, lower(platform), platform=platform)


_register(flash_attention_p, lambda functions: functions.forward)
_register(flash_attention_backward_p, lambda functions: functions.backward)
