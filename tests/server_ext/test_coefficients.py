"""Coefficients on a device against replay with NumPy alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server_ext import coefficients
from server_ext.coefficients import Coefficients, largest_step
from server_ext.noise import Noise
from tests.strategies import SEEDS, layouts, updates
from zoact_remote import GaussianAdam, Normaliser, Update
from zoact_remote.digest import coefficients_digest
from zoact_remote.estimators import Estimate
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import Distribution
from zoact_remote.replay import apply_update, direction, replay

HISTORIES = st.lists(updates(), max_size=5)


@given(layouts(), HISTORIES)
def test_rademacher_coefficients_are_the_replayed_ones_bit_for_bit(layout: Layout, history: list[Update]) -> None:
    """With a normaliser too: IEEE 754 rounds square roots and quotients correctly, and nothing else is inexact."""
    held = Coefficients(Noise(layout, "rademacher"))
    for i, update in enumerate(history):
        held = held.after(update)
        expected = replay(layout, "rademacher", history[: i + 1])
        np.testing.assert_array_equal(held.flat.numpy().view(np.uint32), expected.view(np.uint32))
        assert held.digest() == coefficients_digest(expected, layout)


@given(layouts(), updates())
def test_gaussian_coefficients_agree_up_to_rounding(layout: Layout, update: Update) -> None:
    held = Coefficients(Noise(layout, "gaussian")).after(update)
    expected = apply_update(np.zeros(layout.size, np.float32), layout, "gaussian", update)
    # One unit of the noise's last place, at the size that the terms reach before they cancel.
    reach = np.zeros(layout.size)
    for seed, scalar in update.terms:
        reach += np.abs(scalar * direction(layout, "gaussian", seed).astype(np.float64))
    if update.normaliser is not None:
        squares = [w * direction(layout, "gaussian", s).astype(np.float64) ** 2 for s, w in update.normaliser.terms]
        moment = update.normaliser.offset + sum(squares, np.zeros(layout.size))
        reach /= np.sqrt(moment) + update.normaliser.epsilon
    eps = float(np.finfo(np.float32).eps)
    assert (np.abs(held.flat.numpy() - expected) <= 16 * eps * reach + 1e-37).all()


@given(layouts(), SEEDS, st.floats(2**-20, 1e3), st.sampled_from([1, -1]))
def test_a_perturbation_is_epsilon_times_the_direction(layout: Layout, seed: int, epsilon: float, sign: int) -> None:
    found = Noise(layout, "rademacher").draw(seed, sign * epsilon)
    expected = np.float32(sign * epsilon) * direction(layout, "rademacher", seed)
    np.testing.assert_array_equal(found.numpy(), expected)


@given(layouts(), st.integers(0, 2**32 - 1), st.integers(1, 1000) | st.just(coefficients.DIGESTED_AT_ONCE))
def test_the_digest_is_numpys_whatever_the_bits(layout: Layout, seed: int, at_once: int) -> None:
    """Negative zeros, subnormal numbers, infinities and NaNs with their payloads too, and wherever it is cut."""
    bits = np.random.default_rng(seed).integers(0, 2**32, layout.size, dtype=np.uint32)
    flat = bits.view(np.float32)
    held = Coefficients(Noise(layout, "rademacher"), torch.from_numpy(flat.copy()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coefficients, "DIGESTED_AT_ONCE", at_once)
        assert held.digest() == coefficients_digest(flat, layout)


def test_an_update_leaves_what_it_starts_from_as_it_was() -> None:
    layout = Layout((Site(0, "a", "a", 4, 100),), 1)
    first = Coefficients(Noise(layout, "rademacher")).after(Update(0, ((1, 0.5),)))
    copy = first.flat.clone()
    first.at(2, 0.5).add_(1)
    second = first.after(Update(1, ((2, 0.5),), decay=0.5))
    assert torch.equal(first.flat, copy)
    assert not torch.equal(second.flat, copy)


def test_coefficients_of_another_shape_are_refused() -> None:
    layout = Layout((Site(0, "a", "a", 4, 100),), 1)
    with pytest.raises(ValueError, match=r"shape \[128\]"):
        Coefficients(Noise(layout, "rademacher"), torch.zeros(100))


DISTRIBUTIONS = st.sampled_from(["rademacher", "gaussian"])


@given(layouts(), DISTRIBUTIONS, st.data())
def test_no_coefficient_moves_further_than_the_bound(
    layout: Layout, distribution: Distribution, data: st.DataObject
) -> None:
    """Seeds are few, so that many stand both among the terms and in the normaliser, some of them twice."""
    seeds, scalars = st.integers(0, 3), st.floats(-1e3, 1e3)
    terms = data.draw(st.lists(st.tuples(seeds, scalars), max_size=5))
    weights = data.draw(st.lists(st.tuples(seeds, st.floats(0, 1e3)), max_size=5))
    least = data.draw(st.sampled_from([2.0**-126, 2.0**-63, 1e-8, 1.0]))
    offset = data.draw(st.floats(0, 1) | st.floats(0, 2.0**-120))
    update = Update(0, tuple(terms), normaliser=Normaliser(tuple(weights), offset, least))
    with np.errstate(over="ignore"):
        moved = np.abs(apply_update(np.zeros(layout.size, np.float32), layout, distribution, update)).max()
        assert moved <= 2.0 * largest_step(update, distribution)


@given(st.lists(st.floats(-1e3, 1e3).filter(lambda slope: abs(slope) > 1e-6), min_size=1, max_size=80))
def test_the_bound_lets_adam_by_coordinate_take_its_first_steps(slopes: list[float]) -> None:
    """Its divisor may come near zero in a coordinate, but only together with the terms."""
    optimizer = GaussianAdam()
    for version, slope in enumerate(slopes):
        update = optimizer.step(Estimate(((version, slope),), 0.0), 1e-3, version)
    # a_i^2 / b_i does not depend on the slopes, and the bound on the run's length alone: it rises to 7.3 rates.
    assert largest_step(update, "gaussian") < 10 * 1e-3
