"""Known identities of zeroth-order estimates, on the package's own estimators.

Where probes are signs and few, expectations are taken over all of them and are exact. Where they are Gaussian, means of
fixed draws of the package's own noise must lie within five standard errors; were the draws not fixed, one run in two
million would fail.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zoact_remote import FZOO, Estimator, ForwardDifference, LeaveOneOut, Losses, TwoPoint
from zoact_remote.noise import draw
from zoact_remote.wire import ProbeLoss

Vector = NDArray[np.float64]
Function = Callable[[Vector], float]

SIZE = 3
EVERY_SIGN = [np.array(z) for z in itertools.product((-1.0, 1.0), repeat=SIZE)]
VECTORS = st.lists(st.floats(-2, 2), min_size=SIZE, max_size=SIZE).map(np.array)
MATRICES = st.lists(st.floats(-2, 2), min_size=SIZE**2, max_size=SIZE**2).map(
    lambda values: np.array(values).reshape(SIZE, SIZE)
)
DISTANCES = st.integers(-6, 0).map(lambda power: 2.0**power)


def slopes(estimator: Estimator, loss: Function, at: Vector, directions: Sequence[Vector]) -> list[float]:
    """The g of the estimate ``sum_i g_i Z_i``, with these directions for Z(0), Z(1), ..."""
    seeds = itertools.count()
    ask = estimator.ask(lambda: next(seeds))
    losses = tuple(
        ProbeLoss(
            probe.seed,
            probe.epsilon,
            loss(at + probe.epsilon * z),
            loss(at - probe.epsilon * z) if probe.sides == "both" else None,
        )
        for probe, z in zip(ask.probes, directions, strict=True)
    )
    return [g for _, g in estimator.tell(Losses(0, losses, loss(at) if ask.base else None, 0)).terms]


def gradient(estimator: Estimator, loss: Function, at: Vector, directions: Sequence[Vector]) -> Vector:
    """The estimate itself."""
    return np.asarray(np.array(slopes(estimator, loss, at, directions)) @ np.array(directions))


def over_every_sign(probes: int) -> Iterable[tuple[Vector, ...]]:
    return itertools.product(EVERY_SIGN, repeat=probes)


def gaussian(size: int, seed: int) -> Vector:
    return draw("gaussian", seed, 0, size).astype(np.float64)


def assert_mean(samples: Sequence[float], expected: float) -> None:
    error = np.std(samples, ddof=1) / math.sqrt(len(samples))
    assert abs(np.mean(samples) - expected) < 5.0 * error
    assert 5.0 * error < 0.15 * expected  # else it would hold for anything


@pytest.mark.parametrize("probes", [1, 4])
def test_second_moment_of_the_averaged_gaussian_estimate(probes: int) -> None:
    # E|g|^2 = (d + n + 1)/n |grad|^2: n (d + 2) |grad|^2 from each slope by itself, n (n - 1) |grad|^2 from pairs.
    size, trials = 6, 10_000
    true = np.linspace(-1.0, 2.0, size)
    estimator = TwoPoint(0.5, probes)
    squares = []
    for directions in gaussian(trials * probes * size, seed=0).reshape(trials, probes, size):
        estimate = gradient(estimator, lambda c: float(true @ c), np.zeros(size), list(directions))
        squares.append(float(estimate @ estimate))
    assert_mean(squares, (size + probes + 1) / probes * float(true @ true))


@settings(max_examples=20)
@given(VECTORS, st.integers(1, 2))
def test_second_moment_of_the_averaged_estimate_of_signs(true: Vector, probes: int) -> None:
    # (d + n - 1)/n |grad|^2: with z = +-1 no slope's own term has a fourth moment.
    squares = [
        np.sum(gradient(TwoPoint(0.5, probes), lambda c: float(true @ c), np.zeros(SIZE), z) ** 2)
        for z in over_every_sign(probes)
    ]
    assert np.mean(squares) == pytest.approx((SIZE + probes - 1) / probes * float(true @ true))


@settings(max_examples=20)
@given(VECTORS, MATRICES, VECTORS, DISTANCES)
def test_estimates_of_a_quadratic_have_no_bias(slope: Vector, half: Vector, at: Vector, epsilon: float) -> None:
    hessian = half + half.T

    def loss(c: Vector) -> float:
        return float(slope @ c + 0.5 * c @ hessian @ c)

    for estimator in (TwoPoint(epsilon), ForwardDifference(epsilon), LeaveOneOut(epsilon, probes=2)):
        estimates = [gradient(estimator, loss, at, z) for z in over_every_sign(estimator.probes)]
        np.testing.assert_allclose(np.mean(estimates, axis=0), slope + hessian @ at, atol=1e-10)


@settings(max_examples=20)
@given(VECTORS, MATRICES, VECTORS, DISTANCES)
def test_central_differences_are_exact_on_quadratics(slope: Vector, half: Vector, at: Vector, epsilon: float) -> None:
    hessian = half + half.T
    for z in EVERY_SIGN:
        (found,) = slopes(TwoPoint(epsilon), lambda c: float(slope @ c + 0.5 * c @ hessian @ c), at, [z])
        assert found == pytest.approx(float((slope + hessian @ at) @ z), abs=1e-10)


@settings(max_examples=20)
@given(VECTORS, VECTORS, VECTORS, DISTANCES)
def test_the_bias_on_a_cubic(slope: Vector, a: Vector, at: Vector, epsilon: float) -> None:
    # L = slope'c + (a'c)^3 / 6 has the third derivative (a'z)^3 along z, so that each slope is off by eps^2/6 of it.
    def loss(c: Vector) -> float:
        return float(slope @ c + (a @ c) ** 3 / 6.0)

    true = slope + 0.5 * (a @ at) ** 2 * a
    for z in EVERY_SIGN:
        (found,) = slopes(TwoPoint(epsilon), loss, at, [z])
        assert found == pytest.approx(float(true @ z + epsilon**2 / 6.0 * (a @ z) ** 3), abs=1e-10)
    # E (a'z)^3 z_j = 3 a_j |a|^2 - 2 a_j^3 for signs.
    bias = epsilon**2 / 6.0 * (3.0 * a * (a @ a) - 2.0 * a**3)
    mean = np.mean([gradient(TwoPoint(epsilon), loss, at, [z]) for z in EVERY_SIGN], axis=0)
    np.testing.assert_allclose(mean, true + bias, atol=1e-10)


@settings(max_examples=20)
@given(VECTORS, DISTANCES, st.integers(2, 3))
def test_a_leave_one_out_slope_is_noisier_by_its_baseline(true: Vector, epsilon: float, probes: int) -> None:
    estimator = LeaveOneOut(epsilon, probes)
    squares = [
        np.square(slopes(estimator, lambda c: float(true @ c), np.zeros(SIZE), z)) for z in over_every_sign(probes)
    ]
    expected = probes / (probes - 1) * float(true @ true) / probes**2
    np.testing.assert_allclose(np.mean(squares, axis=0), expected, atol=1e-10)


@settings(max_examples=20)
@given(st.lists(st.floats(0.1, 2), min_size=SIZE, max_size=SIZE).map(np.array), DISTANCES)
def test_the_spread_that_fzoo_divides_by_is_the_length_of_the_gradient(true: Vector, epsilon: float) -> None:
    spreads = [np.var([1.0 + epsilon * true @ z for z in step], ddof=1) for step in over_every_sign(3)]
    assert np.mean(spreads) == pytest.approx(epsilon**2 * float(true @ true))
    for step in ((EVERY_SIGN[0], EVERY_SIGN[1], EVERY_SIGN[3]), (EVERY_SIGN[7], EVERY_SIGN[2], EVERY_SIGN[4])):
        found = slopes(FZOO(epsilon, probes=3), lambda c: 1.0 + float(true @ c), np.zeros(SIZE), step)
        spread = np.std([epsilon * true @ z for z in step], ddof=1)
        np.testing.assert_allclose(found, [epsilon * true @ z / (3.0 * spread) for z in step], rtol=1e-6)


def test_what_a_basis_keeps_of_the_gradient() -> None:
    """The subspace error and the cosine that AGZO (arXiv 2601.17261, section 5) argues from."""
    # A layer y = (W + C V') x whose loss is linear in y: the gradient in W is G = Q' X, in C it is G V.
    rng = np.random.default_rng(0)
    outputs, inputs, tokens, rank, trials = 4, 12, 7, 3, 2000
    sensitivities, activations = rng.normal(size=(tokens, outputs)), rng.normal(size=(tokens, inputs))
    _, strengths, directions = np.linalg.svd(activations, full_matrices=False)
    basis = directions[:rank].T
    full = sensitivities.T @ activations
    kept = full @ basis

    def loss(c: Vector) -> float:
        return float(np.sum(full * (c.reshape(outputs, rank) @ basis.T)))

    size, at = outputs * rank, np.zeros(outputs * rank)
    estimates, cosines = np.zeros((outputs, inputs)), []
    for seed in range(trials):
        estimate = gradient(TwoPoint(0.5), loss, at, [gaussian(size, seed)]).reshape(outputs, rank) @ basis.T
        estimates += estimate / trials
        cosines.append(float(np.sum(estimate * full) / (np.linalg.norm(estimate) * np.linalg.norm(full))))
    # Estimates have the projected gradient for their mean, and lack what lies outside of the basis, which is no more
    # than the activations have outside of it.
    assert np.linalg.norm(estimates @ basis - kept) < 5.0 * math.sqrt((size + 1) / trials) * np.linalg.norm(kept)
    lost = float(np.linalg.norm(full - kept @ basis.T) ** 2)
    assert lost == pytest.approx(np.linalg.norm(full) ** 2 - np.linalg.norm(kept) ** 2)
    assert 0.0 < lost <= np.linalg.norm(sensitivities, 2) ** 2 * np.sum(strengths[rank:] ** 2)
    assert lost <= np.linalg.norm(sensitivities) ** 2 * strengths[rank] ** 2
    # One estimate lies along Z, uniform on the sphere of d = out rank dimensions, and the fixed direction is the kept
    # share of the gradient: E|cos| of Z with a fixed direction is Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), E cos^2 1/d.
    share = float(np.linalg.norm(kept) / np.linalg.norm(full))
    sphere = math.exp(math.lgamma(size / 2) - math.lgamma((size + 1) / 2)) / math.sqrt(math.pi)
    assert_mean(cosines, sphere * share)
    assert_mean([cosine**2 for cosine in cosines], share**2 / size)


@given(MATRICES, st.sampled_from([1, SIZE]))
def test_probes_that_share_the_rows_vary_by_the_gradients_of_their_parts(gradients: Vector, probes: int) -> None:
    """``E |g|^2 = (d sum_j |G_j|^2 + |sum_j G_j|^2 - sum_j |G_j|^2) / q^2`` with G_j the mean gradient of part j."""
    estimator = TwoPoint(0.5, probes, split=True)
    ask = estimator.ask(itertools.count().__next__)
    parts = gradients.reshape(probes, SIZE // probes, SIZE).mean(axis=1)
    mean, square = np.zeros(SIZE), 0.0
    for directions in over_every_sign(probes):
        losses = [
            ProbeLoss(
                probe.seed,
                probe.epsilon,
                float(np.mean([gradients[i] @ (probe.epsilon * z) for i in probe.rows_of(SIZE)])),
                float(np.mean([gradients[i] @ (-probe.epsilon * z) for i in probe.rows_of(SIZE)])),
            )
            for probe, z in zip(ask.probes, directions, strict=True)
        ]
        found = [g for _, g in estimator.tell(Losses(0, tuple(losses), None, 0)).terms]
        estimate = np.array(found) @ np.array(directions)
        mean += estimate / len(EVERY_SIGN) ** probes
        square += estimate @ estimate / len(EVERY_SIGN) ** probes
    np.testing.assert_allclose(mean, gradients.mean(axis=0), atol=1e-9)
    squares = np.sum(parts**2)
    expected = ((SIZE - 1) * squares + np.sum(parts.sum(axis=0) ** 2)) / probes**2
    assert math.isclose(square, expected, rel_tol=1e-9, abs_tol=1e-9)
