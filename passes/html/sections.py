"""The parts of a report, from a plan of either kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alpa_lite.passes.explain import Baseline, Sensitivity
from alpa_lite.passes.explain_text import (
    baseline_rows,
    binding_sentence,
    layout_text,
    sensitivity_rows,
)
from alpa_lite.passes.html.charts import (
    KIND_CLASSES,
    MAX_RECTANGLES,
    PART_CLASSES,
    Bar,
    Span,
    area,
    bar,
    legend,
    seconds_scale,
    timeline,
)
from alpa_lite.passes.html.elements import Content, Html, definitions, join, section, table, tag
from alpa_lite.passes.memory import CATEGORIES
from alpa_lite.passes.pipeline_plan import PipelinePlan, PlannedStage
from alpa_lite.passes.pipeline_text import stage_rows
from alpa_lite.passes.pipeline_timeline import plan_bytes, plan_timeline, plan_times
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.plan_text import Row, alternative_rows, axis_rows, configuration_rows
from alpa_lite.passes.schedules import MeshMemory, Timeline, memory_over_time, transfers
from alpa_lite.passes.units import format_bytes, format_seconds

AnyPlan = Plan | PipelinePlan

_MAX_MOMENTS = 400
"""Points of a memory curve; more cannot be seen."""

_EXPLAIN = tag("code", "alpa-lite report --explain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What a report shows beyond the plan file, from planning again.

    Attributes:
      sensitivity: of the plan.
      baselines: recipes used by hand.
      moments: of a plan for one mesh, what runs at every moment; empty for pipelines.
      memory: bytes held at every moment, by category.
    """

    sensitivity: Sensitivity
    baselines: tuple[Baseline, ...]
    moments: tuple[str, ...] = ()
    memory: Mapping[str, np.ndarray] | None = None


def summary(plan: AnyPlan) -> Html:
    """The figures that matter most."""
    return section("Summary", "summary", *summary_content(plan))


def summary_content(plan: AnyPlan) -> tuple[Content, ...]:
    """The figures, and what was chosen."""
    predicted = plan.predicted
    figures = [
        (format_seconds(predicted.step_s), "per step, predicted"),
        (format_bytes(predicted.peak_bytes),
         f"per device at its peak, of {format_bytes(plan.memory_budget_bytes)}"),
        (str(plan.cluster.num_devices), f"devices: {plan.cluster.name}"),
        (str(plan.num_microbatches), "microbatches" if plan.num_microbatches > 1 else "microbatch"),
    ]  # fmt: skip
    if isinstance(plan, PipelinePlan):
        figures.append((f"{plan.predicted.bubble_share:.0%}", "of the time is bubble"))
    rows: list[Row] = [("layout", layout_text(plan)), ("method", plan.method)]
    if isinstance(plan, Plan):
        rows += axis_rows(plan)
        solve = plan.solve
        rows.append(("solver", f"{solve.status}, gap {solve.gap:.2%}, {solve.solver}"))
    shown = [tag("li", tag("b", value), tag("span", what)) for value, what in figures]
    return tag("ul", *shown, class_="figures"), definitions(rows)


def timeline_section(plan: AnyPlan) -> Html:
    """When everything is expected to happen."""
    return section("Timeline of a step", "timeline", *timeline_content(plan))


def timeline_content(plan: AnyPlan) -> tuple[Content, ...]:
    """Tracks and their legend."""
    if isinstance(plan, Plan):
        parts = step_parts(plan)
        spans, now_s = [], 0.0
        for part in parts:
            spans.append(Span(part.name, now_s, now_s + part.value, part.style))
            now_s += part.value
        picture = timeline([("one mesh", spans)], plan.predicted.step_s, "timeline")
        note = tag(
            "p", "Without stages a plan file holds totals only: they are drawn one after the "
            "other, with no overlap, as they are priced.", class_="faint",
        )  # fmt: skip
        kinds = [("compute", "c-compute"), ("collectives", "c-communication")]
        return note, picture, legend(kinds)
    found = plan_timeline(plan)
    return (*timeline_pictures(found, plan_times(plan).tail_s),)


