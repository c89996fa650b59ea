"""Which implementation runs: by platform, unless the caller says."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite.runtime.kernels.flash.spec import MOSAIC_GPU, PALLAS, SCAN

MOSAIC_DTYPES = ("bfloat16", "float16")
MAX_MOSAIC_HEAD_DIM = 256
HOPPER = "9.0"  # compute capability; wgmma is an instruction of this one alone

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Functions:
    """`forward(spec, ...)` and `backward(spec, ...)`, with the operands of the primitives."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def choose(implementation: str | None, platform: str, dtype: Any, head_dim: int) -> Functions:
    """The functions to lower an attention to.

    Args:
      implementation: what the caller asked for, or None.
      platform: of JAX that is lowered for: `cpu`, `cuda`, ...
      dtype: of q, k and v.
      head_dim: the larger of those of q and v.

    Raises:
      ValueError: what the caller asked for does not run there.
    """
    name = implementation or _automatic(platform, dtype, head_dim)
    if name == MOSAIC_GPU:
        _require_hopper(platform)
        from alpa_lite.runtime.kernels.flash import hopper

        return _functions_of(hopper)
    if name == PALLAS:
        if platform not in ("cpu", "cuda"):
            raise ValueError(
                f"implementation={PALLAS!r} runs on CPU (interpreted) and on NVIDIA GPUs, not on"
                f" {platform!r}. Leave it out, or say {SCAN!r}, which runs everywhere."
            )
        from alpa_lite.runtime.kernels.flash import portable

        functions = _functions_of(portable)
        run = {"interpret": platform == "cpu"}
        return Functions(
            functools.partial(functions.forward, **run),
            functools.partial(functions.backward, **run),
        )
    from alpa_lite.runtime.kernels.flash import scan

    return _functions_of(scan)


def mosaic_refusal(dtype: Any, head_dim: int) -> str | None:
    """Why the Hopper kernels do not take such inputs, or None if they do."""
    if jnp.dtype(dtype).name not in MOSAIC_DTYPES:
        return f"takes {' or '.join(MOSAIC_DTYPES)}, not {jnp.dtype(dtype).name}"
    if head_dim > MAX_MOSAIC_HEAD_DIM:
        return f"takes head dims up to {MAX_MOSAIC_HEAD_DIM}, not {head_dim}"
    return None


def _functions_of(module: ModuleType) -> Functions:
    return Functions(module.forward, module.backward)


def _automatic(platform: str, dtype: Any, head_dim: int) -> str:
    if platform != "cuda" or mosaic_refusal(dtype, head_dim):
        return SCAN
    device, capability = cuda_device()
    if capability == HOPPER:
        return MOSAIC_GPU
    _log_fallback(device, capability)
    return SCAN


def _require_hopper(platform: str) -> None:
    where = platform
    if platform == "cuda":
        device, capability = cuda_device()
        if capability == HOPPER:
            return
        where = f"{device} (compute capability {capability})"
    raise ValueError(
        f"implementation={MOSAIC_GPU!r} needs a GPU with wgmma (compute capability {HOPPER}:"
        f" H100, H200, GH200), not {where}. Leave it out to have one chosen by platform."
    )


def cuda_device() -> tuple[str, str]:
    """(kind, compute capability) of this process's GPUs; a Hopper's where there is none.

    Without a GPU the program is lowered for one elsewhere; JAX then lowers kernels for Hopper.
    """
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return "no GPU", HOPPER
    return device.device_kind, str(device.compute_capability)


@functools.cache
def _log_fallback(device: str, capability: str) -> None:
    """One line for each kind of device."""
    _LOG.warning(
        "flash_attention: %s (compute capability %s) has no wgmma; attention runs as loops of XLA"
        " operations (implementation=%r).",
        device, capability, SCAN,
    )  # fmt: skip
