"""A batch cut into tiles: runs of tokens that have one slot, for a program of ``server_ext.gpu.lora`` each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TILE = 64
"""Tokens of a tile, at most."""


def slots_of(ids: NDArray[np.int64], lora_index_to_id: Sequence[int | None]) -> NDArray[np.int32]:
    """The slot of every token, -1 for none.

    Args:
        ids: LoRA id of every token, 0 for none.
        lora_index_to_id: LoRA id by slot, None for a free one.

    """
    slot_by_id = {number: slot for slot, number in enumerate(lora_index_to_id) if number is not None}
    found, inverse = np.unique(ids, return_inverse=True)
    return np.array([slot_by_id[i] if i > 0 else -1 for i in found.tolist()], np.int32)[inverse]


def tiles_of(slots: NDArray[np.int32], count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens grouped by slot, ``[tokens]``, and the groups cut into tiles, ``[tiles, 3]``: slot, first place, tokens.

    Args:
        slots: slot of every token, -1 for none.
        count: number of slots.

    """
    order = np.argsort(slots, kind="stable").astype(np.int32)
    sizes = np.bincount(slots + 1, minlength=count + 1)
    starts = np.cumsum(sizes) - sizes
    pieces = -(-sizes // TILE)
    group = np.repeat(np.arange(count + 1), pieces)
    within = (np.arange(len(group)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * TILE
    tiles = np.stack([group - 1, starts[group] + within, np.minimum(TILE, sizes[group] - within)], axis=1)
    return order, tiles.astype(np.int32)


def most_tiles(tokens: int, count: int) -> int:
    """Tiles that a batch takes at most: every slot, and the tokens without one, may end in a tile that is not full."""
    return -(-tokens // TILE) + min(count + 1, tokens)
