"""HTML elements from Python values; whatever is text is escaped.

Example:
  >>> tag("p", "1 < 2", class_="note")
  '<p class="note">1 &lt; 2</p>'
"""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence

from alpa_lite.passes.plan_text import Row, printable


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | Html

_VOID = ("input", "meta")
"""Elements without content, and so without an end tag."""


def tag(name: str, /, *content: Content, **attributes: object) -> Html:
    """An element.

    Args:
      name: of the element.
      *content: what is in it; text is escaped, `Html` is not.
      **attributes: a trailing underscore is dropped and others become hyphens; None and False are
        left out, True has no value.
    """
    inside = join(*content)
    if name in _VOID:
        return Html(f"<{name}{_attributes(attributes)}>")
    return Html(f"<{name}{_attributes(attributes)}>{inside}</{name}>")


def join(*content: Content) -> Html:
    """Pieces one after the other."""
    return Html("".join(each if isinstance(each, Html) else escape(each) for each in content))


def escape(text: str) -> Html:
    """Text as HTML; control characters become escapes, as in a terminal."""
    return Html(html.escape(printable(text)))


def table(
    header: Sequence[str], rows: Sequence[Sequence[Content]], right: Collection[int] = (),
    caption: str = "",
) -> Html:  # fmt: skip
    """A table that scrolls by itself if it is too wide.

    Args:
      header: one text per column.
      rows: cells.
      right: right-aligned columns.
      caption: what it shows.
    """
    alignment = ["number" if i in right else None for i in range(len(header))]
    head = join(
        *(tag("th", h, scope="col", class_=a) for h, a in zip(header, alignment, strict=True))
    )
    body = join(
        *(
            tag("tr", *(tag("td", c, class_=a) for c, a in zip(row, alignment, strict=True)))
            for row in rows
        )
    )
    inside = join(
        tag("caption", caption) if caption else Html(""), tag("thead", tag("tr", head)),
        tag("tbody", body),
    )  # fmt: skip
    return tag(
        "div", tag("table", inside), class_="scroll", tabindex="0", role="region",
        aria_label=caption or header[0],
    )  # fmt: skip


def definitions(rows: Sequence[Row]) -> Html:
    """(what, value) pairs."""
    return tag("dl", *(join(tag("dt", what), tag("dd", value)) for what, value in rows))


def section(title: str, identity: str, *content: Content) -> Html:
    """A part of the page that can be linked to."""
    heading = tag("h2", title, id=f"{identity}-title")
    return tag("section", heading, *content, id=identity, aria_labelledby=f"{identity}-title")


def _attributes(attributes: dict[str, object]) -> str:
    found = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        found.append(f" {key}" if value is True else f' {key}="{escape(str(value))}"')
    return "".join(found)
