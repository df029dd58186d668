"""How a run trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from zoact_remote.estimators import Estimator
    from zoact_remote.optimizers import Optimizer
    from zoact_remote.schedules import Schedule
    from zoact_remote.wire import Basis

EstimatorName = Literal["two-point", "forward-difference"]
OptimizerName = Literal["adam", "sgd", "momentum"]
ScheduleName = Literal["linear", "constant", "cosine"]
PositionsName = Literal["scored", "prompt", "both"]

MOMENTUM = 0.9


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a run.

    Attributes:
        rank: columns of each coefficient matrix.
        positions: which activations the basis is taken from; see :class:`~zoact_remote.wire.Basis`.
        calibration_rows: training rows that the basis is taken from.
        steps: of the run.
        batch_size: rows a step.
        estimator: how losses under probes become a gradient.
        probes: directions a step.
        epsilon: distance of a probe; a power of two scales probes without rounding.
        optimizer: what is made of the gradient.
        learning_rate: at the first step.
        schedule: how it goes on from there.
        eval_every: steps from one evaluation to the next; None for only the first and last.
        eval_rows: rows evaluated at most, evenly spaced over those held out.
        seed: of the data's order and the probes.

    """

    rank: int = 4
    positions: PositionsName = "scored"
    calibration_rows: int = 64
    steps: int = 400
    batch_size: int = 16
    estimator: EstimatorName = "two-point"
    probes: int = 1
    epsilon: float = 2.0**-7
    optimizer: OptimizerName = "adam"
    learning_rate: float = 2e-3
    schedule: ScheduleName = "linear"
    eval_every: int | None = None
    eval_rows: int = 400
    seed: int = 0

    def make_basis(self) -> Basis:
        from zoact_remote.wire import Basis

        return Basis(positions=self.positions)

    def make_estimator(self) -> Estimator:
        from zoact_remote.estimators import ForwardDifference, TwoPoint

        kind = TwoPoint if self.estimator == "two-point" else ForwardDifference
        return kind(epsilon=self.epsilon, probes=self.probes)

    def make_optimizer(self) -> Optimizer:
        from zoact_remote.optimizers import SGD, Adam

        if self.optimizer == "adam":
            return Adam()
        return SGD(momentum=MOMENTUM if self.optimizer == "momentum" else 0.0)

    def make_schedule(self) -> Schedule:
        from zoact_remote import schedules

        if self.schedule == "constant":
            return schedules.constant(self.learning_rate)
        decay = schedules.linear if self.schedule == "linear" else schedules.cosine
        return decay(self.learning_rate, self.steps)


DEFAULTS = TrainingSettings()
QUICKSTART = replace(DEFAULTS, positions="prompt", learning_rate=3e-3, steps=200, eval_every=50)
"""A run that takes minutes on two cores."""
