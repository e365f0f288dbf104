"""A few SVG shapes as text.

Colors are classes of the page's style sheet, so that charts follow its light and dark styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH = 720


@dataclass(frozen=True)
class Chart:
    """A chart with its title and a sentence on how to read it."""

    title: str
    svg: str
    caption: str


def picture(height: float, shapes: Sequence[str], label: str) -> str:
    """An inline SVG of `WIDTH` × `height`, with a label for screen readers."""
    body = "".join(shapes)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> str:
    """A line of text; `anchor`: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def box(x: float, y: float, width: float, height: float, kind: str, title: str, opacity: float = 1.0) -> str:
    """A filled rectangle with a tooltip."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" class="{kind}" '
        f'fill-opacity="{opacity:.3f}"><title>{escape(title)}</title></rect>'
    )


def curve(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" class="{kind}"/>'


def dot(x: float, y: float, radius: float, kind: str, title: str) -> str:
    """A filled circle with a tooltip."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="{kind}"><title>{escape(title)}</title></circle>'


def color(index: int) -> str:
    """The CSS class of the n-th series' color."""
    return f"c{index % 8}"


def legend(names: Sequence[str], y: float) -> tuple[list[str], float]:
    """A legend in rows: names of series beside their colors.

    Returns its shapes, and the y below them.
    """
    shapes, x = list[str](), 0.0
    for index, name in enumerate(names):
        width = 30 + 8.4 * len(name)
        if x and x + width > WIDTH:
            x, y = 0.0, y + 20
        shapes += [box(x, y - 9, 12, 10, f"fill {color(index)}", name), text(x + 18, y, name)]
        x += width
    return shapes, y + 16


def ticks(largest: float) -> list[float]:
    """Three to six round values from 0 up to `largest`."""
    if largest <= 0:
        return [0.0]
    unit = 10.0 ** floor(log10(largest))
    step = next(unit * factor for factor in (5, 2, 1, 0.5, 0.2) if largest >= 2 * unit * factor * (1 - 1e-9))
    return [step * index for index in range(int(largest / step + 1e-9) + 1)]
