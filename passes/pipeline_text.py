"""A pipeline plan as text for people: `describe_pipeline`, and the tables it is made of."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from alpa_lite.passes.plan_text import Row, configuration_rows, format_axes, layout_rows, section
from alpa_lite.passes.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from alpa_lite.passes.pipeline_plan import PipelinePlan, PlannedStage

_REASON_WIDTH = 90


def describe_pipeline(plan: PipelinePlan) -> str:
    """Stages, cost, memory, layouts of every kind of stage, what else was considered, and notes."""
    sections = [
        section(f"{plan.name} on {plan.cluster.name}", summary_rows(plan)),
        section(
            "Stages",
            [
                ("stage", "layers", "devices", "mesh axes", "remat", "in flight", "forward",
                 "backward", "per step", "peak memory"),
                *stage_rows(plan),
            ],
            right={5, 6, 7, 8, 9},
        ),
    ]  # fmt: skip
    for title, stage in layouts(plan):
        sections.append(section(title, layout_rows(stage.plan.inputs)))
    if plan.alternatives:
        rows: list[Row] = [
            (
                "-" if a.step_s is None else format_seconds(a.step_s), a.description,
                textwrap.shorten(a.reason, _REASON_WIDTH, placeholder=" ..."),
            )
            for a in plan.alternatives
        ]  # fmt: skip
        sections.append(section("Considered", rows, right={0}))
    if plan.notes:
        sections.append(section("Notes", [("-", note) for note in plan.notes]))
    if plan.configuration:
        sections.append(section("Asked for", configuration_rows(plan.configuration)))
    return "\n\n".join(sections)


def summary_rows(plan: PipelinePlan) -> list[Row]:
    """(what, value) of everything that fits on a line."""
    predicted = plan.predicted
    virtual = f", {plan.num_virtual} stages per submesh" if plan.num_virtual > 1 else ""
    rows: list[Row] = [
        ("method", plan.method),
        ("schedule", f"{plan.schedule}{virtual}"),
        ("stages", f"{len(plan.stages)} on {len(plan.meshes)} submeshes"),
        ("microbatches", str(plan.num_microbatches)),
        (
            "predicted step",
            f"{format_seconds(predicted.step_s)}, bubble {predicted.bubble_share:.0%} of the time "
            "from first to last task",
        ),
        (
            "peak memory",
            f"{format_bytes(predicted.peak_bytes)} per device, budget "
            f"{format_bytes(plan.memory_budget_bytes)}",
        ),
        ("sent between stages", f"{format_bytes(predicted.transfer_bytes)} per step"),
    ]
    if plan.alternatives:
        rows.append(("search", f"{format_seconds(plan.wall_s)}, gap {plan.gap:.1%}"))
    if plan.idle_devices:
        rows.append(("idle devices", f"{plan.idle_devices} of {plan.cluster.num_devices}"))
    if plan.versions:
        rows.append(("made with", ", ".join(f"{k} {v}" for k, v in plan.versions.items())))
    return rows


def stage_rows(plan: PipelinePlan) -> list[Row]:
    """A line for every stage."""
    return [
        (
            str(i), _ranges(stage.layers), _where(plan, stage), format_axes(stage.plan.mesh.axes),
            stage.remat, str(stage.in_flight), format_seconds(stage.forward_s),
            format_seconds(stage.backward_s), format_seconds(stage.per_step_s),
            format_bytes(stage.peak_bytes),
        )
        for i, stage in enumerate(plan.stages)
    ]  # fmt: skip


def layouts(plan: PipelinePlan) -> list[tuple[str, PlannedStage]]:
    """(title, stage) of every stage whose layouts differ from those of all before."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, stage in enumerate(plan.stages):
        key = (stage.plan.graph_hash, stage.plan.mesh, tuple(stage.plan.inputs.values()))
        kinds.setdefault(key, []).append(i)
    return [
        (
            f"Inputs of stage{'s' if len(same) > 1 else ''} {_ranges(same)}, and the mesh axes "
            "that split each dim",
            plan.stages[same[0]],
        )
        for same in kinds.values()
    ]


def _where(plan: PipelinePlan, stage: PlannedStage) -> str:
    placed = plan.meshes[stage.mesh]
    return f"hosts {_ranges(placed.hosts)}, devices {_ranges(placed.devices)}"


def _ranges(numbers: Iterable[int]) -> str:
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][-1] + 1:
            found[-1].append(n)
        else:
            found.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in found)
