"""Two-point (central) differences."""

from __future__ import annotations

from dataclasses import dataclass

from zoact_remote.errors import InvalidValue
from zoact_remote.estimators.base import Ask, Draw, Estimate, ProbeSettings
from zoact_remote.wire import Losses, Probe


@dataclass(frozen=True)
class TwoPoint(ProbeSettings):
    """Simultaneous perturbation on both sides: ``g_i = (L(C + eps Z_i) - L(C - eps Z_i)) / (2 eps q)``.

    Two forward passes a probe. The even terms of the loss cancel, so the slope along Z_i is exact for a quadratic loss
    and off by O(eps^2) otherwise.

    Split, the q probes share the rows of the batch: L is then the loss of the i-th of q equal parts of them, and all
    together take two forward passes. Where mu is the rows' mean gradient and sigma^2 the trace of their covariance, the
    estimate of n rows has the variance ``d (|mu|^2 / q + sigma^2 / n)``, up to 1/d of it, whatever q; a shared probe
    has ``d (|mu|^2 + sigma^2 / n)``. So a row of its own for every probe is never worse, and is up to n times better as
    long as rows agree on where to go.

    Sources: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation",
    IEEE Transactions on Automatic Control 37(3), 1992 (for z = +-1, dividing by z equals multiplying by it); Malladi
    et al., "Fine-tuning language models with just forward passes" (MeZO), arXiv 2305.17333, algorithm 1.

    Args:
        epsilon: see :class:`~zoact_remote.estimators.base.ProbeSettings`.
        probes: q.
        split: whether every probe sees a part of the rows of its own; their number must be a multiple of q.

    """

    split: bool = False

    def ask(self, draw: Draw) -> Ask:
        """``probes`` two-sided probes."""
        parts = [(i, self.probes) if self.split else None for i in range(self.probes)]
        return Ask(tuple(Probe(draw(), self.epsilon, "both", part) for part in parts))

    def tell(self, losses: Losses) -> Estimate:
        """The averaged slopes; the loss is the mean over all sides, which is off by O(eps^2)."""
        terms, total, count = [], 0.0, len(losses.losses)
        for i, probe in enumerate(losses.losses):
            if probe.minus is None:
                raise InvalidValue(f"losses[{i}].minus", "two-point differences need both sides of a probe")
            terms.append((probe.seed, (probe.plus - probe.minus) / (2.0 * probe.epsilon * count)))
            total += 0.5 * (probe.plus + probe.minus)
        return Estimate(tuple(terms), total / count)
