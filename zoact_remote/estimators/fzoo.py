"""One-sided probes, normalised by the spread of their losses."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import ClassVar

from zoact_remote.errors import InvalidValue
from zoact_remote.estimators.base import Ask, Draw, Estimate, ProbeSettings
from zoact_remote.wire import Losses, Probe


@dataclass(frozen=True)
class FZOO(ProbeSettings):
    """``g_i = (L_i - L) / (q s)`` with ``L_i = L(C + eps Z_i)`` and s the standard deviation of the L_i.

    A forward difference over s. For a linear loss and z = +-1, ``E s^2 = eps^2 |grad|^2`` (s^2 with the divisor q - 1),
    so that this estimates the gradient's direction, ``grad / |grad|``, whatever epsilon is: the same learning rate fits
    steep and flat ground. s takes up the losses' noise too, so that an epsilon at which rounding shows makes for small
    steps. The curvature that all probes share stands in the differences and not in s: an epsilon at which it outweighs
    the slope makes for long, random ones. If all L_i are equal there is no spread to measure by, and the estimate is
    zero.

    One forward pass a probe and one for the unperturbed loss.

    Source: Dang et al., "FZOO: Fast zeroth-order optimizer for fine-tuning large language models towards Adam-scale
    speed", arXiv 2506.09034. As in the authors' program, and unlike a division of the slopes themselves by s, epsilon
    cancels; their program takes the divisor q in s^2.

    Args:
        epsilon: see :class:`~zoact_remote.estimators.base.ProbeSettings`.
        probes: q, at least 2; the authors take 8.

    """

    probes: int = 8

    fewest: ClassVar[int] = 2

    def ask(self, draw: Draw) -> Ask:
        """``probes`` one-sided probes and the unperturbed loss."""
        return Ask(tuple(Probe(draw(), self.epsilon, "plus") for _ in range(self.probes)), base=True)

    def tell(self, losses: Losses) -> Estimate:
        """The averaged, normalised differences, and the unperturbed loss."""
        base = losses.base
        if base is None:
            raise InvalidValue("losses.base", "FZOO needs the unperturbed loss")
        count = len(losses.losses)
        if count < self.fewest:
            raise InvalidValue("losses", f"FZOO needs at least {self.fewest} probes, got {count}")
        spread = statistics.stdev(probe.plus for probe in losses.losses)
        scale = 1.0 / (count * spread) if spread > 0.0 else 0.0
        return Estimate(tuple((probe.seed, scale * (probe.plus - base)) for probe in losses.losses), base)
