"""Optimisers in seed space against textbook ones that hold every coordinate in float64."""

import itertools
import json
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zoact_remote import SGD, Adam, AdamW, Estimate, GaussianAdam, InvalidValue, Optimizer, Update

Vector = NDArray[np.float64]
Draw = Callable[[int], Vector]
Run = list[tuple[float, Estimate]]
SIZE = 24


@cache
def signs(seed: int) -> Vector:
    return np.random.default_rng(seed).choice((-1.0, 1.0), size=SIZE)


@cache
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


@settings(max_examples=50)
@given(runs(probes=3), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.1]))
def test_sgd_is_exact(run: Run, momentum: float, weight_decay: float) -> None:
    optimizer = SGD(momentum=momentum, weight_decay=weight_decay, truncation=0.0)
    expected = dense_sgd(run, signs, momentum, weight_decay)
    np.testing.assert_allclose(in_seed_space(optimizer, run, signs), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=50)
@given(runs(), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.99]), st.sampled_from([0.0, 0.1]))
def test_adam_is_exact_for_one_probe_of_signs(run: Run, beta1: float, beta2: float, weight_decay: float) -> None:
    expected = dense_adam(run, signs, beta1, beta2, 1e-3, weight_decay)
    for kind in (Adam, AdamW):
        optimizer = kind(beta1, beta2, 1e-3, weight_decay, truncation=0.0)
        np.testing.assert_allclose(in_seed_space(optimizer, run, signs), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=50)
@given(runs(), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.1]))
def test_gaussian_adam_is_exact_for_one_probe_and_a_long_window(run: Run, beta1: float, weight_decay: float) -> None:
    optimizer = GaussianAdam(beta1, 0.99, 1e-3, weight_decay, truncation=0.0, window=len(run))
    expected = dense_adam(run, normals, beta1, 0.99, 1e-3, weight_decay)
    np.testing.assert_allclose(in_seed_space(optimizer, run, normals), expected, rtol=1e-9, atol=1e-9)


def test_the_names_differ_by_their_weight_decay() -> None:
    estimate = Estimate(((7, 1.0),), 0.0)
    assert Adam().step(estimate, 0.1, 0).decay == 0.0
    assert AdamW().step(estimate, 0.1, 0).decay == pytest.approx(0.1 * 0.01)
    assert AdamW(weight_decay=0.0).step(estimate, 0.1, 0) == Adam().step(estimate, 0.1, 0)


def second_moment(g: list[float]) -> float:
    """What Adam divides by after one step, squared."""
    optimizer = Adam(beta1=0.0, beta2=0.0, epsilon=1e-12)
    update = optimizer.step(Estimate(tuple(enumerate(g)), 0.0), 1.0, 0)
    return (g[0] / update.terms[0][1]) ** 2


@settings(max_examples=50)
@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4), st.integers(0, 1000))
def test_second_moment_of_several_probes_leaves_out_the_cross_terms(g: list[float], seed: int) -> None:
    z = np.random.default_rng(seed).choice((-1.0, 1.0), size=(len(g), SIZE))
    cross = sum(g[i] * g[k] * (z[i] @ z[k]) / SIZE for i, k in itertools.permutations(range(len(g)), 2))
    assert second_moment(g) + cross == pytest.approx(np.mean((g @ z) ** 2))


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_what_the_cross_terms_come_to(probes: int) -> None:
    gradient = np.array([1.0, -2.0, 0.5])
    every = [np.array(z) for z in itertools.product((-1.0, 1.0), repeat=3)]
    squares, scalars = [], []
    for step in itertools.product(every, repeat=probes):
        g = [float(gradient @ z) / probes for z in step]
        squares.append(np.sum([a * z for a, z in zip(g, step, strict=True)], axis=0) ** 2)
        scalars.append(second_moment(g))
    length = gradient @ gradient
    assert np.mean(scalars) == pytest.approx(length / probes)
    np.testing.assert_allclose(np.mean(squares, axis=0), length / probes + (1 - 1 / probes) * gradient**2)


DECAYS = st.sampled_from([0.3, 0.5, 0.9])
TRUNCATIONS = st.sampled_from([0.3, 1e-1, 1e-2])


def largest(run: Run) -> float:
    return max(sum(abs(g) for _, g in estimate.terms) for _, estimate in run)


@settings(max_examples=50)
@given(runs(probes=2, steps=60), DECAYS, TRUNCATIONS)
def test_a_truncated_average_stays_within_its_bound(run: Run, decay: float, truncation: float) -> None:
    exact, short = SGD(decay, truncation=0.0), SGD(decay, truncation=truncation)
    for version, (_, estimate) in enumerate(run):
        everything = applied(np.zeros(SIZE), exact.step(estimate, 1.0, version), signs)
        truncated = applied(np.zeros(SIZE), short.step(estimate, 1.0, version), signs)
        bound = 2.0 * truncation / (1.0 - decay) * largest(run)
        assert np.abs(everything - truncated).max() <= bound * (1.0 + 1e-9)


