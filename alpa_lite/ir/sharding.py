"""How one array lies on a logical mesh: `Mesh` and `ShardingSpec`.

*Axis* is said of meshes, *dim* of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

MAX_MESH_AXES = 4
"""More are neither searched nor accepted."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """A logical device mesh: named axes, row-major over the devices, the last axis fastest.

    Attributes:
      axes: (name, size) pairs, from the slowest links to the fastest.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names) or not all(n.isidentifier() for n in names):
            raise ValueError(f"mesh axis names must be distinct identifiers, found {names}")
        if any(size < 1 for _, size in self.axes):
            raise ValueError(f"mesh axis sizes must be at least 1, found {dict(self.axes)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names in order."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Axis sizes in order."""
        return tuple(size for _, size in self.axes)

    @property
    def num_devices(self) -> int:
        """Product of the axis sizes."""
        return math.prod(self.shape)

    def size(self, axes: str | Iterable[str]) -> int:
        """Number of devices along one axis, or along several together."""
        sizes: Mapping[str, int] = dict(self.axes)
        return sizes[axes] if isinstance(axes, str) else math.prod(sizes[a] for a in axes)

    def __str__(self) -> str:
        return "x".join(f"{name}={size}" for name, size in self.axes)


@dataclass(frozen=True, slots=True)
class ShardingSpec:
    """Mesh axes per dim, and axes over which a sum is still pending.

    Attributes:
      dims: for every dim the mesh axes that split it, major to minor.
      partial: mesh axes along which each device holds one summand of the value, sorted.
    """

    dims: tuple[tuple[str, ...], ...]
    partial: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        used = self.used_axes
        if len(set(used)) != len(used):
            raise ValueError(f"a mesh axis may be used once per array, found {self}")

    @property
    def used_axes(self) -> tuple[str, ...]:
        """Every mesh axis the spec names."""
        return tuple(axis for dim in self.dims for axis in dim) + self.partial

    @property
    def is_replicated(self) -> bool:
        """Whether every device holds the whole value."""
        return not self.used_axes

    @classmethod
    def replicated(cls, rank: int) -> ShardingSpec:
        """The spec of an array that every device holds whole."""
        return cls(((),) * rank)

    def num_shards(self, mesh: Mesh) -> int:
        """How many times smaller than the whole each device's part is."""
        return mesh.size(axis for dim in self.dims for axis in dim)

    def local_shape(self, shape: Iterable[int], mesh: Mesh) -> tuple[int, ...]:
        """Shape of each device's part; dims must divide."""
        return tuple(n // mesh.size(axes) for n, axes in zip(shape, self.dims, strict=True))

    def partition_spec(self) -> PartitionSpec:
        """JAX's form; the spec must have no pending sum."""
        if self.partial:
            raise ValueError(f"{self} has a pending sum and no PartitionSpec")
        entries: list[Any] = [
            None if not axes else axes[0] if len(axes) == 1 else axes for axes in self.dims
        ]
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    def to_json(self) -> list[list[str]]:
        """A list of axes per dim (pending sums are never stored)."""
        return [list(axes) for axes in self.dims]

    def __str__(self) -> str:
        dims = ", ".join("+".join(axes) if axes else "-" for axes in self.dims)
        return f"[{dims}]" + (f" partial({'+'.join(self.partial)})" if self.partial else "")
