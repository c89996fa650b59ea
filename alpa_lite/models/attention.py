"""Causal attention and rotary positions, written so that every dim can be sharded.

Heads are a dim of their own, `[batch, seq, heads, head_dim]`; batch and seq are never merged.
Grouped-query attention reshapes the queries instead of repeating keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

AttentionFunction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(q, k, v) -> out` with the shapes of `causal_attention`, and as causal."""


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention in which position i sees positions 0..i.

    Args:
        q: `[batch, seq, heads, head_dim]`.
        k: `[batch, seq, kv_heads, head_dim]`; `kv_heads` divides `heads`, and each key head
            serves `heads / kv_heads` neighbouring query heads.
        v: `[batch, seq, kv_heads, value_dim]`.

    Returns:
        `[batch, seq, heads, value_dim]`.
    """
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q * jnp.asarray(head_dim**-0.5, q.dtype)
    if kv_heads == heads:
        probs = causal_softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", probs, v)
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    probs = causal_softmax(jnp.einsum("bqhgd,bkhd->bhgqk", q, k))
    out = jnp.einsum("bhgqk,bkhd->bqhgd", probs, v)
    return out.reshape(batch, seq, heads, v.shape[-1])


def causal_softmax(scores: jax.Array) -> jax.Array:
    """Softmax over keys, computed in float32, returned in the dtype of the scores.

    Args:
        scores: `[..., queries, keys]`; keys after the query get probability 0.
    """
    queries = jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], 0)
    keys = jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], 1)
    lowest = jnp.finfo(jnp.float32).min
    masked = jnp.where(queries >= keys, scores.astype(jnp.float32), lowest)
    return jax.nn.softmax(masked, axis=-1).astype(scores.dtype)


def apply_rope(x: jax.Array, *, theta: float) -> jax.Array:
    """Rotary position embedding, the half-split form of Llama's released weights.

    Dim pair (i, i + dim/2) of position p turns by the angle `p * theta ** (-2 i / dim)`.

    Args:
        x: `[batch, seq, heads, dim]` with even `dim`.
        theta: Base of the frequencies.

    Returns:
        The rotated array, same shape and dtype; the rotation itself is done in float32.

    References:
        RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.
    """
    seq, dim = x.shape[1], x.shape[3]
    inverse_frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = jnp.arange(seq, dtype=jnp.float32)[:, None] * inverse_frequency[None, :]
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
