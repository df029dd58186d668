"""The low-rank term of a layer, y += B (A x), for batches in which every token may have another slot.

vLLM's kernels launch a grid of (token blocks x output blocks x slots), of which all but one in ``slots`` exit at once,
read x once a slice, and add partial sums by atomics. Here a batch comes as tiles, runs of up to ``TILE`` tokens with
one slot, and a program does one tile:

- ``shrink``: A x in float32, x read once; where few tiles leave the device idle, the inner dimension is split into
  parts that ``expand`` adds in a fixed order, so that equal batches give equal bits.
- ``expand``: y += B (A x), A x as the sum of two 16-bit numbers, so that it does not round before it meets B.
- ``activate``: silu(gate) * up of y + B (A x), in one pass over y. The layer's own output then takes no pass at all,
  and with 2 x 14,336 of the 21,504 output features of a Llama-3-8B block it has most of the bytes.

A slot's rank says how to read it (``server_ext.gpu.slots``): a point of ours has one A for all slices and two column
groups in B; a LoRA of vLLM's own (rank -1) has an A for every slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from server_ext.gpu.tiles import TILE, most_tiles

TARGET_PROGRAMS = 264
"""Two a multiprocessor of an H100: with fewer tiles than that, the inner dimension of ``shrink`` is split."""
MAX_PARTS = 16
MAX_SLICES = 3


@triton.jit
def _tile(tiles, order, TILE: tl.constexpr):
    """Slot, first place and tokens of this program's tile."""
    entry = tiles + 3 * tl.program_id(0)
    slot = tl.load(entry)
    start = tl.load(entry + 1)
    lane = tl.arange(0, TILE)
    real = lane < tl.load(entry + 2)
    token = tl.load(order + start + lane, mask=real, other=0).to(tl.int64)
    return slot.to(tl.int64), start + lane, real, token


