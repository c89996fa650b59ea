"""One op on one device's parts: the primitive bound again with local sizes.

Sharding rules promise that binding the primitive to the local operands gives the local result. The
exceptions, which depend on where a part lies, are handled here: iota, random bits, and the indexed
dims of gather and scatter-add. Runs inside `jax.shard_map`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.rules import ShardingRule, localize_params
from alpa_lite.runtime.reshard import keep_on_first

_DROP = GatherScatterMode.FILL_OR_DROP


@dataclass(frozen=True, slots=True, eq=False)
class LocalOp:
    """An op and its layouts on this mesh.

    Attributes:
      primitive, params: of the global op.
      rule: its sharding rule, all operands included.
      operand_specs, result_specs: layouts of all operands and results.
      operand_shapes, result_shapes: global shapes.
    """

    primitive: Any
    params: Mapping[str, Any]
    rule: ShardingRule
    operand_specs: tuple[ShardingSpec, ...]
    result_specs: tuple[ShardingSpec, ...]
    operand_shapes: tuple[tuple[int, ...], ...]
    result_shapes: tuple[tuple[int, ...], ...]


def run_op(op: LocalOp, operands: Sequence[Any], mesh: Mesh) -> list[jax.Array]:
    """Local results of one op."""
    name = op.primitive.name
    if name == "sharding_constraint":
        return list(operands)  # layouts are the plan's
    if name == "iota":
        return [_iota(op, operands, mesh)]
    if name == "random_bits":
        if op.result_specs[0].is_replicated:
            # An array of keys puts its dims before `shape`.
            return _bind(op, operands, mesh, shape=op.params["shape"])
        return [_random_bits(op, operands[0], mesh)]
    if name == "gather" and _indexed_dims(op, mesh):
        return [_gather(op, operands, mesh)]
    if name == "scatter-add":
        operands = _scatter_operands(op, operands, mesh)
    if name in ("dynamic_slice", "dynamic_update_slice"):
        operands = _clamp_starts(op, operands)
    return _bind(op, operands, mesh)


def _bind(op: LocalOp, operands: Sequence[Any], mesh: Mesh, **changes: Any) -> list[jax.Array]:
    local_ins = [jnp.shape(x) for x in operands]
    local_outs = [
        spec.local_shape(shape, mesh)
        for spec, shape in zip(op.result_specs, op.result_shapes, strict=True)
    ]
    params = localize_params(op.primitive.name, op.params, op.rule, local_ins, local_outs)
    params.update(changes)
    results = op.primitive.bind(*operands, **params)
    results = list(results) if op.primitive.multiple_results else [results]
    for result, shape in zip(results, local_outs, strict=True):
        assert result.shape == shape, (op.primitive.name, result.shape, shape)
    return results


def _offset(axes: tuple[str, ...], local_size: int) -> Any:
    """Where this device's part of a dim begins."""
    return jax.lax.axis_index(axes) * local_size if axes else 0


def _iota(op: LocalOp, operands: Sequence[Any], mesh: Mesh) -> jax.Array:
    (result,) = _bind(op, operands, mesh)
    dim = op.params["dimension"]
    axes = op.result_specs[0].dims[dim]
    if not axes:
        return result
    return result + jnp.asarray(_offset(axes, result.shape[dim])).astype(result.dtype)


def _random_bits(op: LocalOp, key: jax.Array, mesh: Mesh) -> jax.Array:
    """This device's part of the bits that the whole draw would give.

    JAX's partitionable threefry hashes the 64-bit position of each element; so do we, for the
    positions of this part.
    """
    shape, width = op.result_shapes[0], op.params["bit_width"]
    spec = op.result_specs[0]
    local = spec.local_shape(shape, mesh)
    high = low = jnp.zeros(local, jnp.uint32)
    for dim, size in enumerate(local):
        index = jax.lax.broadcasted_iota(jnp.uint32, local, dim)
        index = index + jnp.asarray(_offset(spec.dims[dim], size)).astype(jnp.uint32)
        more_high, more_low = _multiply_64(index, math.prod(shape[dim + 1 :]))
        low_sum = low + more_low
        high = high + more_high + (low_sum < low).astype(jnp.uint32)
        low = low_sum
    words = jax.random.key_data(key)
    bits_high, bits_low = jax.extend.random.threefry2x32_p.bind(
        jnp.broadcast_to(words[0], local), jnp.broadcast_to(words[1], local), high, low
    )
    if width == 64:
        return (bits_high.astype(jnp.uint64) << 32) | bits_low.astype(jnp.uint64)
    bits = bits_high ^ bits_low
    return bits if width == 32 else bits.astype({8: jnp.uint8, 16: jnp.uint16}[width])


