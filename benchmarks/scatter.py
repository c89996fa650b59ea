"""A scatter plot of predicted over measured, as SVG: text that can be reviewed and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, LEGEND = 720, 480, 64, 48, 24, 230
# Okabe and Ito's palette, told apart by people with colour-blindness; then shades of grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
BAND = 1.1  # shown around the diagonal: 10 %


def scatter_svg(
    groups: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str
) -> str:
    """Points `(x, y)` by group on equal logarithmic axes, with the diagonal and 10 % around it.

    Raises:
      ValueError: there is no point, or one is not positive.
    """
    values = [value for points in groups.values() for point in points for value in point]
    if not values or min(values) <= 0:
        raise ValueError("a logarithmic plot needs points with positive coordinates")
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    right = WIDTH - LEGEND

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * (right - LEFT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    first, last = 10.0**low, 10.0**high
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" '
        f'height="{HEIGHT - BOTTOM - TOP}"/></clipPath>',
    ]
    for power in range(low, high + 1):
        value = 10.0**power
        lines += [
            f'<path d="M{x(value):.1f} {TOP}V{HEIGHT - BOTTOM}M{LEFT} {y(value):.1f}H{right}" '
            'stroke="#dddddd"/>',
            f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
            f"{value:g}</text>",
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    for factor, dash in ((1.0, ""), (BAND, "4 3"), (1 / BAND, "4 3")):
        lines.append(
            f'<path d="M{x(first):.1f} {y(first * factor):.1f}L{x(last):.1f} '
            f'{y(last * factor):.1f}" stroke="#666666" stroke-dasharray="{dash}" fill="none" '
            'clip-path="url(#plot)"/>'
        )
    for i, (name, points) in enumerate(groups.items()):
        colour = COLOURS[i % len(COLOURS)]
        lines += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}" fill-opacity="0.6"/>'
            for a, b in points
        ]
        height = TOP + 10 + 18 * i
        lines += [
            f'<circle cx="{right + 16}" cy="{height}" r="4" fill="{colour}"/>',
            f'<text x="{right + 26}" y="{height + 4}">{escape(name)} ({len(points)})</text>',
        ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines += [
        f'<text x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text x="16" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle:.1f})">{escape(y_label)}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
