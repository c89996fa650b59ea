"""Bars, timelines and curves.

Shapes are SVG that stretches to the width there is; words stand beside them as HTML, so that they
stay readable on a telephone. Colours are classes, which the style sheet sets for light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alpa_lite.passes.html.elements import Html, join, tag
from alpa_lite.passes.units import format_bytes, format_seconds

_WIDTH = 1000.0
"""Units of a drawing from left to right."""

MAX_RECTANGLES = 12_000
"""More would make a browser slow."""

KIND_CLASSES = {
    "compute": "c-compute",
    "forward": "c-forward",
    "backward": "c-backward",
    "backward_input": "c-backward",
    "backward_weight": "c-weight",
    "communication": "c-communication",
    "move": "c-communication",
    "update": "c-update",
    "prepare": "c-update",
    "bubble": "c-bubble",
}
"""Class of every kind of slice."""

PART_CLASSES = ("c-part0", "c-part1", "c-part2", "c-part3", "c-part4", "c-part5")
"""Classes of the parts of a whole, in their order."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A part of a bar.

    Attributes:
      name: shown when pointed at.
      value: its length, in the unit of the whole.
      text: the value as people read it.
      style: class of its colour.
    """

    name: str
    value: float
    text: str
    style: str


@dataclass(frozen=True, slots=True)
class Span:
    """Something on a track of a timeline.

    Attributes:
      name: shown when pointed at.
      start_s, end_s: seconds.
      style: class of its colour.
    """

    name: str
    start_s: float
    end_s: float
    style: str


def bar(parts: Sequence[Bar], whole: float, label: str) -> Html:
    """Parts of a whole, side by side; `whole` is the full width."""
    x = 0.0
    shapes = []
    for part in parts:
        width = _WIDTH * part.value / whole if whole else 0.0
        title = tag("title", f"{part.name}: {part.text}")
        shapes.append(
            tag("rect", title, x=f"{x:.2f}", y=0, width=f"{width:.2f}", height=20,
                class_=part.style)
        )  # fmt: skip
        x += width
    told = ", ".join(f"{part.name} {part.text}" for part in parts)
    return _drawing(shapes, 20, f"{label}: {told}", "bar")


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """(what, class of its colour)."""
    return tag(
        "ul",
        *(tag("li", tag("span", class_=f"swatch {style}"), name) for name, style in entries),
        class_="legend",
    )


def timeline(tracks: Sequence[tuple[str, Sequence[Span]]], step_s: float, label: str) -> Html:
    """Tracks below each other with one time scale.

    Args:
      tracks: (name, what is on it).
      step_s: seconds of the full width.
      label: what it shows, for those who cannot see it.
    """
    rows = []
    for name, spans in tracks:
        shapes = [
            tag(
                "rect",
                tag("title", f"{s.name}: {format_seconds(s.end_s - s.start_s)} from "
                             f"{format_seconds(s.start_s)}"),
                x=f"{_x(s.start_s, step_s):.2f}", y=0,
                width=f"{max(0.0, _x(s.end_s, step_s) - _x(s.start_s, step_s)):.2f}", height=20,
                class_=s.style,
            )
            for s in spans
        ]  # fmt: skip
        drawing = _drawing(shapes, 20, f"{label}: {name}", "track")
        rows.append(tag("div", tag("span", name, class_="track-name"), drawing, class_="row"))
    return tag("div", *rows, seconds_scale(step_s, "scale"), class_="timeline")


def area(
    layers: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], step_s: float,
    limit_bytes: float, label: str,
) -> Html:  # fmt: skip
    """Step functions stacked on each other, and a line at a limit.

    Args:
      layers: (name, class of its colour, (x, bytes from there on)); all have the same x.
      step_s: x of the full width.
      limit_bytes: drawn as a line if it is within the picture.
      label: what it shows.
    """
    points = [[b for _, b in curve] for _, _, curve in layers]
    totals = [sum(each) for each in zip(*points, strict=True)]
    peak = max(totals, default=0.0)
    top = max(peak * 1.08, limit_bytes if limit_bytes < 1.6 * peak else 0.0, 1.0)
    height = 160.0
    shapes = []
    below = [0.0] * len(totals)
    for name, style, curve in layers:
        above = [a + b for a, (_, b) in zip(below, curve, strict=True)]
        xs = [_x(x, step_s) for x, _ in curve]
        upper = _steps(xs, [height * (1 - v / top) for v in above])
        lower = _steps(xs, [height * (1 - v / top) for v in below])
        path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in [*upper, *reversed(lower)]) + "Z"
        most = format_bytes(max((b for _, b in curve), default=0.0))
        shapes.append(tag("path", tag("title", f"{name}: at most {most}"), d=path, class_=style))
        below = above
    if limit_bytes <= top:
        y = f"{height * (1 - limit_bytes / top):.2f}"
        title = tag("title", f"budget: {format_bytes(limit_bytes)}")
        shapes.append(tag("line", title, x1=0, x2=_WIDTH, y1=y, y2=y, class_="limit"))
    drawing = _drawing(shapes, height, f"{label}: at most {format_bytes(peak)}", "area")
    return tag("div", tag("span", format_bytes(top), class_="area-top"), drawing, class_="plot")


def seconds_scale(step_s: float, style: str = "scale flush") -> Html:
    """Ticks under a drawing of a step."""
    ticks = [tag("span", format_seconds(step_s * i / 4) if i else "0") for i in range(5)]
    return tag("div", *ticks, class_=style, aria_hidden="true")


def _drawing(shapes: Sequence[Html], height: float, label: str, style: str) -> Html:
    return tag(
        "svg", join(*shapes), viewBox=f"0 0 {_WIDTH:g} {height:g}", preserveAspectRatio="none",
        role="img", aria_label=label, class_=style,
    )  # fmt: skip


def _x(seconds: float, step_s: float) -> float:
    return _WIDTH * seconds / step_s if step_s else 0.0


def _steps(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of a step function that keeps each value until the next."""
    found: list[tuple[float, float]] = []
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        end = xs[i + 1] if i + 1 < len(xs) else _WIDTH
        found += [(x, y), (end, y)]
    return found