def timeline_pictures(found: Timeline, tail_s: Sequence[float] = ()) -> tuple[Content, ...]:
    """Tracks of a simulated step, and their legend."""
    schedule = found.schedule
    sent = transfers(schedule)
    last = _last_microbatch(found)
    tracks: list[tuple[str, list[Span]]] = []
    kinds: dict[str, None] = {}
    for mesh, tasks in enumerate(schedule.tasks):
        spans, links = [], []
        for i, task in enumerate(tasks):
            if task.microbatch > last:
                continue
            kinds[task.kind] = None
            spans.append(
                Span(str(task), found.start_s[mesh][i], found.end_s[mesh][i],
                     KIND_CLASSES[task.kind])
            )  # fmt: skip
            if task in sent and found.send_end_s[mesh][i] > found.send_start_s[mesh][i]:
                links.append(
                    Span(f"{task} to mesh {sent[task].target}", found.send_start_s[mesh][i],
                         found.send_end_s[mesh][i], "c-communication")
                )  # fmt: skip
        if mesh < len(tail_s) and tail_s[mesh]:
            start_s = found.tail_start_s[mesh]
            spans.append(Span("update", start_s, start_s + tail_s[mesh], "c-update"))
        tracks.append((f"mesh {mesh}", spans))
        if links:
            tracks.append((f"mesh {mesh} sends", links))
    named = [(kind.replace("_", " "), KIND_CLASSES[kind]) for kind in kinds]
    named += [("sending", "c-communication"), ("update", "c-update"), ("bubble", "c-bubble")]
    pictures: list[Content] = [timeline(tracks, found.step_s, "timeline"), legend(named)]
    if last + 1 < schedule.num_microbatches:
        note = f"Drawn are microbatches 0 to {last} of {schedule.num_microbatches}."
        pictures.append(tag("p", note, class_="faint"))
    return tuple(pictures)


def memory_section(plan: AnyPlan, solved: Solved | None) -> Html:
    """Bytes on a device over the step, by what they are."""
    budget = plan.memory_budget_bytes
    named = [(n.replace("_", " "), s) for n, s in zip(CATEGORIES, PART_CLASSES, strict=False)]
    if isinstance(plan, Plan):
        predicted = plan.predicted
        parts = [
            Bar(name, predicted.memory_bytes[key], format_bytes(predicted.memory_bytes[key]), style)
            for key, (name, style) in zip(CATEGORIES, named, strict=True)
        ]
        content: list[Content] = [
            tag("h3", f"At the peak ({predicted.peak_at})"),
            bar(parts, max(predicted.peak_bytes, 1.0), "memory at the peak"),
            legend([(f"{p.name} {p.text}", p.style) for p in parts]),
        ]
        if solved is not None and solved.memory is not None:
            content += [tag("h3", "Over the step"), _memory_over_step(solved, budget)]
        else:
            content.append(
                tag(
                    "p", "The curve over the step needs the step itself: ", _EXPLAIN, class_="faint"
                )
            )
        return section("Memory of a device", "memory", *content)
    curves = memory_over_time(plan_timeline(plan), plan_bytes(plan))
    pictures: list[Content] = [
        legend([*named, ("kept for the backward pass", PART_CLASSES[5]), ("budget", "c-limit")])
    ]
    for i, stage in enumerate(plan.stages):
        if stage.pipeline == 0 and stage.mesh not in {s.mesh for s in plan.stages[:i]}:
            pictures += _stage_memory(plan, stage, curves[stage.mesh])
    return section("Memory of a device over the step", "memory", *pictures)


