"""Arrays over devices of several processes: `put`, `absent`.

A process holds the parts on its own devices. An array of which it has no part is *absent*: it has
a shape, a dtype and a sharding like any other, and no data here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from alpa_lite.compat import make_absent


def is_local(where: NamedSharding | jax.sharding.Mesh | jax.Device) -> bool:
    """Whether this process has the device, or some of those of a mesh or a sharding."""
    here = jax.process_index()
    if isinstance(where, jax.Device):
        return where.process_index == here
    mesh = where.mesh if isinstance(where, NamedSharding) else where
    return any(d.process_index == here for d in mesh.devices.flat)


def absent(aval: Any, sharding: NamedSharding) -> jax.Array:
    """An array on devices of other processes.

    Args:
      aval: shape, dtype and weak type.
      sharding: of devices of which this process has none.
    """
    return make_absent(aval.shape, aval.dtype, getattr(aval, "weak_type", False), sharding)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array laid out as wanted.

    Nothing is sent between processes, unless the array lies on the devices of several already.

    Args:
      x: numpy array or number, or a `jax.Array`; the same in every process that has devices of
        `sharding`.
      sharding: the layout. Where it has devices of other processes, each makes its own parts.

    Raises:
      ValueError: the array lies on devices of other processes, and on others than wanted.
    """
    known = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable and known:
        return jax.device_put(x, sharding)
    if not is_local(sharding):
        return absent(jax.typeof(x), sharding)
    if not known and x.sharding.device_set == sharding.device_set:
        return jax.device_put(x, sharding)  # by all of its processes
    if not known and not (x.is_fully_replicated and x.addressable_shards):
        raise ValueError(
            f"{x.dtype}{list(x.shape)} lies on devices of other processes, as {x.sharding}, and "
            f"cannot be laid out as {sharding}"
        )
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), keys_as_data(x, sharding))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def put_all(values: Sequence[Any], shardings: Sequence[NamedSharding]) -> list[jax.Array]:
    """Several arrays laid out as wanted; see `put`."""
    if all(s.is_fully_addressable for s in shardings):
        return jax.device_put(list(values), list(shardings))
    return [put(x, s) for x, s in zip(values, shardings, strict=True)]


def own_copy(x: jax.Array) -> jax.Array:
    """The array in buffers of its own, made by every process for itself."""
    if x.is_fully_addressable:
        return jax.device_put(x, x.sharding, may_alias=False)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = own_copy(jax.random.key_data(x))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    parts = [jnp.copy(shard.data) for shard in x.addressable_shards]
    if not parts:
        return x
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def keys_as_data(keys: Any, sharding: NamedSharding) -> NamedSharding:
    """The layout of `jax.random.key_data(keys)` for keys in a layout.

    Args:
      keys: an array of keys, or its type.
      sharding: its layout.
    """
    aval = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
    more = len(jax.eval_shape(jax.random.key_data, aval).shape) - len(keys.shape)
    dims = tuple(sharding.spec) + (None,) * (len(keys.shape) - len(sharding.spec) + more)
    return NamedSharding(sharding.mesh, PartitionSpec(*dims))
