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
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from zoact_remote.charts import Curve, Point, chart
from zoact_remote.metrics import FIGURES, LESS_IS_BETTER, spelt

if TYPE_CHECKING:
    from zoact_remote.evaluation import Evaluation
    from zoact_remote.history import History, StepRecord
    from zoact_remote.wire import Row

Results: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What was reached, by name, in the order shown: ``{"tuned": {"accuracy": 0.9, "loss": 0.3, "rows": 120}}``."""

MEAN_OVER = 20
"""Steps that a running mean is taken over."""
MOST_CHANGES = 50
"""Changed answers that are shown."""
NONE = "-"
"""Shown for a figure that there is none of."""


@dataclass(frozen=True)
class Change:
    """A held-out row whose likeliest choice changed.

    Attributes:
        prompt: of the row.
        right: the choice that is.
        before: the choice before the training.
        after: the choice after it.

    """

    prompt: str
    right: str
    before: str
    after: str


def changed_answers(rows: Sequence[Row], before: Evaluation | None, after: Evaluation | None) -> list[Change]:
    """The rows of choices whose likeliest one differs between two evaluations; none if one was not made."""
    if before is None or after is None:
        return []
    return [
        Change(str(row["prompt"]), *(str(row["choices"][i]) for i in (row["answer"], old, new)))
        for row, old, new in zip(rows, before.predictions, after.predictions, strict=True)
        if old is not None and new is not None and old != new
    ]


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    settings: Mapping[str, object],
    history: History,
    results: Results,
    metric: str = "accuracy",
    changes: Sequence[Change] = (),
) -> Path:
    """Write the report of a run.

    Args:
        path: the file; its directory is made if it does not exist.
        title: shown as text, as is everything else here: nothing is taken for HTML.
        settings: name to value, in the order shown.
        history: the run. Without evaluations their curves are left out.
        results: name to figures (:data:`zoact_remote.metrics.FIGURES`) and ``rows``, each of which may be None or
            missing. The first is what the others are compared with.
        metric: the figure that the run is judged by; the loss takes its place where there is none.
        changes: rows whose answer changed; the first of them are shown.

    Returns:
        The file.

    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_page(title, settings, history, results, metric, changes), encoding="utf-8")
    return file


def running_mean(values: Sequence[float], window: int = MEAN_OVER) -> list[float]:
    """Means of each value and the ``window - 1`` before it, of fewer at the start."""
    return [
        math.fsum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    ]


def figure_text(name: str, result: Mapping[str, Any]) -> str:
    """A result's figure as it is shown: ``41.2%``, ``0.412``; an accuracy with its standard error, ``84.2% ± 3.3``."""
    value, rows = result.get(name), result.get("rows")
    if value is None:
        return NONE
    error = f" ± {100 * math.sqrt(value * (1 - value) / rows):.1f}" if name == "accuracy" and rows else ""
    return format(value, FIGURES[name]) + error


def results_cells(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """Results as a table: its heads, and a line a result. Figures that none of them has are left out."""
    found = [name for name in FIGURES if any(result.get(name) is not None for result in results.values())]
    return [*map(spelt, found), "rows"], [
        (name, *(figure_text(figure, result) for figure in found), str(result.get("rows") or NONE))
        for name, result in results.items()
    ]


# The page ------------------------------------------------------------------------------------------------------------


def _page(
    title: str,
    settings: Mapping[str, object],
    history: History,
    results: Results,
    metric: str,
    changes: Sequence[Change],
) -> str:
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
{_tiles(results, metric)}
<section class="charts">
{"".join(_charts(history, metric))}
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
{_returns(history)}
{_changes(changes)}
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


def _tiles(results: Results, metric: str) -> str:
    tiles = []
    first = next(iter(results.values()), {})
    key = "loss" if first.get(metric) is None else metric
    for name, result in results.items():
        value, start = result.get(key), first.get(key)
        if value is None:
            continue
        shown = format(value, FIGURES[key])
        note = "loss, nats" if key == "loss" else spelt(key)
        if result is not first and start is not None:
            gain = value - start
            note += f" · {gain:+{FIGURES[key]}}" if key in LESS_IS_BETTER else f" · {100 * gain:+.1f} points"
        tiles.append(
            f'<div class="tile panel"><span class="quiet">{escape(name)}</span>'
            f'<strong>{shown}</strong><span class="quiet">{escape(note)}</span></div>'
        )
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def _results_table(results: Results) -> str:
    heads, lines = results_cells(results)
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in lines
    )
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


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


