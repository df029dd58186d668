"""How far out to probe: the loss's noise measured against the bias of a central difference.

Along a direction Z the loss has an odd part ``(L(+eps) - L(-eps)) / 2 = s eps + b eps^3 + ... + noise``, with the slope
s and ``b = L'''/6``. The noise is rounding: of one size at every distance, and different at each. If one loss has the
standard deviation sigma, the odd part has ``sigma / sqrt 2``. The central difference, which is the odd part over eps,
is then off by

    ``error(eps)^2 = sigma^2 / (2 eps^2) + (b eps^2)^2``,

which is least at ``eps^3 = sigma / (2 |b|)``. Both numbers come from losses at distances that double. In

    ``odd(eps) - 2 odd(eps/2) = 3/4 b eps^3 + ... + noise``

the slope has gone, and the noise has the variance ``5/2 sigma^2``. So the square of this is level where noise rules,
and grows 64-fold a doubling where bias does: a rise that a few probes show. The level gives sigma. The foot of the rise
gives b, which there stands out of the noise and is least mixed with higher derivatives; what error both have left, the
third root makes small.

Source for balancing measured noise against a measured derivative: More and Wild, "Estimating derivatives of noisy
simulations", ACM Transactions on Mathematical Software 38(3), 2012.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from zoact_remote.errors import Inconclusive, InvalidValue
from zoact_remote.wire import Losses, Probe, Row

DISTANCES = tuple(2.0**power for power in range(-12, -3))
FLOOR = 3
"""Differences at the smallest distances that are taken for noise in any case."""
FEWEST = FLOOR + 2
"""Distances that a measurement needs: for the floor's differences and one more."""
RISE = 8.0
"""How many times the mean of those before it a mean square must be, not to be taken for noise."""


class Probed(Protocol):
    """What answers with losses under probes; an :class:`~zoact_remote.adapter.Adapter` is one."""

    def losses(self, rows: Sequence[Row], probes: Sequence[Probe], *, version: int | None = None) -> Losses:
        """Mean losses of a batch under probes."""
        ...


@dataclass(frozen=True)
class EpsilonChoice:
    """A distance for central differences, and what it was chosen by.

    Attributes:
        epsilon: the distance of least error among those measured.
        noise: sigma, the standard deviation of one loss in nats.
        third_derivative: of the loss along a probe, root mean square over probes; 0 if even the farthest show none.
        slope: of the loss along a probe, root mean square over probes, to hold :meth:`error` against.

    """

    epsilon: float
    noise: float
    third_derivative: float
    slope: float

    def error(self, epsilon: float) -> float:
        """Root mean square error of a central difference at a distance."""
        return math.hypot(self.noise / (math.sqrt(2.0) * epsilon), self.third_derivative / 6.0 * epsilon**2)


def choose_epsilon(
    adapter: Probed,
    rows: Sequence[Row],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    distances: Sequence[float] = DISTANCES,
    version: int | None = None,
) -> EpsilonChoice:
    """Measure how far out to probe, with one call a seed; by default as much work as 27 two-point steps.

    Args:
        adapter: whose loss; its coefficients stay as they are.
        rows: a batch of the size that training will take: noise falls with the number of rows.
        seeds: probes to average over, at least one.
        distances: at least 5, each twice the one before.
        version: to probe; None for the newest.

    Raises:
        Inconclusive: the loss does not change along the probes, or is not finite, at so many distances that fewer than
            5 are left.

    """
    if not seeds:
        raise InvalidValue("seeds", "at least one is needed")
    eps = np.asarray(distances, dtype=np.float64)
    if len(eps) < FEWEST or not (eps > 0.0).all() or not np.array_equal(eps[1:], 2.0 * eps[:-1]):
        raise InvalidValue("distances", f"must be at least {FEWEST}, greater than 0, each twice the one before")
    odd = np.empty((len(seeds), len(eps)))
    for i, seed in enumerate(seeds):
        answer = adapter.losses(rows, [Probe(seed, distance) for distance in distances], version=version)
        for k, loss in enumerate(answer.losses):
            # JSON has no NaN: a loss that is not finite may come as None.
            odd[i, k] = math.nan if loss.minus is None else (loss.plus - loss.minus) / 2.0
    return _least_error(eps, odd)


def _least_error(eps: NDArray[np.float64], odd: NDArray[np.float64]) -> EpsilonChoice:
    """The choice from odd parts: float64 ``[seeds, distances]``."""
    # Too near, a change may be lost to rounding altogether, which would pass for a loss without noise; too far, the
    # loss may overflow.
    seen = np.isfinite(odd).all(axis=0) & (odd != 0.0).all(axis=0)
    edges = np.flatnonzero(np.diff(seen, prepend=False, append=False))
    first, end = max(edges.reshape(-1, 2).tolist(), key=lambda run: run[1] - run[0], default=(0, 0))
    count = end - first
    if count < FEWEST:
        raise Inconclusive(f"the loss is finite, and changes, at {count} distances in a row; {FEWEST} are needed")
    eps, odd = eps[first : first + count], odd[:, first : first + count]
    squares = np.mean((odd[:, 1:] - 2.0 * odd[:, :-1]) ** 2, axis=0)
    foot = _foot(squares)
    level = float(np.mean(squares[:foot]))
    noise = math.sqrt(level / 2.5)
    bias = math.sqrt(max(float(squares[foot]) - level, 0.0)) / (0.75 * float(eps[foot + 1]) ** 3)
    best = int(np.argmin(np.hypot(noise / (math.sqrt(2.0) * eps), bias * eps**2)))
    slope = math.sqrt(np.mean((odd[:, best] / eps[best]) ** 2))
    return EpsilonChoice(float(eps[best]), noise, 6.0 * bias, slope)


def _foot(squares: NDArray[np.float64]) -> int:
    """The first place from which on every mean square stands above those before it; the last place if there is none."""
    for place in range(FLOOR, len(squares)):
        if (squares[place:] > RISE * np.mean(squares[:place])).all():
            return place
    return len(squares) - 1
