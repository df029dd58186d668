"""What a trainer calls on its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from zoact_remote.evaluation import Evaluation
    from zoact_remote.history import History, StepRecord
    from zoact_remote.training import Trainer
    from zoact_remote.wire import Json


class Callback:
    """Hooks into a run; each does nothing unless it is overridden.

    In the order of a step: :meth:`before_step`, :meth:`on_loss`, :meth:`on_checkpoint`, :meth:`on_eval` if an
    evaluation is due, :meth:`after_step`. Every hook is given the trainer, which it may tell to
    :meth:`~zoact_remote.Trainer.stop`.

    What a callback decides by must be the same in a run that was killed and resumed. It may keep a state for that: the
    trainer saves it with its own. A resumed run calls :meth:`after_step` again for the step whose state it goes on
    from, but neither :meth:`on_loss` nor an :meth:`on_eval` that was done: a state should change in :meth:`on_loss` and
    :meth:`after_step` alone.
    """

    kind: ClassVar[str | None] = None
    """Names the callback's state in the trainer's; None for a callback that keeps none."""

    def state_dict(self) -> Json:
        """What its decisions depend on, fit for JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""

    def before_step(self, trainer: Trainer) -> None:
        """Before a step's call."""

    def on_loss(self, trainer: Trainer, loss: float) -> None:
        """The server has answered a step: the batch's loss in nats, nan if a loss is not finite.

        No update has been made from it yet, and :meth:`~zoact_remote.Trainer.return_to` may take its place. Where this
        raises, in any callback, the step is done again by the next :meth:`~zoact_remote.Trainer.run`; states that are
        kept are then what they were before.
        """

    def on_checkpoint(self, trainer: Trainer) -> None:
        """A step is done, whose update or rollback has not left yet; it stays where this raises, in any callback.

        A run that keeps its :meth:`~zoact_remote.Trainer.state_dict` here, on disk before this returns, may die at any
        moment: resumed from the last state kept, it repeats nothing but what the server has done already, which changes
        nothing.
        """

    def on_eval(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """After an evaluation, the one before the first step included."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After a step, and the evaluation that followed it."""

    def on_end(self, trainer: Trainer, history: History) -> None:
        """All steps are done or the run was stopped, and the last update is applied.

        A callback may still :meth:`~zoact_remote.Trainer.return_to` a version.
        """


class AfterStep(Callback):
    """A plain function, called after every step."""

    def __init__(self, function: Callable[[Trainer, StepRecord], None]) -> None:
        self._function = function

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._function(trainer, record)
