"""Tiles between processes by `jax.device_put`: `DevicePutTransport`, for GPUs.

On GPUs, JAX makes a send and a receive from device to device of it, in the order of the calls, per
pair of devices and direction: the two ends of a pair have to send and receive in the same order,
across all their channels. The first value of a pair sets up its connection and holds up both ends.

Every tile is a call of its own: in a call with several arrays JAX (0.10.2) sends them in an order
that the two ends do not agree on.

On the CPU it needs `jax_cross_host_transfer_socket_address`, and every process has to make every
call in one order, also those that neither send nor receive. That is how it is tested; it has not
run on GPUs yet.
"""

from __future__ import annotations

from collections import deque

import jax
from jax.sharding import SingleDeviceSharding

from alpa_lite.compat import make_copier
from alpa_lite.runtime.transfer import Transfer
from alpa_lite.runtime.transport import Channel, post_of


class DevicePutTransport:
    """Channels between the processes of `jax.distributed`, without any state of their own."""

    def open(self, tag: int, transfer: Transfer) -> Channel:
        """See `Transport`; the order of calls takes the place of tags."""
        return _DeviceChannel(tag, transfer)

    def close(self) -> None:
        """See `Transport`; there is nothing to release."""


class _DeviceChannel:
    def __init__(self, tag: int, transfer: Transfer) -> None:
        me = jax.process_index()
        self._tag = tag
        self._transfer = transfer
        self._post = post_of(transfer.route, me)
        moves = transfer.route.moves
        leaving = [(a, b) for a, b in moves if a.process_index == me]
        arriving = [(a, b) for a, b in moves if b.process_index == me]
        self._send_to = [
            (tuple(tiles), [SingleDeviceSharding(leaving[i][1]) for i in tiles])
            for _, tiles in self._post.sends
        ]
        self._receive_from = [
            (
                tuple(slots),
                [self._elsewhere(arriving[i][0]) for i in slots],
                [SingleDeviceSharding(arriving[i][1]) for i in slots],
            )
            for _, slots in self._post.receives
        ]
        self._keep = make_copier([SingleDeviceSharding(arriving[i][1]) for _, i in self._post.kept])
        self._kept: deque[list[jax.Array]] = deque()

    def send(self, x: jax.Array) -> None:
        tiles = self._transfer.leaving_tiles(self._transfer.start_source(x))
        for indices, targets in self._send_to:
            for i, target in zip(indices, targets, strict=True):
                jax.device_put(tiles[i], target)
        if self._post.kept:
            self._kept.append(self._keep([tiles[i] for i, _ in self._post.kept]))

    def receive(self) -> jax.Array:
        tiles: dict[int, jax.Array] = {}
        for slots, absent, targets in self._receive_from:
            for i, tile, target in zip(slots, absent, targets, strict=True):
                tiles[i] = jax.device_put(tile, target)
        if self._post.kept:
            if not self._kept:
                raise RuntimeError(f"channel {self._tag}: this process receives before it sends")
            slots = tuple(i for _, i in self._post.kept)
            tiles.update(zip(slots, self._kept.popleft(), strict=True))
        return self._transfer.finish_target([tiles[i] for i in range(self._post.num_arriving)])

    def _elsewhere(self, device: jax.Device) -> jax.Array:
        """A tile of which this process has no part, on a device of another one."""
        route = self._transfer.route
        return jax.make_array_from_single_device_arrays(
            route.tile_shape, SingleDeviceSharding(device), [], dtype=self._transfer.aval.dtype
        )
