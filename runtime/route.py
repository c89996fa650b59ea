"""Which way a value takes from one submesh to another: `find_route`.

In: shape, element size and two shardings. Out: a `Route`, on paper; `transfer` makes programs of
it. A route has up to three steps:

1. *prepare*: a program on the source's devices lays the value out in the tiles that travel;
2. *copy*: every target device gets one tile, from a source device that has it;
3. *finish*: a program on the target's devices makes the target's layout of them.

Copies never change tiles: equal tiles move without anybody waiting, everything else goes through
the host (jax 0.10.2). Which tiles travel is chosen by time. Those of the target need no finish,
those of the source no preparation, and finer ones carry every byte once where several devices hold
the same tile; whole copies of the value always work.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import NamedSharding

from alpa_lite.runtime.tiles import (
    Counts,
    Cut,
    Tile,
    coarsened,
    cut_of,
    grid,
    overlap,
    refined,
    size,
    subtiles,
    tiles_of,
)

# Routes are weighed against each other by these, so only the ratios matter.
LOCAL_BYTES_PER_S = 450e9
"""Of a device, one way, within a host. Quoted: NVLink of an H100, NVIDIA's data sheet."""
CROSS_HOST_BYTES_PER_S = 50e9
"""Of a device, one way, between hosts. Quoted: one 400 Gbit/s adapter per GPU, DGX H100."""
PROGRAM_S = 50e-6
"""Start of a program of one argument, in seconds. Measured: 23 to 49 us on 2 and 4 virtual CPU
devices, jax 0.10.2."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The way of one tile.

    Attributes:
      part: which of the arrays that leave the source.
      source: position of the device that the tile leaves.
      target: position of the device that it goes to.
    """

    part: int
    source: int
    target: int


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """The steps of a transfer.

    Attributes:
      shape: of the value.
      itemsize: bytes of an element.
      source: how the value lies.
      target: how it shall lie.
      sent: how the source cuts it, before splitting its tiles.
      splits: into how many parts of every dim the source splits each of its tiles; one array leaves
        the source per part. More than one only if more tiles travel than the source has devices.
      received: how the value arrives.
      pairs: one per target device, in mesh order.
    """

    shape: tuple[int, ...]
    itemsize: int
    source: NamedSharding
    target: NamedSharding
    sent: NamedSharding
    splits: Counts
    received: NamedSharding
    pairs: tuple[Pair, ...]

    @property
    def num_parts(self) -> int:
        """Number of arrays that leave the source."""
        return math.prod(self.splits)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of each."""
        return tuple(n // k for n, k in zip(self.shape, self.splits, strict=True))

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of every tile that travels."""
        return self.received.shard_shape(self.shape)

    @property
    def tile_bytes(self) -> int:
        """Bytes of every tile that travels."""
        return math.prod(self.tile_shape) * self.itemsize

    @property
    def prepares(self) -> bool:
        """Whether a program runs on the source's devices."""
        return self.sent is not self.source or self.num_parts > 1

    @property
    def copies(self) -> bool:
        """Whether anything is left to do between the programs."""
        return self.sent is not self.received

    @property
    def finishes(self) -> bool:
        """Whether a program runs on the target's devices."""
        return self.received is not self.target

    @property
    def whole(self) -> bool:
        """Whether one array leaves, and its i-th tile goes to the i-th device of the target."""
        return (
            self.num_parts == 1
            and self.sent.num_devices == self.received.num_devices
            and all(p.source == p.target for p in self.pairs)
        )

    @property
    def moves(self) -> tuple[tuple[jax.Device, jax.Device], ...]:
        """The two devices of every pair."""
        sources, targets = devices_of(self.sent), devices_of(self.received)
        return tuple((sources[p.source], targets[p.target]) for p in self.pairs)

    @property
    def wire_bytes(self) -> int:
        """Bytes that the copy step takes from one device to another."""
        return self.tile_bytes * sum(a is not b for a, b in self.moves)

    def seconds(self, wire_bytes_per_s: float) -> float:
        """Time of the busiest device in each step, added up.

        Args:
          wire_bytes_per_s: of a device, one way, in the copy step.
        """
        leaving: dict[jax.Device, int] = defaultdict(int)
        arriving: dict[jax.Device, int] = defaultdict(int)
        for a, b in self.moves:
            if a is not b:
                leaving[a] += self.tile_bytes
                arriving[b] += self.tile_bytes
        wire_bytes = max([*leaving.values(), *arriving.values()], default=0)
        gathered = _gathered(self.source, self.sent, self.shape)
        gathered += _gathered(self.received, self.target, self.shape)
        return (
            wire_bytes / wire_bytes_per_s
            + gathered * self.itemsize / LOCAL_BYTES_PER_S
            + (self.prepares + self.finishes) * PROGRAM_S
        )


