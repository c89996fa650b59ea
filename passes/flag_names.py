"""What others call it: mesh axes and plans in the terms of Megatron-LM and MaxText.

In: a plan. Out: the nearest flags, and in what the plan goes beyond them. Names as of Megatron-LM's
`megatron/training/arguments.py` and MaxText's `configs/base.yml`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from alpa_lite.cost_model import Cluster
from alpa_lite.passes.pipeline_methods import FULL_REMAT, NO_REMAT
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisName:
    """A kind of mesh axis.

    Attributes:
      name: here.
      meaning: what is split along it.
      maxtext: name of MaxText's mesh axis; `""` if it has none.
      megatron: flag of Megatron-LM; `""` if it has none.
    """

    name: str
    meaning: str
    maxtext: str
    megatron: str


AXES = (
    AxisName(name="pp", meaning="layers, in stages", maxtext="stage",
             megatron="--pipeline-model-parallel-size"),
    AxisName(name="dp", meaning="the batch; parameters are whole", maxtext="data",
             megatron="what is left of the devices"),
    AxisName(name="fsdp", meaning="the batch, and parameters (ZeRO-3)", maxtext="fsdp",
             megatron="--data-parallel-sharding-strategy optim_grads_params"),
    AxisName(name="tp", meaning="parameters and what they make", maxtext="tensor",
             megatron="--tensor-model-parallel-size"),
    AxisName(name="sp", meaning="sequences, where parameters are whole",
             maxtext="tensor_sequence", megatron="--sequence-parallel"),
    AxisName(name="ep", meaning="experts", maxtext="expert",
             megatron="--expert-model-parallel-size"),
    AxisName(name="cp", meaning="sequences, attention included", maxtext="context",
             megatron="--context-parallel-size"),
)  # fmt: skip
"""Slowest links first."""

_MAXTEXT_PARALLELISM = {
    "pp": "pipeline", "dp": "data", "fsdp": "fsdp", "tp": "tensor", "sp": "tensor_sequence",
    "ep": "expert", "cp": "context",
}  # fmt: skip
"""As in `ici_..._parallelism`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """A plan in the terms of another program.

    Attributes:
      flags: name and value, in the order they are given; a switch has the value `""`.
      remarks: in what the plan differs from what the flags say.
    """

    flags: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]


