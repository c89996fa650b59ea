"""Which tiles of the score matrix hold anything: the loops of every kernel run over these only.

The matrix is cut into tiles of `block_rows` by `block_cols`. Forward and dq kernels own a row of
tiles (rows are queries) and walk along it; dk/dv kernels own a row of the transpose (rows are
keys). For each row of tiles four numbers say where to walk:

    begin <= full_begin <= full_end <= end

Tiles outside `[begin, end)` hold no visible pair. Those in `[full_begin, full_end)` hold nothing
else, and need no mask. The rest are masked element by element.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from alpa_lite.runtime.kernels.flash.spec import FlashSpec

Array = Any


def num_blocks(length: int, block: int) -> int:
    """Tiles of size `block` that cover `length`."""
    return -(-length // block)


def kv_tile_ranges(
    spec: FlashSpec, q_offset: Array, kv_offset: Array, ids: tuple[Array, ...],
    q_len: int, kv_len: int, block_q: int, block_kv: int,
) -> Array:  # fmt: skip
    """Key tiles for each query tile, `[batch, q tiles, 4]`, int32.

    Args:
      spec: of the attention.
      q_offset: position of the first query, `[batch]`.
      kv_offset: position of the first key, `[batch]`.
      ids: segment ids of queries `[batch, q_len]` and of keys `[batch, kv_len]`, or nothing.
      q_len: number of queries.
      kv_len: number of keys.
      block_q: queries of a tile.
      block_kv: keys of a tile.
    """
    row_ids, col_ids = ids or (None, None)
    return _tile_ranges(
        spec.left, spec.right, q_offset - kv_offset, row_ids, col_ids,
        q_len, kv_len, block_q, block_kv,
    )  # fmt: skip


def q_tile_ranges(
    spec: FlashSpec, q_offset: Array, kv_offset: Array, ids: tuple[Array, ...],
    q_len: int, kv_len: int, block_q: int, block_kv: int,
) -> Array:  # fmt: skip
    """Query tiles for each key tile, `[batch, kv tiles, 4]`, int32; see `kv_tile_ranges`."""
    col_ids, row_ids = ids or (None, None)
    return _tile_ranges(
        spec.right, spec.left, kv_offset - q_offset, row_ids, col_ids,
        kv_len, q_len, block_kv, block_q,
    )  # fmt: skip


def _tile_ranges(
    left: int | None, right: int | None, shift: Array, row_ids: Array | None,
    col_ids: Array | None, num_rows: int, num_cols: int, block_rows: int, block_cols: int,
) -> Array:  # fmt: skip
    """Ranges for rows at `shift + i` that see the columns from `left` before to `right` after."""
    rows = num_blocks(num_rows, block_rows)
    cols = num_blocks(num_cols, block_cols)
    first = jnp.arange(rows, dtype=jnp.int32) * block_rows
    last = jnp.minimum(first + block_rows, num_rows) - 1
    first, last = shift[:, None] + first, shift[:, None] + last  # [batch, rows], in columns
    lowest, highest = jnp.zeros_like(first), jnp.full_like(first, num_cols - 1)  # seen by any row
    full_begin = jnp.zeros_like(first)
    full_end = jnp.full_like(first, num_cols // block_cols)  # the last tile may be short
    if left is not None:
        lowest = jnp.maximum(lowest, first - left)
        full_begin = jnp.maximum(full_begin, -((left - last) // block_cols))
    if right is not None:
        highest = jnp.minimum(highest, last + right)
        full_end = jnp.minimum(full_end, (first + right + 1) // block_cols)
    begin, end = lowest // block_cols, highest // block_cols + 1
    empty = lowest > highest
    if row_ids is not None:
        some, whole = _segment_tiles(row_ids, col_ids, block_rows, block_cols)
        tile = jnp.arange(cols, dtype=jnp.int32)
        inside = (begin[..., None] <= tile) & (tile < end[..., None])
        begin, end = _hull(some & inside, tile)
        inside = (full_begin[..., None] <= tile) & (tile < full_end[..., None])
        full_begin, full_end = _first_run(whole & inside, tile)
        empty |= end <= begin
    begin, end = jnp.where(empty, 0, begin), jnp.where(empty, 0, end)
    full_begin = jnp.clip(full_begin, begin, end)
    full_end = jnp.clip(full_end, full_begin, end)
    return jnp.stack([begin, full_begin, full_end, end], axis=-1).astype(jnp.int32)


def _segment_tiles(
    row_ids: Array, col_ids: Array, block_rows: int, block_cols: int
) -> tuple[Array, Array]:
    """(tiles that may, tiles that only) hold pairs of equal ids; `[batch, rows, cols]`, bool."""
    row_min, row_max = (x[:, :, None] for x in _extremes(row_ids, block_rows))
    col_min, col_max = (x[:, None, :] for x in _extremes(col_ids, block_cols))
    some = (row_min <= col_max) & (col_min <= row_max)
    whole = (row_min == row_max) & (col_min == col_max) & (row_min == col_min)
    return some, whole


def _extremes(ids: Array, block: int) -> tuple[Array, Array]:
    """Smallest and largest id of each tile, `[batch, tiles]`."""
    missing = num_blocks(ids.shape[1], block) * block - ids.shape[1]
    tiles = jnp.pad(ids, ((0, 0), (0, missing)), mode="edge").reshape(ids.shape[0], -1, block)
    return tiles.min(axis=-1), tiles.max(axis=-1)


def _hull(marked: Array, tile: Array) -> tuple[Array, Array]:
    """First marked tile and the one after the last; a begin at or after the end if none is."""
    begin = jnp.where(marked, tile, tile.shape[0]).min(axis=-1)
    return begin, jnp.where(marked, tile + 1, 0).max(axis=-1)


def _first_run(marked: Array, tile: Array) -> tuple[Array, Array]:
    """The first run of marked tiles."""
    count = tile.shape[0]
    begin = jnp.where(marked, tile, count).min(axis=-1)
    beyond = (tile >= begin[..., None]) & ~marked
    return begin, jnp.where(beyond, tile, count).min(axis=-1)
