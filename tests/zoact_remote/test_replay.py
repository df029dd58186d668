"""Replaying updates, against a float64 reference that holds every coefficient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.strategies import SEEDS, layouts, updates
from zoact_remote import Normaliser, Update
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import DISTRIBUTIONS, Distribution, draw
from zoact_remote.replay import Replayer, apply_update, direction, lineage, replay

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)
Dense = NDArray[np.float64]


def dense(layout: Layout, distribution: Distribution, history: list[Update]) -> tuple[Dense, Dense]:
    """The coefficients in float64, and how far float32 may stray from them: each rounding adds half a unit at most."""
    flat, bound = np.zeros(layout.size), np.zeros(layout.size)
    for update in history:
        step, size = np.zeros(layout.size), np.zeros(layout.size)
        for seed, scalar in update.terms:
            z = direction(layout, distribution, seed).astype(np.float64)
            step, size = step + scalar * z, size + np.abs(scalar * z)
        divisor = np.ones(layout.size)
        roundings = len(update.terms) + 4
        if update.normaliser is not None:
            squares = [
                w * direction(layout, distribution, s).astype(np.float64) ** 2 for s, w in update.normaliser.terms
            ]
            moment = update.normaliser.offset + sum(squares, np.zeros(layout.size))
            divisor = np.sqrt(moment) + update.normaliser.epsilon
            roundings += len(update.normaliser.terms) + 4
        kept = 1.0 - update.decay
        bound = bound * kept + roundings * EPS * (np.abs(flat) + size / divisor) + TINY
        flat = flat * kept + step / divisor
    return flat, bound


@given(layouts(), st.sampled_from(DISTRIBUTIONS), st.lists(updates(), max_size=4))
def test_replay_is_the_formula_up_to_rounding(
    layout: Layout, distribution: Distribution, history: list[Update]
) -> None:
    found = replay(layout, distribution, history)
    expected, bound = dense(layout, distribution, history)
    assert found.dtype == np.float32
    assert (np.abs(found - expected) <= bound).all()


@given(layouts(), st.sampled_from(DISTRIBUTIONS), st.lists(updates(), max_size=3))
def test_gaps_stay_zero(layout: Layout, distribution: Distribution, history: list[Update]) -> None:
    found = replay(layout, distribution, history)
    for start, stop in layout.gaps:
        assert not found[start:stop].view(np.uint32).any(), "not even a negative zero"


@given(layouts(), st.sampled_from(DISTRIBUTIONS), st.lists(updates(), max_size=4), st.sampled_from([0, 200, 1 << 20]))
def test_directions_that_are_kept_are_those_that_are_drawn(
    layout: Layout, distribution: Distribution, history: list[Update], limit: int
) -> None:
    replayer = Replayer(layout, distribution, limit)
    found = expected = np.zeros(layout.size, np.float32)
    for update in history * 2:
        found = replayer.apply(found, update)
        expected = apply_update(expected, layout, distribution, update)
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@given(layouts(), SEEDS)
def test_a_direction_is_each_sites_own_noise(layout: Layout, seed: int) -> None:
    """A site draws the same numbers whichever other sites an adapter has."""
    flat = direction(layout, "rademacher", seed)
    for offset, site in zip(layout.offsets, layout.sites, strict=True):
        count = layout.count(site)
        np.testing.assert_array_equal(flat[offset : offset + count], draw("rademacher", seed, site.index, count))


def test_scalars_are_rounded_to_float32_before_they_meet_anything() -> None:
    layout = Layout((Site(0, "a", "a", 4, 128),), 1)
    z = draw("rademacher", 1, 0, 128)
    update = Update(0, ((1, 0.1), (1, 1e-9), (1, -0.1)))
    # 0.1 + 1e-9 is 0.1 in float32, so the second term is lost, as it must be on every device.
    np.testing.assert_array_equal(replay(layout, "rademacher", [update]), 0 * z)
    kept = apply_update(z, layout, "rademacher", Update(0, (), decay=0.1))
    np.testing.assert_array_equal(kept, z * np.float32(0.9))


def test_the_coefficients_before_are_left_alone() -> None:
    layout = Layout((Site(0, "a", "a", 4, 100),), 1)
    before = direction(layout, "gaussian", 3)
    copy = before.copy()
    for update in (Update(0, ((1, 0.1),)), Update(0, ((1, 0.1),), normaliser=Normaliser((), 1.0, 1e-8))):
        after = apply_update(before, layout, "gaussian", update)
        np.testing.assert_array_equal(before, copy)
        assert not np.shares_memory(after, before)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_normaliser_without_noise_divides_by_a_number(offset: float) -> None:
    layout = Layout((Site(0, "a", "a", 4, 128),), 1)
    update = Update(0, ((1, 1.0),), normaliser=Normaliser((), offset, 0.5))
    z = draw("rademacher", 1, 0, 128)
    np.testing.assert_array_equal(replay(layout, "rademacher", [update]), z / np.float32(offset + 0.5))


@dataclass(frozen=True)
class Row:
    version: int
    rollback_to: int | None = None


@given(st.lists(st.none() | st.integers(0, 30), max_size=30), st.data())
def test_the_lineage_of_a_version_is_what_a_history_of_lists_would_hold(
    asked: list[int | None], data: st.DataObject
) -> None:
    """The model: each version's whole list of updates, copied by a rollback."""
    held: list[list[int]] = [[]]
    rows = []
    for version, target in enumerate(asked, 1):
        back = None if target is None else target % version
        rows.append(Row(version, back))
        held.append([*held[-1], version] if back is None else held[back])
    version = data.draw(st.integers(0, len(rows)))
    assert [row.version for row in lineage(data.draw(st.permutations(rows)), version)] == held[version]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row(2)], "no version 1"),
        ([Row(1)], "no version 2"),
        ([Row(1), Row(2, 2)], "rollback to 2"),
        ([Row(1), Row(2, -1)], "rollback to -1"),
    ],
)
def test_a_lineage_with_a_hole_is_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lineage(rows, 2)
