"""Tiles between processes over sockets: `TransferServerTransport`.

Made of `jax.experimental.transfer`: every process has a server, which gives tiles to those who pull
them. Tiles are found by number, so the order of sends and receives is free, and a pull may come
before the send. They pass through host memory, which suits CPUs, and the network between clusters
of GPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from alpa_lite.compat import KeyValueStore, make_copier
from alpa_lite.runtime.distributed import own_address
from alpa_lite.runtime.route import devices_of
from alpa_lite.runtime.transfer import Transfer
from alpa_lite.runtime.transport import Channel, post_of

# A tile's number in 64 bits: how many values its channel has sent before, modulo; the channel; and
# the process that receives it.
_COUNT_BITS, _TAG_BITS, _PROCESS_BITS = 24, 24, 16

_SOCKETS = 2
"""Connections of each pair of processes."""


class TransferServerTransport:
    """Channels between the processes of `jax.distributed`."""

    def __init__(self, name: str = "pipeline", *, timeout_s: float = 60.0) -> None:
        """Start this process's server. Every process does.

        Args:
          name: not used before by these processes.
          timeout_s: how long to wait for the others when opening and closing.
        """
        from jax.experimental import transfer  # only where JAX has it: on Linux

        self._name = name
        self._timeout_s = timeout_s
        self._store = KeyValueStore()
        self._connections: dict[int, Any] = {}
        host = own_address()
        self._server: Any = transfer.start_transfer_server(
            jax.local_devices()[0].client, f"{host}:0", [f"{host}:0"] * _SOCKETS
        )
        self._store.set(self._key(jax.process_index()), self._server.address())

    def open(self, tag: int, transfer: Transfer) -> Channel:
        """See `Transport`.

        Raises:
          ValueError: the tag is negative or too large.
          TimeoutError: a process that sends has not started its transport in time.
        """
        if not 0 <= tag < 1 << _TAG_BITS:
            raise ValueError(f"tags go from 0 to 2**{_TAG_BITS} - 1, found {tag}")
        return _ServerChannel(tag, transfer, self._server, self._connect)

    def close(self) -> None:
        """See `Transport`."""
        self._store.barrier(f"alpa_lite/transport/{self._name}/close", self._timeout_s)
        self._connections.clear()
        self._server = None

    def _connect(self, process: int) -> Any:
        if process not in self._connections:
            address = self._store.get(self._key(process), self._timeout_s)
            self._connections[process] = self._server.connect(address)
        return self._connections[process]

    def _key(self, process: int) -> str:
        return f"alpa_lite/transport/{self._name}/address/{process}"


class _ServerChannel:
    def __init__(
        self, tag: int, transfer: Transfer, server: Any, connect: Callable[[int], Any]
    ) -> None:
        me = jax.process_index()
        self._tag = tag
        self._me = me
        self._transfer = transfer
        self._server = server
        self._post = post_of(transfer.route, me)
        targets = [d for d in devices_of(transfer.target) if d.process_index == me]
        tile = transfer.route.tile_shape
        arriving = [
            jax.ShapeDtypeStruct(tile, transfer.aval.dtype, sharding=SingleDeviceSharding(d))
            for d in targets
        ]
        self._pulls = [
            (connect(process), slots, [arriving[i] for i in slots])
            for process, slots in self._post.receives
        ]
        self._keep = make_copier([SingleDeviceSharding(targets[i]) for _, i in self._post.kept])
        self._kept: deque[list[jax.Array]] = deque()
        self._sent = self._received = 0

    def send(self, x: jax.Array) -> None:
        tiles = self._transfer.leaving_tiles(self._transfer.start_source(x))
        for process, indices in self._post.sends:
            number = self._number(self._sent, process)
            self._server.await_pull(number, [tiles[i] for i in indices])
        if self._post.kept:
            self._kept.append(self._keep([tiles[i] for i, _ in self._post.kept]))
        self._sent += 1

    def receive(self) -> jax.Array:
        tiles: dict[int, jax.Array] = {}
        for connection, slots, avals in self._pulls:
            pulled = connection.pull(self._number(self._received, self._me), avals)
            tiles.update(zip(slots, pulled, strict=True))
        if self._post.kept:
            if not self._kept:
                raise RuntimeError(f"channel {self._tag}: this process receives before it sends")
            slots = tuple(i for _, i in self._post.kept)
            tiles.update(zip(slots, self._kept.popleft(), strict=True))
        self._received += 1
        return self._transfer.finish_target([tiles[i] for i in range(self._post.num_arriving)])

    def _number(self, count: int, receiver: int) -> int:
        count %= 1 << _COUNT_BITS
        return (count << _TAG_BITS | self._tag) << _PROCESS_BITS | receiver