@settings(max_examples=50)
@given(runs(probes=2, steps=200), DECAYS, TRUNCATIONS)
def test_truncated_updates_lead_to_the_same_coefficients(run: Run, decay: float, truncation: float) -> None:
    exact = in_seed_space(SGD(decay, truncation=0.0), run, signs)
    short = in_seed_space(SGD(decay, truncation=truncation), run, signs)
    rates = np.array([rate for rate, _ in run])
    bound = truncation / (1.0 - decay) ** 2 * (rates.max() + np.abs(np.diff(rates)).sum()) * largest(run)
    assert np.abs(exact - short).max() <= bound * (1.0 + 1e-9)


@pytest.mark.parametrize("steps", [100, 1000, 3000])
def test_the_error_of_truncation_does_not_grow(steps: int) -> None:
    # The worst case: every step pulls every coordinate the same way.
    run = [(0.1, Estimate(((step, 1.0),), 0.0)) for step in range(steps)]
    moved = in_seed_space(SGD(0.9), run, lambda seed: np.ones(SIZE))
    exact = 1.0 - 0.1 * sum((1.0 - 0.9 ** (age + 1)) / 0.1 for age in range(steps))
    np.testing.assert_allclose(moved, exact, rtol=0, atol=0.1 * 0.01 / 0.1**2)


@settings(max_examples=25)
@given(runs(steps=120), st.sampled_from([1e-1, 1e-2]))
def test_truncation_of_adam_stays_within_its_bound(run: Run, truncation: float) -> None:
    exact, short = (Adam(beta2=0.99, epsilon=1e-3, truncation=t) for t in (0.0, truncation))
    nought, apart, scales = np.zeros(SIZE), np.zeros(SIZE), []
    for version, (rate, estimate) in enumerate(run):
        update = exact.step(estimate, rate, version)
        apart += applied(nought, update, signs) - applied(nought, short.step(estimate, rate, version), signs)
        scales.append(-update.terms[-1][1] / estimate.terms[-1][1])  # the newest probe's weight is 1
    bound = truncation / 0.1**2 * (max(scales) + np.abs(np.diff(scales)).sum()) * largest(run)
    assert np.abs(apart).max() <= bound * (1.0 + 1e-9)


@pytest.mark.parametrize(
    ("beta", "truncation", "kept"),
    [(0.9, 1e-2, 44), (0.9, 1e-3, 66), (0.0, 1e-3, 1), (0.0, 0.0, 1), (0.5, 0.25, 3), (0.9, 0.0, 99)],
)
def test_length_of_updates(beta: float, truncation: float, kept: int) -> None:
    for optimizer in (SGD(beta, truncation=truncation), Adam(beta1=beta, truncation=truncation)):
        for step in range(99):
            update = optimizer.step(Estimate(((step, 1.0),), 0.0), 0.1, step)
        assert [seed for seed, _ in update.terms] == list(range(99 - kept, 99))


@settings(max_examples=50)
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
    lambda: AdamW(truncation=0.1),
    lambda: GaussianAdam(window=3),
]


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=10)
@given(run=runs(probes=2), cut=st.integers(0, 40))
def test_a_saved_state_goes_on_to_the_bit(make: Callable[[], Optimizer], run: Run, cut: int) -> None:
    first = make()
    for version, (learning_rate, estimate) in enumerate(run[:cut]):
        first.step(estimate, learning_rate, version)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for version, (learning_rate, estimate) in enumerate(run[cut:], start=cut):
        assert first.step(estimate, learning_rate, version) == second.step(estimate, learning_rate, version)


@pytest.mark.parametrize("make", ALL)
def test_a_state_is_a_few_kilobytes_however_long_the_run(make: Callable[[], Optimizer]) -> None:
    optimizer, sizes, lengths = make(), {}, {}
    for step in range(10_000):
        update = optimizer.step(Estimate(((2**64 - 1 - step, -0.1234567890123456),), 0.0), 1e-3, step)
        sizes[step + 1] = len(json.dumps(optimizer.state_dict())) if step + 1 in (1_000, 10_000) else 0
        lengths[step + 1] = len(update.terms)
    assert sizes[10_000] < 4_000
    assert sizes[10_000] <= sizes[1_000] + 16  # digits of the step's number and of the moments
    assert lengths[10_000] == lengths[100] == max(lengths.values())


@pytest.mark.parametrize("make", [*ALL, lambda: Adam(truncation=0.0), lambda: GaussianAdam(beta1=0.0, window=50)])
@given(probes=st.integers(1, 3), before=st.integers(0, 60), steps=st.integers(1, 60))
def test_it_knows_how_long_its_updates_will_be(
    make: Callable[[], Optimizer], probes: int, before: int, steps: int
) -> None:
    optimizer, longest = make(), 0
    for step in range(before + steps):
        if step == before:
            most = optimizer.most_terms(probes, steps)
        update = optimizer.step(Estimate(tuple((step * probes + i, 1.0) for i in range(probes)), 0.0), 1e-3, step)
        listed = max(len(update.terms), 0 if update.normaliser is None else len(update.normaliser.terms))
        longest = max(longest, listed if step >= before else 0)
    assert longest == most


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
