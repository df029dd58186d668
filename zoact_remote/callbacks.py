"""What a trainer calls on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoact_remote.evaluation import Evaluation
    from zoact_remote.training import History, StepRecord, Trainer


class Callback:
    """Hooks into a run; each does nothing unless it is overridden.

    In the order of a step: :meth:`before_step`, :meth:`on_checkpoint`, :meth:`on_eval` if an evaluation is due,
    :meth:`after_step`. Every hook is given the trainer, which it may tell to :meth:`~zoact_remote.Trainer.stop`.
    """

    def before_step(self, trainer: Trainer) -> None:
        """Before a step's call."""

    def on_checkpoint(self, trainer: Trainer) -> None:
        """The server has answered a step, whose update has not left yet.

        A run that keeps its :meth:`~zoact_remote.Trainer.state_dict` here, on disk before this returns, may die at any
        moment: resumed from the last state kept, it repeats nothing but what the server has done already, which changes
        nothing.
        """

    def on_eval(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """After an evaluation, the one before the first step included."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After a step, and the evaluation that followed it."""

    def on_end(self, trainer: Trainer, history: History) -> None:
        """All steps are done or the run was stopped, and the last update is applied."""


class AfterStep(Callback):
    """A plain function, called after every step."""

    def __init__(self, function: Callable[[Trainer, StepRecord], None]) -> None:
        self._function = function

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._function(trainer, record)
