"""Curves over steps as SVG, for a page that has :data:`STYLE` among its styles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]

MOST_POINTS = 800
"""Points that a curve is drawn with: more cannot be told apart, and make the file large."""
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 34


@dataclass(frozen=True)
class Curve:
    """Points joined by a line (``line``), joined and marked (``marks``), or scattered (``dots``)."""

    points: Sequence[Point]
    kind: str
    label: str


def chart(
    title: str, curves: Sequence[Curve], last: int, *, percent: bool = False, events: Sequence[tuple[float, str]] = ()
) -> str:
    """A figure over steps 0 to ``last``, as HTML; nothing if no value is finite.

    Args:
        title: shown as text.
        curves: over steps.
        last: step on the right edge.
        percent: whether values are shares.
        events: a step and what happened there, each marked by an upright line.

    """
    thinned = [(curve, thin([p for p in curve.points if all(map(math.isfinite, p))])) for curve in curves]
    drawn = [(curve, points) for curve, points in thinned if points]
    if not drawn:
        return ""
    ys = [y for _, points in drawn for _, y in points]
    x_ticks = ticks(0, last, whole=True)
    y_ticks = ticks(min(ys), max(ys))
    bottom, top = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> Point:
        up = (y - bottom) / (top - bottom)
        return LEFT + x / last * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    gap = y_ticks[1] - y_ticks[0]
    digits = max(0, -math.floor(math.log10(gap) + 1e-9) - (2 if percent else 0))
    parts = []
    for tick in y_ticks:
        _, y = at(0, tick)
        text = f"{tick:.{digits}%}" if percent else f"{tick:,.{digits}f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        x, _ = at(tick, bottom)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{tick:,.0f}</text>')
    for step, text in events:
        x, _ = at(step, bottom)
        note = f"<title>{escape(text)}</title>"
        parts.append(f'<line class="event" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">{note}</line>')
    for curve, points in drawn:
        parts.append(_marks(curve, points, [at(*point) for point in points], percent))
    legend = " ".join(f'<span class="key {c.kind}">{escape(c.label)}</span>' for c, _ in drawn)
    return (
        f'<figure class="panel"><figcaption><h2>{escape(title)}</h2><span class="quiet">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step">{"".join(parts)}</svg>'
        "</figure>"
    )


def _marks(curve: Curve, points: Sequence[Point], places: Sequence[Point], percent: bool) -> str:
    parts = []
    if curve.kind != "dots" and len(places) > 1:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line" points="{joined}"/>')
    if curve.kind == "dots":
        parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>' for x, y in places]
    elif curve.kind == "marks" or len(places) == 1:
        for (step, value), (x, y) in zip(points, places, strict=True):
            text = f"{value:.1%}" if percent else f"{value:.4g}"
            note = f"<title>step {step:,.0f}: {text}</title>"
            parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{note}</circle>')
    return "".join(parts)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` of the points, evenly spaced, the first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """A few round numbers over a range: inside it for whole numbers, around it, two or more, for others."""
    span = high - low
    # Values that are equal but for rounding leave no room for a gap.
    if span <= max(1e-300, 1e-9 * abs(low), 1e-9 * abs(high)):
        span = max(abs(low) * 0.1, 0.01)
        low, high = low - span / 2, low + span / 2
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(power * step for step in (1, 2, 5, 10) if raw <= power * step * (1 + 1e-9))
    if whole:
        gap = max(1.0, gap)
        return [gap * i for i in range(math.ceil(low / gap), math.floor(high / gap) + 1)]
    return [gap * i for i in range(math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9) + 1)]
