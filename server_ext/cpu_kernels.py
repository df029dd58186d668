"""LoRA on the CPU: tokens grouped by slot, one pair of matrix products a group.

vLLM's fallback gathers a copy of the adapter for every token, and so moves rank x (in + out) numbers a token and layer
instead of once a group. It also reads slot -1, by which a batch says "no LoRA", as the last slot: base-model tokens
that share a batch with adapters come out perturbed once every slot is taken. Grouping mends both.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch


def use_grouped_kernels(wrappers: Iterable[Any]) -> None:
    """Puts ``add_lora_linear`` in place on these instances of vLLM's CPU wrapper; its class stays as it is.

    vLLM chooses the wrapper by platform and offers no door to choose another one.
    """
    for wrapper in wrappers:
        wrapper.add_lora_linear = MethodType(add_lora_linear, wrapper)


def add_lora_linear(
    wrapper: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """Adds ``x A[slot]' B[slot]' scale`` to y, slice by slice of the output, in float32.

    Args:
        wrapper: vLLM's wrapper, which knows the batch's runs of tokens with one slot.
        y: ``[tokens, sum(output_slices)]``, changed in place.
        x: ``[tokens, in]``.
        lora_a_stacked: by slice, ``[slots, 1, rank, in]``.
        lora_b_stacked: by slice, ``[slots, 1, out, rank]``.
        scale: factor of the product.
        output_slices: widths of the slices.

    """
    if wrapper.no_lora:
        return
    for slot, tokens in _groups(wrapper):
        inputs = None
        offset = 0
        for lora_a, lora_b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            # Most adapters leave most layers alone: looking for anything but zeros costs little beside multiplying.
            if lora_b[slot].any():
                inputs = x[tokens].to(torch.float32) if inputs is None else inputs
                reduced = inputs @ lora_a[slot, 0].to(torch.float32).T
                product = reduced @ lora_b[slot, 0].to(torch.float32).T
                y[tokens, offset : offset + width] += product.mul_(scale).to(y.dtype)
            offset += width


def _groups(wrapper: Any) -> list[tuple[int, slice | torch.Tensor]]:
    """Each slot of the batch with its tokens: a slice where they lie together, else their indices."""
    starts, lengths, slots, *_ = wrapper.prefill_metadata
    runs: dict[int, list[tuple[int, int]]] = {}
    for start, length, slot in zip(starts.tolist(), lengths.tolist(), slots.tolist(), strict=True):
        if slot >= 0:
            runs.setdefault(slot, []).append((start, start + length))
    return [
        (slot, slice(*found[0]) if len(found) == 1 else torch.cat([torch.arange(*run) for run in found]))
        for slot, found in runs.items()
    ]
