"""The cache keeps what was used last, in as many bytes as it may have."""

from __future__ import annotations

from functools import partial

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zoact_remote.cache import Cache


@given(
    limit=st.integers(0, 40),
    uses=st.lists(st.integers(0, 6), max_size=60),
    sizes=st.lists(st.integers(0, 20), min_size=7, max_size=7),
    dropped=st.integers(0, 6),
)
def test_it_is_a_list_in_order_of_use(limit: int, uses: list[int], sizes: list[int], dropped: int) -> None:
    cache: Cache[NDArray[np.uint8]] = Cache(limit)
    made: list[int] = []

    def make(key: int) -> NDArray[np.uint8]:
        made.append(key)
        return np.full(sizes[key], key, np.uint8)

    kept: list[int] = []
    for key in uses:
        before = len(made)
        found = cache.get(key, partial(make, key))
        np.testing.assert_array_equal(found, np.full(sizes[key], key, np.uint8))
        assert (len(made) == before) == (key in kept)
        kept = [other for other in kept if other != key] + [key]
        while sum(sizes[other] for other in kept) > limit:
            del kept[0]
        if key == dropped:
            cache.drop(dropped.__eq__)
            kept = [other for other in kept if other != dropped]
