"""What differs between two plans, in plan terms and in seconds and bytes: `diff_plans`.

In: two plans of any kind. Out: `Change`s, section by section, and text for people. Nothing is
computed that the plans do not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from alpa_lite.cost_model import Cluster
from alpa_lite.passes.pipeline_plan import PipelinePlan, PlannedStage
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.plan_text import Row, collapse_paths, format_axes, section
from alpa_lite.passes.units import format_bytes, format_seconds

SECONDS, BYTES, TEXT = "s", "bytes", ""
"""Units of changed values."""

Entry = tuple[str, str, Any, str]
"""(section, name, value, unit)"""

_SAME = 1e-9
"""Relative distance of figures that counts as none."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is different.

    Attributes:
      section: what kind of thing: `asked for`, `cluster`, `plan`, `stages`, `seconds`, `bytes`,
        `collectives`, `layouts`.
      name: which.
      before, after: values; None where there is no such thing.
      unit: `"s"`, `"bytes"`, or `""` for everything else.
    """

    section: str
    name: str
    before: Any
    after: Any
    unit: str = TEXT

    @property
    def ratio(self) -> float | None:
        """`after / before`, of seconds and bytes."""
        if self.unit == TEXT or not self.before or self.after is None:
            return None
        return self.after / self.before

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"ratio": self.ratio}


def diff_plans(before: Plan | PipelinePlan, after: Plan | PipelinePlan) -> tuple[Change, ...]:
    """All differences; empty if the plans decide and predict the same.

    Names, versions and the time that planning took do not count.
    """
    old, new = _entries(before), _entries(after)
    found = []
    for section_, name in dict.fromkeys((*old, *new)):
        a, unit = old.get((section_, name), (None, TEXT))
        b, other_unit = new.get((section_, name), (None, unit))
        if not _same(a, b):
            found.append(Change(section_, name, a, b, unit if a is not None else other_unit))
    return tuple(found)


def describe_diff(changes: tuple[Change, ...]) -> str:
    """Changes as text; layouts that change alike are one line."""
    if not changes:
        return "The plans decide and predict the same."
    sections = []
    for name in dict.fromkeys(change.section for change in changes):
        chosen = [change for change in changes if change.section == name]
        numbers = {1, 2, 3} if any(change.unit for change in chosen) else ()
        sections.append(section(name.capitalize(), _rows(chosen), right=numbers))
    return "\n\n".join(sections)


def _rows(changes: list[Change]) -> list[Row]:
    alike: dict[tuple[str, str, str], list[str]] = {}
    for change in changes:
        values = (_show(change.before, change.unit), _show(change.after, change.unit))
        alike.setdefault((*values, _relative(change)), []).append(change.name)
    rows: list[Row] = []
    for (a, b, relative), names in alike.items():
        collapses = changes[0].section in ("stages", "layouts")
        shown = collapse_paths(names).values() if collapses else names
        rows += [(name, a, f"-> {b}", relative) for name in shown]
    return rows


def _show(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    if unit == SECONDS:
        return format_seconds(value)
    return format_bytes(value) if unit == BYTES else str(value)


def _relative(change: Change) -> str:
    return "" if change.ratio is None else f"{change.ratio - 1:+.1%}"


def _same(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return abs(a - b) <= _SAME * max(abs(a), abs(b)) if numbers else a == b


def _entries(plan: Plan | PipelinePlan) -> dict[tuple[str, str], tuple[Any, str]]:
    """Everything that is compared: (section, name) -> (value, unit)."""
    rows: list[Entry] = [("asked for", k, _flat(v), TEXT) for k, v in plan.configuration.items()]
    rows += [("cluster", name, value, TEXT) for name, value in _cluster(plan.cluster)]
    rows += _one_mesh(plan) if isinstance(plan, Plan) else _staged(plan)
    return {(section_, name): (value, unit) for section_, name, value, unit in rows}


def _one_mesh(plan: Plan) -> list[Entry]:
    predicted = plan.predicted
    return [
        ("plan", "method", plan.method, TEXT),
        ("plan", "mesh", format_axes(plan.mesh.axes), TEXT),
        ("plan", "microbatches", plan.num_microbatches, TEXT),
        *_seconds(predicted.step_s),
        ("seconds", "compute", predicted.compute_s, SECONDS),
        ("seconds", "communication", predicted.communication_s, SECONDS),
        *_bytes(predicted.peak_bytes, plan.memory_budget_bytes),
        *(
            ("bytes", name.replace("_", " "), held, BYTES)
            for name, held in predicted.memory_bytes.items()
        ),
        *_collectives(plan, "collectives", ""),
        *(("layouts", name, str(spec), TEXT) for name, spec in plan.inputs.items()),
    ]


def _staged(plan: PipelinePlan) -> list[Entry]:
    predicted = plan.predicted
    rows: list[Entry] = [
        ("plan", "method", plan.method, TEXT),
        ("plan", "schedule", plan.schedule, TEXT),
        ("plan", "stages", len(plan.stages), TEXT),
        ("plan", "submeshes", len(plan.meshes), TEXT),
        ("plan", "microbatches", plan.num_microbatches, TEXT),
        ("plan", "idle devices", plan.idle_devices, TEXT),
        ("plan", "bubble", f"{predicted.bubble_share:.1%}", TEXT),
        *_seconds(predicted.step_s),
        *_bytes(predicted.peak_bytes, plan.memory_budget_bytes),
        ("bytes", "sent between stages", predicted.transfer_bytes, BYTES),
    ]
    for i, stage in enumerate(plan.stages):
        rows += _stage(plan, i, stage)
    return rows + _stage_layouts(plan)


def _stage(plan: PipelinePlan, index: int, stage: PlannedStage) -> list[Entry]:
    name = f"stage {index}"
    placed = plan.meshes[stage.mesh]
    return [
        ("stages", f"{name} layers", f"{stage.layers[0]}-{stage.layers[-1]}", TEXT),
        ("stages", f"{name} devices", str(placed.submesh), TEXT),
        ("stages", f"{name} mesh", format_axes(stage.plan.mesh.axes), TEXT),
        ("stages", f"{name} remat", stage.remat, TEXT),
        ("seconds", f"{name} forward", stage.forward_s, SECONDS),
        ("seconds", f"{name} backward", stage.backward_s, SECONDS),
        ("seconds", f"{name} per step", stage.per_step_s, SECONDS),
        ("bytes", f"{name} peak", stage.peak_bytes, BYTES),
        *_collectives(stage.plan, "collectives", f"{name} "),
    ]


def _seconds(step_s: float) -> list[Entry]:
    return [("seconds", "step", step_s, SECONDS)]


def _bytes(peak_bytes: float, budget_bytes: float) -> list[Entry]:
    return [
        ("bytes", "peak per device", peak_bytes, BYTES),
        ("bytes", "budget per device", budget_bytes, BYTES),
    ]


def _collectives(plan: Plan, section_: str, prefix: str) -> list[Entry]:
    rows: list[Entry] = []
    for each in plan.predicted.collectives:
        name = f"{prefix}{each.kind} over {'+'.join(each.axes)}"
        rows.append((section_, f"{name}, time", each.seconds_per_step, SECONDS))
        rows.append((section_, f"{name}, bytes", each.bytes_per_step, BYTES))
    return rows


def _stage_layouts(plan: PipelinePlan) -> list[Entry]:
    """Layouts by input, and the stages that have it so."""
    found: dict[str, dict[str, list[int]]] = {}
    for i, stage in enumerate(plan.stages):
        for name, spec in stage.plan.inputs.items():
            found.setdefault(name, {}).setdefault(str(spec), []).append(i)
    return [
        (
            "layouts", name,
            "; ".join(f"{spec} on stage {', '.join(map(str, at))}" for spec, at in specs.items()),
            TEXT,
        )
        for name, specs in found.items()
    ]  # fmt: skip


def _cluster(cluster: Cluster) -> list[tuple[str, Any]]:
    return _leaves(cluster.to_json(), "")


def _leaves(data: Mapping[str, Any], above: str) -> list[tuple[str, Any]]:
    """Every figure by its dotted name; where it comes from does not matter."""
    found: list[tuple[str, Any]] = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            if name not in ("sources", "provenance"):
                found += _leaves(value, f"{above}{name}.")
        else:
            found.append((above + name, _flat(value)))
    return found


def _flat(value: Any) -> Any:
    return str(value) if isinstance(value, list | tuple | dict) else value
