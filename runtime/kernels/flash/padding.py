"""Filling arrays up to whole tiles, and cutting the results back."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

Array = Any


def fill(x: Array, *sizes: tuple[int, int], value: float = 0) -> Array:
    """`x` with `value` after its end along each `(dim, size)`."""
    widths = [(0, 0)] * x.ndim
    for dim, size in sizes:
        widths[dim] = (0, size - x.shape[dim])
    return x if not any(after for _, after in widths) else jnp.pad(x, widths, constant_values=value)


def cut(x: Array, *sizes: tuple[int, int]) -> Array:
    """The first `size` elements along each `(dim, size)`."""
    index = [slice(None)] * x.ndim
    for dim, size in sizes:
        index[dim] = slice(size)
    return x[tuple(index)]


def masked_rows(lse: Array, delta: Array, q_len: int) -> tuple[Array, Array]:
    """Log-sum-exp and delta `[batch, heads, q_len]` such that rows without keys have no gradient.

    Backward kernels compute `p = exp(score - lse)`. With `+inf` that is 0, for rows that see
    nothing (whose log-sum-exp is `-inf`) and for those that were filled in.
    """
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    return fill(lse, (2, q_len), value=jnp.inf), fill(delta, (2, q_len))
