"""One-sided probes, each measured against the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from zoact_remote.errors import InvalidValue
from zoact_remote.estimators.base import Ask, Draw, Estimate, ProbeSettings
from zoact_remote.wire import Losses, Probe


@dataclass(frozen=True)
class LeaveOneOut(ProbeSettings):
    """``g_i = (L_i - mean of the other L_j) / (eps q)`` with ``L_i = L(C + eps Z_i)``.

    One forward pass a probe and none for a baseline: q probes cost q passes, where
    :class:`~zoact_remote.estimators.forward_difference.ForwardDifference` takes q + 1 and
    :class:`~zoact_remote.estimators.two_point.TwoPoint` 2q. The other losses say nothing about Z_i, so that taking
    their mean away leaves the estimate's mean as it is, and takes the loss's own size out of its variance.

    With the mean over all q losses in the baseline's place, ``L_i - mean of the others = q/(q-1) (L_i - mean of all)``:
    so ``g_i = (L_i - mean of all) / (eps (q - 1))``, as it is computed. The factor q/(q-1) makes up for the 1/q of L_i
    in the mean of all, without which the estimate would be short by as much. The g_i sum to zero.

    Against a forward difference the baseline adds noise of the probes' own spread: the second moment of each slope
    is ``q/(q-1)`` times as large for a linear loss. The curvature of the loss, which a forward difference adds to every
    slope alike, cancels but for its own spread.

    Sources: Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning",
    arXiv 1703.03864, for one-sided probes that are named by seeds; Kool, van Hoof and Welling, "Buy 4 REINFORCE
    samples, get a baseline for free!", ICLR 2019 workshop, for the baseline and its factor.

    Args:
        epsilon: see :class:`~zoact_remote.estimators.base.ProbeSettings`.
        probes: q, at least 2.

    """

    probes: int = 4

    fewest: ClassVar[int] = 2

    def ask(self, draw: Draw) -> Ask:
        """``probes`` one-sided probes."""
        return Ask(tuple(Probe(draw(), self.epsilon, "plus") for _ in range(self.probes)))

    def tell(self, losses: Losses) -> Estimate:
        """The averaged slopes; the loss is the mean over the probes, which is off by O(eps^2) on average."""
        count = len(losses.losses)
        if count < self.fewest:
            raise InvalidValue("losses", f"leave-one-out needs at least {self.fewest} probes, got {count}")
        mean = math.fsum(probe.plus for probe in losses.losses) / count
        terms = tuple((probe.seed, (probe.plus - mean) / (probe.epsilon * (count - 1))) for probe in losses.losses)
        return Estimate(terms, mean)
