"""A training run as one HTML file: curves, results and settings.

The file needs nothing besides itself, neither scripts nor fonts nor images, so that it can be mailed, archived and read
offline. It follows the reader's light or dark colour scheme.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from zoact_remote.history import History

Point: TypeAlias = tuple[float, float]
Results: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What was reached, by name, in the order shown: ``{"tuned": {"accuracy": 0.9, "loss": 0.3, "rows": 120}}``."""

MEAN_OVER = 20
"""Steps that a running mean is taken over."""
MOST_POINTS = 800
"""Points that a curve is drawn with: more cannot be told apart, and make the file large."""
NONE = "-"
"""Shown for a figure that there is none of."""
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 34


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    settings: Mapping[str, object],
    history: History,
    results: Results,
) -> Path:
    """Write the report of a run.

    Args:
        path: the file; its directory is made if it does not exist.
        title: shown as text, as is everything else here: nothing is taken for HTML.
        settings: name to value, in the order shown.
        history: the run. Without evaluations their curves are left out.
        results: name to ``accuracy``, ``loss`` (in nats) and ``rows``, each of which may be None or missing. The first
            is what the others are compared with.

    Returns:
        The file.

    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_page(title, settings, history, results), encoding="utf-8")
    return file


def running_mean(values: Sequence[float], window: int = MEAN_OVER) -> list[float]:
    """Means of each value and the ``window - 1`` before it, of fewer at the start."""
    return [
        math.fsum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    ]


def accuracy_text(result: Mapping[str, Any]) -> str:
    """An accuracy in percent with its standard error, as far as they are known: ``84.2% ± 3.3``."""
    accuracy, rows = result.get("accuracy"), result.get("rows")
    if accuracy is None:
        return NONE
    error = f" ± {100 * math.sqrt(accuracy * (1 - accuracy) / rows):.1f}" if rows else ""
    return f"{accuracy:.1%}{error}"


def loss_text(result: Mapping[str, Any]) -> str:
    """A loss in nats: ``0.412``."""
    loss = result.get("loss")
    return NONE if loss is None else f"{loss:.3f}"


# The page ------------------------------------------------------------------------------------------------------------


def _page(title: str, settings: Mapping[str, object], history: History, results: Results) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="quiet">{escape(_summary(history))}</p>
</header>
{_tiles(results)}
<section class="charts">
{"".join(_charts(history))}
</section>
<section class="tables">
<div class="panel">
<h2>Results</h2>
{_results_table(results)}
</div>
<div class="panel">
<h2>Settings</h2>
{_settings_table(settings)}
</div>
</section>
<footer class="quiet">Accuracies are given with their standard error; losses are in nats, means over rows.</footer>
</main>
</body>
</html>
"""


def _summary(history: History) -> str:
    steps = history.steps
    if not steps:
        return "no steps"
    seconds = math.fsum(record.seconds for record in steps)
    tokens = sum(record.tokens for record in steps)
    parts = [f"{len(steps):,} step{'s' if len(steps) > 1 else ''}", f"{tokens:,} tokens", f"{seconds:,.0f} s"]
    if seconds > 0:
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
    if history.stopped is not None:
        parts.append(f"stopped: {history.stopped}")
    return " · ".join(parts)


def _tiles(results: Results) -> str:
    tiles = []
    first = next(iter(results.values()), {})
    for name, result in results.items():
        # A completion task has no accuracy: its loss is the figure then.
        key = "loss" if result.get("accuracy") is None else "accuracy"
        value, start = result.get(key), first.get(key)
        if value is None:
            continue
        shown = f"{value:.1%}" if key == "accuracy" else f"{value:.3f}"
        note = "accuracy" if key == "accuracy" else "loss, nats"
        if result is not first and start is not None:
            gain = f"{100 * (value - start):+.1f} points" if key == "accuracy" else f"{value - start:+.3f}"
            note += f" · {gain}"
        tiles.append(
            f'<div class="tile panel"><span class="quiet">{escape(name)}</span>'
            f'<strong>{shown}</strong><span class="quiet">{escape(note)}</span></div>'
        )
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def _results_table(results: Results) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{accuracy_text(result)}</td><td>{loss_text(result)}</td>'
        f"<td>{escape(str(result.get('rows') or NONE))}</td></tr>"
        for name, result in results.items()
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("accuracy", "loss", "rows"))
    return f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _settings_table(settings: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_setting(value))}</td></tr>'
        for name, value in settings.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _setting(value: object) -> str:
    if value is None:
        return NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


# Curves --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Points joined by a line (``line``), joined and marked (``marks``), or scattered (``dots``)."""

    points: Sequence[Point]
    kind: str
    label: str


