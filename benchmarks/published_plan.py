"""A published train step as the planner sees it: model, grid and cluster, and what it predicts."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import alpa_lite
from alpa_lite.cost_model import Cluster, cluster_presets
from alpa_lite.errors import AlpaLiteError, InfeasibleError
from alpa_lite.models import ModelSetup, build
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.pipeline_methods import ThreeDParallel
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.pipeshard import plan_pipeline
from alpa_lite.passes.rules import RuleTable
from benchmarks.published import PublishedRow

# Accelerator -> cluster preset, and its bytes of memory where the preset's are those of a variant.
PRESETS = {
    "V100-SXM2-16GB": ("v100", None),
    "V100-SXM3-32GB": ("v100", 34_089_730_048),
    "A100-SXM-40GB": ("a100-40", None),
    "A100-SXM-80GB": ("a100-80", None),
    "H100-SXM-80GB": ("h100", None),
    "H800-SXM-80GB": ("h800", None),
    "H200-SXM-141GB": ("h200", None),
    "B200": ("b200", None),
    "GB200": ("gb200", None),
    "MI300X": ("mi300x", None),
}
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# What is computed again: by every block of the model, and by the pipeline method.
REMATS = {
    "none": ((False, "none"),),
    "selective": ((False, "dots"),),
    "full": ((True, "none"),),
    "": ((False, "none"), (True, "none")),  # the least that fits
}
NETWORK_BYTES_PER_S_PER_GBIT = 12e9 / 100  # as in the cluster presets
SEARCH_S = 30.0  # for the integer programs of one stage
NO_LIMIT = 1e15  # bytes


class NotExpressibleError(Exception):
    """What the planner or the models here have no word for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the planner says of a row.

    Attributes:
      step_s, peak_bytes: predicted.
      fits: whether it fits the memory a plan may use; if not, it was planned without that limit.
      remat: what was planned, where the source does not say.
      compute_s, communication_s, update_s: of the slowest stage.
      bubble_share: idle share of all devices.
      wall_s: it took to plan.
    """

    step_s: float
    peak_bytes: float
    fits: bool
    remat: str
    compute_s: float
    communication_s: float
    update_s: float
    bubble_share: float
    wall_s: float


def cluster_of(row: PublishedRow) -> Cluster:
    """The published hardware: a preset with the row's size, network and memory.

    Raises:
      NotExpressibleError: no preset.
    """
    kind, memory = PRESETS.get(row.accelerator, ("", None))
    presets = cluster_presets()
    if kind not in presets:
        raise NotExpressibleError(f"no cluster preset for {row.accelerator}")
    cluster = presets[kind].resized(row.num_hosts, row.devices_per_host)
    if memory is not None:
        cluster = dataclasses.replace(
            cluster, device=dataclasses.replace(cluster.device, hbm_bytes=memory)
        )
    if row.nic_gbit_per_s is not None:
        rate = row.nic_gbit_per_s * NETWORK_BYTES_PER_S_PER_GBIT
        link = dataclasses.replace(cluster.inter_host, bytes_per_s=rate)
        cluster = dataclasses.replace(cluster, inter_host=link)
    return cluster


def setup_of(
    row: PublishedRow, *, scan_layers: bool, remat: bool = False, flash: bool = False
) -> ModelSetup:
    """The model with the row's shape; with `flash`, with a fused attention if the row had one.

    Raises:
      NotExpressibleError: no model here has that shape.
    """
    if row.num_experts:
        raise NotExpressibleError("experts split over the data-parallel devices")
    if row.precision not in DTYPES:
        raise NotExpressibleError(f"matrix products in {row.precision}")
    if row.head_dim not in (None, row.hidden_size / row.num_heads):
        raise NotExpressibleError("head dim other than hidden size / heads")
    common: dict[str, Any] = {
        "vocab_size": row.vocab_size, "seq_len": row.seq_len, "hidden_size": row.hidden_size,
        "num_layers": row.num_layers, "num_heads": row.num_heads, "dtype": DTYPES[row.precision],
        "scan_layers": scan_layers, "remat": remat,
    }  # fmt: skip
    if flash and row.fused_attention:
        common["attention"] = functools.partial(alpa_lite.flash_attention, causal=True)
    plain = not row.gated_mlp and row.num_kv_heads == row.num_heads
    if plain and row.mlp_size % row.hidden_size == 0:
        ratio = row.mlp_size // row.hidden_size
        return build(
            "gpt-1.3b", mlp_ratio=ratio, tie_embeddings=row.tied_embeddings, **common
        )  # fmt: skip
    if row.tied_embeddings:
        raise NotExpressibleError("tied embeddings with a gated MLP or grouped queries")
    return build(
        "llama2-7b", mlp_size=row.mlp_size, num_kv_heads=row.num_kv_heads,
        gated_mlp=row.gated_mlp, **common,
    )  # fmt: skip


def method_of(row: PublishedRow) -> ThreeDParallel:
    """The row's parallel configuration, memory left out.

    Raises:
      NotExpressibleError: it has something that a grid has not.
    """
    if row.cp > 1:
        raise NotExpressibleError("context parallelism")
    if row.ep > 1:
        raise NotExpressibleError("experts split over the data-parallel devices")
    if row.microbatch is None:
        raise NotExpressibleError("no microbatch size is given")
    count, rest = divmod(row.global_batch, row.microbatch * row.dp)
    if rest or not count:
        raise NotExpressibleError(
            f"a batch of {row.global_batch} does not divide into {row.dp} x {row.microbatch}"
        )
    if row.num_layers % (row.pp * row.virtual_stages):
        raise NotExpressibleError(
            f"{row.num_layers} layers in {row.pp} x {row.virtual_stages} unequal stages"
        )
    interleaved = row.pp > 1 and row.virtual_stages > 1
    schedule = "interleaved_1f1b" if interleaved else row.schedule or "1f1b"
    try:
        return ThreeDParallel(
            dp=row.dp, tp=row.tp, pp=row.pp, zero=row.zero, split_weights=True,
            num_microbatches=count, schedule=schedule,
            num_virtual=row.virtual_stages if interleaved else 1, time_limit_s=SEARCH_S,
        )  # fmt: skip
    except ValueError as error:
        raise NotExpressibleError(str(error)) from None


def attempts(row: PublishedRow) -> Iterator[tuple[bool, ThreeDParallel, bool]]:
    """Until one fits: remat of blocks, method, whether memory is limited; not the last time."""
    method = method_of(row)
    for blocks, stages in REMATS[row.remat]:
        yield blocks, dataclasses.replace(method, remat=stages), True
    blocks, stages = REMATS[row.remat][-1]
    yield blocks, dataclasses.replace(method, remat=stages, memory_budget_bytes=NO_LIMIT), False


def predict(
    row: PublishedRow, table: RuleTable, *, scan_layers: bool, flash: bool = False
) -> Prediction:
    """Plan the row's grid and read off the prediction.

    Raises:
      NotExpressibleError: the planner cannot describe the row; says why.
    """
    begun = time.monotonic()
    cluster = cluster_of(row)
    for blocks, method, fits in attempts(row):
        setup = setup_of(row, scan_layers=scan_layers, remat=blocks, flash=flash)
        call = StepArgs(
            fun=setup.step, args=(setup.state_shapes(), setup.batch_shapes(row.global_batch)),
            arg_names=("state", "batch"), batch_argnums=(1,), donate_argnums=(0,), name=row.id,
        )  # fmt: skip
        try:
            plan = plan_pipeline(call, method, cluster, table=table).plan
        except InfeasibleError as error:
            if not fits or error.need_bytes is None:
                raise NotExpressibleError(f"no layout: {str(error)[:160]}") from None
            continue
        except AlpaLiteError as error:
            raise NotExpressibleError(f"{type(error).__name__}: {str(error)[:160]}") from None
        remat = "full" if blocks else method.remat
        return _prediction(plan, fits, remat, time.monotonic() - begun)
    raise AssertionError("the last attempt returns or raises")


def _prediction(plan: PipelinePlan, fits: bool, remat: str, wall_s: float) -> Prediction:
    parts: list[Any] = [stage.plan.predicted for stage in plan.stages]
    return Prediction(
        step_s=plan.predicted.step_s, peak_bytes=plan.predicted.peak_bytes, fits=fits, remat=remat,
        compute_s=max(part.compute_s for part in parts),
        communication_s=max(part.communication_s for part in parts),
        update_s=max(stage.per_step_s for stage in plan.stages),
        bubble_share=plan.predicted.bubble_share, wall_s=wall_s,
    )  # fmt: skip
