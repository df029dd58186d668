"""How a run trains. What is said of a setting here is what ``--help`` and a printed configuration say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from zoact_remote.early_stopping import EarlyStopping
    from zoact_remote.estimators import Estimator
    from zoact_remote.guard import Guard
    from zoact_remote.layout import Site
    from zoact_remote.noise import Distribution
    from zoact_remote.optimizers import Optimizer
    from zoact_remote.schedules import Schedule
    from zoact_remote.wire import Basis, Limits

EstimatorName = Literal["two-point", "forward-difference", "leave-one-out", "fzoo"]
OptimizerName = Literal["adam", "adamw", "gaussian-adam", "sgd"]
ScheduleName = Literal["linear", "constant", "cosine"]
PositionsName = Literal["scored", "prompt", "both"]
SitesName = Literal["all", "upper", "mlp", "upper-mlp"]
Auto = Literal["auto"]
LoggerName = Literal["tensorboard", "wandb", "trackio"]

PROBES: dict[EstimatorName, int] = {"two-point": 1, "forward-difference": 1, "leave-one-out": 4, "fzoo": 8}
"""Directions a step, where none are given: the estimators' own defaults, known without loading them."""
LEARNING_RATE, FULL_RATE_STEPS = 2e-3, 800
"""The rate where none is given, and the most steps that it is for."""
WEIGHT_DECAY = {"adamw": 0.01}
"""Where none is given; 0 for the others."""


