"""Scores of one tile in the registers of a warpgroup, shared by the Hopper kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from alpa_lite.runtime.kernels.flash.hopper_ops import Ops
from alpa_lite.runtime.kernels.flash.spec import LOG2_E, FlashSpec

Array = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTile:
    """Turns products q @ k^T of a tile into base-2 scores with `-inf` where a pair does not count.

    Attributes:
      spec: of the attention.
      ops: of the kernel.
      kv_len: number of keys that exist.
      block_kv: what the padded number of keys is a multiple of.
      shift: position of the first query minus that of the first key; a scalar.
      ids: references to the segment ids of this example's queries and keys, or nothing.
      transposed: rows of the tile are keys, columns are queries.
    """

    spec: FlashSpec
    ops: Ops
    kv_len: int
    block_kv: int
    shift: Any
    ids: tuple[Any, ...] = ()
    transposed: bool = False

    @property
    def masked(self) -> bool:
        """Whether any tile needs a mask."""
        return self.spec.banded or bool(self.ids) or self.kv_len % self.block_kv != 0

    def scores(
        self, dots: Array, q_start: Array, kv_start: Array, partial: Array
    ) -> tuple[Array, Array | None]:
        """(base-2 scores, derivative of the soft cap or None).

        Args:
          dots: products, `[queries, keys]` or transposed.
          q_start: index of the first query of the tile.
          kv_start: index of the first key of the tile.
          partial: whether some pair of the tile may not count.
        """
        slope = None
        if self.spec.softcap is None:
            scores = dots * (self.spec.scale * LOG2_E)
        else:
            capped = jnp.tanh(dots * (self.spec.scale / self.spec.softcap))
            scores = capped * (self.spec.softcap * LOG2_E)
            slope = 1.0 - capped * capped
        if self.masked:
            # One loop with a branch: ptxas serialises wgmma if there is a second, masked loop.
            scores = lax.cond(
                partial, lambda s: self._mask(s, q_start, kv_start), lambda s: s, scores
            )
        return scores, slope

    def _mask(self, scores: Array, q_start: Array, kv_start: Array) -> Array:
        queries, keys = (1, 0) if self.transposed else (0, 1)
        q_index = self.ops.iota(scores.shape, queries)
        kv_index = self.ops.iota(scores.shape, keys)
        distance = q_index - kv_index
        start = self.shift + q_start - kv_start
        keep = []
        if self.spec.left is not None:
            keep.append(distance <= self.spec.left - start)
        if self.spec.right is not None:
            keep.append(distance >= -self.spec.right - start)
        if self.kv_len % self.block_kv:
            keep.append(kv_index < self.kv_len - kv_start)
        if self.ids:
            keep.append(self._same_segment(scores.shape, q_start, kv_start))
        for mask in keep:
            scores = jnp.where(mask, scores, -jnp.inf)
        return scores

    def _same_segment(self, shape: tuple[int, int], q_start: Array, kv_start: Array) -> Array:
        sizes = shape[::-1] if self.transposed else shape
        starts = (q_start, kv_start)
        parts = [
            ref.at[pl.ds(start, size)]
            for ref, start, size in zip(self.ids, starts, sizes, strict=True)
        ]
        rows, cols = parts[::-1] if self.transposed else parts
        of_rows = lax.broadcast_in_dim(self.ops.load_rows(rows, in_shared=False), shape, [0])
        of_cols = lax.broadcast_in_dim(self.ops.load_cols(cols, in_shared=False), shape, [1])
        return of_rows == of_cols
