"""Times of the kernels alone: filling a slot, and a layer's low-rank term beside stock vLLM's.

    python benchmarks/gpu/kernels.py

Llama-3-8B geometry, for each rank. Slots: all layers of the model, for each distribution. Layers: one of each kind, 32
slots, on a batch of 16,384 tokens of 8 probes' sides, and on one of 4,096 tokens of 2. Medians of Triton's
``do_bench``; the floor counts x once and y twice at 3 TB/s.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from engines import slot_rank
from triton.testing import do_bench
from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

from server_ext.gpu import lora
from server_ext.gpu.slots import MOST_LAYERS, STOCK, SlotWriter
from server_ext.gpu.tiles import most_tiles, tiles_of
from server_ext.noise import Noise
from server_ext.store import AdapterState
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import DISTRIBUTIONS, Distribution

DEVICE, DTYPE = "cuda", torch.bfloat16
LAYERS = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
"""Inputs and outputs of a block's layers."""
RANKS = (4, 16, 64)
BATCHES = ((16384, 8), (4096, 2))
"""Tokens, and slots that they have."""
BLOCKS, SLOTS = 32, 32
BYTES_A_MS = 3e9


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}\n")
    print("| rank | noise | slot, ms | slot and basis, ms | 32 slots, wall, ms |\n| --- | --- | --- | --- | --- |")
    for rank in RANKS:
        for distribution in DISTRIBUTIONS:
            fill(rank, distribution)
    print(
        "\n| tokens | rank | layer | floor, ms | stock shrink + expand | ours |\n| --- | --- | --- | --- | --- | --- |"
    )
    for tokens, sides in BATCHES:
        for rank in RANKS:
            for name, (inputs, outputs) in LAYERS.items():
                term(tokens, sides, rank, name, inputs, outputs)


def timed(call: Any) -> float:
    return float(do_bench(call, warmup=20, rep=60, return_mode="median"))


def fill(rank: int, distribution: Distribution) -> None:
    modules: dict[str, Any] = {}
    parts: dict[str, list[str]] = {}
    sites: list[Site] = []
    for block in range(BLOCKS):
        for name, (inputs, outputs) in LAYERS.items():
            module = f"{block}.{name}"
            modules[module] = lora_layer(inputs, outputs, slots=2, rank=slot_rank("ours", rank))
            parts[module] = [f"{module}.{i}" for i in range(len(outputs))]
            for part, width in zip(parts[module], outputs, strict=True):
                sites.append(Site(len(sites), part, module, inputs, width))
    layout = Layout(tuple(sites), rank)
    basis = {name: torch.randn(width, rank) for name, width in layout.inputs.items()}
    states = [AdapterState(Noise(layout, distribution, DEVICE), basis) for _ in range(2)]
    flat = torch.randn(layout.size, device=DEVICE) * 0.05
    ranks = torch.full((MOST_LAYERS, 2), STOCK, dtype=torch.int32, device=DEVICE)
    writer = SlotWriter(modules, parts.__getitem__, ranks)

    def both() -> None:
        for state in states:
            writer.write(0, state, flat, 7, 2.0**-7)

    both()
    with_basis = timed(both) / 2
    alone = timed(lambda: writer.write(0, states[1], flat, 7, 2.0**-7))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for seed in range(32):
        writer.write(0, states[1], flat, seed, 2.0**-7)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - started) * 1e3
    print(f"| {rank} | {distribution} | {alone:.3f} | {with_basis:.3f} | {wall:.1f} |", flush=True)


def term(tokens: int, sides: int, rank: int, name: str, inputs: int, outputs: tuple[int, ...]) -> None:
    x, y = (torch.randn(tokens, width, device=DEVICE, dtype=DTYPE) for width in (inputs, sum(outputs)))
    stock_layer = lora_layer(inputs, outputs, SLOTS, slot_rank("stock", rank))
    meta = LoRAKernelMeta.make(SLOTS, tokens, device=DEVICE)
    meta.prepare_tensors(torch.repeat_interleave(torch.arange(sides, device=DEVICE), tokens // sides))
    arguments = meta.meta_args(tokens, False)
    buffer = torch.empty(len(outputs), tokens, slot_rank("stock", rank), device=DEVICE)
    stock = (
        timed(lambda: lora_shrink(x, list(stock_layer.lora_a_stacked), buffer, *arguments, 1.0)),
        timed(
            lambda: lora_expand(
                buffer, list(stock_layer.lora_b_stacked), y, *arguments, offset_start=0, add_inputs=True
            )
        ),
    )
    layer = lora_layer(inputs, outputs, SLOTS, slot_rank("ours", rank))
    lora_a, lora_b = layer.lora_a_stacked, layer.lora_b_stacked
    order, tiles = tiles_of(np.repeat(np.arange(sides, dtype=np.int32), tokens // sides), SLOTS)
    table = torch.full((most_tiles(tokens, SLOTS), 3), -1, dtype=torch.int32)
    table[: len(tiles)] = torch.from_numpy(tiles)
    ranks = torch.full((SLOTS,), rank, dtype=torch.int32, device=DEVICE)
    arrivals = torch.zeros(lora.MAX_SLICES * len(table), dtype=torch.int32, device=DEVICE)
    batch = lora.Batch(table.to(DEVICE), torch.from_numpy(order).to(DEVICE), ranks, arrivals)
    reduced = lora.shrink(x, lora_a, batch)
    first = timed(lambda: lora.shrink(x, lora_a, batch))
    second = timed(lambda: lora.expand(y, reduced, lora_b, batch))
    note = ""
    if len(outputs) == 2:
        h = torch.empty(tokens, outputs[0], device=DEVICE, dtype=DTYPE)
        fused = timed(lambda: lora.activate(y, h, reduced, lora_b, batch))
        plain = timed(lambda: torch.ops._C.silu_and_mul(h, y))
        note = f"; in the activation {fused:.3f}, which alone takes {plain:.3f}"
    floor = tokens * 2 * inputs / BYTES_A_MS, tokens * 4 * sum(outputs) / BYTES_A_MS
    cells = (f"{a:.3f} + {b:.3f}" for a, b in (floor, stock, (first, second)))
    print(f"| {tokens:,} | {rank} | {name} | " + " | ".join(cells) + f"{note} |", flush=True)


def lora_layer(inputs: int, outputs: tuple[int, ...], slots: int, rank: int) -> Any:
    """What ``SlotWriter`` looks at in a LoRA layer of vLLM's, with random weights."""
    layer = SimpleNamespace(
        lora_a_stacked=tuple(torch.randn(slots, 1, rank, inputs, device=DEVICE, dtype=DTYPE) * 0.01 for _ in outputs),
        lora_b_stacked=tuple(
            torch.randn(slots, 1, width, rank, device=DEVICE, dtype=DTYPE) * 0.01 for width in outputs
        ),
        base_layer=SimpleNamespace(input_size=inputs, output_size=sum(outputs)),
        tp_rank=0,
    )
    if len(outputs) > 1:
        layer.output_ids = (0,) * len(outputs)
    return layer


if __name__ == "__main__":
    main()
