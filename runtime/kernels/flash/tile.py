"""The scores of one tile, the same for every implementation that is written in plain JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from alpa_lite.runtime.kernels.flash.spec import LOG2_E, FlashSpec

Array = Any


def accumulator_dtype(dtype: Any) -> Any:
    """Sums and exponentials are in float32, or in float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def precision_of(dtype: Any) -> lax.Precision | None:
    """Products of float32 numbers are those of float32, also where the default is TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else None


def base2_scores(spec: FlashSpec, dots: Array) -> tuple[Array, Array | None]:
    """(scores times log2(e), derivative of the soft cap or None) from q @ k^T."""
    if spec.softcap is None:
        return dots * (spec.scale * LOG2_E), None
    capped = jnp.tanh(dots * (spec.scale / spec.softcap))
    return capped * (spec.softcap * LOG2_E), 1.0 - capped * capped


def visible(
    spec: FlashSpec, distance: Array, q_ids: Array | None, kv_ids: Array | None
) -> Array | None:
    """Which pairs count, or None for all.

    Args:
      spec: of the attention.
      distance: position of the query minus that of the key.
      q_ids: segment ids, to broadcast against those of the keys, or None.
      kv_ids: likewise.
    """
    masks = []
    if spec.left is not None:
        masks.append(distance <= spec.left)
    if spec.right is not None:
        masks.append(distance >= -spec.right)
    if q_ids is not None:
        masks.append(q_ids == kv_ids)
    result = None
    for mask in masks:
        result = mask if result is None else result & mask
    return result
