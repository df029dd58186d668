"""What kernels work on, without vLLM: stacked buffers as its LoRA layers have them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16
"""Of slots. Triton's interpreter truncates to bfloat16 where the GPU rounds to nearest."""


def layer(
    outputs: Sequence[int],
    inputs: int,
    slots: int,
    rank: int,
    shards: int = 1,
    shard: int = 0,
    split_inputs: bool = False,
) -> Any:
    """A LoRA layer of one tensor-parallel rank, its buffers full of what earlier tenants left.

    Args:
        outputs: unsharded widths of its slices.
        inputs: unsharded width of its input.
        slots: their number.
        rank: columns of a slot.
        shards: tensor-parallel ranks.
        shard: the rank.
        split_inputs: whether the ranks share the inputs instead of the outputs.

    """
    columns = inputs // shards if split_inputs else inputs
    rows = [width if split_inputs else width // shards for width in outputs]
    module = SimpleNamespace(
        lora_a_stacked=tuple(torch.full((slots, 1, rank, columns), 7.0, dtype=DTYPE, device=DEVICE) for _ in rows),
        lora_b_stacked=tuple(torch.full((slots, 1, r, rank), 7.0, dtype=DTYPE, device=DEVICE) for r in rows),
        base_layer=SimpleNamespace(input_size=inputs, output_size=sum(outputs)),
        tp_rank=shard,
    )
    if len(outputs) > 1:
        module.output_ids = (shard,) * len(outputs)

    def reset_lora(slot: int) -> None:
        for buffer in (*module.lora_a_stacked, *module.lora_b_stacked):
            buffer[slot] = 0

    module.reset_lora = reset_lora
    return module
