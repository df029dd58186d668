"""A progress bar for training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from zoact_remote.callbacks import Callback
from zoact_remote.metrics import FIGURES, spelt
from zoact_remote.report import MEAN_OVER

if TYPE_CHECKING:
    from rich.console import Console

    from zoact_remote.adapter import Adapter
    from zoact_remote.evaluation import Evaluation
    from zoact_remote.history import StepRecord
    from zoact_remote.training import Trainer
    from zoact_remote.wire import Generation, Limits, Losses, Probe, Row, Scores, Update, UpdateResult


class TrainingBar(Callback):
    """Shows a run: a callback for its trainer.

    The loss is the mean over the last steps, since a single batch's says little; the metric is the last evaluation's.
    """

    def __init__(self, progress: Progress, steps: int, metric: str) -> None:
        self._progress = progress
        self._metric = metric
        self._task: TaskID = progress.add_task("training", total=steps, figures="")
        self._recent: deque[StepRecord] = deque(maxlen=MEAN_OVER)
        self._evaluation: Evaluation | None = None

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Show a step."""
        self._recent.append(record)
        self._evaluation = record.evaluation or self._evaluation or trainer.history.baseline
        loss = sum(step.loss for step in self._recent) / len(self._recent)
        seconds = sum(step.seconds for step in self._recent)
        figures = [f"loss {loss:.3f}"]
        if self._evaluation is not None:
            figures.append(f"{spelt(self._metric)} {self._evaluation.figure(self._metric):{FIGURES[self._metric]}}")
        if seconds > 0:
            figures.append(f"{sum(step.tokens for step in self._recent) / seconds:,.0f} tokens/s")
        self._progress.update(self._task, completed=record.step + 1, figures=" · ".join(figures))

    def doing(self, what: str) -> None:
        """Say what the run is busy with."""
        self._progress.update(self._task, description=what)


@contextmanager
def training_bar(console: Console, steps: int, metric: str) -> Iterator[TrainingBar]:
    """A progress bar while the context lasts, for a task that is judged by the metric."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield TrainingBar(progress, steps, metric)


@dataclass(frozen=True)
class Watched:
    """An adapter whose calls are shown on a bar: evaluations take long, and a trainer tells of them only afterwards."""

    adapter: Adapter
    bar: TrainingBar

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        self.bar.doing("training")
        return self.adapter.losses(rows, probes, base=base, version=version, update=update)

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        self.bar.doing("evaluating")
        return self.adapter.scores(rows, version=version)

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        max_tokens: int = 64,
        stop: str | Sequence[str] = (),
        version: int | None = None,
    ) -> Generation:
        self.bar.doing("generating")
        return self.adapter.generate(prompt, messages=messages, max_tokens=max_tokens, stop=stop, version=version)

    def update(self, update: Update) -> UpdateResult:
        return self.adapter.update(update)

    def rollback(self, version: int, *, base_version: int | None = None, key: str | None = None) -> UpdateResult:
        return self.adapter.rollback(version, base_version=base_version, key=key)

    def limits(self) -> Limits:
        return self.adapter.limits()