def megatron_flags(plan: Plan | PipelinePlan) -> Flags:
    """The nearest flags of Megatron-LM."""
    stage, stages = _first_stage(plan)
    sizes = axis_sizes(stage)
    copies = sizes["dp"] * sizes["fsdp"]
    flags = [
        ("--tensor-model-parallel-size", str(sizes["tp"])),
        ("--pipeline-model-parallel-size", str(stages)),
    ]
    if sizes["cp"] > 1:
        flags.append(("--context-parallel-size", str(sizes["cp"])))
    if sizes["ep"] > 1:
        flags.append(("--expert-model-parallel-size", str(sizes["ep"])))
    if sizes["fsdp"] > 1:
        flags += [
            ("--use-megatron-fsdp", ""),
            ("--data-parallel-sharding-strategy", "optim_grads_params"),
        ]
    elif splits_optimizer(stage):
        flags.append(("--use-distributed-optimizer", ""))
    if sizes["tp"] > 1 and splits_activations(stage):
        flags.append(("--sequence-parallel", ""))
    batch = plan.configuration.get("batch_size")
    if isinstance(batch, int):
        flags += [
            ("--micro-batch-size", str(max(1, batch // (plan.num_microbatches * copies)))),
            ("--global-batch-size", str(batch)),
        ]
    if isinstance(plan, PipelinePlan):
        if plan.num_virtual > 1:
            flags.append(("--num-virtual-stages-per-pipeline-rank", str(plan.num_virtual)))
        policies = {s.remat for s in plan.stages} - {NO_REMAT}
        if policies:
            granularity = "full" if FULL_REMAT in policies else "selective"
            flags.append(("--recompute-granularity", granularity))
            if granularity == "full":
                flags += [("--recompute-method", "uniform"), ("--recompute-num-layers", "1")]
    return Flags(flags=tuple(flags), remarks=_remarks(plan, ("gpipe", "1f1b", "interleaved_1f1b")))


def maxtext_flags(plan: Plan | PipelinePlan) -> Flags:
    """The nearest settings of MaxText, within (`ici`) and between hosts (`dcn`)."""
    stage, stages = _first_stage(plan)
    flags: list[tuple[str, str]] = []
    within, between = split_by_host(stage, plan.cluster)
    if stages > 1:
        per_host = isinstance(plan, PipelinePlan) and all(
            m.submesh.num_devices < plan.cluster.devices_per_host for m in plan.meshes
        )
        flags.append((f"{'ici' if per_host else 'dcn'}_pipeline_parallelism", str(stages)))
    for prefix, sizes in (("dcn", between), ("ici", within)):
        for name, size in sizes.items():
            if size > 1:
                flags.append((f"{prefix}_{_MAXTEXT_PARALLELISM[name]}_parallelism", str(size)))
    batch = plan.configuration.get("batch_size")
    count = plan.num_microbatches
    if isinstance(batch, int):
        accumulated = 1 if isinstance(plan, PipelinePlan) else count
        rows = batch / plan.cluster.num_devices / accumulated
        flags.append(("per_device_batch_size", f"{rows:g}"))
    if isinstance(plan, PipelinePlan):
        flags += [
            ("num_pipeline_microbatches", str(count)),
            ("num_layers_per_pipeline_stage", str(len(plan.stages[0].layers))),
        ]
        policies = {s.remat for s in plan.stages}
        flags.append(("remat_policy", "full" if FULL_REMAT in policies else "minimal"))
    elif count > 1:
        flags.append(("gradient_accumulation_steps", str(count)))
    return Flags(flags=tuple(flags), remarks=_remarks(plan, ("gpipe", "interleaved_1f1b")))


FLAGS: Mapping[str, Callable[[Plan | PipelinePlan], Flags]] = {
    "megatron": megatron_flags,
    "maxtext": maxtext_flags,
}
"""By name of the program."""


def kind_of_axis(name: str) -> str | None:
    """`tp` of `tp2`; None for a name that says nothing."""
    base = re.sub(r"[0-9]+$", "", name)
    return base if base in _MAXTEXT_PARALLELISM else None


def axis_sizes(plan: Plan) -> dict[str, int]:
    """Devices along every kind of axis; axes of one kind multiply."""
    sizes = dict.fromkeys(_MAXTEXT_PARALLELISM, 1)
    for name, size in plan.mesh.axes:
        kind = kind_of_axis(name)
        if kind is not None:
            sizes[kind] *= size
    return sizes


def split_by_host(plan: Plan, cluster: Cluster) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of axes within a host and between hosts; the last axis is the innermost."""
    within: dict[str, int] = {}
    between: dict[str, int] = {}
    room = min(cluster.devices_per_host, plan.mesh.num_devices)
    for name, size in reversed(plan.mesh.axes):
        kind = kind_of_axis(name)
        inside = math.gcd(size, room)
        room //= inside
        if kind is not None:
            within[kind] = within.get(kind, 1) * inside
            between[kind] = between.get(kind, 1) * (size // inside)
    return dict(reversed(within.items())), dict(reversed(between.items()))


def splits_optimizer(plan: Plan) -> bool:
    """Whether optimizer state is split along a data axis that parameters are not: ZeRO-1 or 2."""
    data = {name for name in plan.mesh.names if kind_of_axis(name) == "dp"}
    of_params: set[str] = set()
    of_others: set[str] = set()
    for path, spec in plan.inputs.items():
        if path.startswith("state"):
            used = of_params if ".params." in path else of_others
            used |= data.intersection(spec.used_axes)
    return bool(of_others - of_params)


def splits_activations(plan: Plan) -> bool:
    """Whether sums along a tensor axis are scattered instead of left whole everywhere."""
    tensor = {name for name in plan.mesh.names if kind_of_axis(name) == "tp"}
    return any(
        each.kind == "reduce_scatter" and set(each.axes) & tensor
        for each in plan.predicted.collectives
    )


def _first_stage(plan: Plan | PipelinePlan) -> tuple[Plan, int]:
    if isinstance(plan, Plan):
        return plan, 1
    return plan.stages[0].plan, len(plan.meshes)


def _remarks(plan: Plan | PipelinePlan, schedules: tuple[str, ...]) -> tuple[str, ...]:
    remarks = ["layouts are chosen per parameter; the flags say what most of them do"]
    parts = [plan] if isinstance(plan, Plan) else [s.plan for s in plan.stages]
    unnamed = sorted({n for p in parts for n in p.mesh.names if kind_of_axis(n) is None})
    if unnamed:
        remarks.append(f"there is no counterpart for mesh axes {', '.join(unnamed)}")
    if any(kind_of_axis(n) == "sp" for p in parts for n in p.mesh.names):
        remarks.append("along sp mostly neither the batch nor parameters are split")
    if isinstance(plan, PipelinePlan):
        if len({s.plan.mesh.axes for s in plan.stages}) > 1:
            remarks.append("stages have different meshes; the flags are those of the first")
        if len({len(s.layers) for s in plan.stages}) > 1:
            remarks.append("stages have different numbers of layers")
        if plan.schedule not in schedules:
            remarks.append(f"there is no counterpart for the schedule {plan.schedule}")
    return tuple(remarks)
