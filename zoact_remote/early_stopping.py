"""Ends a run that no longer gets better on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from zoact_remote.callbacks import Callback
from zoact_remote.errors import InvalidValue

if TYPE_CHECKING:
    from zoact_remote.evaluation import Evaluation
    from zoact_remote.history import History, StepRecord
    from zoact_remote.training import Trainer
    from zoact_remote.wire import Json


class EarlyStopping(Callback):
    """Stops a run whose held-out loss has not fallen for some evaluations, and may return it to the best of them.

    It goes by the loss, which moves long before the accuracy of a few hundred rows does.

    Args:
        patience: evaluations in a row without a new best, at least 1; None to go on to the last step.
        min_delta: nats by which a new best must be below the last one, at least 0.
        keep_best: when the run is over, return to the best version evaluated, be it the first. The figures of the rows
            that it was chosen by are then too good by the luck of the choice.

    """

    kind: ClassVar[str] = "early_stopping"

    def __init__(self, patience: int | None, *, min_delta: float = 0.0, keep_best: bool = False) -> None:
        if patience is not None and patience < 1:
            raise InvalidValue("patience", f"must be at least 1, got {patience}")
        if not (math.isfinite(min_delta) and min_delta >= 0.0):
            raise InvalidValue("min_delta", f"must be finite and at least 0, got {min_delta:g}")
        self.patience = patience
        self.min_delta = min_delta
        self.keep_best = keep_best
        self._best: int | None = None
        """The best version; None before anything was evaluated."""
        self._loss = math.inf
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
            trainer.stop(f"the held-out loss was not below {self._loss:.4f} in {self._waited} evaluations")

    def on_end(self, trainer: Trainer, history: History) -> None:
        """Return to the best version, if asked to."""
        if self.keep_best and history.kept is None and self._best is not None and self._best != trainer.version:
            trainer.return_to(self._best)
            history.kept = self._best

    def _see(self, evaluation: Evaluation) -> None:
        self._waited += 1
        if self._best is None or evaluation.loss < self._loss - self.min_delta:
            self._best, self._loss, self._waited = evaluation.version, evaluation.loss, 0

    def state_dict(self) -> Json:
        """See :meth:`Callback.state_dict`."""
        return {"best": self._best, "loss": self._loss if self._best is not None else None, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self._best = state["best"]
        self._loss = math.inf if state["loss"] is None else state["loss"]
        self._waited = state["waited"]
