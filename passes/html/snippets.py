"""What notebooks show of plans and timelines: their `_repr_html_`."""

from __future__ import annotations

from alpa_lite.passes.html.elements import Content, Html, escape, tag
from alpa_lite.passes.html.sections import (
    AnyPlan,
    cost_content,
    summary_content,
    timeline_content,
    timeline_pictures,
)
from alpa_lite.passes.html.style import STYLE
from alpa_lite.passes.schedules import Timeline
from alpa_lite.passes.units import format_seconds


def plan_snippet(plan: AnyPlan) -> str:
    """Figures and timeline, and the whole text on demand."""
    return _view(
        tag("h3", f"{plan.name} on {plan.cluster.name}"), *summary_content(plan),
        *timeline_content(plan), *cost_content(plan),
        tag("details", tag("summary", "Everything"), tag("pre", Html(_lines(plan.describe())))),
    )  # fmt: skip


def timeline_snippet(timeline: Timeline) -> str:
    """Tracks of a simulated step."""
    title = (
        f"{timeline.schedule.name}: {format_seconds(timeline.step_s)}, bubble "
        f"{timeline.bubble_share:.0%}"
    )
    return _view(tag("h3", title), *timeline_pictures(timeline))


def _view(*content: Content) -> str:
    return str(tag("div", tag("style", Html(STYLE)), *content, class_="alpa"))


def _lines(text: str) -> str:
    """Escaped line by line: line ends are kept, other control characters are not."""
    return "\n".join(escape(line) for line in text.splitlines())
