"""Adam and AdamW for Rademacher probes: one scalar second moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoact_remote.estimators.base import Estimate
from zoact_remote.optimizers import checks
from zoact_remote.optimizers.base import Optimizer
from zoact_remote.optimizers.window import Momentum
from zoact_remote.wire import Json, Update


@dataclass(eq=False)
class Adam(Optimizer):
    """Adam, whose state is one number and a short list of seeds.

    A step's gradient estimate is ``sum_i g_i Z_i`` (the ``g_i`` include the average's 1/q).

    First moment
        ``m_t = beta1 m_{t-1} + (1 - beta1) sum_i g_i Z_i`` is linear in past probes, and is kept as their list,
        truncated where ``beta1^k`` falls below ``truncation`` (:class:`~zoact_remote.optimizers.window.Momentum` says
        how, and bounds the error).
    Second moment
        ``v_t = beta2 v_{t-1} + (1 - beta2) sum_i g_i^2``, one scalar. With z = +-1 and one probe a step,
        ``(g z)^2 = g^2`` in every coordinate, so that this *is* Adam's second moment. The square of an average over q
        probes differs by coordinate: it has cross terms ``g_i g_k z_ij z_kj``. In coordinate j its mean over probes is
        ``|grad|^2 / q + (1 - 1/q) grad_j^2`` to first order, of which the scalar keeps the first part. The second, what
        the cross terms come to, is the smaller one in every coordinate that holds less than 1/q of the gradient's
        energy, and over all d coordinates adds up to (q - 1)/d of the first. It is left out: to measure it the client
        would have to draw all noise, for a correction that vanishes with d.

    The update is ``C <- (1 - lr weight_decay) C - lr m_hat / (sqrt(v_hat) + epsilon)``, with both moments corrected for
    their start at zero. Weight decay is decoupled from the gradient, as in AdamW.

    For Gaussian probes the second moment differs by coordinate: see
    :class:`~zoact_remote.optimizers.adam_gaussian.GaussianAdam`.

    Sources: Kingma and Ba, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

    Args:
        beta1: decay of the first moment, at least 0 and below 1.
        beta2: decay of the second moment, at least 0 and below 1.
        epsilon: greater than 0.
        weight_decay: at least 0.
        truncation: at least 0 (keep everything) and below 1. At beta1 0.9 the default keeps 44 steps.

    """

    kind: ClassVar[str] = "adam"

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    truncation: float = 1e-2

    def __post_init__(self) -> None:
        checks.share(beta1=self.beta1, beta2=self.beta2, truncation=self.truncation)
        checks.positive(epsilon=self.epsilon)
        checks.not_negative(weight_decay=self.weight_decay)
        self._first = Momentum(self.beta1, self.truncation)
        self._second = 0.0
        self._steps = 0

    def step(self, estimate: Estimate, learning_rate: float, base_version: int) -> Update:
        """See :meth:`Optimizer.step`."""
        self._steps += 1
        self._first.push(estimate.terms)
        square = math.fsum(g * g for _, g in estimate.terms)
        self._second = self.beta2 * self._second + (1.0 - self.beta2) * square
        deviation = math.sqrt(self._second / (1.0 - self.beta2**self._steps))
        first_scale = (1.0 - self.beta1) / (1.0 - self.beta1**self._steps)
        terms = self._first.terms(-learning_rate * first_scale / (deviation + self.epsilon))
        return Update(base_version, tuple(terms), decay=learning_rate * self.weight_decay)

    def most_terms(self, probes: int, steps: int) -> int:
        """See :meth:`Optimizer.most_terms`."""
        return probes * self._first.most(steps)

    def _state(self) -> Json:
        return {"steps": self._steps, "first": self._first.to_json(), "second": self._second}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]
        self._first.load_json(state["first"])
        self._second = state["second"]


@dataclass(eq=False)
class AdamW(Adam):
    """:class:`Adam` under the name by which it is known with weight decay on, at the field's usual default."""

    kind: ClassVar[str] = "adamw"

    weight_decay: float = 0.01