def find_route(
    shape: Sequence[int], itemsize: int, source: NamedSharding, target: NamedSharding, *,
    cross_host: bool | None = None,
) -> Route:  # fmt: skip
    """The route of least time.

    Args:
      shape: of the value.
      itemsize: bytes of an element.
      source: how it lies.
      target: how it shall lie, on other devices, on the same, or on some of them.
      cross_host: whether tiles travel between hosts; by default, whether the devices belong to
        different processes.

    Raises:
      ValueError: a sharding leaves a dim open, or does not divide the value evenly.
    """
    if cross_host is None:
        cross_host = _processes(source) != _processes(target)
    wire_bytes_per_s = CROSS_HOST_BYTES_PER_S if cross_host else LOCAL_BYTES_PER_S
    routes = all_routes(shape, itemsize, source, target)
    return min(routes, key=lambda route: route.seconds(wire_bytes_per_s))  # the first of equals


def all_routes(
    shape: Sequence[int], itemsize: int, source: NamedSharding, target: NamedSharding
) -> Iterator[Route]:
    """The routes among which `find_route` chooses; they differ in the tiles that travel.

    Args and errors are those of `find_route`.
    """
    shape = tuple(shape)
    leaving, arriving = cut_of(source, shape), cut_of(target, shape)
    if devices_of(source) == devices_of(target):
        yield _route_in_place(shape, itemsize, source, target)
        return
    choices = [arriving.counts, leaving.counts]
    choices += [refined(arriving, shape).counts, refined(leaving, shape).counts]
    choices += [(1,) * len(shape)]  # whole copies
    for counts in dict.fromkeys(choices):
        received = _laid_out(target, arriving, counts, leaving)
        coarse: Counts | None = counts
        if math.prod(counts) > source.num_devices:
            coarse = _coarse(leaving, counts)
        if received is None or coarse is None:
            continue
        sent = _laid_out(source, leaving, coarse, received[1])
        if sent is None:
            continue
        splits = tuple(n // k for n, k in zip(counts, coarse, strict=True))
        route = Route(shape, itemsize, source, target, sent[0], splits, received[0], ())
        yield replace(route, pairs=_pairs(route))


def devices_of(sharding: NamedSharding) -> list[jax.Device]:
    """Its devices, in mesh order."""
    return list(sharding.mesh.devices.flat)


def sent_tiles(route: Route) -> tuple[tuple[Tile, ...], ...]:
    """Per device of the source, the tile of each part."""
    return tuple(tuple(subtiles(t, route.splits)) for t in tiles_of(route.sent, route.shape))


def _processes(sharding: NamedSharding) -> set[int]:
    return {device.process_index for device in devices_of(sharding)}


def _route_in_place(
    shape: tuple[int, ...], itemsize: int, source: NamedSharding, target: NamedSharding
) -> Route:
    """From and to the same devices: a program, or not even that."""
    equal = tiles_of(source, shape) == tiles_of(target, shape)
    pairs = tuple(Pair(0, i, i) for i in range(source.num_devices))
    sent = source if equal else target
    return Route(shape, itemsize, source, target, sent, (1,) * len(shape), target, pairs)


def _laid_out(
    own: NamedSharding, cut: Cut, counts: Counts, other: Cut
) -> tuple[NamedSharding, Cut] | None:
    """A cut into so many parts on the devices of `own`: itself, or as near to it as possible.

    Args:
      own: how the value lies, or shall lie, there.
      cut: its cut.
      counts: wanted.
      other: the cut on the other side. The same on both sides makes the simplest copy.
    """
    if cut.counts == counts:
        return own, cut
    finer = refined(cut, counts)
    if finer.counts != counts:
        if other.counts == counts and other.num_devices == own.num_devices:
            finer = other
        elif own.num_devices % math.prod(counts) == 0:
            finer = grid(counts, own.num_devices)
        else:
            return None
    return finer.sharding(devices_of(own)), finer


def _coarse(leaving: Cut, counts: Counts) -> Counts | None:
    """The tiles that a source has, one per device, before it splits them into `counts`."""
    near = refined(leaving, counts).counts
    fits = all(n % k == 0 for n, k in zip(counts, near, strict=True))
    if fits and math.prod(near) == leaving.num_devices:
        return near
    return coarsened(counts, leaving.num_devices)


def _pairs(route: Route) -> tuple[Pair, ...]:
    """For every target device a source device with its tile, the same one if possible.

    Otherwise one of the same process, and one that few others take from.
    """
    holders: dict[Tile, list[tuple[int, int]]] = defaultdict(list)
    for position, tiles in enumerate(sent_tiles(route)):
        for part, tile in enumerate(tiles):
            holders[tile].append((part, position))
    sources, targets = devices_of(route.sent), devices_of(route.received)
    uses = [0] * len(sources)
    pairs = []
    for i, tile in enumerate(tiles_of(route.received, route.shape)):
        target = targets[i]
        part, chosen = min(
            holders[tile],
            key=lambda holder: (
                sources[holder[1]] is not target,
                sources[holder[1]].process_index != target.process_index,
                uses[holder[1]],
                holder[1] != i,
            ),
        )
        uses[chosen] += 1
        pairs.append(Pair(part, chosen, i))
    return tuple(pairs)


def _gathered(before: NamedSharding, after: NamedSharding, shape: tuple[int, ...]) -> int:
    """Most elements that a device lacks of its new tile."""
    if before is after:
        return 0
    tiles = zip(tiles_of(before, shape), tiles_of(after, shape), strict=True)
    return max(size(new) - overlap(old, new) for old, new in tiles)
