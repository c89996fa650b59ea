"""Where on the cluster the submeshes of a pipeline lie: rectangles of hosts times devices.

Rule, stage by stage in pipeline order, deterministic:

- A stage of whole hosts takes the next hosts that are still untouched.
- A part of a host takes the smallest free block it fits into and splits it evenly; only if there is
  none, it opens the next untouched host.
- If that block is on another host than the one opened last, and the cluster has hosts to spare,
  what is free on older hosts stays idle, and the part looks for a place without it.

So hosts are opened in pipeline order and neighbours are adjacent, except where parts of hosts have
to fill gaps because there are no hosts to spare. Sizes within a host divide each other, so
splitting the smallest block that fits never leaves free blocks that could have been a larger one:
the stages fit whenever their devices do not exceed the cluster (the buddy system; Alpa, OSDI'22,
Theorem 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .submesh import Submesh, check_shapes, part_sizes


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """A rectangle of devices.

    Attributes:
        first_host: First host.
        first_device: First device on each of the hosts.
        submesh: Its shape.
    """

    first_host: int
    first_device: int
    submesh: Submesh

    @property
    def hosts(self) -> range:
        """The hosts it lies on."""
        return range(self.first_host, self.first_host + self.submesh.num_hosts)

    @property
    def devices(self) -> range:
        """The devices it has on each of them."""
        return range(self.first_device, self.first_device + self.submesh.devices_per_host)


def place_submeshes(
    submeshes: Sequence[Submesh], num_hosts: int, devices_per_host: int
) -> tuple[Placement, ...]:
    """Places the stages of a pipeline; see the module docstring for the rule.

    Args:
        submeshes: Shapes in pipeline order. Parts of a host must divide each other and the host.
        num_hosts: Hosts of the cluster.
        devices_per_host: Devices of each host.

    Raises:
        ValueError: If a shape is not allowed, or all together need more devices than there are.

    Example:
        >>> half, whole = Submesh(1, 4), Submesh(1, 8)
        >>> [(p.first_host, p.first_device) for p in place_submeshes([half, half, whole], 2, 8)]
        [(0, 0), (0, 4), (1, 0)]
    """
    check_shapes(submeshes, num_hosts, devices_per_host)
    needed = sum(shape.num_devices for shape in submeshes)
    if needed > num_hosts * devices_per_host:
        raise ValueError(
            f"{needed} devices do not fit on a cluster of {num_hosts}x{devices_per_host}."
        )
    free: list[tuple[int, int, int]] = []  # (devices, host, first device)
    placed: list[Placement] = []
    next_host = 0
    for index, shape in enumerate(submeshes):
        size = shape.devices_per_host
        if size == devices_per_host:
            placed.append(Placement(next_host, 0, shape))
            next_host += shape.num_hosts
            continue
        block = min((block for block in free if block[0] >= size), default=None)
        old = block is not None and block[1] < next_host - 1
        if old and _hosts_needed(submeshes[index:], devices_per_host) <= num_hosts - next_host:
            free = [block for block in free if block[1] == next_host - 1]
            block = min((block for block in free if block[0] >= size), default=None)
        if block is None:
            block = devices_per_host, next_host, 0
            next_host += 1
        else:
            free.remove(block)
        length, host, first = block
        placed.append(Placement(host, first, shape))
        sizes = part_sizes(submeshes, devices_per_host)
        free += _split(length, host, first, size, sizes)
    return tuple(placed)


def verify_placement(
    placements: Sequence[Placement], num_hosts: int, devices_per_host: int
) -> None:
    """Checks that the rectangles lie on the cluster and share no device.

    Raises:
        ValueError: Naming the stages concerned.
    """
    owner: dict[tuple[int, int], int] = {}
    for stage, placement in enumerate(placements):
        inside = placement.hosts.start >= 0 and placement.hosts.stop <= num_hosts
        if not inside or placement.devices.start < 0 or placement.devices.stop > devices_per_host:
            raise ValueError(f"Stage {stage} leaves the cluster of {num_hosts}x{devices_per_host}.")
        for device in itertools.product(placement.hosts, placement.devices):
            if device in owner:
                raise ValueError(
                    f"Stages {owner[device]} and {stage} share device {device[1]} of host "
                    f"{device[0]}."
                )
            owner[device] = stage


def host_distances(placements: Sequence[Placement]) -> tuple[int, ...]:
    """Hosts from each stage to the next one: 0 on a common host, 1 if next to each other."""
    return tuple(
        max(0, right.hosts[0] - left.hosts[-1], left.hosts[0] - right.hosts[-1])
        for left, right in itertools.pairwise(placements)
    )


def _hosts_needed(shapes: Sequence[Submesh], devices_per_host: int) -> int:
    """Untouched hosts these stages need if no block of a touched one is used."""
    parts = sum(s.devices_per_host for s in shapes if s.devices_per_host < devices_per_host)
    whole = sum(s.num_hosts for s in shapes if s.devices_per_host == devices_per_host)
    return whole - (-parts // devices_per_host)


def _split(
    length: int, host: int, first: int, size: int, sizes: Sequence[int]
) -> list[tuple[int, int, int]]:
    """What stays free of a block whose first `size` devices are taken, as blocks of the sizes."""
    free = []
    for part, larger in itertools.pairwise(sizes):
        if size <= part < length:
            free += [(part, host, first + start) for start in range(part, larger, part)]
    return free