def layouts_section(plan: AnyPlan) -> Html:
    """How every input is split, searchable."""
    parts: list[tuple[str, Plan]] = [("", plan)] if isinstance(plan, Plan) else [
        (str(i), stage.plan) for i, stage in enumerate(plan.stages)
    ]  # fmt: skip
    rows: list[list[Content]] = []
    for stage, part in parts:
        for path, spec in part.inputs.items():
            chips = [
                tag("span", "+".join(axes) or "-", class_="chip" if axes else "chip whole")
                for axes in spec.dims
            ]
            split = tag("span", join(*chips) if chips else "scalar")
            shards = str(spec.num_shards(part.mesh))
            row: list[Content] = [tag("span", path, class_="path"), split, shards]
            rows.append(row if isinstance(plan, Plan) else [stage, *row])
    header = ["input", "mesh axes of each dim", "shards"]
    header = header if isinstance(plan, Plan) else ["stage", *header]
    found = table(header, rows, right={len(header) - 1}, caption="Inputs of the step")
    search = tag(
        "p",
        tag("label", "Search by path or axis: ", for_="layout-search"),
        tag("input", type="search", id="layout-search", autocomplete="off",
            placeholder="mlp.up tp", aria_describedby="layout-count"),
        tag("span", "", id="layout-count", class_="faint", role="status"),
    )  # fmt: skip
    return section("Layouts", "layouts", search, tag("div", found, class_="tall"))


def communication_section(plan: AnyPlan) -> Html:
    """Collectives by mesh axis, and what is sent between stages."""
    header = ["kind", "axes", "times per step", "bytes per step", "time per step"]
    rows: list[list[Content]] = []
    by_axes: dict[str, float] = {}
    parts = [("", plan)] if isinstance(plan, Plan) else [
        (str(i), stage.plan) for i, stage in enumerate(plan.stages)
    ]  # fmt: skip
    for stage, part in parts:
        for each in part.predicted.collectives:
            axes = "+".join(each.axes)
            by_axes[axes] = by_axes.get(axes, 0.0) + each.seconds_per_step
            row = [
                each.kind, axes, f"{each.times_per_step:g}", format_bytes(each.bytes_per_step),
                format_seconds(each.seconds_per_step),
            ]  # fmt: skip
            rows.append([stage, *row] if stage else row)
    header = header if isinstance(plan, Plan) else ["stage", *header]
    content: list[Content] = []
    total = sum(by_axes.values())
    if by_axes:
        bars = [
            Bar(axes, s, format_seconds(s), PART_CLASSES[i % len(PART_CLASSES)])
            for i, (axes, s) in enumerate(by_axes.items())
        ]
        of_all = "" if isinstance(plan, Plan) else ", all stages together"
        content = [
            tag("h3", f"Seconds by mesh axes{of_all}"),
            bar(bars, total, "seconds of collectives by mesh axes"),
            legend([(f"{b.name} {b.text}", b.style) for b in bars]),
            table(header, rows, right=set(range(len(header) - 3, len(header))),
                  caption="Collectives of one device"),
        ]  # fmt: skip
    else:
        content = [tag("p", "No collectives.")]
    if isinstance(plan, PipelinePlan):
        sent = [
            [f"stage {i}", format_seconds(s.send_s), format_seconds(s.return_s)]
            for i, s in enumerate(plan.stages)
        ]
        caption = (
            f"Between stages, per microbatch; {format_bytes(plan.predicted.transfer_bytes)} per "
            "step in all"
        )
        content.append(
            table(["from", "activations onwards", "cotangents back"], sent, right={1, 2},
                  caption=caption)
        )  # fmt: skip
    return section("Communication", "communication", *content)


def cost_section(plan: AnyPlan) -> Html:
    """What the seconds of a step are spent on."""
    return section("Cost of a step", "cost", *cost_content(plan))


