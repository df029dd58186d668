"""PyTorch's noise against the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server_ext.noise import DrawCache, Noise
from tests.strategies import SEEDS, layouts
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import Distribution
from zoact_remote.replay import direction

SCALES = st.floats(-1e3, 1e3)


@given(layouts(), SEEDS)
def test_rademacher_noise_agrees_bit_for_bit(layout: Layout, seed: int) -> None:
    found = Noise(layout, "rademacher").draw(seed)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy().view(np.uint32), direction(layout, "rademacher", seed).view(np.uint32))


@given(layouts(), SEEDS)
def test_gaussian_noise_agrees_to_the_last_place(layout: Layout, seed: int) -> None:
    found = Noise(layout, "gaussian").draw(seed).numpy()
    np.testing.assert_array_max_ulp(found, direction(layout, "gaussian", seed), maxulp=1)


@given(layouts(), SEEDS, SCALES)
def test_a_scale_is_rounded_to_float32_and_multiplies_exactly(layout: Layout, seed: int, scale: float) -> None:
    noise = Noise(layout, "rademacher")
    expected = np.float32(scale) * noise.draw(seed).numpy()
    np.testing.assert_array_equal(noise.draw(seed, scale).numpy(), expected)


@given(layouts(), SEEDS, st.sampled_from(["rademacher", "gaussian"]))
def test_gaps_are_zero(layout: Layout, seed: int, distribution: str) -> None:
    found = Noise(layout, distribution).draw(seed, -1.0)  # type: ignore[arg-type]
    for start, stop in layout.gaps:
        assert not found[start:stop].any()


@given(layouts(), SEEDS, st.data())
def test_a_subset_of_sites_draws_what_the_whole_does(layout: Layout, seed: int, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.sampled_from(layout.sites), min_size=1, unique=True))
    some = Layout(tuple(sorted(kept, key=lambda site: site.index)), layout.rank)
    whole = layout.matrices(Noise(layout, "gaussian").draw(seed))
    for name, matrix in some.matrices(Noise(some, "gaussian").draw(seed)).items():
        assert torch.equal(matrix, whole[name])


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("room", [0, 1 << 20])
def test_draws_do_not_share_memory(distribution: Distribution, room: int) -> None:
    noise = Noise(Layout((Site(0, "a", "a", 4, 200),), 1), distribution, cache=DrawCache(room))
    first = noise.draw(1)
    kept = first.clone()
    noise.draw(2).mul_(3)
    noise.draw(1).zero_()
    assert torch.equal(first, kept)
    assert torch.equal(noise.draw(1), kept)
