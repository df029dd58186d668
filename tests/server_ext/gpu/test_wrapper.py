"""What the layers and the activation after them make of a batch, through the operators that vLLM's model calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

from server_ext.gpu import activation, wrapper
from server_ext.gpu.lora import MAX_SLICES, Batch
from server_ext.gpu.slots import MOST_LAYERS, row_of
from server_ext.gpu.tiles import most_tiles, tiles_of
from tests.server_ext.gpu.support import DEVICE, DTYPE

TOKENS, INPUTS, WIDTH, RANK, SLOTS = 70, 48, 40, 16, 2
ARRIVALS = torch.zeros(MAX_SLICES * most_tiles(TOKENS, SLOTS), dtype=torch.int32, device=DEVICE)


def ranks_of(lora_a: list[torch.Tensor], of_slots: list[int]) -> torch.Tensor:
    """As the wrapper has them, with nothing in any other layer."""
    ranks = torch.zeros(MOST_LAYERS, SLOTS, dtype=torch.int32, device=DEVICE)
    ranks[row_of(lora_a[0])] = torch.tensor(of_slots, dtype=torch.int32, device=DEVICE)
    return ranks


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    slots = np.repeat(np.array([-1, 0, 1], np.int32), (10, 40, 20))
    order, tiles = tiles_of(slots, SLOTS)
    padded = torch.full((most_tiles(TOKENS, SLOTS), 3), -1, dtype=torch.int32)
    padded[: len(tiles)] = torch.from_numpy(tiles)
    return padded.to(DEVICE), torch.from_numpy(order).to(DEVICE)


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> activation.Deferred:
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fresh = activation.Deferred()
    monkeypatch.setattr(activation, "deferred", fresh)
    monkeypatch.setattr(wrapper, "deferred", fresh)
    return fresh


def test_a_term_left_to_the_activation_is_the_term(
    batch: tuple[torch.Tensor, torch.Tensor], deferred: activation.Deferred
) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(TOKENS, n, device=DEVICE).to(DTYPE) for n in (INPUTS, 2 * WIDTH))
    lora_a = [torch.randn(SLOTS, 1, RANK, INPUTS, device=DEVICE).to(DTYPE) * 0.1 for _ in range(2)]
    lora_b = [torch.randn(SLOTS, 1, WIDTH, RANK, device=DEVICE).to(DTYPE) * 0.1 for _ in range(2)]
    ranks = ranks_of(lora_a, [4, -1])
    counts = torch.tensor([TOKENS, TOKENS - 10], dtype=torch.int32)
    added, left = y.clone(), y.clone()
    wrapper.lora_linear(added, x, lora_a, lora_b, *batch, ranks, ARRIVALS, counts)
    gate, up = added.double()[:, :WIDTH], added.double()[:, WIDTH:]
    reader: torch.nn.Module = object.__new__(activation.TermedSiluAndMul)
    deferred.add_layers([(SimpleNamespace(lora_b_stacked=lora_b), reader)])
    wrapper.lora_linear(left, x, lora_a, lora_b, *batch, ranks, ARRIVALS, counts)
    assert torch.equal(left, y)
    # The Transformers backend's batches have one dimension more.
    h = activation.silu_and_mul(left[None])[0]
    expected = torch.nn.functional.silu(gate) * up
    assert (h.double() - expected).norm() < 1e-3 * expected.norm()
    assert deferred.give_out(left) is None


def test_a_padded_batch_leaves_no_term(batch: tuple[torch.Tensor, torch.Tensor], deferred: activation.Deferred) -> None:
    lora_b = [torch.ones(SLOTS, 1, WIDTH, RANK, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    reader: torch.nn.Module = object.__new__(activation.TermedSiluAndMul)
    deferred.add_layers([(SimpleNamespace(lora_b_stacked=lora_b), reader)])
    x, y = (torch.ones(TOKENS, n, device=DEVICE, dtype=DTYPE) for n in (INPUTS, 2 * WIDTH))
    lora_a = [torch.ones(SLOTS, 1, RANK, INPUTS, device=DEVICE, dtype=DTYPE)] * 2
    ranks = ranks_of(lora_a, [4, -1])
    counts = torch.tensor([TOKENS - 1, TOKENS - 10], dtype=torch.int32)
    wrapper.lora_linear(y, x, lora_a, lora_b, *batch, ranks, ARRIVALS, counts)
    assert deferred.give_out(y) is None
    assert (y[10:] != 1).all()


def test_a_layer_that_an_adapter_leaves_alone_adds_nothing(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = (torch.ones(TOKENS, n, device=DEVICE, dtype=DTYPE) for n in (INPUTS, WIDTH))
    lora_a, other = ([torch.ones(SLOTS, 1, RANK, INPUTS, device=DEVICE, dtype=DTYPE)] for _ in range(2))
    lora_b = [torch.ones(SLOTS, 1, WIDTH, RANK, device=DEVICE, dtype=DTYPE)]
    ranks = ranks_of(other, [4, 4])
    counts = torch.tensor([TOKENS, TOKENS - 10], dtype=torch.int32)
    wrapper.lora_linear(y, x, lora_a, lora_b, *batch, ranks, ARRIVALS, counts)
    assert (y == 1).all()
    wrapper.lora_linear(y, x, other, lora_b, *batch, ranks, ARRIVALS, counts)
    assert (y[10:] != 1).all()


def test_a_term_that_nobody_takes_up_is_an_error(deferred: activation.Deferred) -> None:
    y = torch.ones(1, 2 * WIDTH, device=DEVICE)
    lora_b = [torch.ones(1, 1, WIDTH, RANK, device=DEVICE)] * 2
    reader: torch.nn.Module = object.__new__(activation.TermedSiluAndMul)
    deferred.add_layers([(SimpleNamespace(lora_b_stacked=lora_b), reader)])
    assert deferred.take_in(y, y, lora_b, Batch(y, y, y, y), tokens=1)
    with pytest.raises(RuntimeError, match="did not follow"):
        deferred.give_out(torch.ones(1, 2 * WIDTH, device=DEVICE))


class Block(torch.nn.Module):
    """A Llama's, as vLLM writes it."""

    gate_up_proj: Any
    down_proj: Any

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = torch.nn.Identity()

    def forward(self, x: Any) -> Any:
        x, _ = self.gate_up_proj(x)
        x = self.act_fn(x)
        x, _ = self.down_proj(x)
        return x


class ScaledBlock(Block):
    """A Falcon-H1's."""

    gate_multiplier: Any

    def forward(self, x: Any) -> Any:
        x, _ = self.gate_up_proj(x)
        x[:, :WIDTH] *= self.gate_multiplier
        x = self.act_fn(x)
        x, _ = self.down_proj(x)
        return x


def test_a_term_waits_only_where_the_activation_comes_next() -> None:
    model = torch.nn.ModuleDict({"plain": Block(), "scaled": ScaledBlock()})
    layers = {f"{block}.{name}": f"{block}.{name}" for block in model for name in ("gate_up_proj", "down_proj")}
    assert list(activation.pairs(model, layers)) == [("plain.gate_up_proj", model["plain"].act_fn)]
