"""Seconds of one operation on one device: the roofline, plus a floor per operation.

    seconds = max(flops / (peak * efficiency), bytes / (bandwidth * efficiency)) + overhead

(Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785.) Efficiency is one figure per
device, that of large operations; small or narrow matrix products fall short of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alpa_lite.cost_model.cluster import DeviceSpec

MATMUL = "matmul"
ELEMENTWISE = "elementwise"
KINDS = (MATMUL, ELEMENTWISE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What one kind of operation costs on one device.

    Attributes:
      s_per_flop: seconds per floating-point operation, if nothing else binds.
      s_per_byte: seconds per byte read or written, if nothing else binds.
      overhead_s: seconds per operation whatever its size.
    """

    s_per_flop: float
    s_per_byte: float
    overhead_s: float

    def op_s(self, flops: float, bytes_accessed: float) -> float:
        """Seconds of one operation; 0 if it neither computes nor touches memory."""
        busy_s = max(flops * self.s_per_flop, bytes_accessed * self.s_per_byte)
        return busy_s + self.overhead_s if busy_s else 0.0

    def op_s_array(self, flops: ArrayLike, bytes_accessed: ArrayLike) -> NDArray[np.float64]:
        """`op_s` of every pair."""
        busy_s = np.maximum(
            np.asarray(flops) * self.s_per_flop, np.asarray(bytes_accessed) * self.s_per_byte
        )
        return np.where(busy_s > 0, busy_s + self.overhead_s, 0.0)


def roofline(
    device: DeviceSpec, dtype: str, kind: str = MATMUL, shared_compute: float = 1.0
) -> Roofline:
    """The roofline of one kind of operation in one dtype.

    Args:
      device: the device.
      dtype: dtype name, `bfloat16`.
      kind: `matmul`, or `elementwise` for everything else.
      shared_compute: share of its rates the device keeps, see `Cluster`.

    Raises:
      ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of operation {kind!r}; known are {', '.join(KINDS)}")
    if kind == MATMUL:
        rate = device.peak_flops_per_s(dtype) * device.matmul_efficiency
    else:
        rate = device.vector_flops_per_s or device.peak_flops_per_s(dtype)
    bandwidth = device.hbm_bytes_per_s * device.hbm_efficiency
    return Roofline(
        s_per_flop=1.0 / (rate * shared_compute),
        s_per_byte=1.0 / (bandwidth * shared_compute),
        overhead_s=device.op_overhead_s,
    )


def op_s(
    flops: float, bytes_accessed: float, dtype: str, device: DeviceSpec, kind: str = MATMUL
) -> float:
    """Seconds of one operation on one device.

    Args:
      flops: floating-point operations.
      bytes_accessed: bytes read and written in device memory.
      dtype: dtype name of the operands, `bfloat16`.
      device: the device.
      kind: `matmul`, or `elementwise` for everything else.
    """
    return roofline(device, dtype, kind).op_s(flops, bytes_accessed)
