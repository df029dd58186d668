"""The learning-rate range test on losses whose break-even rate is known."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.zoact_remote.regression import LIMITS
from zoact_remote import (
    SGD,
    Adam,
    ConnectionFailed,
    Estimate,
    Estimator,
    ForwardDifference,
    Inconclusive,
    InvalidValue,
    LeaveOneOut,
    Losses,
    Optimizer,
    RangeTest,
    TwoPoint,
    Update,
    UpdateResult,
    find_learning_rate,
)
from zoact_remote.wire import Limits, Probe, ProbeLoss, Row

Vector = NDArray[np.float64]
ROWS: list[Row] = [{"prompt": "a", "completion": "b"}]
SIZE = 200


def direction(seed: int) -> Vector:
    return np.random.default_rng(seed).choice((-1.0, 1.0), size=SIZE)


class Bowl:
    """L(c) = curvature |c - 1|^2 / 2, with every version kept."""

    def __init__(self, curvature: float = 1.0, wall: float = math.inf) -> None:
        self.curvature = curvature
        self.wall = wall
        self.versions = [np.zeros(SIZE), np.full(SIZE, 0.1)]
        self.fail_at: int | None = None
        self.calls = 0

    def loss(self, c: Vector) -> float:
        far = float(np.sum((c - 1.0) ** 2))
        return 0.5 * self.curvature * far if far < self.wall else math.nan

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        assert rows is ROWS
        self.calls += 1
        if update is not None:
            assert update.base_version == len(self.versions) - 1
            change = sum((a * direction(seed) for seed, a in update.terms), np.zeros(SIZE))
            self.versions.append((1.0 - update.decay) * self.versions[-1] + change)
        if self.calls == self.fail_at:
            raise ConnectionFailed("gone", sent=True)
        newest = len(self.versions) - 1
        assert version in (None, newest)
        c = self.versions[-1]
        answers = [
            ProbeLoss(
                p.seed,
                p.epsilon,
                self.loss(c + p.epsilon * direction(p.seed)),
                self.loss(c - p.epsilon * direction(p.seed)) if p.sides == "both" else None,
            )
            for p in probes
        ]
        return Losses(newest, tuple(answers), self.loss(c) if base else None, 0)

    def rollback(self, version: int) -> UpdateResult:
        self.versions.append(self.versions[version])
        return UpdateResult(len(self.versions) - 1, "", True)

    def limits(self) -> Limits:
        return LIMITS


@pytest.mark.parametrize("curvature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("estimator", [TwoPoint(2.0**-7), LeaveOneOut(2.0**-7, probes=4)])
def test_it_finds_the_rate_that_breaks_even(curvature: float, estimator: Estimator) -> None:
    # E|g|^2 is (d + q - 1)/q |grad|^2 for two-point estimates of signs, so that with SGD the mean loss after a step is
    # (1 - 2 h lr + (d + q - 1)/q h^2 lr^2) times the loss before: the same at lr = 2 q / ((d + q - 1) h). Leave-one-out
    # comes near to that.
    probes = 4 if isinstance(estimator, LeaveOneOut) else 1
    expected = 2.0 * probes / ((SIZE + probes - 1) * curvature)
    found = []
    for seed in range(8):
        test = find_learning_rate(Bowl(curvature), estimator, SGD(), ROWS, low=1e-5, high=1.0, steps=60, seed=seed)
        found.append(test.break_even)
        assert test.learning_rate == test.break_even / 4.0
    assert 0.4 < np.median(found) / expected < 2.5


@pytest.mark.parametrize("make", [lambda: SGD(), lambda: SGD(0.9), lambda: Adam(weight_decay=0.1)])
@pytest.mark.parametrize("estimator", [TwoPoint(), ForwardDifference(probes=2)])
def test_all_is_left_as_it_was(make: Callable[[], Optimizer], estimator: Estimator) -> None:
    bowl, optimizer = Bowl(), make()
    optimizer.step(Estimate(((1, 1.0),), 0.0), 0.1, 0)
    before = optimizer.state_dict()
    test = find_learning_rate(bowl, estimator, optimizer, ROWS, low=1e-4, high=10.0)
    assert test.losses[0] == bowl.loss(np.full(SIZE, 0.1))
    assert len(test.losses) == len(test.learning_rates) + 1 < 41  # it stopped when the loss rose
    assert test.losses[-1] > 1.1 * test.losses[0]
    np.testing.assert_array_equal(bowl.versions[-1], bowl.versions[1])
    assert optimizer.state_dict() == before
    assert bowl.calls == len(test.losses)


def test_all_is_left_as_it_was_after_an_error() -> None:
    bowl, optimizer = Bowl(), Adam()
    bowl.fail_at = 5
    before = optimizer.state_dict()
    with pytest.raises(ConnectionFailed):
        find_learning_rate(bowl, TwoPoint(), optimizer, ROWS)
    np.testing.assert_array_equal(bowl.versions[-1], bowl.versions[1])
    assert optimizer.state_dict() == before


def test_the_same_seed_makes_the_same_test() -> None:
    tests = [find_learning_rate(Bowl(), TwoPoint(), Adam(), ROWS, seed=seed) for seed in (1, 1, 2)]
    assert tests[0] == tests[1] != tests[2]


def test_a_loss_that_overflows_ends_the_test() -> None:
    test = find_learning_rate(Bowl(wall=200.0), TwoPoint(), SGD(), ROWS, low=1e-4, high=10.0)
    assert all(map(math.isfinite, test.losses))
    assert test.learning_rate > 0.0


def test_rates_too_low_to_hurt_give_the_highest() -> None:
    test = find_learning_rate(Bowl(), TwoPoint(), SGD(), ROWS, low=1e-5, high=1e-3)
    assert len(test.learning_rates) == 40
    assert test.break_even == pytest.approx(1e-3)


def test_what_cannot_be_measured_is_said() -> None:
    for test in (RangeTest((0.1, 0.2), (1.0, 1.5, 1.7)), RangeTest((), (1.0,))):
        with pytest.raises(Inconclusive, match="no learning rate lowered the loss"):
            _ = test.learning_rate
    bowl = Bowl(wall=1.0)
    with pytest.raises(Inconclusive, match="at version 1"):
        find_learning_rate(bowl, TwoPoint(), SGD(), ROWS)
    assert len(bowl.versions) == 2


@pytest.mark.parametrize(
    ("options", "param"),
    [({"low": 0.0}, "low"), ({"low": 1.0}, "low"), ({"high": math.inf}, "low"), ({"steps": 1}, "steps")],
)
def test_settings_are_checked(options: dict[str, float], param: str) -> None:
    bowl = Bowl()
    with pytest.raises(InvalidValue) as caught:
        find_learning_rate(bowl, TwoPoint(), SGD(), ROWS, **options)  # type: ignore[arg-type]
    assert caught.value.param == param
    assert bowl.calls == 0