def cost_content(plan: AnyPlan) -> tuple[Content, ...]:
    """Bars and tables of seconds."""
    step_s = plan.predicted.step_s
    if isinstance(plan, Plan):
        parts = step_parts(plan)
        rows = [[p.name, p.text, f"{p.value / step_s if step_s else 0:.1%}"] for p in parts]
        rows.append(["step", format_seconds(step_s), "100.0%"])
        return (
            bar(parts, step_s, "seconds of a step"),
            table(["what", "time", "share"], rows, right={1, 2}, caption="One device"),
        )
    found = plan_timeline(plan)
    rows = []
    for mesh, busy_s in enumerate(found.busy_s):
        tail_s = sum(s.per_step_s for s in plan.stages if s.mesh == mesh)
        waits_s = max(0.0, step_s - busy_s - tail_s)
        rows.append(
            [f"mesh {mesh}", *map(format_seconds, (busy_s, tail_s, waits_s)),
             f"{waits_s / step_s if step_s else 0:.0%}"]
        )  # fmt: skip
    stages = table(
        ["stage", "layers", "devices", "mesh axes", "remat", "in flight", "forward", "backward",
         "per step", "peak memory"],
        stage_rows(plan), right={5, 6, 7, 8, 9}, caption="Stages; seconds of one microbatch",
    )  # fmt: skip
    meshes = table(
        ["mesh", "tasks", "once per step", "waits", "of the step"], rows, right={1, 2, 3, 4},
        caption="Meshes; seconds of one step",
    )  # fmt: skip
    return stages, meshes


def alternatives_section(plan: AnyPlan, solved: Solved | None) -> Html:
    """What else there was."""
    content: list[Content] = []
    if isinstance(plan, Plan) and plan.alternatives:
        content.append(
            table(["mesh", "microbatches", "step", ""], alternative_rows(plan), right={1, 2},
                  caption="Meshes tried")
        )  # fmt: skip
    elif isinstance(plan, PipelinePlan) and plan.alternatives:
        rows = [
            [a.description, "-" if a.step_s is None else format_seconds(a.step_s), a.reason]
            for a in plan.alternatives
        ]
        content.append(
            table(["pipeline", "step", ""], rows, right={1}, caption="Pipelines considered")
        )
    if solved is not None:
        step_s = plan.predicted.step_s
        content += [
            tag("h3", "Recipes used by hand"),
            table(["recipe", "step", "", "memory", "mesh"], baseline_rows(plan, solved.baselines),
                  right={1, 2, 3}, caption="Planned for the same step, cluster and memory"),
            tag("h3", "What binds"),
            tag("p", binding_sentence(solved.sensitivity)),
            definitions(sensitivity_rows(step_s, solved.sensitivity)),
        ]  # fmt: skip
    else:
        content.append(
            tag("p", "Recipes used by hand, and what more memory or faster links would bring, need "
                     "planning again: ", _EXPLAIN, class_="faint")
        )  # fmt: skip
    return section("Alternatives", "alternatives", *content)


def assumptions_section(plan: AnyPlan) -> Html:
    """What the figures rest on."""
    cluster = plan.cluster
    device = cluster.device
    rows: list[Row] = [
        ("device", f"{device.name}, {format_bytes(device.hbm_bytes)} at "
                   f"{device.hbm_bytes_per_s / 1e9:,.0f} GB/s"),
        ("peak", ", ".join(f"{k} {v / 1e12:,.0f} TFLOP/s" for k, v in device.flops_per_s.items())),
        ("reached", f"{device.matmul_efficiency:.0%} of the peak in matrix products, "
                    f"{device.hbm_efficiency:.0%} of the memory bandwidth"),
        *(
            (name, f"{link.bytes_per_s / 1e9:,.1f} GB/s per device, "
                   f"{format_seconds(link.alpha_s)} per message")
            for name, link in (("links in a host", cluster.intra_host),
                               ("links between hosts", cluster.inter_host))
        ),
        ("overlap", "none is assumed between compute and collectives of a stage"),
    ]  # fmt: skip
    content: list[Content] = [tag("h3", f"Hardware: {cluster.name}"), definitions(rows)]
    sources = [*device.sources.items(), *cluster.provenance.items()]
    if sources:
        content.append(
            tag("details", tag("summary", "Where these figures come from"), definitions(sources))
        )
    if plan.notes:
        content += [tag("h3", "Notes"), tag("ul", *(tag("li", note) for note in plan.notes))]
    if plan.configuration:
        content += [tag("h3", "Asked for"), definitions(configuration_rows(plan.configuration))]
    content += [tag("h3", "Made with"), definitions(list(plan.versions.items()))]
    return section("Assumptions and versions", "assumptions", *content)


