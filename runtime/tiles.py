"""How an array is cut into tiles over devices: `Cut`, and the tile that every device has.

A `Cut` is a sharding without devices, over mesh axes of prime size, so that it can be refined one
prime at a time and be laid over the devices of another mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Counts = tuple[int, ...]
"""Number of parts of every dim."""

Tile = tuple[tuple[int, int], ...]
"""The part `[start, stop)` of every dim."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Tiles of an array over a row of devices.

    Attributes:
      axes: sizes of the mesh axes, all of them prime; row-major over the devices.
      dims: per dim of the array, the axes that cut it, outermost first. Devices that differ along
        the other axes have the same tile.
    """

    axes: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]

    @property
    def num_devices(self) -> int:
        """Product of the axis sizes."""
        return math.prod(self.axes)

    @property
    def counts(self) -> Counts:
        """Number of parts of every dim."""
        return tuple(math.prod(self.axes[a] for a in axes) for axes in self.dims)

    def sharding(self, devices: Sequence[jax.Device]) -> NamedSharding:
        """The cut over these devices, in their order."""
        names = [f"axis{a}" for a in range(len(self.axes))]
        spec = PartitionSpec(*(tuple(names[a] for a in axes) or None for axes in self.dims))
        grid = np.array(devices).reshape(self.axes or (1,))
        return NamedSharding(Mesh(grid, names or ["axis"]), spec)


def cut_of(sharding: NamedSharding, shape: Sequence[int]) -> Cut:
    """The cut that a sharding makes of an array.

    Args:
      sharding: how the array lies.
      shape: of the array.

    Raises:
      ValueError: the sharding leaves a dim open, or means a sum that is still to be made, or does
        not divide the array evenly.
    """
    spec = sharding.spec
    if spec.unreduced or any(entry is PartitionSpec.UNCONSTRAINED for entry in spec):
        raise ValueError(f"a transfer needs every dim placed and no sum pending, found {spec}")
    axes: list[int] = []
    parts: dict[str, tuple[int, ...]] = {}
    for name, size in sharding.mesh.shape.items():
        primes = prime_factors(size)
        parts[name] = tuple(range(len(axes), len(axes) + len(primes)))
        axes += primes
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    if len(entries) > len(shape):
        raise ValueError(f"{spec} has more dims than an array of shape {tuple(shape)}")
    names = [(e,) if isinstance(e, str) else tuple(e or ()) for e in entries]
    cut = Cut(tuple(axes), tuple(tuple(a for n in group for a in parts[n]) for group in names))
    if not divides(cut.counts, shape):
        raise ValueError(
            f"a transfer needs even tiles: {spec} makes {cut.counts} parts of shape {tuple(shape)}"
        )
    return cut


def refined(cut: Cut, within: Sequence[int]) -> Cut:
    """The cut with its free axes put to use, in order, each on the first dim that it divides.

    Every new tile lies within the old tile of its device.

    Args:
      cut: what to refine.
      within: per dim, what the number of parts must go on dividing.
    """
    dims = list(cut.dims)
    used = {a for axes in dims for a in axes}
    for axis, prime in enumerate(cut.axes):
        if axis in used:
            continue
        counts = replace(cut, dims=tuple(dims)).counts
        for d, count in enumerate(counts):
            if within[d] % (count * prime) == 0:
                dims[d] += (axis,)
                break
    return replace(cut, dims=tuple(dims))


def grid(counts: Counts, num_devices: int) -> Cut:
    """The plain cut into so many parts, row-major, equal tiles side by side.

    Args:
      counts: parts of every dim; their product divides `num_devices`.
      num_devices: number of devices.
    """
    axes: list[int] = []
    dims = []
    for count in counts:
        primes = prime_factors(count)
        dims.append(tuple(range(len(axes), len(axes) + len(primes))))
        axes += primes
    rest = prime_factors(num_devices // math.prod(counts))
    return Cut((*axes, *rest), tuple(dims))


def coarsened(counts: Counts, product: int) -> Counts | None:
    """Counts that divide `counts` and have this product, outer dims first; None if there are none.

    Example:
      >>> coarsened((2, 4), 4)
      (2, 2)
    """
    coarse = [1] * len(counts)
    for prime in prime_factors(product):
        for d, count in enumerate(counts):
            if count % (coarse[d] * prime) == 0:
                coarse[d] *= prime
                break
        else:
            return None
    return tuple(coarse)


def tiles_of(sharding: NamedSharding, shape: Sequence[int]) -> tuple[Tile, ...]:
    """The tile of every device, in mesh order."""
    indices = sharding.devices_indices_map(tuple(shape))
    return tuple(
        tuple(s.indices(n)[:2] for s, n in zip(indices[device], shape, strict=True))
        for device in sharding.mesh.devices.flat
    )


def subtiles(tile: Tile, splits: Counts) -> Iterator[Tile]:
    """A tile cut further, row-major.

    Args:
      tile: what to cut.
      splits: parts of every dim, which they divide.
    """
    for index in np.ndindex(*splits):
        yield tuple(
            (start + (stop - start) * i // n, start + (stop - start) * (i + 1) // n)
            for (start, stop), i, n in zip(tile, index, splits, strict=True)
        )


def size(tile: Tile) -> int:
    """Number of elements."""
    return math.prod(stop - start for start, stop in tile)


def overlap(a: Tile, b: Tile) -> int:
    """Number of elements that two tiles share."""
    return math.prod(
        max(0, min(a_stop, b_stop) - max(a_start, b_start))
        for (a_start, a_stop), (b_start, b_stop) in zip(a, b, strict=True)
    )


def divides(counts: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether every dim falls into so many equal parts."""
    return all(n % count == 0 for count, n in zip(counts, shape, strict=True))


def prime_factors(n: int) -> list[int]:
    """Prime factors of a positive number, ascending.

    Example:
      >>> prime_factors(12)
      [2, 2, 3]
    """
    factors = []
    prime = 2
    while n > 1:
        while n % prime == 0:
            factors.append(prime)
            n //= prime
        prime += 1
    return factors