def setting(
    default: Any,
    section: str,
    text: str,
    *,
    key: str | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A field of a configuration.

    Args:
        default: its value where none is given; None if it need not have one.
        section: of the TOML file that it stands in.
        text: what it means, in a sentence or two.
        key: its name there, if not the field's.
        least: the least number allowed.
        most: the greatest number allowed.

    """
    about = {"section": section, "text": text, "key": key, "least": least, "most": most}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a run, checked by :meth:`check`."""

    rank: int = setting(4, "adapter", "Columns of each coefficient matrix.", least=1)
    sites: SitesName = setting(
        "all",
        "adapter",
        "Layers that are trained: all, those of the upper half of the blocks, of the MLPs, or of both.",
    )
    positions: PositionsName = setting("scored", "adapter", "Activations that the basis is taken from.")
    calibration_rows: int = setting(64, "adapter", "Training rows that the basis is taken from.", least=1)

    steps: int = setting(400, "method", "Steps of the run.", least=1)
    batch_size: int = setting(16, "method", "Rows a step.", least=1)
    estimator: EstimatorName = setting("two-point", "method", "How losses under probes become a gradient.")
    probes: int | None = setting(
        None, "method", "Directions a step; if not given 1, but 4 for leave-one-out and 8 for fzoo.", least=1
    )
    split: bool = setting(
        False, "method", "Give each of two-point's directions an equal part of the rows, so that all take two passes."
    )
    epsilon: float | Auto = setting(
        2.0**-7, "method", "Distance of a probe, best a power of two; 'auto' to measure it first (two-point alone)."
    )
    optimizer: OptimizerName = setting(
        "adam", "method", "What is made of the gradient; gaussian-adam takes Gaussian probes, the others Rademacher's."
    )
    momentum: float = setting(0.0, "method", "Of sgd: share of the last step's velocity kept.", least=0)
    weight_decay: float | None = setting(
        None, "method", "Share of the coefficients, times the rate, that a step takes away; 0.01 for adamw, else 0.",
        least=0,
    )  # fmt: skip
    learning_rate: float | Auto | None = setting(
        None,
        "method",
        "The highest, after the warm-up; 'auto' to find it by a short run at rising rates first. "
        f"If not given {LEARNING_RATE:g}, "
        f"and less in runs of more than {FULL_RATE_STEPS} steps, by the square root of their number.",
    )
    schedule: ScheduleName = setting("linear", "method", "How the learning rate goes on: down to zero, or constant.")
    warmup: int = setting(0, "method", "Steps over which the learning rate rises.", least=0)
    guard: bool = setting(
        True, "method", "Return to the best version at half the rate when training losses show that a run diverges."
    )
    seed: int = setting(
        0, "method", "Of the data's order and the probes; the version that the run starts from is added.", least=0
    )

    eval_every: int | None = setting(
        None, "evaluation", "Steps between evaluations; only the first and last if not given.", key="every", least=1
    )
    eval_rows: int = setting(
        400, "evaluation", "Held-out rows evaluated at most: always the same.", key="rows", least=1
    )
    patience: int | None = setting(
        None, "evaluation", "Stop after this many evaluations without a gain, by the task's metric.", least=1
    )
    min_delta: float = setting(
        0.0, "evaluation", "What --patience takes for a gain on the last one; 0.01 is a point of accuracy.", least=0
    )
    keep_best: bool = setting(
        False,
        "evaluation",
        "Return at the end to the version that did best by the task's metric. Figures on the rows that it was chosen "
        "by are then a little too good.",
    )

    def resolved(self) -> TrainingSettings:
        """These settings with what follows from others written down, so that they say in full what the run does."""
        return replace(
            self,
            probes=PROBES[self.estimator] if self.probes is None else self.probes,
            weight_decay=WEIGHT_DECAY.get(self.optimizer, 0.0) if self.weight_decay is None else self.weight_decay,
            learning_rate=learning_rate_for(self.steps) if self.learning_rate is None else self.learning_rate,
        )

    def check(self) -> None:
        """Raise InvalidValue for settings that do not fit each other."""
        from zoact_remote.errors import InvalidValue

        if self.epsilon == "auto" and self.estimator != "two-point":
            raise InvalidValue(
                "epsilon", f"'auto' measures the error of central differences: give a number for {self.estimator}"
            )
        if self.momentum and self.optimizer != "sgd":
            raise InvalidValue("momentum", f"is for sgd; {self.optimizer} has its own")
        if self.min_delta and self.patience is None:
            raise InvalidValue("min_delta", "is what counts as a gain: say how long to wait for one (--patience)")
        if self.patience is not None and self.eval_every is None:
            raise InvalidValue("patience", "counts evaluations: say after how many steps there is one (--eval-every)")
        if self.split:
            if self.estimator != "two-point":
                raise InvalidValue("split", f"is for two-point; {self.estimator} compares losses of the same rows")
            if self.probes is None or self.probes < 2:
                raise InvalidValue("split", "needs directions to share the rows: say how many (--probes)")
            if self.batch_size % self.probes:
                raise InvalidValue("split", f"{self.batch_size} rows a step do not come in {self.probes} equal parts")
        numbers = self._in_numbers()
        numbers.make_estimator()
        numbers.make_optimizer()
        numbers.make_schedule()
        numbers.make_callbacks("loss")
        made = self.resolved()
        rate, decay = made.learning_rate, made.weight_decay
        if isinstance(rate, int | float) and decay is not None and rate * decay > 1:
            raise InvalidValue("weight_decay", f"times the learning rate, {rate:g}, must be at most 1, got {decay:g}")

    def check_unevaluated(self) -> None:
        """Raise InvalidValue for settings that ask for held-out rows, where there are none."""
        from zoact_remote.errors import InvalidValue

        asked = {"eval_every": self.eval_every, "patience": self.patience, "keep_best": self.keep_best or None}
        for name, value in asked.items():
            if value is not None:
                raise InvalidValue(name, "is for held-out rows, and none are held out")

    def check_limits(self, limits: Limits) -> None:
        """Raise InvalidValue for settings by which a step of the run would be beyond a server's limits."""
        from zoact_remote.limits import check_limits

        check_limits(limits, self._in_numbers().make_estimator(), self.make_optimizer(), self.steps)

    def _in_numbers(self) -> TrainingSettings:
        """These settings with some number in the place of what is measured first."""
        return replace(
            self,
            epsilon=1.0 if self.epsilon == "auto" else self.epsilon,
            learning_rate=1.0 if self.learning_rate == "auto" else self.learning_rate,
        )

    @property
    def sharing(self) -> int:
        """Directions that share the rows of a batch, which they see so many times fewer of; 1 where each sees all."""
        return (self.probes or 1) if self.split else 1

    def choose_sites(self, sites: Sequence[Site]) -> tuple[str, ...] | None:
        """Names of those that are trained, of a server's; None for all. See :func:`zoact_remote.layout.choose_sites`.

        Raises:
            InvalidValue: there are none.

        """
        from zoact_remote.errors import InvalidValue
        from zoact_remote.layout import choose_sites

        if self.sites == "all":
            return None
        try:
            return choose_sites(sites, self.sites)
        except ValueError as error:
            raise InvalidValue("sites", str(error)) from None

    def make_basis(self) -> Basis:
        from zoact_remote.wire import Basis

        return Basis(positions=self.positions)

    @property
    def noise(self) -> Distribution:
        """Of the probes."""
        return "gaussian" if self.optimizer == "gaussian-adam" else "rademacher"

    def make_estimator(self) -> Estimator:
        """The estimator; ``epsilon`` must be a number."""
        from zoact_remote.estimators import FZOO, ForwardDifference, LeaveOneOut, TwoPoint

        kinds: dict[EstimatorName, type[TwoPoint | ForwardDifference | LeaveOneOut | FZOO]] = {
            "two-point": TwoPoint,
            "forward-difference": ForwardDifference,
            "leave-one-out": LeaveOneOut,
            "fzoo": FZOO,
        }
        assert not isinstance(self.epsilon, str)
        probes = self.resolved().probes
        assert probes is not None
        if self.split:
            return TwoPoint(self.epsilon, probes, split=True)
        return kinds[self.estimator](epsilon=self.epsilon, probes=probes)

    def make_optimizer(self) -> Optimizer:
        from zoact_remote.optimizers import SGD, Adam, AdamW, GaussianAdam

        weight_decay = self.resolved().weight_decay
        assert weight_decay is not None
        if self.optimizer == "sgd":
            return SGD(momentum=self.momentum, weight_decay=weight_decay)
        kinds: dict[str, type[Adam | GaussianAdam]] = {"adam": Adam, "adamw": AdamW, "gaussian-adam": GaussianAdam}
        return kinds[self.optimizer](weight_decay=weight_decay)

    def make_schedule(self) -> Schedule:
        """The schedule; ``learning_rate`` must be a number."""
        from zoact_remote import schedules

        learning_rate = self.resolved().learning_rate
        assert isinstance(learning_rate, int | float)
        if self.schedule == "constant":
            return schedules.constant(learning_rate, warmup=self.warmup)
        decay = schedules.linear if self.schedule == "linear" else schedules.cosine
        return decay(learning_rate, self.steps, warmup=self.warmup)

    def make_callbacks(self, metric: str) -> list[Guard | EarlyStopping]:
        """What watches over a run whose task is judged by the metric."""
        from zoact_remote.early_stopping import EarlyStopping
        from zoact_remote.guard import Guard

        made: list[Guard | EarlyStopping] = [Guard()] if self.guard else []
        if self.patience is not None or self.keep_best:
            made.append(EarlyStopping(self.patience, metric=metric, min_delta=self.min_delta, keep_best=self.keep_best))
        return made


def learning_rate_for(steps: int) -> float:
    """The learning rate of a run of so many steps, where none is given; two digits, for people to read.

    What a step learns is one number, and it moves all coefficients. Nearly all of that is at random, and adds up as the
    squares of the steps' rates do: a rate that falls with the root of the steps' number keeps it the same.
    """
    return float(f"{LEARNING_RATE * min(1.0, (FULL_RATE_STEPS / steps) ** 0.5):.2g}")


DEFAULTS = TrainingSettings()
QUICKSTART = replace(DEFAULTS, positions="prompt", learning_rate=3e-3, steps=200, eval_every=50)
"""A run that takes minutes on two cores."""
