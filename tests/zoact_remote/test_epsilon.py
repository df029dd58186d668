"""Epsilon chosen on functions whose noise and derivatives are known, and on real ones rounded to float32."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from zoact_remote import Inconclusive, InvalidValue, Losses, choose_epsilon
from zoact_remote.epsilon import DISTANCES
from zoact_remote.wire import Probe, ProbeLoss, Row

ROWS: list[Row] = [{"prompt": "a", "completion": "b"}]


class Line:
    """Losses of a function of (seed, signed distance)."""

    def __init__(self, loss: Callable[[int, float], float]) -> None:
        self.loss = loss
        self.calls: list[tuple[Sequence[Row], Sequence[Probe], int | None]] = []

    def losses(self, rows: Sequence[Row], probes: Sequence[Probe], *, version: int | None = None) -> Losses:
        self.calls.append((rows, probes, version))
        answers = [
            ProbeLoss(p.seed, p.epsilon, self.loss(p.seed, p.epsilon), self.loss(p.seed, -p.epsilon)) for p in probes
        ]
        return Losses(7, tuple(answers), None, 0)


def cubic(noise: float, third: float, seed: int = 0, slope: float = 10.0) -> Line:
    """Slopes and third derivatives of these sizes, drawn anew for each probe; independent normal noise."""
    rng = np.random.default_rng(seed)
    sizes = rng.normal(size=(1000, 2))

    def loss(probe: int, t: float) -> float:
        along, bend = sizes[probe]
        return float(0.7 + slope * along * t + 3.0 * t**2 + third * bend * t**3 / 6.0 + noise * rng.normal())

    return Line(loss)


def test_it_is_nearly_as_good_as_the_best_distance() -> None:
    rng = np.random.default_rng(0)
    ratios, noises, thirds = [], [], []
    for trial in range(300):
        third = 10.0 ** rng.uniform(1, 4)
        noise = third / 3.0 * 2.0 ** (3.0 * rng.uniform(-9, -5))  # so that the best distance is 2^-9 to 2^-5

        def error(epsilon: float, noise: float = noise, third: float = third) -> float:
            return math.hypot(noise / (math.sqrt(2.0) * epsilon), third * epsilon**2 / 6.0)

        choice = choose_epsilon(cubic(noise, third, seed=trial), ROWS)
        assert choice.epsilon in DISTANCES
        ratios.append(error(choice.epsilon) / min(map(error, DISTANCES)))
        noises.append(choice.noise / noise)
        thirds.append(choice.third_derivative / third)
    assert np.median(ratios) < 1.05
    assert np.quantile(ratios, 0.95) < 1.6
    assert 0.9 < np.median(noises) < 1.3
    assert 0.7 < np.median(thirds) < 1.3


def test_with_many_probes_it_measures_what_is_there() -> None:
    choice = choose_epsilon(cubic(1e-4, 300.0), ROWS, seeds=range(1000))
    assert choice.noise == pytest.approx(1e-4, rel=0.1)
    assert choice.third_derivative == pytest.approx(300.0, rel=0.1)
    assert choice.slope == pytest.approx(10.0, rel=0.1)
    assert choice.epsilon == 2.0**-7  # (3 * 1e-4 / 300)^(1/3) = 0.0100
    assert choice.error(0.01) == pytest.approx(math.hypot(1e-4 / math.sqrt(2.0) / 0.01, 300.0 * 0.01**2 / 6.0), rel=0.1)


@pytest.mark.parametrize("trial", range(5))
def test_a_real_loss_in_float32(trial: int) -> None:
    # Logistic regression: a loss with derivatives of every order, and rounding as it comes.
    rng = np.random.default_rng(trial)
    features, weights = rng.normal(size=(16, 200)), rng.normal(size=200) / 10.0
    labels = rng.choice((-1.0, 1.0), size=16)
    distances = [2.0**power for power in range(-15, -2)]

    def direction(seed: int) -> NDArray[np.float64]:
        return np.random.default_rng(seed).choice((-1.0, 1.0), size=200)

    def loss(seed: int, t: float) -> float:
        moved = (weights + t * direction(seed)).astype(np.float32)
        margins = labels.astype(np.float32) * (features.astype(np.float32) @ moved)
        return float(np.mean(np.log1p(np.exp(-margins))))

    share = labels / (1.0 + np.exp(labels * (features @ weights)))
    gradient = -(share @ features) / 16.0
    errors = []
    for distance in distances:
        slopes = [(loss(z, distance) - loss(z, -distance)) / (2.0 * distance) for z in range(100, 200)]
        true = [float(gradient @ direction(z)) for z in range(100, 200)]
        errors.append(math.sqrt(np.mean(np.square(np.subtract(slopes, true)))))
    choice = choose_epsilon(Line(loss), ROWS, distances=distances)
    assert errors[distances.index(choice.epsilon)] < 2.5 * min(errors)
    assert 0.3 < choice.error(choice.epsilon) / errors[distances.index(choice.epsilon)] < 3.0
    assert max(errors) > 30.0 * min(errors)  # so that there was something to choose


def test_one_call_a_seed() -> None:
    line = cubic(1e-4, 300.0)
    choose_epsilon(line, ROWS, seeds=(3, 5), version=7)
    assert [(rows, version) for rows, _, version in line.calls] == [(ROWS, 7)] * 2
    assert [[probe.seed for probe in probes] for _, probes, _ in line.calls] == [[3] * 9, [5] * 9]
    assert [probe.epsilon for probe in line.calls[0][1]] == list(DISTANCES)


def test_a_bias_lost_in_noise_leaves_the_farthest() -> None:
    for trial in range(20):
        assert choose_epsilon(cubic(0.05, 0.0, seed=trial), ROWS).epsilon >= DISTANCES[-2]


def test_a_noise_below_all_bias_leaves_the_nearest() -> None:
    assert choose_epsilon(cubic(0.0, 1e4), ROWS).epsilon <= DISTANCES[2]


def test_distances_that_show_nothing_are_passed_over() -> None:
    def loss(seed: int, t: float) -> float:
        value = (1.0 + seed) * t + 200.0 * t**3 + 1e-4 * math.sin(1e6 * t)
        return math.nan if abs(t) > 0.1 else 0.0 if abs(t) < 2.0**-11 else value

    assert 2.0**-9 <= choose_epsilon(Line(loss), ROWS).epsilon <= 2.0**-5


def test_a_distance_that_shows_something_among_those_that_do_not_is_passed_over() -> None:
    def loss(seed: int, t: float) -> float:
        flat = DISTANCES[0] < abs(t) <= DISTANCES[1]
        return 0.0 if flat else (1.0 + seed) * t + 200.0 * t**3 + 1e-4 * math.sin(1e6 * t)

    assert choose_epsilon(Line(loss), ROWS).epsilon > DISTANCES[1]


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(Inconclusive, match="at 0 distances"):
        choose_epsilon(Line(lambda seed, t: 1.0), ROWS)
    with pytest.raises(Inconclusive, match="at 2 distances"):
        choose_epsilon(Line(lambda seed, t: t if abs(t) < 2.0**-10 else math.inf), ROWS)
    with pytest.raises(InvalidValue, match="seeds"):
        choose_epsilon(cubic(0.1, 1.0), ROWS, seeds=())
    for distances in ((0.1, 0.2, 0.4, 0.8), (0.1, 0.2, 0.3, 0.4, 0.5), (-0.1, -0.2, -0.4, -0.8, -1.6)):
        line = cubic(0.1, 1.0)
        with pytest.raises(InvalidValue, match="distances: must be at least 5"):
            choose_epsilon(line, ROWS, distances=distances)
        assert not line.calls
