"""Shapes of submeshes, and which of them can be combined on a cluster."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Submesh:
    """The shape of the devices of a stage: part of one host, or whole hosts.

    Attributes:
        num_hosts: Hosts it spans.
        devices_per_host: Devices used on each of them.
    """

    num_hosts: int
    devices_per_host: int

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return self.num_hosts * self.devices_per_host

    def __str__(self) -> str:
        return f"{self.num_hosts}x{self.devices_per_host}"


def submesh_shapes(num_hosts: int, devices_per_host: int) -> tuple[Submesh, ...]:
    """The usual submeshes: `1 x 2^k` within a host, then whole hosts, powers of two and all.

    Alpa's reduced set (OSDI'22, section 5.2): these always fit together on the cluster, as long as
    their devices do not exceed it (`placement`).

    Example:
        >>> " ".join(str(shape) for shape in submesh_shapes(6, 4))
        '1x1 1x2 1x4 2x4 4x4 6x4'
    """
    parts = [
        1 << k for k in range(devices_per_host.bit_length()) if devices_per_host % (1 << k) == 0
    ]
    hosts = [1 << k for k in range(num_hosts.bit_length())]
    shapes = [Submesh(1, part) for part in parts if part < devices_per_host]
    shapes += [Submesh(count, devices_per_host) for count in sorted({*hosts, num_hosts})]
    return tuple(shapes)


def check_shapes(shapes: Sequence[Submesh], num_hosts: int, devices_per_host: int) -> None:
    """Checks that shapes can be combined freely.

    Raises:
        ValueError: Naming the first shape that cannot, and why.
    """
    if min(num_hosts, devices_per_host) < 1:
        raise ValueError(f"A cluster of {num_hosts}x{devices_per_host} has no devices.")
    for shape in shapes:
        if not (
            1 <= shape.num_hosts <= num_hosts and 1 <= shape.devices_per_host <= devices_per_host
        ):
            raise ValueError(
                f"Submesh {shape} does not fit on {num_hosts}x{devices_per_host} devices."
            )
        if shape.num_hosts > 1 and shape.devices_per_host < devices_per_host:
            raise ValueError(
                f"Submesh {shape} uses a part of several hosts; use part of one, or whole hosts."
            )
    for part, larger in itertools.pairwise(part_sizes(shapes, devices_per_host)):
        if larger % part:
            raise ValueError(
                f"Submeshes with {part} and {larger} devices of a host do not fit together on "
                f"hosts of {devices_per_host}: each size must divide the next."
            )


def part_sizes(shapes: Sequence[Submesh], devices_per_host: int) -> list[int]:
    """The different numbers of devices they use of a host, and all of them, ascending."""
    return sorted({shape.devices_per_host for shape in shapes} | {devices_per_host})