def _charts(history: History) -> Iterable[str]:
    steps = history.steps
    last = steps[-1].step + 1 if steps else 1
    if steps:
        yield _chart("Training loss", _noisy([(r.step, r.loss) for r in steps], "a step's batch"), last)
    evaluations = [] if history.baseline is None else [(0, history.baseline)]
    # An evaluation is of the version that its step made.
    evaluations += [(r.step + 1, r.evaluation) for r in steps if r.evaluation is not None]
    accuracy = [(step, e.accuracy) for step, e in evaluations if e.accuracy is not None]
    if accuracy:
        yield _chart("Evaluation accuracy", [Curve(accuracy, "marks", "held-out rows")], last, percent=True)
    if evaluations:
        losses = [(step, e.loss) for step, e in evaluations]
        yield _chart("Evaluation loss", [Curve(losses, "marks", "held-out rows")], last)
    slopes = [(r.step, math.hypot(*(g for _, g in r.terms))) for r in steps]
    if slopes:
        yield _chart("Slope along the probe, |g|", _noisy(slopes, "a step"), last)


def _noisy(points: Sequence[Point], label: str) -> list[Curve]:
    """A step's values as dots, and their running mean as a line."""
    smooth = running_mean([y for _, y in points])
    line = [(x, mean) for (x, _), mean in zip(points, smooth, strict=True)]
    return [Curve(points, "dots", label), Curve(line, "line", f"mean of {MEAN_OVER}")]


def _chart(title: str, curves: Sequence[Curve], last: int, *, percent: bool = False) -> str:
    """A figure over steps 0 to ``last``; nothing if no value is finite."""
    thinned = [(curve, _thin([p for p in curve.points if all(map(math.isfinite, p))])) for curve in curves]
    drawn = [(curve, points) for curve, points in thinned if points]
    if not drawn:
        return ""
    ys = [y for _, points in drawn for _, y in points]
    x_ticks = _ticks(0, last, whole=True)
    y_ticks = _ticks(min(ys), max(ys))
    bottom, top = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> Point:
        up = (y - bottom) / (top - bottom)
        return LEFT + x / last * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    digits = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9) - (2 if percent else 0))
    parts = []
    for tick in y_ticks:
        _, y = at(0, tick)
        text = f"{tick:.{digits}%}" if percent else f"{tick:.{digits}f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        x, _ = at(tick, bottom)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{tick:,.0f}</text>')
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


def _thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` of the points, evenly spaced, the first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """A few round numbers over a range: inside it for whole numbers, around it, two or more, for others."""
    span = high - low
    if span <= 0:
        span = max(abs(low) * 0.1, 0.01)
        low, high = low - span / 2, low + span / 2
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(power * step for step in (1, 2, 5, 10) if raw <= power * step * (1 + 1e-9))
    if whole:
        gap = max(1.0, gap)
        return [gap * i for i in range(math.ceil(low / gap), math.floor(high / gap) + 1)]
    return [gap * i for i in range(math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9) + 1)]


STYLE = """
:root { --page: #f6f7f9; --panel: #ffffff; --edge: #e3e6eb; --text: #1b1f27; --quiet: #667085; --grid: #e9ecf1;
  --accent: #4353d8; --dot: #a9b2f0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #101218; --panel: #181b23; --edge: #282d38; --text: #e7eaf0; --quiet: #949db0; --grid: #262b36;
    --accent: #8c9bff; --dot: #4a5490; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 56px; display: grid; gap: 20px; }
h1 { font-size: 26px; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 15px; font-weight: 600; margin: 0; }
p { margin: 0; }
.quiet { color: var(--quiet); font-size: 13px; }
.panel { background: var(--panel); border: 1px solid var(--edge); border-radius: 10px; padding: 16px 18px; margin: 0;
  min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 16px; }
.tile { display: grid; }
.tile strong { font-size: 32px; line-height: 1.25; letter-spacing: -0.02em; font-weight: 600; }
.tile:last-child strong { color: var(--accent); }
.charts, .tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px;
  align-items: start; }
figcaption { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; flex-wrap: wrap;
  margin-bottom: 8px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 12px; }
.grid { stroke: var(--grid); stroke-width: 1; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--dot); }
.mark { fill: var(--panel); stroke: var(--accent); stroke-width: 2; }
.key { margin-left: 12px; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 14px; height: 2px; margin-right: 6px; vertical-align: middle;
  border-radius: 1px; background: var(--accent); }
.key.dots::before { width: 5px; height: 5px; border-radius: 50%; background: var(--dot); }
table { border-collapse: collapse; width: 100%; margin-top: 8px; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  font-weight: 400; overflow-wrap: anywhere; }
thead th { color: var(--quiet); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { white-space: nowrap; }
"""
