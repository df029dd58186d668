"""Optimisers in seed space against textbook ones that hold every coordinate in float64."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zoact_remote import SGD, Adam, Estimate, GaussianAdam, InvalidValue, Optimizer, Update

Vector = NDArray[np.float64]
Draw = Callable[[int], Vector]
Run = list[tuple[float, Estimate]]
SIZE = 24


def signs(seed: int) -> Vector:
    return np.random.default_rng(seed).choice((-1.0, 1.0), size=SIZE)


def normals(seed: int) -> Vector:
    return np.random.default_rng(seed).normal(size=SIZE)


def runs(probes: int = 1, steps: int = 40) -> st.SearchStrategy[Run]:
    """Learning rates and estimates of a run; no seed comes up twice."""

    def make(seed: int, length: int) -> Run:
        rng = np.random.default_rng(seed)
        return [
            (
                float(rng.uniform(0.01, 0.1)),
                Estimate(tuple((step * probes + i, float(rng.normal())) for i in range(probes)), 0.0),
            )
            for step in range(length)
        ]

    return st.builds(make, st.integers(0, 2**32), st.integers(1, steps))


def applied(c: Vector, update: Update, draw: Draw) -> Vector:
    change = sum((a * draw(seed) for seed, a in update.terms), np.zeros(SIZE))
    if update.normaliser is not None:
        squares = sum((b * draw(seed) ** 2 for seed, b in update.normaliser.terms), np.zeros(SIZE))
        change = change / (np.sqrt(update.normaliser.offset + squares) + update.normaliser.epsilon)
    return np.asarray((1.0 - update.decay) * c + change)


def in_seed_space(optimizer: Optimizer, run: Run, draw: Draw) -> Vector:
    c = np.ones(SIZE)
    for version, (learning_rate, estimate) in enumerate(run):
        update = optimizer.step(estimate, learning_rate, version)
        seeds = [seed for seed, _ in update.terms]
        assert seeds == sorted(set(seeds))  # seeds of these runs rise: oldest first, none twice
        assert update.base_version == version
        c = applied(c, update, draw)
    return c


def gradient(estimate: Estimate, draw: Draw) -> Vector:
    return sum((g * draw(seed) for seed, g in estimate.terms), np.zeros(SIZE))


def dense_sgd(run: Run, draw: Draw, momentum: float, weight_decay: float) -> Vector:
    c, velocity = np.ones(SIZE), np.zeros(SIZE)
    for learning_rate, estimate in run:
        velocity = momentum * velocity + gradient(estimate, draw)
        c = (1.0 - learning_rate * weight_decay) * c - learning_rate * velocity
    return c


def dense_adam(run: Run, draw: Draw, beta1: float, beta2: float, epsilon: float, weight_decay: float) -> Vector:
    c, first, second = np.ones(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    for step, (learning_rate, estimate) in enumerate(run, start=1):
        g = gradient(estimate, draw)
        first = beta1 * first + (1.0 - beta1) * g
        second = beta2 * second + (1.0 - beta2) * g**2
        change = first / (1.0 - beta1**step) / (np.sqrt(second / (1.0 - beta2**step)) + epsilon)
        c = (1.0 - learning_rate * weight_decay) * c - learning_rate * change
    return c


@settings(max_examples=50, deadline=None)
@given(runs(probes=3), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.1]))
def test_sgd_is_exact(run: Run, momentum: float, weight_decay: float) -> None:
    optimizer = SGD(momentum=momentum, weight_decay=weight_decay, truncation=0.0)
    expected = dense_sgd(run, signs, momentum, weight_decay)
    np.testing.assert_allclose(in_seed_space(optimizer, run, signs), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(runs(), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.99]), st.sampled_from([0.0, 0.1]))
def test_adam_is_exact_for_one_probe_of_signs(run: Run, beta1: float, beta2: float, weight_decay: float) -> None:
    optimizer = Adam(beta1, beta2, 1e-3, weight_decay, truncation=0.0)
    expected = dense_adam(run, signs, beta1, beta2, 1e-3, weight_decay)
    np.testing.assert_allclose(in_seed_space(optimizer, run, signs), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(runs(), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.1]))
def test_gaussian_adam_is_exact_for_one_probe_and_a_long_window(run: Run, beta1: float, weight_decay: float) -> None:
    optimizer = GaussianAdam(beta1, 0.99, 1e-3, weight_decay, truncation=0.0, window=len(run))
    expected = dense_adam(run, normals, beta1, 0.99, 1e-3, weight_decay)
    np.testing.assert_allclose(in_seed_space(optimizer, run, normals), expected, rtol=1e-9, atol=1e-9)


def test_second_moment_of_several_probes_is_right_on_average() -> None:
    probes = Estimate(tuple((seed, 0.1 * (seed + 1)) for seed in range(4)), 0.0)
    optimizer = Adam(beta1=0.0, beta2=0.0, epsilon=1e-12, truncation=0.0)
    update = optimizer.step(probes, 1.0, 0)
    scalar = (probes.terms[0][1] / update.terms[0][1]) ** 2
    assert scalar == pytest.approx(sum(g * g for _, g in probes.terms))
    rng = np.random.default_rng(0)
    z = rng.choice((-1.0, 1.0), size=(4, 200_000))
    squares = (np.array([g for _, g in probes.terms]) @ z) ** 2
    assert squares.mean() == pytest.approx(scalar, rel=0.02)


@settings(max_examples=50, deadline=None)
@given(runs(probes=2), st.sampled_from([0.5, 0.9]), st.sampled_from([0.3, 1e-1, 1e-2]))
def test_truncation_stays_within_its_bound(run: Run, decay: float, truncation: float) -> None:
    largest = max(sum(abs(g) for _, g in estimate.terms) for _, estimate in run)
    exact, short = SGD(decay, truncation=0.0), SGD(decay, truncation=truncation)
    for version, (_, estimate) in enumerate(run):
        everything = applied(np.zeros(SIZE), exact.step(estimate, 1.0, version), signs)
        truncated = applied(np.zeros(SIZE), short.step(estimate, 1.0, version), signs)
        bound = truncation / (1.0 - decay) * largest
        assert np.abs(everything - truncated).max() <= bound * (1.0 + 1e-9)


@pytest.mark.parametrize(
    ("beta", "truncation", "kept"), [(0.9, 1e-3, 66), (0.0, 1e-3, 1), (0.5, 0.25, 3), (0.9, 0.0, 99)]
)
def test_length_of_updates(beta: float, truncation: float, kept: int) -> None:
    for optimizer in (SGD(beta, truncation=truncation), Adam(beta1=beta, truncation=truncation)):
        for step in range(99):
            update = optimizer.step(Estimate(((step, 1.0),), 0.0), 0.1, step)
        assert [seed for seed, _ in update.terms] == list(range(99 - kept, 99))


@settings(max_examples=50, deadline=None)
@given(runs(probes=2), st.integers(1, 8))
def test_gaussian_tail_is_its_expectation(run: Run, window: int) -> None:
    optimizer = GaussianAdam(beta2=0.9, window=window)
    for version, (learning_rate, estimate) in enumerate(run):
        update = optimizer.step(estimate, learning_rate, version)
    assert update.normaliser is not None
    weights = [0.1 * 0.9**age / (1.0 - 0.9 ** len(run)) for age in range(len(run))]
    squares = [sum(g * g for _, g in estimate.terms) for _, estimate in reversed(run)]
    tail = sum(w * s for w, s in list(zip(weights, squares, strict=True))[window:])
    assert update.normaliser.offset == pytest.approx(tail, rel=1e-12)
    whole = sum(w * s for w, s in zip(weights, squares, strict=True))
    assert update.normaliser.offset + sum(b for _, b in update.normaliser.terms) == pytest.approx(whole)


ALL = [
    lambda: SGD(),
    lambda: SGD(0.9, weight_decay=0.1),
    lambda: Adam(),
    lambda: Adam(truncation=0.1, weight_decay=0.1),
    lambda: GaussianAdam(window=3),
]


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=10, deadline=None)
@given(run=runs(probes=2), cut=st.integers(0, 40))
def test_a_saved_state_goes_on_to_the_bit(make: Callable[[], Optimizer], run: Run, cut: int) -> None:
    first = make()
    for version, (learning_rate, estimate) in enumerate(run[:cut]):
        first.step(estimate, learning_rate, version)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for version, (learning_rate, estimate) in enumerate(run[cut:], start=cut):
        assert first.step(estimate, learning_rate, version) == second.step(estimate, learning_rate, version)


def test_a_state_is_a_few_kilobytes() -> None:
    optimizer = Adam()
    for step in range(500):
        optimizer.step(Estimate(((2**64 - 1 - step, -0.1234567890123456),), 0.0), 1e-3, step)
    assert len(json.dumps(optimizer.state_dict())) < 5_000


def test_a_state_under_other_settings_is_refused() -> None:
    state = Adam().state_dict()
    with pytest.raises(InvalidValue, match=r"settings\.beta1: was 0\.9 .* is 0\.8"):
        Adam(beta1=0.8).load_state_dict(state)
    with pytest.raises(InvalidValue, match="'adam', not of 'sgd'"):
        SGD().load_state_dict(state)


@pytest.mark.parametrize("make", ALL)
def test_a_seed_that_comes_again_is_named_once(make: Callable[[], Optimizer]) -> None:
    optimizer = make()
    for version in range(3):
        update = optimizer.step(Estimate(((7, 1.0), (8, 1.0)), 0.0), 0.1, version)
    assert [seed for seed, _ in update.terms] == [7, 8]


@pytest.mark.parametrize("make", ALL)
def test_a_flat_loss_changes_nothing(make: Callable[[], Optimizer]) -> None:
    update = make().step(Estimate(((7, 0.0),), 0.0), 0.1, 0)
    assert update.terms == ((7, 0.0),)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: SGD(momentum=1.0), "momentum"),
        (lambda: SGD(truncation=1.0), "truncation"),
        (lambda: SGD(weight_decay=-1.0), "weight_decay"),
        (lambda: Adam(beta1=-0.1), "beta1"),
        (lambda: Adam(beta2=1.0), "beta2"),
        (lambda: Adam(epsilon=0.0), "epsilon"),
        (lambda: GaussianAdam(window=0), "window"),
        (lambda: GaussianAdam(epsilon=float("nan")), "epsilon"),
    ],
)
def test_settings_are_checked(make: Callable[[], Optimizer], param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make()
    assert caught.value.param == param
