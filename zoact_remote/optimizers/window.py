"""The window of past probes, which stands for a moving average of gradients."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from zoact_remote.wire import Term


class Window:
    """The terms of the last steps, under geometrically decaying weights.

    The moving average ``m_t = decay m_{t-1} + g_t`` of vectors ``g_t = sum_i g_ti Z(seed_ti)`` is
    ``sum_k decay^k g_{t-k}``, a list of (seed, weight). Steps whose ``decay^k`` is below ``truncation`` are dropped.

    Error: the weights dropped sum to at most ``truncation`` of all weights, ``sum_k decay^k = 1/(1 - decay)``. With
    ``G_t = sum_i |g_ti|`` (for z = +-1 no coordinate of ``g_t`` is larger) every coordinate of m is therefore off by
    at most ``truncation / (1 - decay) max G`` over the steps dropped.

    Args:
        decay: at least 0 and below 1.
        length: steps kept; None for all.

    """

    def __init__(self, decay: float, length: int | None) -> None:
        self.decay = decay
        self._steps: deque[tuple[Term, ...]] = deque(maxlen=length)

    @staticmethod
    def length_for(decay: float, truncation: float) -> int | None:
        """Steps whose ``decay^k`` is at least ``truncation``: k = 0 always, all (None) for a truncation of 0."""
        if truncation == 0.0:
            return None
        if decay == 0.0:
            return 1
        return math.floor(math.log(truncation) / math.log(decay)) + 1

    def push(self, terms: Iterable[Term]) -> tuple[Term, ...]:
        """Add a step, and return the terms of the step that it pushes out, if any."""
        full = len(self._steps) == self._steps.maxlen
        dropped = self._steps[0] if full else ()
        self._steps.append(tuple(terms))
        return dropped

    def terms(self, scale: float = 1.0) -> list[Term]:
        """``(seed, scale decay^k g)``, oldest first; a seed that comes up again adds to its first place."""
        sums: dict[int, float] = {}
        newest = len(self._steps) - 1
        for i, step in enumerate(self._steps):
            weight = scale * self.decay ** (newest - i)
            for seed, value in step:
                sums[seed] = sums.get(seed, 0.0) + weight * value
        return list(sums.items())

    def to_json(self) -> list[list[list[float]]]:
        return [[[seed, value] for seed, value in step] for step in self._steps]

    def load_json(self, steps: Iterable[Iterable[tuple[int, float]]]) -> None:
        self._steps.clear()
        self._steps.extend(tuple((int(seed), float(value)) for seed, value in step) for step in steps)
