"""Estimators on quadratics, where the slope along a probe is known. What they share stands first."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zoact_remote import FZOO, Estimator, ForwardDifference, InvalidValue, LeaveOneOut, Losses, TwoPoint
from zoact_remote.estimators import Ask
from zoact_remote.estimators.base import ProbeSettings
from zoact_remote.wire import ProbeLoss

Vector = NDArray[np.float64]
SIZE = 5
SEEDS = st.integers(0, 2**64 - 1)
DISTANCES = st.integers(-8, 0).map(lambda power: 2.0**power)
COUNTS = st.integers(2, 5)

KINDS: list[Callable[..., Estimator]] = [TwoPoint, ForwardDifference, LeaveOneOut, FZOO]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Quadratic:
    """L(c) = a + b'c + c'Hc/2 with probes of signs."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        half = rng.normal(size=(SIZE, SIZE))
        self.constant = float(rng.normal())
        self.slope = rng.normal(size=SIZE)
        self.hessian = half @ half.T
        self.at = rng.normal(size=SIZE)

    def loss(self, c: Vector) -> float:
        return float(self.constant + self.slope @ c + 0.5 * c @ self.hessian @ c)

    def gradient(self) -> Vector:
        return np.asarray(self.slope + self.hessian @ self.at)

    def answer(self, ask: Ask, scale: float = 1.0, shift: float = 0.0) -> Losses:
        """The losses asked for, times ``scale`` plus ``shift``."""

        def loss(c: Vector) -> float:
            return scale * self.loss(c) + shift

        losses = [
            ProbeLoss(
                probe.seed,
                probe.epsilon,
                loss(self.at + probe.epsilon * direction(probe.seed)),
                loss(self.at - probe.epsilon * direction(probe.seed)) if probe.sides == "both" else None,
            )
            for probe in ask.probes
        ]
        return Losses(0, tuple(losses), loss(self.at) if ask.base else None, 0)


def direction(seed: int) -> Vector:
    return np.random.default_rng(seed).choice((-1.0, 1.0), size=SIZE)


def asked(estimator: Estimator, first_seed: int) -> Ask:
    seeds = iter(range(first_seed, first_seed + 100_000))
    return estimator.ask(lambda: next(seeds))


def scalars(terms: tuple[tuple[int, float], ...]) -> list[float]:
    return [g for _, g in terms]


@every_kind
@settings(max_examples=25)
@given(SEEDS, DISTANCES, COUNTS)
def test_a_step_asks_once_and_names_what_it_asked_for(
    kind: Callable[..., Estimator], seed: int, epsilon: float, probes: int
) -> None:
    estimator = kind(epsilon, probes)
    ask = asked(estimator, seed % 1000)
    assert [probe.seed for probe in ask.probes] == list(range(seed % 1000, seed % 1000 + probes))
    assert {probe.epsilon for probe in ask.probes} == {epsilon}
    answer = Quadratic(seed).answer(ask)
    estimate = estimator.tell(answer)
    assert [drawn for drawn, _ in estimate.terms] == [probe.seed for probe in ask.probes]
    assert estimator.tell(answer) == estimate  # nothing is remembered


@every_kind
@settings(max_examples=25)
@given(SEEDS, DISTANCES, COUNTS, st.floats(-10, 10))
def test_a_constant_in_the_loss_is_no_gradient(
    kind: Callable[..., Estimator], seed: int, epsilon: float, probes: int, shift: float
) -> None:
    problem, estimator = Quadratic(seed), kind(epsilon, probes)
    ask = asked(estimator, 0)
    plain, shifted = (estimator.tell(problem.answer(ask, shift=s)) for s in (0.0, shift))
    assert shifted.loss == pytest.approx(plain.loss + shift)
    assert scalars(shifted.terms) == pytest.approx(scalars(plain.terms), rel=1e-6, abs=1e-6)


@every_kind
@settings(max_examples=25)
@given(SEEDS, DISTANCES, COUNTS, st.floats(0.1, 10), st.sampled_from([1, -1]))
def test_a_scaled_loss_has_a_scaled_gradient(
    kind: Callable[..., Estimator], seed: int, epsilon: float, probes: int, size: float, sign: int
) -> None:
    problem, estimator = Quadratic(seed), kind(epsilon, probes)
    ask = asked(estimator, 0)
    plain, scaled = (estimator.tell(problem.answer(ask, scale=s)) for s in (1.0, sign * size))
    expected = sign if kind is FZOO else sign * size
    assert scalars(scaled.terms) == pytest.approx([expected * g for g in scalars(plain.terms)], rel=1e-6, abs=1e-6)


@every_kind
def test_a_flat_loss_has_no_gradient(kind: Callable[..., Estimator]) -> None:
    problem, estimator = Quadratic(0), kind(probes=3)
    estimate = estimator.tell(problem.answer(asked(estimator, 0), scale=0.0, shift=1.5))
    assert estimate.loss == 1.5
    assert scalars(estimate.terms) == [0.0] * 3


