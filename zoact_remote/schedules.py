"""Learning rates by step. A schedule maps a step's number, from 0, to its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from zoact_remote.errors import InvalidValue

Schedule: TypeAlias = Callable[[int], float]


def constant(learning_rate: float, *, warmup: int = 0) -> Schedule:
    """The same rate at every step, after a warm-up.

    Args:
        learning_rate: at least 0.
        warmup: steps over which the rate rises in equal steps; step ``warmup - 1`` is the first at full rate.

    """
    return _warmed(learning_rate, warmup, lambda step: learning_rate)


def linear(learning_rate: float, steps: int, *, warmup: int = 0, final: float = 0.0) -> Schedule:
    """A straight line from ``learning_rate`` at the end of the warm-up to ``final`` at step ``steps``, and on.

    Args:
        learning_rate: at least 0.
        steps: of the whole run, warm-up included; more than ``warmup``.
        warmup: as for :func:`constant`.
        final: at least 0. The last step, ``steps - 1``, still lies above it.

    """
    progress = _progress(steps, warmup)
    return _warmed(learning_rate, warmup, lambda step: final + (learning_rate - final) * (1.0 - progress(step)), final)


def cosine(learning_rate: float, steps: int, *, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Half a cosine from ``learning_rate`` at the end of the warm-up to ``final`` at step ``steps``, and on.

    Source: Loshchilov and Hutter, "SGDR", arXiv 1608.03983, equation 5, without restarts.

    Args:
        learning_rate: at least 0.
        steps: of the whole run, warm-up included; more than ``warmup``.
        warmup: as for :func:`constant`.
        final: at least 0.

    """
    progress = _progress(steps, warmup)

    def rate(step: int) -> float:
        return final + 0.5 * (learning_rate - final) * (1.0 + math.cos(math.pi * progress(step)))

    return _warmed(learning_rate, warmup, rate, final)


def _progress(steps: int, warmup: int) -> Callable[[int], float]:
    if steps <= warmup:
        raise InvalidValue("steps", f"must be more than the {warmup} steps of warm-up, got {steps}")
    return lambda step: min((step - warmup) / (steps - warmup), 1.0)


def _warmed(learning_rate: float, warmup: int, after: Schedule, final: float = 0.0) -> Schedule:
    for name, value in (("learning_rate", learning_rate), ("final", final), ("warmup", warmup)):
        if not (math.isfinite(value) and value >= 0):
            raise InvalidValue(name, f"must be finite and at least 0, got {value!r}")
    return lambda step: learning_rate * (step + 1) / warmup if step < warmup else after(step)
