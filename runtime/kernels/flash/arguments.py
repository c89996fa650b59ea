"""Checks the arguments of `flash_attention`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from alpa_lite.runtime.kernels.flash.choice import mosaic_refusal
from alpa_lite.runtime.kernels.flash.spec import IMPLEMENTATIONS, MOSAIC_GPU, FlashSpec

Array = Any

DTYPES = ("bfloat16", "float16", "float32", "float64")
LAYOUT = "[batch, seq, heads, head_dim]"
MAX_POSITION = 2**30  # sums and differences of two positions stay within int32


def check_arguments(
    q: Array, k: Array, v: Array, *, causal: Any, window: Any, segment_ids: Any, scale: Any,
    softcap: Any, offsets: Mapping[str, Any], implementation: Any,
) -> tuple[FlashSpec, tuple[Array, ...]]:  # fmt: skip
    """The spec, and the segment ids of queries and keys in int32 (or nothing).

    Raises:
      TypeError: an argument has a type that does not fit.
      ValueError: shapes or values do not fit; says which they are.
    """
    _check_arrays(q, k, v)
    for name, offset in offsets.items():
        _check_offset(name, offset, q.shape[0])
    left, right = _band(causal, window)
    if implementation is not None:
        _check_implementation(implementation, q, v)
    spec = FlashSpec(
        scale=q.shape[-1] ** -0.5 if scale is None else _positive("scale", scale),
        left=left,
        right=right,
        softcap=None if softcap is None else _positive("softcap", softcap),
        implementation=implementation,
    )
    return spec, _segments(segment_ids, q, k)


def _check_arrays(q: Array, k: Array, v: Array) -> None:
    arrays = {"q": q, "k": k, "v": v}
    for name, x in arrays.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} is an array {LAYOUT}, not {type(x).__name__}.")
    shown = ", ".join(f"{name} {_text(x)}" for name, x in arrays.items())
    for name, x in arrays.items():
        if len(x.shape) != 4:
            raise ValueError(f"{name} has the dims {LAYOUT}; found {shown}.")
        if 0 in x.shape:
            raise ValueError(f"No dim of {name} is empty; found {shown}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v have one dtype; found {shown}. Cast them first.")
    if jnp.dtype(q.dtype).name not in DTYPES:
        raise ValueError(f"The dtype is one of {', '.join(DTYPES)}; found {shown}.")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v have one batch size; found {shown}.")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v have the same seq and heads; found {shown}.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k have the same head_dim; found {shown}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"The heads of k divide those of q; found {shown}, and {k.shape[2]} does not divide"
            f" {q.shape[2]}."
        )


def _check_offset(name: str, offset: Any, batch: int) -> None:
    if offset is None:
        return
    shape, dtype = np.shape(offset), jnp.result_type(offset)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} is an integer or integers; found {dtype.name}{list(shape)}.")
    if shape not in ((), (batch,)):
        raise ValueError(f"{name} is one number or [{batch}], one for each example; found {shape}.")
    if isinstance(offset, int | np.ndarray | np.integer) and np.abs(offset).max() >= MAX_POSITION:
        raise ValueError(f"{name} is below 2**30, so that positions fit into int32; got {offset}.")


def _band(causal: Any, window: Any) -> tuple[int | None, int | None]:
    """(left, right) of a `FlashSpec`."""
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal is True or False, not {causal!r}.")
    left: int | None = None
    right: int | None = None
    if _is_integer(window):
        if not causal:
            raise ValueError(
                f"window={window} counts keys up to the query's own position, so it needs"
                f" causal=True. For a window without it say (left, right), such as"
                f" window=({window - 1}, {window - 1})."
            )
        if not 1 <= window < MAX_POSITION:
            raise ValueError(f"window is from 1 to 2**30 - 1; got {window}.")
        left = int(window) - 1
    elif window is not None:
        left, right = _two_sides(window)
    if causal:
        right = 0
    return left, right


def _two_sides(window: Any) -> tuple[int | None, int | None]:
    if not isinstance(window, tuple) or len(window) != 2:
        raise TypeError(f"window is a number of keys or (left, right), not {window!r}.")
    for side in window:
        if side is not None and not _is_integer(side):
            raise TypeError(f"window=(left, right) has integers or None, not {window!r}.")
        if side is not None and not 0 <= side < MAX_POSITION:
            raise ValueError(f"window=(left, right) is from 0 to 2**30 - 1; got {window}.")
    left, right = (None if side is None else int(side) for side in window)
    return left, right


def _segments(segment_ids: Any, q: Array, k: Array) -> tuple[Array, ...]:
    if segment_ids is None:
        return ()
    if not isinstance(segment_ids, tuple):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"With {q.shape[1]} queries and {k.shape[1]} keys, segment_ids is a pair"
                f" (of queries, of keys)."
            )
        segment_ids = (segment_ids, segment_ids)
    if len(segment_ids) != 2:
        raise TypeError(f"segment_ids is an array or a pair of them, not {len(segment_ids)}.")
    for ids, x, name in zip(segment_ids, (q, k), ("queries", "keys"), strict=True):
        if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
            raise TypeError(f"Segment ids are integers; found {_text(ids)}.")
        if np.shape(ids) != x.shape[:2]:
            raise ValueError(
                f"The segment ids of the {name} are [batch, seq] = {list(x.shape[:2])}; found"
                f" {_text(ids)}."
            )
    return tuple(jnp.asarray(ids, jnp.int32) for ids in segment_ids)


def _check_implementation(implementation: Any, q: Array, v: Array) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is None or one of {', '.join(map(repr, IMPLEMENTATIONS))};"
            f" got {implementation!r}."
        )
    head_dim = max(q.shape[-1], v.shape[-1])
    refusal = mosaic_refusal(q.dtype, head_dim) if implementation == MOSAIC_GPU else None
    if refusal:
        raise ValueError(f"implementation={MOSAIC_GPU!r} {refusal}; found q {_text(q)}.")


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(
            f"{name} is a Python number, known when the step is traced, not"
            f" {type(value).__name__}. Multiply q for a scale that is computed."
        )
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is positive and finite; got {value}.")
    return float(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _text(x: Any) -> str:
    return f"{jnp.result_type(x).name}{list(np.shape(x))}"
