"""A report: one self-contained page about one plan."""

from __future__ import annotations

from alpa_lite.passes.html.elements import Html, join, tag
from alpa_lite.passes.html.sections import (
    AnyPlan,
    Solved,
    alternatives_section,
    assumptions_section,
    communication_section,
    cost_section,
    layouts_section,
    memory_section,
    summary,
    timeline_section,
)
from alpa_lite.passes.html.style import SCRIPT, STYLE
from alpa_lite.version import __version__

# Nothing is fetched: the browser would refuse.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_SECTIONS = (
    ("summary", "Summary"),
    ("timeline", "Timeline"),
    ("memory", "Memory"),
    ("layouts", "Layouts"),
    ("communication", "Communication"),
    ("cost", "Cost"),
    ("alternatives", "Alternatives"),
    ("assumptions", "Assumptions"),
)


def report_page(plan: AnyPlan, solved: Solved | None = None) -> str:
    """A whole HTML document.

    Args:
      plan: of either kind.
      solved: what planning again gave; left out of the page if None.
    """
    title = f"{plan.name} on {plan.cluster.name}"
    links = [tag("li", tag("a", name, href=f"#{identity}")) for identity, name in _SECTIONS]
    body = tag(
        "body",
        tag("a", "Skip to the figures", href="#summary", class_="skip"),
        tag("header", tag("h1", title), tag("p", f"Plan report of alpa-lite {__version__}. All "
            "times and bytes are predictions of its cost model.", class_="faint")),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag(
            "main", summary(plan), timeline_section(plan), memory_section(plan, solved),
            layouts_section(plan), communication_section(plan), cost_section(plan),
            alternatives_section(plan, solved), assumptions_section(plan),
        ),
        tag("script", Html(SCRIPT)),
        class_="alpa",
    )  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )  # fmt: skip
    return str(join(Html("<!doctype html>\n"), tag("html", head, body, lang="en"), Html("\n")))
