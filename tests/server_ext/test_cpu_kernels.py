"""The grouped LoRA kernels for the CPU, token by token in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server_ext.cpu_kernels import add_lora_linear, use_grouped_kernels

SLOTS, RANK, WIDTH = 3, 2, 5


@dataclass
class Wrapper:
    """What the kernels read of vLLM's wrapper: each run of tokens with one slot, by start, length and slot."""

    token_slots: list[int]

    @property
    def no_lora(self) -> bool:
        return all(slot < 0 for slot in self.token_slots)

    @property
    def prefill_metadata(self) -> tuple[Any, ...]:
        runs = [(slot, len(list(run))) for slot, run in groupby(self.token_slots)]
        lengths = torch.tensor([length for _, length in runs])
        slots = torch.tensor([slot for slot, _ in runs])
        return lengths.cumsum(0) - lengths, lengths, slots, len(runs), int(lengths.max()), len(self.token_slots)


def weights(widths: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH, generator=generator).to(dtype) for _ in widths)
    return a, tuple(torch.randn(SLOTS, 1, out, RANK, generator=generator).to(dtype) for out in widths)


def by_token(
    y: torch.Tensor, x: torch.Tensor, slots: list[int], a: Any, b: Any, scale: float, widths: tuple[int, ...]
) -> torch.Tensor:
    expected = y.double().clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            parts = [b[i][slot, 0].double() @ (a[i][slot, 0].double() @ x[token].double()) for i in range(len(widths))]
            expected[token] += scale * torch.cat(parts)
    return expected


@given(
    st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=12),
    st.sampled_from([(4,), (6, 2, 2)]),
    st.sampled_from([1.0, -0.5]),
)
def test_every_token_gets_its_own_slots_product(slots: list[int], widths: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(len(slots))
    x = torch.randn(len(slots), WIDTH, generator=generator)
    y = torch.randn(len(slots), sum(widths), generator=generator)
    a, b = weights(widths, torch.float32)
    expected = by_token(y, x, slots, a, b, scale, widths)
    untouched = y[[i for i, slot in enumerate(slots) if slot < 0]].clone()
    add_lora_linear(Wrapper(slots), y, x, a, b, scale, widths, buffer=None)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(y[[i for i, slot in enumerate(slots) if slot < 0]], untouched), "no LoRA means no change at all"


def test_slices_that_a_slot_leaves_alone_are_not_multiplied() -> None:
    slots, widths = [0, 0, 1, -1], (4, 2)
    a, b = weights(widths, torch.float32)
    b[0][0] = 0.0
    a[0][0] = torch.nan
    x = torch.ones(len(slots), WIDTH)
    y = torch.ones(len(slots), sum(widths))
    add_lora_linear(Wrapper(slots), y, x, a, b, 1.0, widths)
    changed = y != 1.0
    assert changed.tolist() == [[False] * 4 + [True] * 2] * 2 + [[True] * 6] + [[False] * 6]


def test_products_are_taken_in_float32() -> None:
    """With bfloat16 throughout, C = 1 and epsilon Z = 2^-10 beside it would add up to 1."""
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    a = torch.zeros(SLOTS, 1, RANK, WIDTH, dtype=torch.bfloat16)
    a[0, 0, :, 0] = 1
    b = torch.zeros(SLOTS, 1, 1, RANK, dtype=torch.bfloat16)
    b[0, 0, 0] = torch.tensor([1, 2**-10])
    y = torch.full((1, 1), -1.0, dtype=torch.float32)
    add_lora_linear(Wrapper([0]), y, x, (a,), (b,), 1.0, (1,))
    assert y.item() == 2**-10


def test_only_the_wrappers_given_are_changed() -> None:
    mine, other = Wrapper([0]), Wrapper([0])
    use_grouped_kernels([mine])
    assert hasattr(mine, "add_lora_linear")
    assert not hasattr(other, "add_lora_linear")


@pytest.mark.vllm
@pytest.mark.parametrize("slots", [[0, 0, 1, 2, 2, 0], [2, -1, 0, -1, 2, 2], [-1, -1, 1, 1, -1, 0]])
def test_vllms_own_wrapper_says_what_the_kernels_read(slots: list[int]) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper = PunicaWrapperCPU(max_num_batched_tokens=16, max_batches=8, device="cpu", max_loras=SLOTS)
    ids = [slot + 1 if slot >= 0 else 0 for slot in slots]
    mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
    wrapper.update_metadata(mapping, [1, 2, 3], SLOTS, 512)
    use_grouped_kernels([wrapper])
    x, y = torch.randn(len(slots), WIDTH), torch.zeros(len(slots), 4)
    a, b = weights((4,), torch.float32)
    expected = by_token(y, x, slots, a, b, 1.0, (4,))
    wrapper.add_lora_linear(y, x, a, b, 1.0, (4,))
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
