"""Forward differences."""

from __future__ import annotations

from zoact_remote.errors import InvalidValue
from zoact_remote.estimators.base import Ask, Draw, Estimate, ProbeSettings
from zoact_remote.wire import Losses, Probe


class ForwardDifference(ProbeSettings):
    """Differences from the unperturbed loss: ``g_i = (L(C + eps Z_i) - L(C)) / (eps q)``.

    One forward pass a probe and one for all: with many probes half the cost of
    :class:`~zoact_remote.estimators.two_point.TwoPoint`. For a quadratic loss with Hessian H the slope along Z_i is
    off by ``eps/2 Z_i' H Z_i``. With Rademacher and Gaussian probes alike the product of that term with Z_i has mean
    zero, so it adds variance to the gradient and, on a quadratic, no bias.

    Source: the averaged forward difference of ZO-Act, arXiv 2607.01125.

    Args:
        epsilon: see :class:`~zoact_remote.estimators.base.ProbeSettings`.
        probes: q.

    """

    def ask(self, draw: Draw) -> Ask:
        """``probes`` one-sided probes and the unperturbed loss."""
        return Ask(tuple(Probe(draw(), self.epsilon, "plus") for _ in range(self.probes)), base=True)

    def tell(self, losses: Losses) -> Estimate:
        """The averaged slopes, and the unperturbed loss."""
        base = losses.base
        if base is None:
            raise InvalidValue("losses.base", "forward differences need the unperturbed loss")
        count = len(losses.losses)
        terms = tuple((probe.seed, (probe.plus - base) / (probe.epsilon * count)) for probe in losses.losses)
        return Estimate(terms, base)
