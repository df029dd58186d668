"""Layouts: where sites lie, and which ones are chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import layouts
from zoact_remote.layout import ALIGNMENT, Layout, Site, choose_sites, select_sites

BLOCK = (
    ("mlp.down_proj", "mlp.down_proj", 12, 4),
    ("attn.q_proj", "attn.q_proj", 4, 6),
    ("attn.k_proj", "attn.q_proj", 4, 2),
)
SITES = tuple(
    Site(i, f"model.layers.{i // 3}.{name}", f"model.layers.{i // 3}.{reads}", width, out)
    for i, (name, reads, width, out) in enumerate(2 * BLOCK)
)


@given(layouts())
def test_sites_and_gaps_fill_the_buffer_without_overlap(layout: Layout) -> None:
    owner = np.zeros(layout.size, dtype=int)
    for offset, site in zip(layout.offsets, layout.sites, strict=True):
        assert offset % ALIGNMENT == 0
        owner[offset : offset + layout.count(site)] += 1
    assert int(owner.sum()) == layout.parameters == sum(site.out_features for site in layout.sites) * layout.rank
    for start, stop in layout.gaps:
        assert 0 < stop - start < ALIGNMENT
        owner[start:stop] += 1
    assert (owner == 1).all()


@given(layouts())
def test_matrices_are_views_in_row_major_order(layout: Layout) -> None:
    flat = np.arange(layout.size)
    for offset, site in zip(layout.offsets, layout.sites, strict=True):
        matrix = layout.matrices(flat)[site.name]
        assert matrix.shape == (site.out_features, layout.rank)
        assert np.shares_memory(matrix, flat)
        row, column = site.out_features - 1, layout.rank - 1
        assert matrix[row, column] == offset + row * layout.rank + column


def test_sites_that_read_one_input_share_it() -> None:
    assert Layout(SITES[:3], 2).inputs == {"model.layers.0.mlp.down_proj": 12, "model.layers.0.attn.q_proj": 4}


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (["down_proj"], [0, 3]),
        (["k_proj", "q_proj"], [1, 2, 4, 5]),
        (["model.layers.1.attn.q_proj"], [4]),
        (["model.layers.1.attn.q_proj", "down_proj", "q_proj"], [0, 1, 3, 4]),
    ],
)
def test_sites_are_selected_by_name_in_the_models_order(patterns: list[str] | None, chosen: list[int]) -> None:
    assert [site.index for site in select_sites(SITES, patterns)] == chosen


@pytest.mark.parametrize("patterns", [["proj"], ["down_proj", "lm_head"], ["attn.q_proj"], [""]])
def test_a_name_of_no_site_is_refused(patterns: list[str]) -> None:
    with pytest.raises(ValueError, match="names no site"):
        select_sites(SITES, patterns)


KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def of_blocks(numbers: list[int]) -> list[Site]:
    names = [f"model.layers.{number}.{kind}" for number in numbers for kind in KINDS]
    return [Site(i, name, name, 8, 8) for i, name in enumerate(names)]


@given(st.sets(st.integers(0, 99), min_size=1, max_size=12))
def test_choices_of_sites_split_blocks_and_kinds(numbers: set[int]) -> None:
    ordered = sorted(numbers)
    sites = of_blocks(ordered)
    everything = [site.name for site in sites]
    assert list(choose_sites(sites, "all")) == everything
    mlp = choose_sites(sites, "mlp")
    assert list(mlp) == [name for name in everything if ".mlp." in name]
    upper = choose_sites(sites, "upper")
    # The half nearer to the head, with the block in the middle.
    assert list(upper) == everything[len(numbers) // 2 * len(KINDS) :]
    assert set(choose_sites(sites, "upper-mlp")) == set(mlp) & set(upper)


def test_a_model_without_blocks_or_mlps_has_none_to_choose() -> None:
    sites = [Site(0, "head.q_proj", "x", 8, 8)]
    assert choose_sites(sites, "all") == ("head.q_proj",)
    for choice in ("mlp", "upper", "upper-mlp"):
        with pytest.raises(ValueError, match=f"'{choice}' names no layer"):
            choose_sites(sites, choice)


def test_a_layout_needs_sites_and_a_rank() -> None:
    with pytest.raises(ValueError, match="rank"):
        Layout(SITES, 0)
    with pytest.raises(ValueError, match="site"):
        Layout((), 1)
