"""Estimators on quadratics, where the slope along a probe is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zoact_remote import Estimator, ForwardDifference, InvalidValue, Losses, TwoPoint
from zoact_remote.estimators import Ask
from zoact_remote.wire import ProbeLoss

Vector = NDArray[np.float64]
SIZE = 5


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

    def answer(self, ask: Ask) -> Losses:
        losses = [
            ProbeLoss(
                probe.seed,
                probe.epsilon,
                self.loss(self.at + probe.epsilon * direction(probe.seed)),
                self.loss(self.at - probe.epsilon * direction(probe.seed)) if probe.sides == "both" else None,
            )
            for probe in ask.probes
        ]
        return Losses(0, tuple(losses), self.loss(self.at) if ask.base else None, 0)


def direction(seed: int) -> Vector:
    return np.random.default_rng(seed).choice((-1.0, 1.0), size=SIZE)


SEEDS = st.integers(0, 2**64 - 1)
DISTANCES = st.integers(-8, 0).map(lambda power: 2.0**power)
COUNTS = st.integers(1, 4)


@settings(max_examples=50, deadline=None)
@given(SEEDS, DISTANCES, COUNTS)
def test_two_point_is_exact_on_quadratics(seed: int, epsilon: float, probes: int) -> None:
    problem, draw = Quadratic(seed), iter(range(seed % 1000, seed % 1000 + probes))
    estimator = TwoPoint(epsilon, probes)
    ask = estimator.ask(lambda: next(draw))
    assert not ask.base
    estimate = estimator.tell(problem.answer(ask))
    for probe, (drawn, g) in zip(ask.probes, estimate.terms, strict=True):
        assert drawn == probe.seed
        assert math.isclose(g, problem.gradient() @ direction(drawn) / probes, rel_tol=1e-7, abs_tol=1e-7)
    bend = np.mean([0.5 * epsilon**2 * direction(s) @ problem.hessian @ direction(s) for s, _ in estimate.terms])
    assert math.isclose(estimate.loss, problem.loss(problem.at) + bend, rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=50, deadline=None)
@given(SEEDS, DISTANCES, COUNTS)
def test_forward_difference_is_off_by_the_curvature(seed: int, epsilon: float, probes: int) -> None:
    problem, draw = Quadratic(seed), iter(range(seed % 1000, seed % 1000 + probes))
    estimator = ForwardDifference(epsilon, probes)
    ask = estimator.ask(lambda: next(draw))
    assert ask.base
    assert {probe.sides for probe in ask.probes} == {"plus"}
    estimate = estimator.tell(problem.answer(ask))
    assert estimate.loss == problem.loss(problem.at)
    for drawn, g in estimate.terms:
        z = direction(drawn)
        slope = problem.gradient() @ z + 0.5 * epsilon * z @ problem.hessian @ z
        assert math.isclose(g, slope / probes, rel_tol=1e-7, abs_tol=1e-7)


@pytest.mark.parametrize("kind", [TwoPoint, ForwardDifference])
def test_estimates_average_to_the_gradient(kind: type[TwoPoint] | type[ForwardDifference]) -> None:
    problem, draw, probes = Quadratic(0), iter(range(4000)), 4000
    estimator: Estimator = kind(0.5, probes)
    estimate = estimator.tell(problem.answer(estimator.ask(lambda: next(draw))))
    mean = sum(g * direction(seed) for seed, g in estimate.terms)
    spread = np.linalg.norm(problem.gradient()) + np.trace(problem.hessian)
    assert np.abs(mean - problem.gradient()).max() < 5 * spread / math.sqrt(probes)


@pytest.mark.parametrize("kind", [TwoPoint, ForwardDifference])
def test_settings_are_checked(kind: type[TwoPoint] | type[ForwardDifference]) -> None:
    with pytest.raises(InvalidValue, match="epsilon"):
        kind(epsilon=0.0)
    with pytest.raises(InvalidValue, match="probes"):
        kind(probes=0)


def test_missing_losses_are_named() -> None:
    answer = Losses(0, (ProbeLoss(1, 0.5, 1.0, None),), None, 0)
    with pytest.raises(InvalidValue, match=r"losses\[0\].minus"):
        TwoPoint().tell(answer)
    with pytest.raises(InvalidValue, match=r"losses\.base"):
        ForwardDifference().tell(answer)