def _multiply_64(x: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """(high, low) 32-bit words of `x * factor` for 32-bit `x` and 64-bit `factor`."""
    low_factor, high_factor = factor & 0xFFFFFFFF, factor >> 32
    a, b = x >> 16, x & 0xFFFF
    c, d = jnp.uint32(low_factor >> 16), jnp.uint32(low_factor & 0xFFFF)
    middle = b * c + ((b * d) >> 16)
    carry = a * d + (middle & 0xFFFF)
    high = a * c + (middle >> 16) + (carry >> 16) + x * jnp.uint32(high_factor & 0xFFFFFFFF)
    return high, x * jnp.uint32(low_factor)


def _indexed_dims(op: LocalOp, mesh: Mesh) -> list[tuple[int, int, tuple[str, ...]]]:
    """(index component, operand dim, axes) for each indexed dim that is split."""
    found = []
    for component, dim in enumerate(_addressed_dims(op)):
        axes = op.operand_specs[0].dims[dim]
        if axes and mesh.size(axes) > 1:
            found.append((component, dim, axes))
    return found


def _addressed_dims(op: LocalOp) -> tuple[int, ...]:
    """The operand dim that each index component addresses."""
    numbers = op.params["dimension_numbers"]
    gathers = op.primitive.name == "gather"
    return tuple(numbers.start_index_map if gathers else numbers.scatter_dims_to_operand_dims)


def _shift(
    op: LocalOp, indices: jax.Array, local_shape: tuple[int, ...], mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices relative to this device's part; whether each falls into it, and into the whole."""
    clip = _clips(op)
    split = {component: axes for component, _, axes in _indexed_dims(op, mesh)}
    indices = _to_int32(indices)
    inside = jnp.ones(indices.shape[:-1], bool)
    valid = jnp.ones(indices.shape[:-1], bool)
    for component, dim in enumerate(_addressed_dims(op)):
        # Dims that are not split count too: one component out of bounds spoils the whole index.
        index = indices[..., component]
        if clip:
            index = jnp.clip(index, 0, op.operand_shapes[0][dim] - 1)
        valid &= (index >= 0) & (index < op.operand_shapes[0][dim])
        if component in split:
            index = index - _offset(split[component], local_shape[dim])
            inside &= (index >= 0) & (index < local_shape[dim])
        indices = indices.at[..., component].set(index)
    return indices, inside, valid


def _clips(op: LocalOp) -> bool:
    """Whether indices out of bounds count as the nearest in bounds.

    XLA clamps those of a gather that JAX does not check, such as `table[i]`, and drops those of a
    scatter.
    """
    unchecked = op.params["mode"] == GatherScatterMode.PROMISE_IN_BOUNDS
    gathers = op.primitive.name == "gather"
    return op.params["mode"] == GatherScatterMode.CLIP or (unchecked and gathers)


def _to_int32(indices: jax.Array) -> jax.Array:
    """Indices beyond what 32 bits hold stay out of bounds, on the same side."""
    given, held = jnp.iinfo(indices.dtype), jnp.iinfo(jnp.int32)
    if given.max > held.max:
        indices = jnp.clip(indices, max(given.min, held.min), held.max)
    return indices.astype(jnp.int32)


def _gather(op: LocalOp, operands: Sequence[Any], mesh: Mesh) -> jax.Array:
    """Each device looks up the indices that fall into its part; the others contribute zeros."""
    operand, indices = operands
    shifted, inside, valid = _shift(op, indices, operand.shape, mesh)
    (found,) = _bind(op, [operand, shifted], mesh, mode=GatherScatterMode.CLIP)
    offset_dims = op.params["dimension_numbers"].offset_dims
    inside, valid = (jnp.expand_dims(m, offset_dims) for m in (inside, valid))
    zero = jnp.zeros((), found.dtype)
    if op.params["mode"] != _DROP:
        return jnp.where(inside, found, zero)
    # Out of bounds everywhere: one device supplies the fill value, so that the sum is the fill.
    split = tuple(axis for _, _, axes in _indexed_dims(op, mesh) for axis in axes)
    fill = jnp.where(jax.lax.axis_index(split) == 0, _fill_value(op, found.dtype), zero)
    return jnp.where(valid, jnp.where(inside, found, zero), fill)


def _clamp_starts(op: LocalOp, operands: Sequence[Any]) -> list[Any]:
    """Starts brought into bounds here, as the op would do itself.

    XLA joins a slice of a slice, such as a layout change after this op, by adding the starts; it
    forgets that the inner one is clamped first.
    """
    inner = 1 if op.primitive.name == "dynamic_slice" else 2
    sizes = op.result_shapes[0] if inner == 1 else op.operand_shapes[1]
    starts = [
        jax.lax.clamp(jnp.zeros_like(start), start, jnp.asarray(whole - size, start.dtype))
        for start, whole, size in zip(operands[inner:], op.operand_shapes[0], sizes, strict=True)
    ]
    return [*operands[:inner], *starts]


def _fill_value(op: LocalOp, dtype: Any) -> jax.Array:
    value = op.params.get("fill_value")
    if value is not None:
        return jnp.asarray(value, dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, dtype)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return jnp.asarray(jnp.iinfo(dtype).min, dtype)
    return jnp.asarray(True if dtype == jnp.bool_ else jnp.iinfo(dtype).max, dtype)


def _scatter_operands(op: LocalOp, operands: Sequence[Any], mesh: Mesh) -> list[Any]:
    """Count the operand once, and drop updates that fall into other devices' parts."""
    operand, indices, updates = operands
    partial = op.result_specs[0].partial
    if partial:
        operand = keep_on_first(operand, partial)
    if _indexed_dims(op, mesh):
        shifted, inside, _ = _shift(op, indices, operand.shape, mesh)
        # What falls elsewhere adds zeros to the first element: an index out of this part would do,
        # but XLA makes slices of single indices and joins them with the slices of layout changes
        # without minding that this part ends.
        window = op.params["dimension_numbers"].update_window_dims
        updates = jnp.where(jnp.expand_dims(inside, window), updates, jnp.zeros_like(updates))
        indices = jnp.where(inside[..., None], shifted, 0)
    return [operand, indices, updates]
