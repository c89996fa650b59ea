"""Tiles on their way between processes: `Transport`, `Channel`.

A `Transfer` says what the source's processes do, which tiles travel, and what the target's
processes do; a transport takes the tiles. Every process opens the same channels. A process that has
devices of the source sends, one that has devices of the target receives, and one that has devices
of both does both, sending first. Values of a channel arrive in the order in which they were sent;
different channels are independent.

`LocalTransport` is for one process; `TransferServerTransport` (CPU, and GPU over the data centre
network) and `DevicePutTransport` (GPU) are for several.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax

from alpa_lite.runtime.route import Route
from alpa_lite.runtime.transfer import Transfer


@runtime_checkable
class Channel(Protocol):
    """One transfer, value after value."""

    def send(self, x: jax.Array) -> None:
        """Enqueue the source's part for a value.

        It may be dropped afterwards, but not be deleted or donated before it has been received.
        """

    def receive(self) -> jax.Array:
        """Enqueue the target's part for the next value; the result is ready when it has come."""


@runtime_checkable
class Transport(Protocol):
    """What makes channels."""

    def open(self, tag: int, transfer: Transfer) -> Channel:
        """A new channel.

        Args:
          tag: the same in every process, and no other channel's.
          transfer: the same in every process.
        """

    def close(self) -> None:
        """Release what the channels use, once every process is here. Received values are ready."""


class LocalTransport:
    """For submeshes of one process: a transfer starts when its value is sent."""

    def open(self, tag: int, transfer: Transfer) -> Channel:
        """See `Transport`."""
        return _LocalChannel(tag, transfer)

    def close(self) -> None:
        """See `Transport`."""


class _LocalChannel:
    def __init__(self, tag: int, transfer: Transfer) -> None:
        self._tag = tag
        self._transfer = transfer
        self._started: deque[jax.Array] = deque()

    def send(self, x: jax.Array) -> None:
        self._started.append(self._transfer.start(x))

    def receive(self) -> jax.Array:
        if not self._started:
            raise RuntimeError(f"nothing was sent on channel {self._tag} that is to be received")
        return self._started.popleft()


@dataclass(frozen=True, slots=True)
class Post:
    """What a process sends and receives in one transfer.

    *Leaving* tiles are numbered as `Transfer.leaving_tiles` returns them, *arriving* ones as
    `Transfer.finish_target` takes them. Both ends list the tiles between them in the same order.

    Attributes:
      sends: (process, leaving tiles for it), for every other process that gets some.
      receives: (process, arriving tiles from it), for every other process that gives some.
      kept: (leaving, arriving) for every tile that stays in this process.
      num_arriving: number of tiles to receive or keep.
    """

    sends: tuple[tuple[int, tuple[int, ...]], ...]
    receives: tuple[tuple[int, tuple[int, ...]], ...]
    kept: tuple[tuple[int, int], ...]
    num_arriving: int


def post_of(route: Route, process: int) -> Post:
    """The tiles of a route that a process sends, receives and keeps."""
    sends: dict[int, list[int]] = defaultdict(list)
    receives: dict[int, list[int]] = defaultdict(list)
    kept = []
    leaving = arriving = 0
    for source, target in route.moves:
        from_here = source.process_index == process
        to_here = target.process_index == process
        if from_here and to_here:
            kept.append((leaving, arriving))
        elif from_here:
            sends[target.process_index].append(leaving)
        elif to_here:
            receives[source.process_index].append(arriving)
        leaving += from_here
        arriving += to_here
    return Post(_sorted(sends), _sorted(receives), tuple(kept), arriving)


def _sorted(groups: dict[int, list[int]]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((process, tuple(tiles)) for process, tiles in sorted(groups.items()))
