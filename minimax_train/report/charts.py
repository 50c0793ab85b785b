"""Line charts as SVG, inline in a page whose style sheet gives ``.run-N`` its colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from minimax_train.metrics.console import count
from minimax_train.report.run import Points

WIDTH, HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 38
_MOST_POINTS = 500
_TICKS = 5
_DOT = 3
_CHARACTER = 7  # no digit of a tick is wider


@dataclass(frozen=True)
class Curve:
    """Of one run.

    Attributes:
        run: index, for its colour.
        label: which metric of which run, shown where the mouse is.
        dots: whether each point is marked, as where there are few.
    """

    run: int
    label: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that has happened to a run at a place of the x axis."""

    run: int
    x: float
    text: str


def draw(title: str, x_name: str, curves: Sequence[Curve], marks: Sequence[Mark] = (), *, settled: bool = False) -> str:
    """An SVG element.

    Args:
        settled: leave out of the picture how far the curves are up in the first twentieth.
    """
    points = [point for curve in curves for point in curve.points]
    xs = [x for x, _ in points] + [mark.x for mark in marks]
    low_x, high_x = _span(xs)
    shown = [y for x, y in points if not settled or x >= low_x + (high_x - low_x) / 20]
    low_y, high_y = _span(shown or [y for _, y in points], margin=0.05)

    def at_x(x: float) -> float:
        return round(_LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT), 1)

    def at_y(y: float) -> float:
        return round(HEIGHT - _BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>')
    for y in _ticks(low_y, high_y):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at_y(y)}" y2="{at_y(y)}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{at_y(y) + 4}" text-anchor="end">{_number(y)}</text>')
    for x in _ticks(low_x, high_x, integer=all(x == int(x) for x in xs)):
        label = _number(x)
        middle = min(at_x(x), WIDTH - _CHARACTER * len(label) / 2)  # not beyond the edge
        parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_name)}</text>')
    # An SVG of its own cuts off what lies outside.
    x, y, width, height = _LEFT - _DOT, _TOP, WIDTH - _LEFT - _RIGHT + 2 * _DOT, HEIGHT - _TOP - _BOTTOM + _DOT
    parts.append(f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{x} {y} {width} {height}">')
    for mark in marks:
        line = f'x1="{at_x(mark.x)}" x2="{at_x(mark.x)}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"'
        parts.append(f'<line class="mark run-{mark.run}" {line}><title>{escape(mark.text)}</title></line>')
    for curve in curves:
        line = " ".join(f"{at_x(x)},{at_y(y)}" for x, y in thin(curve.points))
        name = f"<title>{escape(curve.label)}</title>"
        parts.append(f'<polyline class="curve run-{curve.run}" points="{line}">{name}</polyline>')
        for x, y in curve.points if curve.dots or len(curve.points) == 1 else ():
            parts.append(
                f'<circle class="dot run-{curve.run}" cx="{at_x(x)}" cy="{at_y(y)}" r="{_DOT}">{name}</circle>'
            )
    return "".join([*parts, "</svg></svg>"])


def thin(points: Points) -> Points:
    """At most so many points that a chart can show, the least and the greatest of each stretch."""
    if len(points) <= _MOST_POINTS:
        return points
    size = -(-2 * len(points) // _MOST_POINTS)
    kept: Points = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _span(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(_TICKS, steps=[1, 2, 5, 10], integer=integer)
    return [float(x) for x in locator.tick_values(low, high) if low <= x <= high]


def _number(x: float) -> str:
    return count(x) if abs(x) >= 1000 else f"{x:.4g}"
