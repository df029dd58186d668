"""Windows of past probes, which stand for moving averages of gradients."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from zoact_remote.wire import Term


class Window:
    """The terms of the last steps, under geometrically decaying weights.

    The moving average ``m_t = decay m_{t-1} + g_t`` of vectors ``g_t = sum_i g_ti Z(seed_ti)`` is
    ``sum_k decay^k g_{t-k}``, a list of (seed, weight). Of that list the window holds the steps of age k below its
    length.

    Args:
        decay: at least 0 and below 1.
        length: steps kept, at least 1; None for all.

    """

    def __init__(self, decay: float, length: int | None) -> None:
        self.decay = decay
        self._steps: deque[tuple[Term, ...]] = deque(maxlen=length)

    def push(self, terms: Iterable[Term]) -> tuple[Term, ...]:
        """Add a step, and return the terms of the step that it pushes out, if any."""
        full = len(self._steps) == self._steps.maxlen
        dropped = self._steps[0] if full else ()
        self._steps.append(tuple(terms))
        return dropped

    def weight(self, age: int) -> float:
        """The weight of the step pushed ``age`` steps before the newest."""
        return self.decay**age

    def most(self, steps: int) -> int:
        """How many steps it holds at most while so many more are pushed."""
        longest = len(self._steps) + steps
        return longest if self._steps.maxlen is None else min(longest, self._steps.maxlen)

    def terms(self, scale: float = 1.0) -> list[Term]:
        """``(seed, scale weight g)``, oldest first; a seed that comes up again adds to its first place."""
        sums: dict[int, float] = {}
        newest = len(self._steps) - 1
        for i, step in enumerate(self._steps):
            weight = scale * self.weight(newest - i)
            for seed, value in step:
                sums[seed] = sums.get(seed, 0.0) + weight * value
        return list(sums.items())

    def to_json(self) -> list[list[list[float]]]:
        return [[[seed, value] for seed, value in step] for step in self._steps]

    def load_json(self, steps: Iterable[Iterable[tuple[int, float]]]) -> None:
        self._steps.clear()
        self._steps.extend(tuple((int(seed), float(value)) for seed, value in step) for step in steps)


class Momentum(Window):
    """A moving average that is sent with every step, in updates of bounded length.

    It keeps the K steps whose ``decay^k`` is at least ``truncation``, so that ``decay^K < truncation``. A step that is
    sent for the last time, at age K - 1, is sent with all the weight that it would still have had,
    ``decay^(K-1) / (1 - decay)`` in place of ``decay^(K-1)``. Every gradient then has its full weight in the
    coefficients, the last of it a little early. Were it dropped, each gradient would lack the share ``decay^K`` for
    good, and that error would grow with the number of steps.

    Error, against the untruncated average, with G the largest ``sum_i |g_ti|`` of any step (for z = +-1 no coordinate
    of ``g_t`` is larger; for other noise, times the largest ``|z|``):

    - of one step's average, in each coordinate, at most ``2 truncation / (1 - decay) G``;
    - of the coefficients ``C <- C - s_t m_t``, in each coordinate and after any number of steps, at most
      ``truncation / (1 - decay)^2 (max s_t + V) G``, where ``V = sum_t |s_{t+1} - s_t|``. For a scale that only falls,
      V is at most ``max s_t``; a step of steady size moves a coordinate by up to ``max s_t G / (1 - decay)``. At decay
      0.9 and truncation 0.01 that is a fifth of a step, however long the run.

    The Euclidean error is at most the square root of the number of coefficients times as large.

    Args:
        decay: at least 0 and below 1.
        truncation: at least 0 (keep everything, without end) and below 1. At decay 0.9 a truncation of 0.01 keeps 44
            steps.

    """

    def __init__(self, decay: float, truncation: float) -> None:
        super().__init__(decay, _length(decay, truncation))

    def weight(self, age: int) -> float:
        """See :meth:`Window.weight`; the last time, all that is to come."""
        leaves = age + 1 == self._steps.maxlen
        return self.decay**age / (1.0 - self.decay) if leaves else self.decay**age


def _length(decay: float, truncation: float) -> int | None:
    """Steps whose ``decay^k`` is at least ``truncation``: k = 0 always, all (None) for a truncation of 0."""
    if decay == 0.0:
        return 1
    if truncation == 0.0:
        return None
    return math.floor(math.log(truncation) / math.log(decay)) + 1