@every_kind
def test_estimates_average_to_the_gradient(kind: Callable[..., Estimator]) -> None:
    problem, probes = Quadratic(0), 4000
    estimator = kind(0.5, probes)
    estimate = estimator.tell(problem.answer(asked(estimator, 0)))
    mean = sum(g * direction(seed) for seed, g in estimate.terms)
    # Of so many probes FZOO's spread is as good as its expectation, which takes in the curvature's own.
    bend = problem.hessian - np.diag(np.diag(problem.hessian))
    length = math.sqrt(np.sum(problem.gradient() ** 2) + 0.5 * 0.5**2 * np.sum(bend**2)) if kind is FZOO else 1.0
    spread = np.linalg.norm(problem.gradient()) + np.trace(problem.hessian)
    assert np.abs(mean * length - problem.gradient()).max() < 5 * spread / math.sqrt(probes)


@every_kind
def test_settings_are_checked(kind: Callable[..., Estimator]) -> None:
    with pytest.raises(InvalidValue, match="epsilon"):
        kind(epsilon=0.0)
    with pytest.raises(InvalidValue, match="probes"):
        kind(probes=0)


@settings(max_examples=50)
@given(SEEDS, DISTANCES, COUNTS)
def test_two_point_is_exact_on_quadratics(seed: int, epsilon: float, probes: int) -> None:
    problem, estimator = Quadratic(seed), TwoPoint(epsilon, probes)
    ask = asked(estimator, seed % 1000)
    assert not ask.base
    estimate = estimator.tell(problem.answer(ask))
    for drawn, g in estimate.terms:
        assert math.isclose(g, problem.gradient() @ direction(drawn) / probes, rel_tol=1e-7, abs_tol=1e-7)
    bend = np.mean([0.5 * epsilon**2 * direction(s) @ problem.hessian @ direction(s) for s, _ in estimate.terms])
    assert math.isclose(estimate.loss, problem.loss(problem.at) + bend, rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=50)
@given(SEEDS, DISTANCES, COUNTS)
def test_forward_difference_is_off_by_the_curvature(seed: int, epsilon: float, probes: int) -> None:
    problem, estimator = Quadratic(seed), ForwardDifference(epsilon, probes)
    ask = asked(estimator, seed % 1000)
    assert ask.base
    assert {probe.sides for probe in ask.probes} == {"plus"}
    estimate = estimator.tell(problem.answer(ask))
    assert estimate.loss == problem.loss(problem.at)
    for drawn, g in estimate.terms:
        z = direction(drawn)
        slope = problem.gradient() @ z + 0.5 * epsilon * z @ problem.hessian @ z
        assert math.isclose(g, slope / probes, rel_tol=1e-7, abs_tol=1e-7)


@settings(max_examples=50)
@given(SEEDS, DISTANCES, COUNTS)
def test_leave_one_out_measures_against_the_others(seed: int, epsilon: float, probes: int) -> None:
    problem, estimator = Quadratic(seed), LeaveOneOut(epsilon, probes)
    ask = asked(estimator, seed % 1000)
    assert not ask.base
    assert {probe.sides for probe in ask.probes} == {"plus"}
    answer = problem.answer(ask)
    estimate = estimator.tell(answer)
    values = [loss.plus for loss in answer.losses]
    for i, g in enumerate(scalars(estimate.terms)):
        others = np.mean(values[:i] + values[i + 1 :])
        assert math.isclose(g, (values[i] - others) / (epsilon * probes), rel_tol=1e-7, abs_tol=1e-7)
        against_all = (values[i] - np.mean(values)) / (epsilon * probes)
        assert math.isclose(g, probes / (probes - 1) * against_all, rel_tol=1e-7, abs_tol=1e-7)
    assert sum(scalars(estimate.terms)) == pytest.approx(0.0, abs=1e-9 / epsilon)


@settings(max_examples=50)
@given(SEEDS, DISTANCES, COUNTS)
def test_fzoo_is_a_forward_difference_over_the_spread(seed: int, epsilon: float, probes: int) -> None:
    problem = Quadratic(seed)
    ask = asked(FZOO(epsilon, probes), 0)  # seeds whose few signs differ
    assert ask == asked(ForwardDifference(epsilon, probes), 0)
    answer = problem.answer(ask)
    spread = np.std([loss.plus for loss in answer.losses], ddof=1)
    forward = ForwardDifference(epsilon, probes).tell(answer)
    estimate = FZOO(epsilon, probes).tell(answer)
    expected = [epsilon * g / spread for g in scalars(forward.terms)]
    assert scalars(estimate.terms) == pytest.approx(expected, rel=1e-6)
    assert estimate.loss == forward.loss


@pytest.mark.parametrize("kind", [LeaveOneOut, FZOO])
def test_a_comparison_takes_two(kind: type[ProbeSettings]) -> None:
    with pytest.raises(InvalidValue, match="probes: must be at least 2, got 1"):
        kind(probes=1)


@pytest.mark.parametrize(
    ("estimator", "base", "param"),
    [
        (TwoPoint(), None, r"losses\[0\].minus"),
        (ForwardDifference(), None, r"losses\.base"),
        (FZOO(), None, r"losses\.base"),
        (FZOO(), 1.0, r"losses: .* at least 2"),
        (LeaveOneOut(), None, r"losses: .* at least 2"),
    ],
)
def test_missing_losses_are_named(estimator: Estimator, base: float | None, param: str) -> None:
    with pytest.raises(InvalidValue, match=param):
        estimator.tell(Losses(0, (ProbeLoss(1, 0.5, 1.0, None),), base, 0))
