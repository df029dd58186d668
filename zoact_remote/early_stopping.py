"""Ends a run that no longer gets better on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from zoact_remote.callbacks import Callback
from zoact_remote.errors import InvalidValue
from zoact_remote.metrics import FIGURES, LESS_IS_BETTER, spelt

if TYPE_CHECKING:
    from zoact_remote.evaluation import Evaluation
    from zoact_remote.history import History, StepRecord
    from zoact_remote.training import Trainer
    from zoact_remote.wire import Json


class EarlyStopping(Callback):
    """Stops a run that has gained nothing on held-out rows for some evaluations, and may return it to the best of them.

    Of two evaluations with the same figure, such as an accuracy of few rows, the one with the lower loss is the better.

    Args:
        patience: evaluations in a row without a new best, at least 1; None to go on to the last step.
        metric: the figure that evaluations are judged by, one of :data:`zoact_remote.metrics.FIGURES`. Of the loss and
            of the perplexity, less is better.
        min_delta: by how much a figure must be better than the best one before it, at least 0, in the metric's unit:
            0.01 is one point of accuracy, or a hundredth of a nat.
        keep_best: when the run is over, return to the best version evaluated, be it the first. The figures of the rows
            that it was chosen by are then too good by the luck of the choice.

    """

    kind: ClassVar[str] = "early_stopping"

    def __init__(
        self, patience: int | None, *, metric: str = "loss", min_delta: float = 0.0, keep_best: bool = False
    ) -> None:
        if patience is not None and patience < 1:
            raise InvalidValue("patience", f"must be at least 1, got {patience}")
        if metric not in FIGURES:
            raise InvalidValue("metric", f"must be one of {', '.join(FIGURES)}, got {metric!r}")
        if not (math.isfinite(min_delta) and min_delta >= 0.0):
            raise InvalidValue("min_delta", f"must be finite and at least 0, got {min_delta:g}")
        self.patience = patience
        self.metric = metric
        self.min_delta = min_delta
        self.keep_best = keep_best
        self._best: int | None = None
        """The best version; None before anything was evaluated."""
        self._figure = self._loss = math.nan
        """Of the best version."""
        self._waited = 0

    def on_eval(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """Take in the evaluation before the first step."""
        if trainer.step == 0:
            self._see(evaluation)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Look at the step's evaluation, if there was one."""
        if record.evaluation is None:
            return
        if self._best is None and trainer.history.baseline is not None:  # made before the run was cut off
            self._see(trainer.history.baseline)
        self._see(record.evaluation)
        if self._waited == self.patience:
            beyond = "below" if self.metric in LESS_IS_BETTER else "above"
            trainer.stop(
                f"the held-out {spelt(self.metric)} was not {beyond} {self._figure:.4f} in {self._waited} evaluations"
            )

    def on_end(self, trainer: Trainer, history: History) -> None:
        """Return to the best version, if asked to."""
        if self.keep_best and history.kept is None and self._best is not None and self._best != trainer.version:
            trainer.return_to(self._best)
            history.kept = self._best

    def _see(self, evaluation: Evaluation) -> None:
        figure = evaluation.figure(self.metric)
        gain = self._figure - figure if self.metric in LESS_IS_BETTER else figure - self._figure
        tie = figure == self._figure and evaluation.loss < self._loss
        self._waited += 1
        if self._best is None or gain > self.min_delta or tie:
            self._best, self._figure, self._loss, self._waited = evaluation.version, figure, evaluation.loss, 0

    def state_dict(self) -> Json:
        """See :meth:`Callback.state_dict`."""
        best = None if self._best is None else [self._best, self._figure, self._loss]
        return {"best": best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self._best, self._figure, self._loss = state["best"] or (None, math.nan, math.nan)
        self._waited = state["waited"]
