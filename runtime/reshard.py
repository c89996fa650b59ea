"""Executes the steps of `alpa_lite.passes.reshard` on one device's part, inside `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes import reshard as steps
from alpa_lite.passes.reshard import ReshardStep


def run_step(x: jax.Array, step: ReshardStep, mesh: Mesh, *, again: bool = False) -> jax.Array:
    """Apply one reshard step to the local part of an array.

    Args:
      x: this device's part.
      step: what to do.
      mesh: the logical mesh.
      again: the same array is gathered elsewhere too, and must not be kept alive from there.
    """
    axes = step.axes
    if mesh.size(axes) == 1:
        return x
    if step.kind == steps.SLICE:
        size = x.shape[step.dim] // mesh.size(axes)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, step.dim)
    if step.kind == steps.ALL_GATHER:
        return _gather_again(x, step) if again else _gather(x, step)
    if step.kind == steps.REDUCE_SCATTER:
        return _summed(
            x, lambda y: jax.lax.psum_scatter(y, axes, scatter_dimension=step.dim, tiled=True)
        )
    if step.kind == steps.ALL_TO_ALL:
        return _all_to_all(x, step, mesh.size(axes))
    if step.kind == steps.ALL_REDUCE:
        return _summed(x, lambda y: jax.lax.psum(y, axes))
    assert step.kind == steps.MASK, step.kind
    return keep_on_first(x, axes)


def spec_after(spec: ShardingSpec, step: ReshardStep) -> ShardingSpec:
    """The layout of what `run_step` makes of an array."""
    dims = [list(axes) for axes in spec.dims]
    partial = set(spec.partial)
    if step.kind == steps.MASK:
        partial |= set(step.axes)
    if step.kind in (steps.ALL_REDUCE, steps.REDUCE_SCATTER):
        partial -= set(step.axes)
    if step.kind in (steps.ALL_GATHER, steps.ALL_TO_ALL):
        source = dims[step.dim if step.kind == steps.ALL_GATHER else step.from_dim]
        del source[len(source) - len(step.axes) :]
    if step.kind in (steps.SLICE, steps.REDUCE_SCATTER, steps.ALL_TO_ALL):
        dims[step.dim] += step.axes
    return ShardingSpec(tuple(map(tuple, dims)), tuple(sorted(partial)))


def _gather(x: jax.Array, step: ReshardStep) -> jax.Array:
    return jax.lax.all_gather(x, step.axes, axis=step.dim, tiled=True)


def _gather_again(x: jax.Array, step: ReshardStep) -> jax.Array:
    """An all_gather that XLA does not merge with an equal one: through an extra dim."""
    stacked = jax.lax.all_gather(x, step.axes, axis=step.dim, tiled=False)
    joined = stacked.shape[step.dim] * x.shape[step.dim]
    return stacked.reshape(*x.shape[: step.dim], joined, *x.shape[step.dim + 1 :])


def _all_to_all(x: jax.Array, step: ReshardStep, count: int) -> jax.Array:
    """An all_to_all of flat arrays.

    XLA:CPU (jax 0.10.2) cuts the operand into one array per device. With dims of size 1 among
    them these can get different layouts, and its verifier then refuses the program ("HLO all-to-all
    has operands with different shapes"). Flat arrays have one layout.
    """
    d, f = step.dim, step.from_dim
    parts = x.reshape(*x.shape[:d], count, x.shape[d] // count, *x.shape[d + 1 :])
    parts = jnp.moveaxis(parts, d, 0)
    received = jax.lax.all_to_all(parts.reshape(-1), step.axes, 0, 0, tiled=True)
    stacked = jnp.moveaxis(received.reshape(parts.shape), 0, f)
    joined = count * stacked.shape[f + 1]
    return stacked.reshape(*stacked.shape[:f], joined, *stacked.shape[f + 2 :])


def keep_on_first(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The value on the first device along `axes`, zeros on the others: a pending sum of it."""
    return jnp.where(jax.lax.axis_index(axes) == 0, x, jnp.zeros_like(x))


def combine(x: jax.Array, axes: tuple[str, ...], how: str) -> jax.Array:
    """Combine partial results over mesh axes, on all of them."""
    if how == "sum":
        return _summed(x, lambda y: jax.lax.psum(y, axes))
    if how == "max":
        return jax.lax.pmax(x, axes)
    if how == "min":
        return jax.lax.pmin(x, axes)
    if how in ("and", "or") and x.dtype == bool:
        joined = (jax.lax.pmin if how == "and" else jax.lax.pmax)(x.astype(jnp.uint8), axes)
        return joined.astype(bool)
    parts = jax.lax.all_gather(x, axes, axis=0, tiled=False)
    reduce = {"prod": jnp.prod, "and": jnp.bitwise_and.reduce, "or": jnp.bitwise_or.reduce}[how]
    return reduce(parts, axis=0).astype(x.dtype)


def _summed(x: jax.Array, collective: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """A sum over devices; of booleans, of which one device has the true ones, too."""
    return collective(x.astype(jnp.uint8)).astype(bool) if x.dtype == bool else collective(x)
