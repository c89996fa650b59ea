"""`flash_attention`: the function that users call."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from alpa_lite import compat
from alpa_lite.runtime.kernels.flash.arguments import check_arguments
from alpa_lite.runtime.kernels.flash.primitive import backward, forward
from alpa_lite.runtime.kernels.flash.spec import FlashSpec
from alpa_lite.runtime.kernels.flash.tile import accumulator_dtype

Array = Any

OUT_NAME = "flash_attention_out"
LSE_NAME = "flash_attention_lse"


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_offset: Array | int | None = None,
    kv_offset: Array | int | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention in memory linear in the sequence.

    `softmax(scale * q @ k^T) @ v` for each head, without the matrix of scores ever being held:
    tiles of it are made, used and forgotten, forward and backward. Sums are in float32.

    The query with index `i` is at position `q_offset + i`, the key with index `j` at
    `kv_offset + j`; masks compare positions. So `causal=True` lets query `i` see keys `0` to `i`,
    as in `jax.nn.dot_product_attention`, also where there are more keys than queries; to continue a
    sequence of `n` cached keys pass `q_offset=n - q.shape[1]`. A query that sees no key has output
    0, log-sum-exp `-inf` and zero gradients.

    Differentiable in q, k and v, once and in reverse; works under `jit`, `vmap`, `scan`,
    `jax.checkpoint` and `jax.shard_map`. For `jax.checkpoint` the output and the log-sum-exp are
    named `flash_attention_out` and `flash_attention_lse`: a policy that saves both names spares the
    second forward pass.

    Args:
      q: queries `[batch, q_len, heads, head_dim]`, bfloat16, float16 or float32.
      k: keys `[batch, kv_len, kv_heads, head_dim]`; `kv_heads` divides `heads`, and query head `h`
        reads key head `h // (heads // kv_heads)`.
      v: values `[batch, kv_len, kv_heads, v_dim]`.
      causal: no query sees a key at a later position.
      window: with `causal`, a number of keys: the query's own position and those before it. Or
        `(left, right)`: how many positions a query sees before and after its own, None for all.
      segment_ids: integers; a query sees the keys of its own segment. One array
        `[batch, q_len]` for both where `q_len == kv_len`, or `(of queries, of keys)`. Any order.
      scale: of the scores; `head_dim ** -0.5` by default.
      softcap: scores become `softcap * tanh(score / softcap)`.
      q_offset: position of the first query, an integer or `[batch]`; 0 by default.
      kv_offset: position of the first key, likewise.
      implementation: `"mosaic_gpu"` (Hopper kernels), `"pallas"` (portable kernels) or `"scan"`
        (loops of XLA operations). By default Hopper GPUs use the first for 16-bit types and head
        dims up to 256, and everything else the last.
      return_lse: return `(output, lse)`, with natural logarithms `[batch, heads, q_len]`.

    Returns:
      `[batch, q_len, heads, v_dim]`, of q's dtype.

    Raises:
      TypeError: an argument has a type that does not fit.
      ValueError: shapes or values do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> q = jax.random.normal(jax.random.key(0), (2, 100, 8, 64), jnp.bfloat16)
      >>> kv = jax.random.normal(jax.random.key(1), (2, 100, 2, 64), jnp.bfloat16)
      >>> flash_attention(q, kv, kv, causal=True, window=32).shape
      (2, 100, 8, 64)

    References:
      Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135; Shah et al., FlashAttention-3,
      https://arxiv.org/abs/2407.08608.
    """
    spec, ids = check_arguments(
        q, k, v, causal=causal, window=window, segment_ids=segment_ids, scale=scale,
        softcap=softcap, offsets={"q_offset": q_offset, "kv_offset": kv_offset},
        implementation=implementation,
    )  # fmt: skip
    batch = q.shape[0]
    operands = compat.vary_alike(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v),
        _positions(q_offset, batch), _positions(kv_offset, batch), *ids,
    )  # fmt: skip
    out, lse = _attend(spec, *operands)
    return (out, lse) if return_lse else out


def _positions(offset: Array | int | None, batch: int) -> Array:
    return jnp.broadcast_to(jnp.asarray(0 if offset is None else offset, jnp.int32), (batch,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: FlashSpec, *operands: Array) -> tuple[Array, Array]:
    return forward(spec, *operands)


def _attend_forward(spec: FlashSpec, *operands: Array) -> tuple[Any, Any]:
    out, lse = forward(spec, *operands)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (out, lse), (operands, out, lse)


def _attend_backward(spec: FlashSpec, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    (q, k, v, *rest), out, lse = residuals
    dout, dlse = cotangents
    acc = accumulator_dtype(q.dtype)
    # The gradient of score ij is p_ij * (dout_i . v_j - out_i . dout_i + dlse_i).
    delta = (out.astype(acc) * dout.astype(acc)).sum(axis=-1).swapaxes(1, 2) - dlse
    gradients = backward(spec, q, k, v, lse, delta, dout, *rest)
    return (*gradients, *(None for _ in rest))


_attend.defvjp(_attend_forward, _attend_backward)
