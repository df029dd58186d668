"""vLLM's seam for LoRA kernels, a punica wrapper, with the kernels of ``server_ext.gpu.lora`` behind it.

The wrapper knows a batch; the layers call ``add_lora_linear``. Both kernels of a layer are one opaque operator to
torch.compile, as vLLM's own are, and take all that varies from tensors at fixed addresses, so that CUDA graphs replay
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.library import Library
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.utils.torch_utils import async_tensor_h2d, direct_register_custom_op

from server_ext.gpu import lora
from server_ext.gpu.activation import deferred
from server_ext.gpu.slots import MOST_LAYERS, STOCK, row_of
from server_ext.gpu.tiles import most_tiles, slots_of, tiles_of

TOKENS, WITH_SLOT = 0, 1
"""Entries of ``counts``."""


class GroupedPunicaWrapper(PunicaWrapperGPU):  # type: ignore[misc]  # final, but there is no other door to its class
    """Chosen through ``server_ext.gpu.platform``.

    Attributes:
        ranks: see ``SlotWriter``; every slot starts as one for LoRAs of vLLM's own.
        alone: whether every LoRA layer is served by these kernels. The metadata of vLLM's own, a loop over the batch's
            tokens in Python, are then left out.

    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        tiles = most_tiles(max_num_batched_tokens, self.max_loras)
        # One buffer, so that one copy a batch fills it.
        self._batch = torch.full((3 * tiles + 2 * max_num_batched_tokens,), -1, dtype=torch.int32, device=device)
        self._tiles = self._batch[: 3 * tiles].view(tiles, 3)
        self._order = self._batch[3 * tiles : 3 * tiles + max_num_batched_tokens]
        self._slots = self._batch[3 * tiles + max_num_batched_tokens :]
        self._counts = torch.zeros(2, dtype=torch.int32, device="cpu")
        self._arrivals = torch.zeros(lora.MAX_SLICES * tiles, dtype=torch.int32, device=device)
        self.ranks = torch.full((MOST_LAYERS, self.max_loras), STOCK, dtype=torch.int32, device=device)
        self.alone = False

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        if not self.alone:
            super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        tokens = len(mapping.index_mapping)
        slots = slots_of(np.fromiter(mapping.index_mapping, np.int64, tokens), lora_index_to_id)
        order, tiles = tiles_of(slots, self.max_loras)
        batch = np.full(len(self._batch), -1, np.int32)
        batch[: tiles.size] = tiles.reshape(-1)
        first = self._tiles.numel()
        batch[first : first + tokens] = order
        first += len(self._order)
        batch[first : first + tokens] = slots
        self._batch.copy_(async_tensor_h2d(batch, self._batch.device), non_blocking=True)
        self._counts[TOKENS], self._counts[WITH_SLOT] = tokens, int((slots >= 0).sum())
        if self.alone:
            self._token_lora_indices[:tokens].copy_(self._slots[:tokens])
            self.indices_len[0] = tokens

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Adds B (A x), as ``PunicaWrapperGPU`` does; vLLM's scale is always 1."""
        if len(output_slices) > lora.MAX_SLICES or not kwargs.get("add_inputs", True):
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            return
        torch.ops.zoact.lora_linear(
            y, x, list(lora_a_stacked), list(lora_b_stacked),
            self._tiles, self._order, self.ranks, self._arrivals, self._counts,
        )  # fmt: skip


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    tiles: torch.Tensor,
    order: torch.Tensor,
    ranks: torch.Tensor,
    arrivals: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """The operator: y += B (A x)."""
    tokens, with_slot = counts.tolist()
    if not with_slot:
        return
    batch = lora.Batch(tiles, order, ranks[row_of(lora_a[0])], arrivals)
    reduced = lora.shrink(x, lora_a, batch)
    if not deferred.take_in(y, reduced, lora_b, batch, tokens):
        lora.expand(y, reduced, lora_b, batch)


def _lora_linear_fake(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    tiles: torch.Tensor,
    order: torch.Tensor,
    ranks: torch.Tensor,
    arrivals: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    return


_library = Library("zoact", "FRAGMENT")  # type: ignore[no-untyped-call]
# Arrivals change too, but are zeros again when the operator ends.
direct_register_custom_op(
    "lora_linear", lora_linear, mutates_args=["y"], fake_impl=_lora_linear_fake, target_lib=_library
)
