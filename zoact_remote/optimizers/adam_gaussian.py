"""Adam for Gaussian probes: the second moment by coordinate, still as a list of scalars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoact_remote.errors import InvalidValue
from zoact_remote.estimators.base import Estimate
from zoact_remote.optimizers import checks
from zoact_remote.optimizers.base import Optimizer
from zoact_remote.optimizers.window import Momentum, Window
from zoact_remote.wire import Json, Normaliser, Update


@dataclass(eq=False)
class GaussianAdam(Optimizer):
    """Adam with decoupled weight decay, by coordinate: the server divides the terms by a normaliser.

    A step's gradient estimate is ``sum_i g_i Z_i`` (the ``g_i`` include the average's 1/q).

    First moment
        As in :class:`~zoact_remote.optimizers.adam.Adam`.
    Second moment
        ``v_t,j = (1 - beta2) sum_k beta2^k sum_i g_{t-k,i}^2 Z_{t-k,i,j}^2``: over the last ``window`` steps a list of
        (seed, weight) that travels as the normaliser's terms; older steps enter with their expectation (E z^2 = 1) as
        its constant offset. With one probe a step and a window as long as the run this is Adam exactly. With q probes
        the cross terms of the squared estimate are left out, for Adam's reasons.

    The update is ``C <- (1 - lr weight_decay) C - lr m_hat / (sqrt(v_hat) + epsilon)``, coordinate by coordinate, with
    both moments corrected for their start at zero.

    Sources: Kingma and Ba, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

    Args:
        beta1: decay of the first moment, at least 0 and below 1.
        beta2: decay of the second moment, at least 0 and below 1.
        epsilon: greater than 0.
        weight_decay: at least 0.
        truncation: of the first moment, at least 0 (keep everything) and below 1.
        window: steps of the second moment kept by coordinate, at least 1. The server draws their noise again for every
            update.

    """

    kind: ClassVar[str] = "gaussian_adam"

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    truncation: float = 1e-2
    window: int = 64

    def __post_init__(self) -> None:
        checks.share(beta1=self.beta1, beta2=self.beta2, truncation=self.truncation)
        checks.positive(epsilon=self.epsilon)
        checks.not_negative(weight_decay=self.weight_decay)
        if self.window < 1:
            raise InvalidValue("window", f"must be at least 1, got {self.window}")
        self._first = Momentum(self.beta1, self.truncation)
        self._second = Window(self.beta2, self.window)
        self._tail = 0.0
        self._steps = 0

    def step(self, estimate: Estimate, learning_rate: float, base_version: int) -> Update:
        """See :meth:`Optimizer.step`."""
        self._steps += 1
        self._first.push(estimate.terms)
        expired = self._second.push([(seed, g * g) for seed, g in estimate.terms])
        # A step that leaves the window has the weight beta2^window from now on.
        self._tail = self.beta2 * self._tail + self.beta2**self.window * math.fsum(square for _, square in expired)
        first_scale = (1.0 - self.beta1) / (1.0 - self.beta1**self._steps)
        second_scale = (1.0 - self.beta2) / (1.0 - self.beta2**self._steps)
        return Update(
            base_version,
            tuple(self._first.terms(-learning_rate * first_scale)),
            decay=learning_rate * self.weight_decay,
            normaliser=Normaliser(
                tuple(self._second.terms(second_scale)), offset=second_scale * self._tail, epsilon=self.epsilon
            ),
        )

    def most_terms(self, probes: int, steps: int) -> int:
        """See :meth:`Optimizer.most_terms`."""
        return probes * max(self._first.most(steps), self._second.most(steps))

    def _state(self) -> Json:
        return {
            "steps": self._steps,
            "first": self._first.to_json(),
            "second": self._second.to_json(),
            "tail": self._tail,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]
        self._first.load_json(state["first"])
        self._second.load_json(state["second"])
        self._tail = state["tail"]
