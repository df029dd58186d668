"""What adapters may have of a GPU's memory. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

from server_ext.room import MIB, NoRoom, Room

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
PASSES = 256 * MIB


def block() -> torch.Tensor:
    return torch.empty(64 * MIB, dtype=torch.uint8, device=DEVICE)


def test_what_adapters_take_and_give_back_is_counted_and_passes_keep_theirs() -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        of_a_graph = block() + 1
    del of_a_graph
    room = Room(DEVICE, PASSES)
    before = room.free()
    assert before is not None
    taken = block()
    after = room.free()
    assert after is not None
    assert before - after == pytest.approx(64 * MIB, abs=2 * MIB)
    del taken
    assert room.free() == pytest.approx(before, abs=2 * MIB)
    room.check(before // 2)
    with pytest.raises(NoRoom, match="delete adapters"):
        room.check(before + 64 * MIB)
    del graph


def test_what_is_kept_for_speed_makes_room() -> None:
    kept = [block() for _ in range(4)]
    room = Room(DEVICE, PASSES, kept.clear)
    free = room.free()
    assert free is not None
    room.check(free + 128 * MIB)
    assert not kept
