"""A plan as text for people: `describe_plan`, and the tables it is made of.

In: a `Plan`. Out: text, or rows for a view that lays them out itself (the command line). Names in
a plan may come from a file that someone else wrote, so whatever could steer a terminal is escaped.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alpa_lite.ir.sharding import ShardingSpec
from alpa_lite.passes.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from alpa_lite.passes.plan import Plan

Row = tuple[str, ...]

_REASON_WIDTH = 90
_SETTINGS_WIDTH = 90

# A path as tokens: the text between numbers at even places, the numbers at odd ones.
_NUMBERS = re.compile(r"([0-9]{1,9})")
# Dots between the parts of a path, not those in `{0..3}`.
_DOT = re.compile(r"\.(?![^{}]*})")

# Alternatives at every place of a path; most places have one.
_Places = tuple[tuple[str, ...], ...]


def describe_plan(plan: Plan) -> str:
    """Mesh, cost, memory, collectives, layouts, what else was tried, and notes."""
    predicted = plan.predicted
    sections = [
        section(f"{plan.name} on {plan.cluster.name}", summary_rows(plan)),
        section("Mesh axes", axis_rows(plan)),
        section(
            f"Memory per device at its peak ({predicted.peak_at})", memory_rows(plan), right={1, 2}
        ),
    ]
    if predicted.collectives:
        header: Row = ("kind", "axes", "times", "bytes", "time")
        sections.append(
            section(
                "Collectives per step and device", [header, *collective_rows(plan)], right={2, 3, 4}
            )
        )
    sections.append(
        section("Inputs, and the mesh axes that split each dim", layout_rows(plan.inputs))
    )
    if plan.alternatives:
        header = ("mesh", "microbatches", "step", "")
        sections.append(section("Tried", [header, *alternative_rows(plan)], right={1, 2}))
    if plan.notes:
        sections.append(section("Notes", [("-", note) for note in plan.notes]))
    if plan.configuration:
        sections.append(section("Asked for", configuration_rows(plan.configuration)))
    return "\n\n".join(sections)


def summary_rows(plan: Plan) -> list[Row]:
    """(what, value) of everything that fits on a line."""
    predicted, solve = plan.predicted, plan.solve
    rows: list[Row] = [
        ("method", plan.method),
        ("mesh", f"{format_axes(plan.mesh.axes)} ({plan.mesh.num_devices} devices)"),
        ("microbatches", str(plan.num_microbatches)),
        (
            "predicted step",
            f"{format_seconds(predicted.step_s)} = {format_seconds(predicted.compute_s)} compute + "
            f"{format_seconds(predicted.communication_s)} communication, no overlap assumed",
        ),
        (
            "peak memory",
            f"{format_bytes(predicted.peak_bytes)} per device, budget "
            f"{format_bytes(plan.memory_budget_bytes)}",
        ),
        (
            "solver",
            f"{solve.status}, gap {solve.gap:.2%} ({solve.solver}, {solve.num_decisions} decisions "
            f"with {solve.num_strategies} strategies, {format_seconds(solve.wall_s)})",
        ),
    ]
    if plan.pins:
        rows.append(("pinned inputs", str(len(plan.pins))))
    if plan.versions:
        rows.append(("made with", ", ".join(f"{k} {v}" for k, v in plan.versions.items())))
    return rows


def axis_rows(plan: Plan) -> list[Row]:
    """(axis, what it splits) of every mesh axis, over all operations and values of the step."""
    total = sum(decision.count for decision in plan.decisions)
    rows: list[Row] = []
    for axis in plan.mesh.names:
        uses = [(d.axes[axis], d.count) for d in plan.decisions if axis in d.axes]
        split = sum(count for label, count in uses if label != "partial")
        pending = sum(count for label, count in uses if label == "partial")
        tail = f", keeps {pending} as pending sums" if pending else ""
        rows.append((axis, f"splits {split} of {total} groups of operations{tail}"))
    return rows


def memory_rows(plan: Plan) -> list[Row]:
    """(what, bytes, share of the peak): every category, then their sum."""
    peak = plan.predicted.peak_bytes
    rows = [*plan.predicted.memory_bytes.items(), ("all", peak)]
    return [
        (name.replace("_", " "), format_bytes(held), f"{held / peak if peak else 0:.0%}")
        for name, held in rows
    ]


def collective_rows(plan: Plan) -> list[Row]:
    """(kind, axes, times, bytes, time) of every group of collectives."""
    return [
        (
            each.kind, "+".join(each.axes), f"{each.times_per_step:g}",
            format_bytes(each.bytes_per_step), format_seconds(each.seconds_per_step),
        )
        for each in plan.predicted.collectives
    ]  # fmt: skip


def alternative_rows(plan: Plan) -> list[Row]:
    """(mesh, microbatches, step time, remark) of everything tried."""
    rows: list[Row] = []
    for tried in plan.alternatives:
        chosen = (tried.mesh, tried.num_microbatches) == (plan.mesh.shape, plan.num_microbatches)
        reason = textwrap.shorten(tried.reason, _REASON_WIDTH, placeholder=" ...")
        rows.append(
            (
                "x".join(map(str, tried.mesh)),
                str(tried.num_microbatches),
                "-" if tried.step_s is None else format_seconds(tried.step_s),
                "chosen" if chosen else reason,
            )
        )
    return rows


def configuration_rows(configuration: Mapping[str, Any]) -> list[Row]:
    """(what, values): settings with a common first part of their name are one entry."""
    plain: list[Row] = []
    grouped: dict[str, list[str]] = {}
    for key, value in configuration.items():
        group, dot, name = key.partition(".")
        if dot:
            grouped.setdefault(group, []).append(f"{name}={value}".replace(", ", ","))
        else:
            plain.append((key, str(value)))
    for group, settings in grouped.items():
        lines = textwrap.wrap(
            " ".join(settings), _SETTINGS_WIDTH, break_long_words=False, break_on_hyphens=False
        )
        plain += [(group if i == 0 else "", line) for i, line in enumerate(lines)]
    return plain


def layout_rows(inputs: Mapping[str, ShardingSpec]) -> list[Row]:
    """(paths, layout); paths that share a layout and differ in one place are one row.

    Example:
      >>> split, whole = ShardingSpec(((), ("tp",))), ShardingSpec(((), ()))
      >>> layout_rows({"w.layer_0.up": split, "w.layer_1.up": split, "w.layer_1.down": whole})
      [('w.layer_{0,1}.up', '[-, tp]'), ('w.layer_1.down', '[-, -]')]
    """
    names: dict[str, list[str]] = {}
    for name, spec in inputs.items():
        names.setdefault(str(spec), []).append(name)
    position = {name: i for i, name in enumerate(inputs)}
    rows = [
        (position[first], paths, layout)
        for layout, same in names.items()
        for first, paths in collapse_paths(same).items()
    ]
    return [(paths, layout) for _, paths, layout in sorted(rows)]


def collapse_paths(names: Sequence[str]) -> dict[str, str]:
    """Merge dotted paths that differ in one place: first path of each group -> `a.x_{0..3}.{b,c}`.

    Numbers are merged before whole parts, so that equal layers meet first; always the last place
    first. Every merge is exact: braces stand for the paths that were given and for no others.
    """
    by_number = _merge(
        {name: tuple((token,) for token in _NUMBERS.split(name)) for name in names},
        lambda count: range(count - 2, 0, -2),
    )
    texts = {first: "".join(map(_braces, places)) for first, places in by_number.items()}
    by_part = _merge(
        {first: tuple((part,) for part in _DOT.split(text)) for first, text in texts.items()},
        lambda count: range(count - 1, -1, -1),
    )
    return {first: ".".join(map(_braces, places)) for first, places in by_part.items()}


def format_axes(axes: Sequence[tuple[str, int]]) -> str:
    """Mesh axes as `dp=2, tp=4`."""
    return ", ".join(f"{name}={size}" for name, size in axes)


def printable(text: str) -> str:
    """The text with control characters (line ends and terminal escapes too) written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def section(title: str, rows: Sequence[Row], right: Collection[int] = ()) -> str:
    """A title and, indented below it, a table; `right` names right-aligned columns."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [printable(title)]
    for row in cells:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def _merge(
    paths: Mapping[str, _Places], order: Callable[[int], Sequence[int]]
) -> dict[str, _Places]:
    """Merge paths that are equal but for one place, for each place in the given order."""
    done: dict[str, _Places] = {}
    for count in sorted({len(places) for places in paths.values()}):
        same = {first: places for first, places in paths.items() if len(places) == count}
        for place in order(count):
            groups: dict[_Places, list[str]] = {}
            for first, places in same.items():
                groups.setdefault(places[:place] + places[place + 1 :], []).append(first)
            same = {
                firsts[0]: (
                    *rest[:place],
                    tuple(text for first in firsts for text in same[first][place]),
                    *rest[place:],
                )
                for rest, firsts in groups.items()
            }
        done |= same
    return {first: done[first] for first in paths if first in done}


def _braces(alternatives: Sequence[str]) -> str:
    """`x` of one, `{x,y}` of several, `{0..3}` of numbers in a row."""
    if len(alternatives) == 1:
        return alternatives[0]
    if not all(text.isdecimal() and str(int(text)) == text for text in alternatives):
        return f"{{{','.join(alternatives)}}}"
    runs: list[list[int]] = []
    for number in sorted(map(int, alternatives)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs]
    return f"{{{','.join(texts)}}}"
