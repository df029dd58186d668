"""Every token of a batch is in one tile, beside tokens of its own slot."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server_ext.gpu.tiles import TILE, most_tiles, slots_of, tiles_of

SLOTS = 5


@given(st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 3 * TILE)), min_size=1, max_size=12))
def test_tiles_cover_a_batch_once(runs: list[tuple[int, int]]) -> None:
    slots = np.concatenate([np.full(length, slot, np.int32) for slot, length in runs])
    order, tiles = tiles_of(slots, SLOTS)
    assert len(tiles) <= most_tiles(len(slots), SLOTS)
    seen = []
    for slot, start, count in tiles.tolist():
        assert 1 <= count <= TILE
        tokens = order[start : start + count]
        assert (slots[tokens] == slot).all()
        seen += tokens.tolist()
    assert sorted(seen) == list(range(len(slots)))


@given(st.lists(st.sampled_from([0, 3, 8, 2**40]), min_size=1, max_size=50))
def test_slots_are_looked_up_by_id(ids: list[int]) -> None:
    held = [8, None, 2**40, 3]
    found = slots_of(np.array(ids), held)
    assert found.tolist() == [held.index(i) if i else -1 for i in ids]
