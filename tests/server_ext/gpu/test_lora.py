"""The kernels against the products spelled out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server_ext.gpu import lora
from server_ext.gpu.slots import STOCK
from server_ext.gpu.tiles import most_tiles, tiles_of
from tests.server_ext.gpu.support import DEVICE, DTYPE

INPUTS = 144
SLOTS = 5


def _ranks(slot_rank: int) -> list[int]:
    """By slot: one of each kind."""
    return [STOCK, 3, 0, slot_rank // 2, 1]


def _batch(tokens: int, seed: int, slot_rank: int) -> tuple[torch.Tensor, lora.Batch]:
    """Slots of the tokens, and the batch as the wrapper lays it out."""
    slots = np.random.default_rng(seed).integers(-1, SLOTS, tokens).astype(np.int32)
    order, tiles = tiles_of(slots, SLOTS)
    padded = torch.full((most_tiles(tokens, SLOTS), 3), -1, dtype=torch.int32)
    padded[: len(tiles)] = torch.from_numpy(tiles)
    ranks = torch.tensor(_ranks(slot_rank), dtype=torch.int32)
    arrivals = torch.zeros(lora.MAX_SLICES * len(padded), dtype=torch.int32)
    tensors = (padded, torch.from_numpy(order), ranks, arrivals)
    return torch.from_numpy(slots), lora.Batch(*(tensor.to(DEVICE) for tensor in tensors))


def _delta(
    x: torch.Tensor, lora_a: list[torch.Tensor], lora_b: list[torch.Tensor], slots: torch.Tensor
) -> torch.Tensor:
    """B (A x) of every token, float64."""
    result = torch.zeros(len(x), sum(b.shape[2] for b in lora_b), dtype=torch.float64, device=DEVICE)
    for token, slot in enumerate(slots.tolist()):
        rank, offset = _ranks(lora_b[0].shape[3])[slot] if slot >= 0 else 0, 0
        for a, b in zip(lora_a, lora_b, strict=True):
            width, half = b.shape[2], b.shape[3] // 2
            matrix = b[slot, 0].double()
            if rank == STOCK:
                result[token, offset : offset + width] = matrix @ (a[slot, 0].double() @ x[token].double())
            elif rank:
                both = matrix[:, :rank] + matrix[:, half : half + rank]
                result[token, offset : offset + width] = both @ (lora_a[0][slot, 0, :rank].double() @ x[token].double())
            offset += width
    return result


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("slot_rank", [8, 16, 32])
@pytest.mark.parametrize("widths", [(40, 24, 24), (200,), (72, 72)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_layers_add_their_slots_products(tokens: int, widths: tuple[int, ...], slot_rank: int) -> None:
    torch.manual_seed(tokens)
    slots, batch = _batch(tokens, tokens + 3, slot_rank)
    lora_a = [torch.randn(SLOTS, 1, slot_rank, INPUTS, device=DEVICE).to(DTYPE) * 0.1 for _ in widths]
    lora_b = [torch.randn(SLOTS, 1, width, slot_rank, device=DEVICE).to(DTYPE) * 0.1 for width in widths]
    x = torch.randn(tokens, INPUTS, device=DEVICE).to(DTYPE)
    y = torch.randn(tokens, sum(widths), device=DEVICE).to(DTYPE)
    expected = y.double() + _delta(x, lora_a, lora_b, slots)
    reduced = lora.shrink(x, lora_a, batch)
    if len(widths) == 2:
        h = torch.full((tokens, widths[0]), float("nan"), dtype=DTYPE, device=DEVICE)
        lora.activate(y, h, reduced, lora_b, batch)
        gate, up = expected[:, : widths[0]], expected[:, widths[0] :]
        assert _error(h, torch.nn.functional.silu(gate) * up) < 1e-3
    untouched = y.clone()
    lora.expand(y, reduced, lora_b, batch)
    assert _error(y, expected) < 1e-3
    idle = [slot < 0 or _ranks(slot_rank)[slot] == 0 for slot in slots.tolist()]
    assert torch.equal(y[idle], untouched[idle])


@pytest.mark.parametrize("inputs", [2048, 2000])
@pytest.mark.parametrize("tokens", [3, 200])
def test_the_parts_of_a_sum_are_added_by_the_last_to_arrive(tokens: int, inputs: int) -> None:
    slots, batch = _batch(tokens, 1, 16)
    lora_a = [torch.randn(SLOTS, 1, 16, inputs, device=DEVICE).to(DTYPE) * 0.1 for _ in range(2)]
    lora_b = [torch.randn(SLOTS, 1, 96, 16, device=DEVICE).to(DTYPE) for _ in range(2)]
    x = torch.randn(tokens, inputs, device=DEVICE).to(DTYPE)
    found = []
    for _ in range(2 if DEVICE == "cpu" else 200):
        y = torch.zeros(tokens, 192, dtype=DTYPE, device=DEVICE)
        lora.expand(y, lora.shrink(x, lora_a, batch), lora_b, batch)
        assert not batch.arrivals.any()
        found.append(y)
    assert _error(found[0], _delta(x, lora_a, lora_b, slots)) < 1e-3
    # Equal batches give equal bits, whoever came last.
    assert all(torch.equal(y, found[0]) for y in found)
