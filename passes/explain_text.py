"""Explanations in words and numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from alpa_lite.passes.explain import (
    MEMORY,
    METHOD,
    MORE_BANDWIDTH,
    MORE_MEMORY_BYTES,
    PIN,
    Baseline,
    DecisionExplanation,
    Outcome,
    RunnerUp,
    Sensitivity,
)
from alpa_lite.passes.explain_pipeline import StageExplanation
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.pipeline_timeline import plan_timeline
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.plan_text import Row, alternative_rows, collapse_paths, format_axes, section
from alpa_lite.passes.units import format_bytes, format_seconds

_WIDTH = 90


def describe_explanation(
    plan: Plan | PipelinePlan, found: Sensitivity, baselines: Sequence[Baseline]
) -> str:
    """Why this plan, and not another."""
    predicted = plan.predicted
    sections = [
        f"{plan.name} on {plan.cluster.name}: {format_seconds(predicted.step_s)} per step, "
        f"{format_bytes(predicted.peak_bytes)} per device of "
        f"{format_bytes(plan.memory_budget_bytes)}",
        section("Where the time goes", time_rows(plan), right={1, 2}),
        section(binding_sentence(found), sensitivity_rows(predicted.step_s, found)),
    ]
    header: Row = ("recipe", "step", "", "memory", "mesh")
    sections.append(
        section(
            "Against recipes used by hand, planned for the same step, cluster and memory",
            [header, *baseline_rows(plan, baselines)], right={1, 2, 3},
        )
    )  # fmt: skip
    if isinstance(plan, Plan):
        if plan.alternatives:
            header = ("mesh", "microbatches", "step", "")
            sections.append(
                section("Meshes tried", [header, *alternative_rows(plan)], right={1, 2})
            )
    elif plan.alternatives:
        rows: list[Row] = [
            (_seconds(a.step_s), a.description, _short(a.reason)) for a in plan.alternatives
        ]
        sections.append(section("Pipelines tried", rows, right={0}))
    return "\n\n".join(sections)


def describe_decision(found: DecisionExplanation, title: str) -> str:
    """Why one decision is what it is; the title says what is decided."""
    d = found.decision
    share = found.cost
    runner = found.runner_up
    rows: list[Row] = [("chosen", choice_text(d.axes, d.factors, found.layout))]
    if d.count > 1:
        rows.append(("shared by", f"{d.count} groups of operations that are alike"))
    rows += [
        (
            "costs",
            f"{format_seconds(share.compute_s)} compute, {format_seconds(share.reading_s)} "
            f"collectives that it needs, {format_seconds(share.giving_s)} collectives that "
            "others need to read it",
        ),
        ("holds at the peak", format_bytes(share.peak_bytes)),
        ("binds", _decision_binding(found)),
        ("runner-up", runner_text(found.step_s, runner, d.factors)),
    ]
    if runner.also_changed:
        names = ", ".join(collapse_paths(list(runner.also_changed)).values())
        rows.append(("which changes", textwrap.shorten(names, 2 * _WIDTH, placeholder=" ...")))
    rows += [(name, value) for name, value, *_ in sensitivity_rows(found.step_s, found.sensitivity)]
    return section(title, rows)


def describe_stage(found: StageExplanation) -> str:
    """Why one stage is what it is."""
    stage = found.stage
    predicted = stage.plan.predicted
    layers = f"{stage.layers[0]} to {stage.layers[-1]}"
    pace = "the slowest for a microbatch, so it sets the pace"
    limit = pace if found.slowest else "not the slowest"
    rows: list[Row] = [
        ("layers", layers if len(stage.layers) > 1 else str(stage.layers[0])),
        ("mesh", f"{format_axes(stage.plan.mesh.axes)} on submesh {stage.mesh}"),
        ("remat", stage.remat),
        (
            "microbatch",
            f"{format_seconds(stage.forward_s)} forward, {format_seconds(stage.backward_s)} "
            f"backward: {limit}",
        ),
        ("once per step", format_seconds(stage.per_step_s)),
        (
            "of the step",
            f"{format_seconds(found.busy_s)} busy, {format_seconds(found.bubble_s)} waiting",
        ),
        (
            "collectives",
            f"{format_seconds(predicted.communication_s)} of "
            f"{format_seconds(predicted.step_s)} per step",
        ),
        (
            "memory",
            f"{format_bytes(stage.peak_bytes)} of {format_bytes(found.budget_bytes)} with "
            f"{stage.in_flight} in flight, each keeping {format_bytes(stage.stash_bytes)}",
        ),
    ]  # fmt: skip
    best = found.runner_up
    if best is not None:
        rows.append(("runner-up", f"{best.change}: {_outcome(found.step_s, best.outcome)}"))
    tried: list[Row] = [
        (c.change, _seconds(c.outcome.step_s), _percent(found.step_s, c.outcome.step_s),
         _short(c.outcome.reason) if c.outcome.step_s is None else _bytes(c.outcome.peak_bytes))
        for c in found.changes
    ]  # fmt: skip
    parts = [section(f"Stage {found.index} of a step of {format_seconds(found.step_s)}", rows)]
    if tried:
        title = "The whole pipeline, planned again with this stage changed"
        parts.append(section(title, tried, right={1, 2}))
    return "\n\n".join(parts)


def time_rows(plan: Plan | PipelinePlan) -> list[Row]:
    """(what, seconds, share of the step)."""
    whole = plan.predicted.step_s
    if isinstance(plan, Plan):
        found = [("compute", plan.predicted.compute_s)]
        by_axes: dict[str, float] = {}
        for each in plan.predicted.collectives:
            name = f"collectives over {'+'.join(each.axes)}"
            by_axes[name] = by_axes.get(name, 0.0) + each.seconds_per_step
        found += by_axes.items()
    else:
        timeline = plan_timeline(plan)
        found = []
        for mesh, busy_s in enumerate(timeline.busy_s):
            tail_s = sum(s.per_step_s for s in plan.stages if s.mesh == mesh)
            found.append((f"mesh {mesh} in tasks", busy_s))
            found.append((f"mesh {mesh} once per step", tail_s))
            found.append((f"mesh {mesh} waits", max(0.0, whole - busy_s - tail_s)))
    return [(name, format_seconds(s), f"{s / whole if whole else 0:.0%}") for name, s in found]


def binding_sentence(found: Sensitivity) -> str:
    """What keeps the step from being faster."""
    if found.binding == MEMORY:
        return "Memory: with more of it another plan on the same mesh would be faster."
    return "Not memory: with more of it the plan on this mesh would be as fast as it is."


def sensitivity_rows(step_s: float, found: Sensitivity) -> list[Row]:
    """(condition, step time and change) of the re-solves."""
    return [
        (name, _outcome(step_s, outcome))
        for name, outcome in (
            (f"{format_bytes(MORE_MEMORY_BYTES)} more memory", found.more_memory),
            ("unlimited memory", found.unlimited_memory),
            (f"{MORE_BANDWIDTH:g} x the bandwidth", found.more_bandwidth),
        )
    ]


def baseline_rows(plan: Plan | PipelinePlan, baselines: Sequence[Baseline]) -> list[Row]:
    """(recipe, step, relative to the plan, memory, layout or why not)."""
    step_s = plan.predicted.step_s
    own: Row = ("this plan", format_seconds(step_s), "", format_bytes(plan.predicted.peak_bytes),
                layout_text(plan))  # fmt: skip
    return [
        own,
        *(
            (
                each.name, _seconds(each.outcome.step_s), _percent(step_s, each.outcome.step_s),
                _bytes(each.outcome.peak_bytes), each.layout or _short(each.outcome.reason),
            )
            for each in baselines
        ),
    ]  # fmt: skip


def layout_text(plan: Plan | PipelinePlan) -> str:
    """Mesh, stages and microbatches on a line."""
    count = plan.num_microbatches
    tail = f"{count} microbatch{'es' * (count > 1)}"
    if isinstance(plan, Plan):
        return f"{format_axes(plan.mesh.axes)}, {tail}"
    return f"{len(plan.stages)} stages on {len(plan.meshes)} submeshes, {plan.schedule}, {tail}"


def choice_text(axes: Mapping[str, str], factors: Mapping[str, int], layout: str = "") -> str:
    """A strategy in words."""
    parts = [
        f"{axis} leaves pending sums" if label == "partial"
        else f"{axis} splits {_dim(label, factors)}"
        for axis, label in axes.items()
    ]  # fmt: skip
    text = ", ".join(parts) or "replicated"
    return f"{layout}: {text}" if layout else text


def runner_text(step_s: float, runner: RunnerUp, factors: Mapping[str, int]) -> str:
    """The best alternative of a decision, and what it would cost."""
    if runner.axes is None:
        return f"none: {_short(runner.outcome.reason)}"
    text = f"{choice_text(runner.axes, factors)}: {_outcome(step_s, runner.outcome)}"
    others = len(runner.also_changed)
    return text + (f"; {others} other decision{'s' * (others > 1)} would change" if others else "")


def _decision_binding(found: DecisionExplanation) -> str:
    if found.binding == PIN:
        return "it is pinned"
    if found.binding == METHOD:
        return "the method leaves one choice"
    if found.binding == MEMORY:
        unbound = choice_text(found.unbound_axes, found.decision.factors)
        return f"memory: unlimited, it would be {unbound}"
    return f"nothing but time: on this mesh there are {found.num_choices} choices"


def _dim(label: str, factors: Mapping[str, int]) -> str:
    """A dim's label, which is a letter and its size."""
    return label if label not in factors else f"{label[:1]} (of {factors[label]})"


def _outcome(step_s: float, outcome: Outcome) -> str:
    if outcome.step_s is None:
        return f"does not fit ({_short(outcome.reason)})"
    change = _percent(step_s, outcome.step_s)
    return f"{format_seconds(outcome.step_s)} per step ({change}), {_bytes(outcome.peak_bytes)}"


def _percent(before: float, after: float | None) -> str:
    text = "" if after is None or not before else f"{after / before - 1:+.1%}"
    return "+0.0%" if text == "-0.0%" else text


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _bytes(value: float | None) -> str:
    return "-" if value is None else format_bytes(value)


def _short(reason: str) -> str:
    return textwrap.shorten(reason, _WIDTH, placeholder=" ...")
