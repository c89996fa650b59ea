"""Values of arrays in every process: `fetch`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from alpa_lite.runtime.group import ProcessGroup, process_group

Index = tuple[tuple[int, int], ...]
"""Of a tile: first and last element, the latter excluded, along every dim."""


def fetch(tree: Any) -> Any:
    """The values of all arrays of a pytree, in every process.

    In one process that is `jax.device_get`. In several, an array may lie on devices of some of them
    (the loss of a pipeline is on its last stage); all processes call this in the same order, with
    the results of the same step. The data pass through process 0's key-value store, at some tens of
    MB per second: right for metrics, slow for the state of a large model.

    Args:
      tree: arrays and numbers.

    Returns:
      The same tree with numpy arrays; PRNG keys stay keys, on a device of this process.

    Raises:
      TimeoutError: another process has not called it within an hour.

    Example:
      >>> import alpa_lite, jax.numpy as jnp
      >>> alpa_lite.fetch({"loss": jnp.float32(2.5)})
      {'loss': array(2.5, dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = {i: jax.random.key_impl(x) for i, x in enumerate(leaves) if _is_keys(x)}
    leaves = [jax.random.key_data(x) if i in keys else x for i, x in enumerate(leaves)]
    group = process_group()
    values = jax.device_get(leaves) if group is None else _fetch(leaves, group)
    values = [
        jax.random.wrap_key_data(x, impl=keys[i]) if i in keys else np.asarray(x)
        for i, x in enumerate(values)
    ]
    return jax.tree.unflatten(structure, values)


def _fetch(leaves: list[Any], group: ProcessGroup) -> list[Any]:
    """Every tile is told by the first process that has it."""
    tiles = {i: _tiles(x) for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    told = {
        i: b"".join(
            np.asarray(_own_tile(leaves[i], index)).tobytes()
            for index, owner in owners.items()
            if owner == group.me
        )
        for i, owners in tiles.items()
    }
    heard = [_unpacked(data) for data in group.exchange("fetch", _packed(told))]
    values = list(leaves)
    for i, owners in tiles.items():
        x = leaves[i]
        if x.is_fully_addressable:
            continue
        values[i] = np.empty(x.shape, x.dtype)
        parts = {process: heard[process][i] for process in set(owners.values())}
        for index, owner in owners.items():
            shape = tuple(b - a for a, b in index)
            size = math.prod(shape) * x.dtype.itemsize
            data, parts[owner] = parts[owner][:size], parts[owner][size:]
            where = tuple(slice(a, b) for a, b in index)
            values[i][where] = np.frombuffer(data, x.dtype).reshape(shape)
    return jax.device_get(values)


def _packed(parts: Mapping[int, bytes]) -> bytes:
    """Numbers and lengths in a line of JSON, then the bytes."""
    head = {i: len(data) for i, data in parts.items() if data}
    return json.dumps(head).encode() + b"\n" + b"".join(parts.values())


def _unpacked(data: bytes) -> dict[int, memoryview]:
    head, _, rest = data.partition(b"\n")
    found, left = {}, memoryview(rest)
    for i, size in json.loads(head).items():
        found[int(i)], left = left[:size], left[size:]
    return found


def _tiles(x: jax.Array) -> Mapping[Index, int]:
    """The tiles of an array, with the lowest number of a process that has each."""
    found: dict[Index, int] = {}
    places: Mapping[Any, Any] = x.sharding.devices_indices_map(x.shape)
    for device, index in places.items():
        key = _key(index, x.shape)
        found[key] = min(device.process_index, found.get(key, device.process_index))
    return dict(sorted(found.items()))


def _own_tile(x: jax.Array, index: Index) -> Any:
    return next(s.data for s in x.addressable_shards if _key(s.index, x.shape) == index)


def _key(index: Any, shape: tuple[int, ...]) -> Index:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _is_keys(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
