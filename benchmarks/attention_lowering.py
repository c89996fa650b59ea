"""Lowers every configuration of the Hopper attention kernels for CUDA; needs no GPU.

    python -m benchmarks.attention_lowering [--quick]

Head dims x dtypes x mask classes x soft cap x lowering semantics, forward and backward, split and
fused, at sizes that have to be filled up. What Mosaic checks while lowering (register layouts,
shapes of wgmma, tilings, the size of shared memory) is checked by this; whether the kernels are
fast is not. Writes `results/attention_lowering_jax-<version>.json`, with one row per head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib import metadata
from typing import Any

import jax

from alpa_lite import compat
from alpa_lite.runtime.kernels.flash import hopper
from alpa_lite.runtime.kernels.flash.block_sizes import (
    CAUSAL,
    DEFAULTS,
    FULL,
    FUSED,
    HEAD_DIMS,
    MASK_CLASSES,
    SEGMENTS,
    SPLIT,
    WINDOW,
    Blocks,
)
from alpa_lite.runtime.kernels.flash.hopper_dkv import FUSED_DIM
from alpa_lite.runtime.kernels.flash.spec import FlashSpec
from benchmarks.options import parse_options
from benchmarks.results_table import Column, ResultsTable, describe_environment

SEMANTICS = ("Lane", "Warpgroup")
CALL = "stablehlo.custom_call @mosaic_gpu_v2"
BANDS = {FULL: (None, None), CAUSAL: (None, 0), WINDOW: (99, 0), SEGMENTS: (None, 0)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What is lowered, forward and backward."""

    head_dim: int
    dtype: str
    mask: str
    softcap: float | None
    kind: str
    semantics: str

    @property
    def kernels(self) -> int:
        """How many the two passes are."""
        return 3 if self.kind == SPLIT else 2

    @property
    def cheap(self) -> bool:
        """Whether it is one of those of its head dim that a quick test takes."""
        return self.dtype == "bfloat16" and self.softcap is None and self.kind == SPLIT

    def __str__(self) -> str:
        cap = "" if self.softcap is None else "-softcap"
        return f"{self.head_dim}-{self.dtype}-{self.mask}{cap}-{self.kind}-{self.semantics}"

    def blocks(self) -> Blocks:
        """The shipped block sizes, with the kind of backward pass asked for."""
        blocks = DEFAULTS[self.head_dim]
        return dataclasses.replace(
            blocks, backward=dataclasses.replace(blocks.backward, kind=self.kind)
        )


def configurations() -> list[Configuration]:
    """All of them."""
    return [
        Configuration(
            head_dim=dim, dtype=dtype, mask=mask, softcap=cap, kind=kind, semantics=semantics
        )
        for dim in HEAD_DIMS
        for kind in ((SPLIT, FUSED) if dim == FUSED_DIM else (SPLIT,))
        for dtype in ("bfloat16", "float16")
        for mask in MASK_CLASSES
        for cap in (None, 30.0)
        for semantics in SEMANTICS
    ]


def lower(configuration: Configuration) -> int:
    """Lower both passes; how many kernels are in the two programs."""
    return sum(lower_pass(configuration, forward=forward) for forward in (True, False))


def lower_pass(
    configuration: Configuration, *, forward: bool, q_len: int = 300, kv_len: int = 450
) -> int:
    """Lower one pass; how many kernels are in its program."""
    shape = jax.ShapeDtypeStruct
    dtype, dim = configuration.dtype, configuration.head_dim
    q, kv = shape((1, q_len, 4, dim), dtype), shape((1, kv_len, 2, dim), dtype)
    row, offset = shape((1, 4, q_len), "float32"), shape((1,), "int32")
    ids = tuple(shape((1, n), "int32") for n in (q_len, kv_len))
    left, right = BANDS[configuration.mask]
    function = functools.partial(
        hopper.forward if forward else hopper.backward,
        FlashSpec(scale=dim**-0.5, left=left, right=right, softcap=configuration.softcap),
        blocks=configuration.blocks(),
        semantics=compat.lowering_semantics(configuration.semantics),
    )
    operands = (q, kv, kv) if forward else (q, kv, kv, row, row, q)
    rest = (offset, offset, *(ids if configuration.mask == SEGMENTS else ()))
    traced = jax.jit(function).trace(*operands, *rest)
    return traced.lower(lowering_platforms=("cuda",)).as_text().count(CALL)


def main() -> None:
    options = parse_options(__doc__, [str(dim) for dim in HEAD_DIMS])
    rows = []
    for dim in map(int, options.chosen):
        chosen = [c for c in configurations() if c.head_dim == dim]
        failed = [str(c) for c in chosen if not _lowers(c)]
        rows.append({
            "head_dim": dim, "configurations": len(chosen), "lowered": len(chosen) - len(failed),
            "failed": ", ".join(failed) or None,
        })  # fmt: skip
        print(rows[-1], flush=True)
    if options.save:
        _save(rows)


def _lowers(configuration: Configuration) -> bool:
    try:
        return lower(configuration) == configuration.kernels
    except Exception as error:  # noqa: BLE001 (whatever Mosaic raises is the finding)
        print(f"{configuration}: {type(error).__name__}: {error}", flush=True)
        return False


def _save(rows: list[dict[str, Any]]) -> None:
    version = metadata.version("jax")
    ResultsTable(
        title="Configurations of the Hopper attention kernels lowered for CUDA without a GPU",
        command="python -m benchmarks.attention_lowering",
        environment=describe_environment("no accelerator"),
        columns=(
            Column("head_dim", "Head dim"),
            Column("configurations", "Configurations"),
            Column("lowered", "Lowered"),
            Column("failed", "Failed"),
        ),
        rows=tuple(rows),
    ).save(f"attention_lowering_jax-{version}".replace(".", "-"))


if __name__ == "__main__":
    main()