def _returns(history: History) -> str:
    """Where the run went back to an earlier version."""
    rates = [record.learning_rate for record in history.steps[1:]]
    rows = [
        (f"{record.step:,}", f"{record.version:,}", f"{record.returned_to:,}", NONE if rate is None else f"{rate:.3g}")
        for record, rate in zip_longest(history.steps, rates)
        if record.returned_to is not None
    ]
    if history.kept is not None:
        rows.append(("end", NONE, f"{history.kept:,}", NONE))
    heads = ("step", "from version", "to the coefficients of version", "learning rate after it")
    return _panel("Returns to earlier versions", _table(heads, rows)) if rows else ""


def _changes(changes: Sequence[Change]) -> str:
    if not changes:
        return ""
    righted = sum(change.after == change.right for change in changes)
    wronged = sum(change.before == change.right for change in changes)
    shown = f"; the first {MOST_CHANGES} are shown" if len(changes) > MOST_CHANGES else ""
    note = f"{len(changes):,} held-out rows: {righted:,} became right, {wronged:,} wrong{shown}."
    rows = [(change.prompt, change.right, change.before, change.after) for change in changes[:MOST_CHANGES]]
    table = _table(("prompt", "right", "before", "after"), rows)
    return _panel("Changed answers", f'<p class="quiet">{note}</p>{table}', "texts")


def _panel(title: str, content: str, kind: str = "") -> str:
    return f'<section class="panel {kind}"><h2>{title}</h2>{content}</section>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# Curves --------------------------------------------------------------------------------------------------------------


def _charts(history: History, metric: str) -> Iterable[str]:
    steps = history.steps
    last = steps[-1].step + 1 if steps else 1
    if steps:
        events = [(r.step, f"step {r.step}: returned to version {r.returned_to}") for r in _returned(steps)]
        losses = [(r.step, r.loss) for r in steps if math.isfinite(r.loss)]
        yield chart("Training loss", _noisy(losses, "a step's batch"), last, events=events)
    evaluations = [] if history.baseline is None else [(0, history.baseline)]
    # An evaluation is of the version that its step made.
    evaluations += [(r.step + 1, r.evaluation) for r in steps if r.evaluation is not None]
    judged = [(step, getattr(e, metric)) for step, e in evaluations if getattr(e, metric) is not None]
    if judged and metric != "loss":
        marks = [Curve(judged, "marks", "held-out rows")]
        yield chart(f"Evaluation {spelt(metric)}", marks, last, percent=metric not in LESS_IS_BETTER)
    if evaluations:
        held_out = [(step, e.loss) for step, e in evaluations]
        yield chart("Evaluation loss", [Curve(held_out, "marks", "held-out rows")], last)
    slopes = [(r.step, math.hypot(*(g for _, g in r.terms))) for r in steps if r.terms]
    if slopes:
        yield chart("Slope along the probe, |g|", _noisy(slopes, "a step"), last)
        rates = [(r.step, r.learning_rate) for r in steps]
        yield chart("Learning rate", [Curve(rates, "line", "of each update")], last)
        tokens = list(zip((r.step for r in steps), accumulate(r.tokens for r in steps), strict=True))
        yield chart("Tokens", [Curve(tokens, "line", "through the model so far")], last)


def _returned(steps: Iterable[StepRecord]) -> list[StepRecord]:
    return [record for record in steps if record.returned_to is not None]


def _noisy(points: Sequence[Point], label: str) -> list[Curve]:
    """A step's values as dots, and their running mean as a line."""
    smooth = running_mean([y for _, y in points])
    line = [(x, mean) for (x, _), mean in zip(points, smooth, strict=True)]
    return [Curve(points, "dots", label), Curve(line, "line", f"mean of {MEAN_OVER}")]


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
.event { stroke: var(--text); stroke-width: 1; stroke-dasharray: 3 3; opacity: 0.6; }
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
.texts td { white-space: pre-wrap; }
.texts td:first-child { width: 55%; }
"""
