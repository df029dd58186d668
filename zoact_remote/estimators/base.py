"""The interface of estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from zoact_remote.wire import Losses, Probe, Term
from zoact_remote.wire.values import whole_number

Draw: TypeAlias = Callable[[], int]
"""Returns a fresh 64-bit seed each time."""


@dataclass(frozen=True)
class Ask:
    """What a step must evaluate.

    Attributes:
        probes: perturbations of the coefficients.
        base: whether the unperturbed loss is needed.

    """

    probes: tuple[Probe, ...]
    base: bool = False


@dataclass(frozen=True)
class Estimate:
    """An estimate of the loss's gradient in the coefficients: ``sum_i g_i Z(seed_i)``.

    Attributes:
        terms: ``(seed_i, g_i)``; the average over probes is taken already.
        loss: the batch's loss, or what the probes say of it, in nats.

    """

    terms: tuple[Term, ...]
    loss: float


class Estimator(Protocol):
    """Turns losses under probes into a gradient. Holds no state between steps.

    For probes with E z = 0 and E z z' = I (Rademacher and Gaussian both), an estimate's mean is the gradient up to a
    bias that vanishes with epsilon, or what the estimator says in its place. All probes of a step are asked for at
    once, so that they travel in one call and run in one batch.
    """

    def ask(self, draw: Draw) -> Ask:
        """What to evaluate next, with seeds from ``draw``."""
        ...

    def tell(self, losses: Losses) -> Estimate:
        """The estimate from the losses that were asked for.

        Raises:
            InvalidValue: they are others; what lacks is named.

        """
        ...


@dataclass(frozen=True)
class ProbeSettings:
    """How many probes a step, and how far out.

    Attributes:
        epsilon: distance of a probe, greater than 0. Too small a value measures the model's rounding: in bfloat16,
            2^-10 can be wrong by half where 2^-7 is not. A power of two scales probes without rounding.
        probes: directions a step, whose estimates are averaged.

    """

    epsilon: float = 2.0**-7
    probes: int = 1

    fewest: ClassVar[int] = 1
    """Probes that an estimate needs."""

    def __post_init__(self) -> None:
        Probe(0, self.epsilon)  # checks epsilon
        whole_number(self.probes, "probes", least=self.fewest)