def step_parts(plan: Plan) -> list[Bar]:
    """Compute, and each group of collectives."""
    predicted = plan.predicted
    return [
        Bar("compute", predicted.compute_s, format_seconds(predicted.compute_s), "c-compute"),
        *(
            Bar(f"{each.kind} over {'+'.join(each.axes)}", each.seconds_per_step,
                format_seconds(each.seconds_per_step), "c-communication")
            for each in predicted.collectives
        ),
    ]  # fmt: skip


def _last_microbatch(found: Timeline) -> int:
    """The last one to be drawn, so that a browser can draw all tasks up to it."""
    schedule = found.schedule
    per_microbatch = sum(map(len, schedule.tasks)) / max(1, schedule.num_microbatches)
    return max(1, min(schedule.num_microbatches, int(MAX_RECTANGLES / (2 * per_microbatch)))) - 1


def _stage_memory(plan: PipelinePlan, stage: PlannedStage, curve: MeshMemory) -> list[Content]:
    """One mesh: what is there all the time, by category, and what microbatches keep."""
    step_s = plan.predicted.step_s
    on_mesh = [s for s in plan.stages if s.mesh == stage.mesh and s.pipeline == 0]
    held: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    for each in on_mesh:
        for name, size in each.plan.predicted.memory_bytes.items():
            held[name] += size
    steady = _resident(on_mesh)
    # In flight is drawn as what is above the steady part; activations hold it at the peak.
    held["activations"] = max(0.0, steady - (sum(held.values()) - held["activations"]))
    times = [float(t) for t in curve.times_s]
    layers = [
        (name.replace("_", " "), style, [(t, held[name]) for t in times])
        for name, style in zip(CATEGORIES, PART_CLASSES, strict=False)
    ]
    kept = [
        (t, max(0.0, float(b) - steady)) for t, b in zip(times, curve.bytes_in_use, strict=True)
    ]
    layers.append(("kept for the backward pass", PART_CLASSES[5], kept))
    title = f"Mesh {stage.mesh}: at most {format_bytes(curve.peak_bytes)}"
    picture = area(layers, step_s, plan.memory_budget_bytes, f"memory of mesh {stage.mesh}")
    return [tag("h3", title), picture, seconds_scale(step_s)]


def _resident(stages: Sequence[PlannedStage]) -> float:
    """Bytes that stages hold whatever is in flight."""
    return sum(max(0.0, s.peak_bytes - s.in_flight * s.stash_bytes) for s in stages)


def _memory_over_step(solved: Solved, budget_bytes: float) -> Html:
    """Bytes by category over the operations of a step; the peak is always among the points."""
    assert solved.memory is not None
    total = sum(solved.memory.values())
    assert isinstance(total, np.ndarray)
    chosen = np.linspace(0, len(total) - 1, min(len(total), _MAX_MOMENTS)).astype(int)
    chosen = np.union1d(chosen, [int(total.argmax())])
    layers = [
        (name.replace("_", " "), style,
         [(float(t), float(solved.memory[name][t])) for t in chosen])
        for name, style in zip(CATEGORIES, PART_CLASSES, strict=False)
    ]  # fmt: skip
    named = [(name, style) for name, style, _ in layers]
    return join(
        area(layers, float(len(total)), budget_bytes, "memory over the step"),
        tag("p", f"From the first to the last of {len(total)} operations, not to scale in time.",
            class_="faint"),
        legend([*named, ("budget", "c-limit")]),
    )  # fmt: skip
