"""The digest of coefficients tells any two apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.strategies import layouts
from zoact_remote.digest import basis_digest, coefficients_digest
from zoact_remote.layout import Layout, Site

SITE = Site(0, "layers.0.proj", "layers.0.proj", 4, 100)
LAYOUT = Layout((SITE, replace(SITE, index=1, name="layers.1.proj")), 2)


def coefficients(layout: Layout, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)


def test_digests_are_what_they_were() -> None:
    """They stand in journals."""
    assert coefficients_digest(np.zeros(LAYOUT.size, np.float32), LAYOUT) == (
        "sha256:12235bfed2e2bb1ebcdcd98429c204dcb08bda8acc1c89dd63d096bae1c00a9c"
    )
    ramp = np.arange(LAYOUT.size, dtype=np.float32) / np.float32(3)
    assert (
        coefficients_digest(ramp, LAYOUT) == "sha256:2cbab60e0ada0bf9198f6b84ddb4fd1135258f5befa2e6deffdddb848bb5d69d"
    )


@given(layouts(), st.integers(0, 100), st.data())
def test_any_flipped_bit_shows(layout: Layout, seed: int, data: st.DataObject) -> None:
    flat = coefficients(layout, seed)
    before = coefficients_digest(flat, layout)
    place, bit = data.draw(st.integers(0, layout.size - 1)), data.draw(st.integers(0, 31))
    flat.view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert coefficients_digest(flat, layout) != before
    flat.view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert coefficients_digest(flat, layout) == before


@given(layouts(), st.integers(0, 100), st.data())
def test_values_that_change_places_show(layout: Layout, seed: int, data: st.DataObject) -> None:
    flat = coefficients(layout, seed)
    before = coefficients_digest(flat, layout)
    i, j = data.draw(st.lists(st.integers(0, layout.size - 1), min_size=2, max_size=2, unique=True))
    assume(flat[i] != flat[j])
    flat[[i, j]] = flat[[j, i]]
    assert coefficients_digest(flat, layout) != before


@pytest.mark.parametrize(
    "other",
    [
        Layout(LAYOUT.sites, 1),
        Layout(LAYOUT.sites[::-1], 2),
        Layout((SITE, replace(SITE, index=1, name="layers.2.proj")), 2),
        Layout((SITE, replace(SITE, index=1, name="layers.1.proj", out_features=99)), 2),
    ],
)
def test_the_layout_is_part_of_it(other: Layout) -> None:
    zeros = np.zeros(LAYOUT.size, np.float32)
    assert coefficients_digest(zeros[: other.size], other) != coefficients_digest(zeros, LAYOUT)


def test_signs_of_zero_are_told_apart() -> None:
    flat = np.zeros(LAYOUT.size, np.float32)
    assert coefficients_digest(flat, LAYOUT) != coefficients_digest(-flat, LAYOUT)


def test_digests_of_bases_are_what_they_were() -> None:
    """They stand in journals too, in order of name whatever the mapping's."""
    ramp = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert basis_digest({"b": ramp, "a": ramp.T}) == basis_digest({"a": ramp.T, "b": ramp})
    assert basis_digest({"b": ramp, "a": ramp.T}) == (
        "sha256:b94f308bda7089150364fe94119620516c862810831b0f0fd7ef62d164ed4cac"
    )
