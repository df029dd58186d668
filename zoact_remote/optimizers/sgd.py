"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoact_remote.estimators.base import Estimate
from zoact_remote.optimizers import checks
from zoact_remote.optimizers.base import Optimizer
from zoact_remote.optimizers.window import Momentum
from zoact_remote.wire import Json, Update


@dataclass(eq=False)
class SGD(Optimizer):
    """``u_t = momentum u_{t-1} + g_t``, then ``C <- (1 - lr weight_decay) C - lr u_t``.

    The velocity u is kept as the list of past probes that it is a sum of: the exact recursion, truncated where
    ``momentum^k`` falls below ``truncation`` (:class:`~zoact_remote.optimizers.window.Momentum` says how, and bounds
    the error). At momentum 0.9 and the default truncation an update lists the probes of 44 steps.

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964, in the form of Sutskever
    et al., "On the importance of initialization and momentum in deep learning", ICML 2013, with the learning rate
    outside the recursion.

    Args:
        momentum: at least 0 and below 1.
        weight_decay: decoupled from the gradient, at least 0.
        truncation: at least 0 (keep everything) and below 1.

    """

    kind: ClassVar[str] = "sgd"

    momentum: float = 0.0
    weight_decay: float = 0.0
    truncation: float = 1e-2

    def __post_init__(self) -> None:
        checks.share(momentum=self.momentum, truncation=self.truncation)
        checks.not_negative(weight_decay=self.weight_decay)
        self._velocity = Momentum(self.momentum, self.truncation)

    def step(self, estimate: Estimate, learning_rate: float, base_version: int) -> Update:
        """See :meth:`Optimizer.step`."""
        self._velocity.push(estimate.terms)
        terms = self._velocity.terms(-learning_rate)
        return Update(base_version, tuple(terms), decay=learning_rate * self.weight_decay)

    def most_terms(self, probes: int, steps: int) -> int:
        """See :meth:`Optimizer.most_terms`."""
        return probes * self._velocity.most(steps)

    def _state(self) -> Json:
        return {"velocity": self._velocity.to_json()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._velocity.load_json(state["velocity"])