@triton.jit
def _reduce(x, a, token, real, part, width, rows, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
            PARTS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    total = tl.zeros((TILE, ROWS), tl.float32)
    for start in range(part * BLOCK, width, BLOCK * PARTS):
        k = start + tl.arange(0, BLOCK)
        inside = k < width
        if EVEN:
            inputs = tl.load(x + token[:, None] * width + k[None, :])
            vectors = tl.load(a + row[None, :] * width + k[:, None], mask=(row < rows)[None, :], other=0.0)
        else:
            inputs = tl.load(x + token[:, None] * width + k[None, :], mask=inside[None, :], other=0.0)
            vectors = tl.load(
                a + row[None, :] * width + k[:, None], mask=(row < rows)[None, :] & inside[:, None], other=0.0
            )
        total = tl.dot(inputs, vectors, total)
    return total


@triton.jit(do_not_specialize=["places"])
def _shrink(
    x,  # [tokens, width]
    a0, a1, a2,  # [slots, 1, RANK, width] by slice
    reduced,  # float32 [PARTS, SLICES, places, RANK]
    tiles, order, ranks,
    width,
    places,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    slot, place, real, token = _tile(tiles, order, TILE)
    if slot < 0:
        return
    rank = tl.load(ranks + slot)
    if rank == 0:
        return
    part = tl.program_id(1)
    piece = tl.program_id(2)
    out = reduced + (part * SLICES + piece).to(tl.int64) * places * RANK
    if rank > 0:
        if piece == 0:
            total = _reduce(x, a0 + slot * RANK * width, token, real, part, width, rank, HALF, TILE, BLOCK, PARTS, EVEN)
            column = tl.arange(0, HALF)
            tl.store(out + place[:, None] * RANK + column[None, :], total, mask=real[:, None] & (column < RANK))
    else:
        a = a0
        if piece == 1:
            a = a1
        if piece == 2:
            a = a2
        total = _reduce(x, a + slot * RANK * width, token, real, part, width, RANK, COLUMNS, TILE, BLOCK, PARTS, EVEN)
        column = tl.arange(0, COLUMNS)
        tl.store(out + place[:, None] * RANK + column[None, :], total, mask=real[:, None] & (column < RANK))


@triton.jit
def _load_reduced(reduced, place, real, places, rank, piece, RANK: tl.constexpr, COLUMNS: tl.constexpr,
                  SLICES: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """A x as B's columns want it, float32 ``[TILE, COLUMNS]``, and which of these columns are in use."""
    lane = tl.arange(0, COLUMNS)
    column = tl.where(rank > 0, lane % (RANK // 2), lane)
    used = (lane < RANK) & (column < tl.where(rank < 0, RANK, rank))
    here = reduced + tl.where(rank > 0, 0, piece) * places.to(tl.int64) * RANK + place[:, None] * RANK + column[None, :]
    mask = real[:, None] & used[None, :]
    total = tl.load(here, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(here + part * SLICES * places * RANK, mask=mask, other=0.0)
    return total, used


@triton.jit
def _add_product(values, total, b, n, width, used, RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """``values + total B'`` for the rows ``n`` of B, float32 ``[TILE, len(n)]``."""
    column = tl.arange(0, COLUMNS)
    weights = tl.load(b + n[:, None] * RANK + column[None, :], mask=(n < width)[:, None] & used[None, :], other=0.0)
    weights = tl.trans(weights)
    high = total.to(weights.dtype)
    low = (total - high.to(tl.float32)).to(weights.dtype)
    # The products start from the 16-bit values, so that these, not float32 sums, change their layout.
    return tl.dot(low, weights, tl.dot(high, weights, values.to(tl.float32)))


@triton.jit(do_not_specialize=["places"])
def _expand(
    y,  # [tokens, y_width], changed in place
    reduced,
    b0, b1, b2,  # [slots, 1, width, RANK] by slice
    tiles, order, ranks,
    places, y_width,
    width0, width1, width2,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    slot, place, real, token = _tile(tiles, order, TILE)
    if slot < 0:
        return
    rank = tl.load(ranks + slot)
    if rank == 0:
        return
    piece = 0
    block = tl.program_id(1)
    offset = 0
    width = width0
    b = b0
    if SLICES > 1:
        blocks0 = tl.cdiv(width0, BLOCK)
        if block >= blocks0:
            block -= blocks0
            piece = 1
            offset = width0
            width = width1
            b = b1
            if SLICES > 2:
                blocks1 = tl.cdiv(width1, BLOCK)
                if block >= blocks1:
                    block -= blocks1
                    piece = 2
                    offset = width0 + width1
                    width = width2
                    b = b2
    total, used = _load_reduced(reduced, place, real, places, rank, piece, RANK, COLUMNS, SLICES, PARTS)
    n = block * BLOCK + tl.arange(0, BLOCK)
    here = y + token[:, None] * y_width + offset + n[None, :]
    mask = real[:, None] & (n < width)[None, :]
    values = tl.load(here, mask=mask, other=0.0)
    values = _add_product(values, total, b + slot * width * RANK, n, width, used, RANK, COLUMNS)
    tl.store(here, values.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["places"])
def _activate(
    y,  # [tokens, 2 width]
    h,  # [tokens, width]
    reduced,
    b0, b1,
    tiles, order, ranks,
    places, width,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    slot, place, real, token = _tile(tiles, order, TILE)
    # Tokens without a slot go the same way, with nothing to add: a branch would cost all tokens a change of layout.
    rank = tl.where(slot < 0, 0, tl.load(ranks + tl.maximum(slot, 0)))
    slot = tl.maximum(slot, 0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = real[:, None] & (n < width)[None, :]
    here = y + token[:, None] * (2 * width) + n[None, :]
    gate = tl.load(here, mask=mask, other=0.0)
    up = tl.load(here + width, mask=mask, other=0.0)
    total, used = _load_reduced(reduced, place, real, places, rank, 0, RANK, COLUMNS, 2, PARTS)
    gate = _add_product(gate, total, b0 + slot * width * RANK, n, width, used, RANK, COLUMNS)
    if rank < 0:
        total, used = _load_reduced(reduced, place, real, places, rank, 1, RANK, COLUMNS, 2, PARTS)
    up = _add_product(up, total, b1 + slot * width * RANK, n, width, used, RANK, COLUMNS)
    value = gate * tl.sigmoid(gate) * up
    tl.store(h + token[:, None] * width + n[None, :], value.to(h.dtype.element_ty), mask=mask)


@cache
def _stages(device: torch.device) -> int:
    """Steps that ``shrink`` loads ahead. Four take 160 KB of shared memory at most, and many GPUs have but 99."""
    if device.type == "cpu":  # Triton's interpreter, where it makes no difference
        return 4
    properties: Any = torch.cuda.get_device_properties(device)
    return 4 if properties.shared_memory_per_block_optin >= 160 << 10 else 3


def shrink(
    x: torch.Tensor, lora_a: Sequence[torch.Tensor], tiles: torch.Tensor, order: torch.Tensor, ranks: torch.Tensor
) -> torch.Tensor:
    """A x of every token with a slot, by place in ``order``: float32 ``[parts, slices, tokens, rank]``, to be summed.

    Args:
        x: ``[tokens, in]``.
        lora_a: by slice, ``[slots, 1, rank, in]``.
        tiles: int32 ``[tiles, 3]``: slot (-1 for none), first place, tokens.
        order: int32: tokens by place.
        ranks: int32 ``[slots]``, the layer's row of ``SlotWriter``'s.

    """
    x = x.contiguous()
    tokens, width = x.shape
    slots, _, rank, _ = lora_a[0].shape
    count = most_tiles(tokens, slots)
    parts = 1
    while parts < MAX_PARTS and triton.cdiv(tokens, TILE) * parts * 2 <= TARGET_PROGRAMS:
        parts *= 2
    block = 128 if rank <= 64 else 64
    reduced = torch.empty((parts, len(lora_a), tokens, rank), dtype=torch.float32, device=x.device)
    a0, a1, a2 = (lora_a[min(i, len(lora_a) - 1)] for i in range(MAX_SLICES))
    _shrink[(count, parts, len(lora_a))](
        x, a0, a1, a2, reduced, tiles, order, ranks, width, tokens,
        RANK=rank, COLUMNS=max(rank, 16), HALF=max(rank // 2, 16), SLICES=len(lora_a), PARTS=parts, BLOCK=block,
        EVEN=width % (block * parts) == 0, TILE=TILE, num_warps=4, num_stages=_stages(x.device),
    )  # fmt: skip
    return reduced


def expand(
    y: torch.Tensor,
    reduced: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    tiles: torch.Tensor,
    order: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """Adds B (A x) in place to ``y``, ``[tokens, out of all slices]``; ``lora_b``: ``[slots, 1, out, rank]`` each."""
    assert y.is_contiguous()
    parts, slices, tokens, rank = reduced.shape
    widths = [b.shape[2] for b in lora_b]
    block = 128 if rank <= 32 else 64
    b0, b1, b2 = (lora_b[min(i, slices - 1)] for i in range(MAX_SLICES))
    width0, width1, width2 = (widths[i] if i < slices else 0 for i in range(MAX_SLICES))
    grid = (most_tiles(tokens, lora_b[0].shape[0]), sum(triton.cdiv(width, block) for width in widths))
    _expand[grid](
        y, reduced, b0, b1, b2, tiles, order, ranks, tokens, y.shape[1], width0, width1, width2,
        RANK=rank, COLUMNS=max(rank, 16), SLICES=slices, PARTS=parts, BLOCK=block, TILE=TILE, num_warps=4,
    )  # fmt: skip


def activate(
    y: torch.Tensor,
    h: torch.Tensor,
    reduced: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    tiles: torch.Tensor,
    order: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """Writes silu(gate) * up of ``y + B (A x)`` into ``h``, ``[..., width]``; ``y`` is gate and up side by side."""
    assert y.is_contiguous()
    parts, _, tokens, rank = reduced.shape
    block = 64
    grid = (most_tiles(tokens, lora_b[0].shape[0]), triton.cdiv(h.shape[-1], block))
    _activate[grid](
        y, h, reduced, *lora_b, tiles, order, ranks, tokens, h.shape[-1],
        RANK=rank, COLUMNS=max(rank, 16), PARTS=parts, BLOCK=block, TILE=TILE, num_warps=4,
    )  # fmt: skip
