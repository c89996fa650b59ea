"""The one interface of the planner to all prices: `CostModel`, and `MeshCostModel` behind it."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alpa_lite.cost_model.cluster import Cluster
from alpa_lite.cost_model.compute import ELEMENTWISE, MATMUL, Roofline, roofline
from alpa_lite.cost_model.curves import CurvePricer
from alpa_lite.cost_model.hierarchy import LinePricer, collective_pricer
from alpa_lite.cost_model.layout import AxisGroup, axis_group


class CostModel(Protocol):
    """Seconds and bytes on one logical mesh."""

    def collective_s(self, kind: str, payload_bytes: float, axes: tuple[str, ...]) -> float:
        """Seconds of one collective over some mesh axes; payload as in `collectives`."""
        ...

    def collective_s_array(
        self, kind: str, payload_bytes: ArrayLike, axes: tuple[str, ...]
    ) -> NDArray[np.float64]:
        """The same for many payloads."""
        ...

    def compute_s(self, flops: float, bytes_accessed: float, dtype: str, is_matmul: bool) -> float:
        """Seconds of one operation on one device, from its local flops and bytes."""
        ...

    def compute_s_array(
        self, flops: ArrayLike, bytes_accessed: ArrayLike, dtype: str, is_matmul: bool
    ) -> NDArray[np.float64]:
        """The same for many operations."""
        ...

    @property
    def hbm_budget_bytes(self) -> int:
        """Bytes per device that a plan may fill."""
        ...


class MeshCostModel:
    """Prices on one mesh of one cluster, remembered: made for a million calls.

    Args:
      cluster: the hardware.
      mesh_axes: (name, size) of the logical mesh, slowest varying first; it covers all devices of
        the cluster (`Cluster.resized` gives a part of one).

    Raises:
      ValueError: the mesh has another number of devices than the cluster.

    Example:
      >>> model = MeshCostModel(Cluster.parse("h100:2x8"), (("dp", 2), ("tp", 8)))
      >>> fast = model.collective_s("all_reduce", 2**30, ("tp",))
      >>> fast < model.collective_s("all_reduce", 2**30, ("dp",))
      True
    """

    def __init__(self, cluster: Cluster, mesh_axes: tuple[tuple[str, int], ...]) -> None:
        size = math.prod(size for _, size in mesh_axes)
        if size != cluster.num_devices:
            sizes = "x".join(f"{n}={s}" for n, s in mesh_axes)
            raise ValueError(
                f"mesh {sizes} has {size} devices, cluster {cluster.name} has "
                f"{cluster.num_devices}; they must agree (Cluster.resized gives a part of one)"
            )
        self.cluster = cluster
        self.mesh_axes = tuple(mesh_axes)
        self._pricers: dict[tuple[str, tuple[str, ...]], CurvePricer | LinePricer] = {}
        self._rooflines: dict[tuple[str, bool], Roofline] = {}

    def group(self, axes: tuple[str, ...]) -> AxisGroup:
        """How groups along some mesh axes lie on the hosts."""
        return axis_group(self.mesh_axes, axes, self.cluster.devices_per_host)

    def collective_s(self, kind: str, payload_bytes: float, axes: tuple[str, ...]) -> float:
        """Seconds of one collective.

        Args:
          kind: all_reduce, all_gather, reduce_scatter, all_to_all or collective_permute.
          payload_bytes: per device, see `collectives`.
          axes: mesh axes taken together, in any order.

        Raises:
          ValueError: unknown kind or axis, or a negative payload.
        """
        pricer = self._pricers.get((kind, axes)) or self._pricer(kind, axes)
        if payload_bytes > 0:
            return pricer.seconds(payload_bytes)
        if payload_bytes == 0:
            return 0.0
        raise ValueError(f"payload of {kind} is {payload_bytes} bytes; it must be at least 0")

    def collective_s_array(
        self, kind: str, payload_bytes: ArrayLike, axes: tuple[str, ...]
    ) -> NDArray[np.float64]:
        """Seconds of one collective for many payloads: `collective_s` of every element."""
        pricer = self._pricers.get((kind, axes)) or self._pricer(kind, axes)
        payload = np.asarray(payload_bytes, dtype=np.float64)
        if not (payload >= 0).all():
            raise ValueError(f"a payload of {kind} is negative or NaN; it must be at least 0")
        return np.where(payload > 0, pricer.seconds_array(payload), 0.0)

    def compute_s(self, flops: float, bytes_accessed: float, dtype: str, is_matmul: bool) -> float:
        """Seconds of one operation on one device.

        Args:
          flops: floating-point operations of this device.
          bytes_accessed: bytes this device reads and writes in its memory.
          dtype: dtype name, `bfloat16`.
          is_matmul: a matrix product or convolution.
        """
        return self._roofline(dtype, is_matmul).op_s(flops, bytes_accessed)

    def compute_s_array(
        self, flops: ArrayLike, bytes_accessed: ArrayLike, dtype: str, is_matmul: bool
    ) -> NDArray[np.float64]:
        """Seconds of many operations on one device: `compute_s` of every pair."""
        return self._roofline(dtype, is_matmul).op_s_array(flops, bytes_accessed)

    @property
    def hbm_budget_bytes(self) -> int:
        """Bytes per device that a plan may fill."""
        return self.cluster.usable_hbm_bytes

    def _roofline(self, dtype: str, is_matmul: bool) -> Roofline:
        line = self._rooflines.get((dtype, is_matmul))
        if line is None:
            kind = MATMUL if is_matmul else ELEMENTWISE
            cluster = self.cluster
            line = roofline(cluster.device, dtype, kind, cluster.shared_compute)
            self._rooflines[dtype, is_matmul] = line
        return line

    def _pricer(self, kind: str, axes: tuple[str, ...]) -> CurvePricer | LinePricer:
        pricer = collective_pricer(kind, self.group(axes), self.cluster)
        self._pricers[kind, tuple(axes)] = pricer
        return pricer
