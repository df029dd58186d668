"""A live curve in a notebook."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from zoact_remote.callbacks import Callback
from zoact_remote.charts import Point, thin
from zoact_remote.report import MEAN_OVER, figure_text, running_mean

if TYPE_CHECKING:
    from zoact_remote.history import History, StepRecord
    from zoact_remote.training import Trainer

WIDTH, HEIGHT, MARGIN = 640, 220, 8


class LiveCurve(Callback):
    """Draws a run's losses in a notebook, and draws them anew as they come.

    Dots are the steps' losses, the line is their running mean, rings are evaluations.

    Args:
        every_s: seconds between two drawings, at least; the last one shows the end of the run.

    Raises:
        ImportError: IPython is not installed, which every notebook brings.

    """

    def __init__(self, every_s: float = 1.0) -> None:
        # Here and not at the top: nothing else of the client needs it.
        from IPython import display

        self._display: Any = display
        self._every_s = every_s
        self._drawn_at = -math.inf
        self._shown: Any = None

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Draw, unless that was done just now."""
        if time.monotonic() - self._drawn_at >= self._every_s:
            self._draw(trainer, trainer.history)

    def on_end(self, trainer: Trainer, history: History) -> None:
        """Draw the whole run. A further run is drawn anew."""
        self._draw(trainer, history)
        self._shown = None

    def _draw(self, trainer: Trainer, history: History) -> None:
        picture = self._display.HTML(curve(history, trainer.steps))
        if self._shown is None:
            self._shown = self._display.display(picture, display_id=True)
        else:
            self._shown.update(picture)
        self._drawn_at = time.monotonic()


def curve(history: History, steps: int) -> str:
    """A run's losses as HTML with an inline SVG, over 0 to ``steps``."""
    losses = [record.loss for record in history.steps]
    dots = [(record.step, record.loss) for record in history.steps]
    line = [(x, mean) for (x, _), mean in zip(dots, running_mean(losses), strict=True)]
    evaluated = [] if history.baseline is None else [(0, history.baseline)]
    evaluated += [(record.step + 1, record.evaluation) for record in history.steps if record.evaluation is not None]
    rings = [(step, found.loss) for step, found in evaluated]
    heights = [y for _, y in [*dots, *rings] if math.isfinite(y)]
    low, high = min(heights, default=0.0), max(heights, default=1.0)
    span = (high - low) or 1.0

    def at(point: Point) -> Point:
        x, y = point[0] / max(steps, 1), (point[1] - low) / span
        return MARGIN + x * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - y * (HEIGHT - 2 * MARGIN)

    def places(points: Sequence[Point]) -> list[Point]:
        return [at(point) for point in thin([p for p in points if math.isfinite(p[1])])]

    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.5" fill="#9aa5e8"/>' for x, y in places(dots)]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places(line))
    marks.append(f'<polyline points="{joined}" fill="none" stroke="#4353d8" stroke-width="2"/>')
    marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="none" stroke="#d84343"/>' for x, y in places(rings)]
    said = [f"step {len(losses) and history.steps[-1].step + 1:,} of {steps:,}"]
    if line:
        said.append(f"loss {line[-1][1]:.4g} (mean of {MEAN_OVER} steps), {low:.4g} to {high:.4g} shown")
    if evaluated:
        found = evaluated[-1][1]
        said.append(f"held-out loss {found.loss:.4g}")
        if found.accuracy is not None:
            said.append(f"accuracy {figure_text('accuracy', found.to_json())}")
    if history.stopped is not None:
        said.append(f"stopped: {history.stopped}")
    return (
        f'<div style="max-width:{WIDTH}px"><div>{escape(" · ".join(said))}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Loss by step" '
        f'style="border:1px solid #8884;border-radius:6px">{"".join(marks)}</svg></div>'
    )
