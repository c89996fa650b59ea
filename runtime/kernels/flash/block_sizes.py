"""Block sizes of the Hopper kernels, by device kind, dtype, head dim and mask class.

The table holds what has been measured to be best (`benchmarks/attention_tuner.py` prints its rows).
Where it has nothing, `DEFAULTS` by head dim hold, which were chosen without a GPU: the largest
tiles that fit shared memory and registers, as `benchmarks/attention_ptxas.py` reports them. Nothing
is tuned while a user's program runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from alpa_lite.runtime.kernels.flash.spec import FlashSpec

HEAD_DIMS = (64, 96, 128, 192, 256)
"""Those that kernels are made for; others are filled up to the next one."""

# Mask classes: how much of the score matrix is seen.
FULL = "full"
CAUSAL = "causal"
WINDOW = "window"
SEGMENTS = "segments"
MASK_CLASSES = (FULL, CAUSAL, WINDOW, SEGMENTS)

SPLIT = "split"  # a kernel for dq, one for dk and dv: seven products, deterministic
FUSED = "fused"  # one kernel: five products; dq is added up in the order in which programs end


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBlocks:
    """Of the forward kernel.

    Attributes:
      block_kv: keys of a tile, a multiple of 64.
      stages: tiles of keys, and of values, that shared memory holds.
    """

    block_kv: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardBlocks:
    """Of the backward kernels.

    Attributes:
      kind: `SPLIT` or `FUSED`.
      dq_block_kv: keys of a tile in the dq kernel, a multiple of 64.
      dq_stages: tiles of keys and values that its shared memory holds.
      dkv_stages: tiles of 64 queries that the shared memory of the dk/dv kernel holds.
    """

    kind: str
    dq_block_kv: int
    dq_stages: int
    dkv_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Of one attention."""

    forward: ForwardBlocks
    backward: BackwardBlocks


def _blocks(forward: tuple[int, int], dq: tuple[int, int], dkv_stages: int) -> Blocks:
    return Blocks(
        forward=ForwardBlocks(block_kv=forward[0], stages=forward[1]),
        backward=BackwardBlocks(
            kind=SPLIT, dq_block_kv=dq[0], dq_stages=dq[1], dkv_stages=dkv_stages
        ),
    )


DEFAULTS: Mapping[int, Blocks] = MappingProxyType(
    {
        64: _blocks((128, 2), (128, 2), 2),
        96: _blocks((128, 2), (64, 2), 2),
        128: _blocks((128, 2), (64, 2), 2),
        192: _blocks((64, 2), (64, 1), 2),
        256: _blocks((64, 2), (64, 1), 2),
    }
)

MEASURED: Mapping[tuple[str, str, int, str], Blocks] = MappingProxyType({})
"""By (device kind, dtype, head dim, mask class). Empty: no GPU has been measured yet."""


def supported_head_dim(head_dim: int) -> int:
    """The smallest of `HEAD_DIMS` that holds `head_dim`."""
    return next(dim for dim in HEAD_DIMS if dim >= head_dim)


def mask_class(spec: FlashSpec, has_segments: bool) -> str:
    """The class of an attention's mask; segments count more than a window, a window than causal."""
    if has_segments:
        return SEGMENTS
    if spec.left is not None:
        return WINDOW
    return FULL if spec.right is None else CAUSAL


def blocks_for(device_kind: str, dtype: str, head_dim: int, mask: str) -> Blocks:
    """Measured block sizes, or the defaults of the head dim.

    Args:
      device_kind: as JAX calls it, such as `NVIDIA H200`.
      dtype: name of the inputs' dtype.
      head_dim: one of `HEAD_DIMS`.
      mask: one of `MASK_CLASSES`.
    """
    return MEASURED.get((device_kind, dtype, head_dim, mask), DEFAULTS[head_dim])
