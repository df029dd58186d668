"""A learning rate found by a short run at rising rates: a range test.

Every step takes the same rows, so that the loss shows what the coefficients do and not which rows came. Rates rise
geometrically. At a low rate a step lowers the loss in proportion to the rate; what it costs, through the loss's
curvature and the noise of the estimate, rises with the rate's square. The loss is therefore least where the two are
equal: the rate of that step breaks even. Half of it lowers the loss most in one step. A quarter of it is the rate to
train at: the gradient falls as training goes on and its noise's cost does not, and a rate too high costs more than one
as much too low.

Source for the rising rates: Smith, "Cyclical learning rates for training neural networks", arXiv 1506.01186, section
3.3, where they are judged by the accuracy on passing batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from zoact_remote.errors import Inconclusive, InvalidValue
from zoact_remote.estimators import Estimator
from zoact_remote.limits import check_limits
from zoact_remote.optimizers import Optimizer
from zoact_remote.wire import Limits, Losses, Probe, Row, Update, UpdateResult

SHARE = 0.25
"""Of the rate that breaks even."""
RISE = 0.1
"""Share of the first loss by which the loss must rise above it to end the test, if it had not fallen by more."""
STREAM = 2
"""Of a seed's randomness; the Trainer's are 0 and 1."""


class Revertible(Protocol):
    """What can be trained and taken back; an :class:`~zoact_remote.adapter.Adapter` is one."""

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        """Mean losses of a batch under probes, after a carried update."""
        ...

    def rollback(self, version: int) -> UpdateResult:
        """Return to a version."""
        ...

    def limits(self) -> Limits:
        """What a step may ask for."""
        ...


@dataclass(frozen=True)
class RangeTest:
    """What rising rates did.

    Attributes:
        learning_rates: one a step.
        losses: without a probe, in nats; ``losses[i]`` is what step i started from, and there is one more of them.

    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def break_even(self) -> float:
        """The rate of the step that led to the least loss: the highest one if the loss never rose.

        Raises:
            Inconclusive: no step led below the first loss.

        """
        least = int(np.argmin(self.losses))
        if least == 0:
            raise Inconclusive("no learning rate lowered the loss: start at a lower one, or take more rows")
        return self.learning_rates[least - 1]

    @property
    def learning_rate(self) -> float:
        """The rate to train at, a quarter of :attr:`break_even`."""
        return SHARE * self.break_even


def find_learning_rate(
    adapter: Revertible,
    estimator: Estimator,
    optimizer: Optimizer,
    rows: Sequence[Row],
    *,
    low: float = 1e-5,
    high: float = 1e-1,
    steps: int = 40,
    seed: int = 0,
) -> RangeTest:
    """Train at rising rates until the loss rises, then take it all back.

    The adapter returns to the version that it had, and the optimiser to its state, whatever happens on the way.

    Args:
        adapter: nobody else may update it meanwhile.
        estimator: as in training.
        optimizer: as in training.
        rows: fixed for the test; on more of them than a batch the loss falls for reasons that last.
        low: the first rate, greater than 0.
        high: the last one, greater than ``low``.
        steps: at most, at least 2.
        seed: of the probes; at least 0.

    Raises:
        InvalidValue: an argument is out of its bounds, or the server's limits do not allow all steps; none is begun.
        Inconclusive: a loss is not finite before the first update.
        CallFailed: a call failed.

    """
    if not 0.0 < low < high < math.inf:
        raise InvalidValue("low", f"must be greater than 0 and below high, got {low:g} and {high:g}")
    if steps < 2:
        raise InvalidValue("steps", f"must be at least 2, got {steps}")
    check_limits(adapter.limits(), estimator, optimizer, steps)
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(STREAM,)))

    def measure(version: int | None, update: Update | None) -> tuple[Losses, float]:
        ask = estimator.ask(lambda: int(words.random_raw()))
        losses = adapter.losses(rows, ask.probes, base=True, version=version, update=update)
        sides = [(probe.sides, answer) for probe, answer in zip(ask.probes, losses.losses, strict=True)]
        found = [losses.base, *(a.plus for _, a in sides), *(a.minus for kind, a in sides if kind == "both")]
        # One loss that is not finite, which JSON may write as null, spoils the estimate.
        whole = [math.nan if value is None else value for value in found]
        return losses, whole[0] if all(map(math.isfinite, whole)) else math.nan

    losses, loss = measure(None, None)
    start = losses.version
    if not math.isfinite(loss):
        raise Inconclusive(f"a loss is not finite, at version {start}")
    rates: list[float] = []
    values = [loss]
    state = optimizer.state_dict()
    try:
        for rate in np.geomspace(low, high, steps).tolist():
            update = optimizer.step(estimator.tell(losses), rate, losses.version)
            losses, loss = measure(losses.version + 1, update)
            if not math.isfinite(loss):
                break
            rates.append(rate)
            values.append(loss)
            if _risen(values):
                break
    finally:
        optimizer.load_state_dict(state)
        adapter.rollback(start)
    return RangeTest(tuple(rates), tuple(values))


def _risen(values: Sequence[float]) -> bool:
    """Whether the last loss is above the first by more than the loss had fallen, and by enough."""
    first = values[0]
    return values[-1] - first > max(first - min(values), RISE * abs(first))
