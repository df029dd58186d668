"""Ends a run that no longer gets better on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from zoact_remote.callbacks import Callback
from zoact_remote.errors import InvalidValue
from zoact_remote.metrics import FIGURES, LESS_IS_BETTER, spelt

if TYPE_CHECKING:
    from zoact_remote.evaluation import Evaluation
    from zoact_remote.history import History, StepRecord
    from zoact_remote.training import Trainer
    from zoact_remote.wire import Json


class Mark(NamedTuple):
    """What a version came to, to hold others against.

    Attributes:
        version: the version.
        figure: by the metric.
        loss: in nats; it decides where figures are the same.

    """

    version: int
    figure: float
    loss: float


class EarlyStopping(Callback):
    """Stops a run that has gained nothing on held-out rows for some evaluations, and may return it to the best of them.

    Of two evaluations with the same figure, such as an accuracy of few rows, the one with the lower loss is the better.

    Args:
        patience: evaluations in a row without a gain, at least 1; None to go on to the last step.
        metric: the figure that evaluations are judged by, one of :data:`zoact_remote.metrics.FIGURES`. Of the loss and
            of the perplexity, less is better.
        min_delta: what is a gain: by how much a figure must be better than the one that made the last gain, at least 0,
            in the metric's unit: 0.01 is one point of accuracy, or a hundredth of a nat. Patience alone goes by it.
        keep_best: when the run is over, return to the best version evaluated, be it the first and by however little.
            The figures of the rows that it was chosen by are then too good by the luck of the choice.

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
        self._best: Mark | None = None
        """The best version; None before anything was evaluated."""
        self._gained: Mark | None = None
        """The version that made the last gain."""
        self._waited = 0
        """Evaluations since then."""

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
            assert self._gained is not None
            beyond = "below" if self.metric in LESS_IS_BETTER else "above"
            by = f"{self.min_delta:g} " if self.min_delta else ""
            trainer.stop(
                f"the held-out {spelt(self.metric)} was not {by}{beyond} {self._gained.figure:.4f} "
                f"in {self._waited} evaluations"
            )

    def on_end(self, trainer: Trainer, history: History) -> None:
        """Return to the best version, if asked to."""
        best = self._best
        if self.keep_best and history.kept is None and best is not None and best.version != trainer.version:
            trainer.return_to(best.version)
            history.kept = best.version

    def _see(self, evaluation: Evaluation) -> None:
        found = Mark(evaluation.version, evaluation.figure(self.metric), evaluation.loss)
        if self._best is None or self._is_better(found, self._best):
            self._best = found
        self._waited += 1
        if self._gained is None or self._is_better(found, self._gained, self.min_delta):
            self._gained, self._waited = found, 0

    def _is_better(self, found: Mark, than: Mark, by: float = 0.0) -> bool:
        # Whatever is a number is better than what is none.
        if math.isnan(than.figure) and not math.isnan(found.figure):
            return True
        gain = than.figure - found.figure if self.metric in LESS_IS_BETTER else found.figure - than.figure
        return gain > by or (by == 0.0 and found.figure == than.figure and found.loss < than.loss)

    def state_dict(self) -> Json:
        """See :meth:`Callback.state_dict`."""
        return {"best": self._best, "gained": self._gained, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self._best = None if state["best"] is None else Mark(*state["best"])
        self._gained = None if state["gained"] is None else Mark(*state["gained"])
        self._waited = state["waited"]
