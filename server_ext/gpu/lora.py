"""The low-rank term of a layer, y += B (A x), for batches in which every token may have another slot.

vLLM's kernels launch a grid of (token blocks x output blocks x slots), of which all but one in ``slots`` exit at once,
read x once a slice, and add partial sums by atomics. Here a batch comes as tiles, runs of up to ``TILE`` tokens with
one slot, and a program does one tile:

- ``shrink``: A x in float32, x read once; where few tiles leave the device idle, the inner dimension is split into
  parts, which the last program of a tile to arrive adds in a fixed order, so that equal batches give equal bits.
- ``expand``: y += B (A x), A x as the sum of two 16-bit numbers, so that it does not round before it meets B.
- ``activate``: silu(gate) * up of y + B (A x), in one pass over y. The layer's own output then takes no pass at all,
  and with 2 x 14,336 of the 21,504 output features of a Llama-3-8B block it has most of the bytes.

A slot's rank says how to read it (``server_ext.gpu.slots``): a point of ours has one A for all slices and two column
groups in B; a LoRA of vLLM's own (rank -1) has an A for every slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from server_ext.gpu.tiles import TILE, most_tiles

TARGET_PROGRAMS = 264
"""Two a multiprocessor of an H100: with fewer tiles than that, the inner dimension of ``shrink`` is split."""
MAX_PARTS = 16
MAX_SLICES = 3


class Batch(NamedTuple):
    """A batch as a layer's kernels see it.

    Attributes:
        tiles: int32 ``[tiles, 3]``: slot (-1 for none), first place, tokens (-1 for a tile that there is not).
        order: int32: tokens by place.
        ranks: int32 ``[slots]``, the layer's row of ``SlotWriter``'s.
        arrivals: int32 zeros, ``[MAX_SLICES * tiles]`` at least, which every kernel leaves as it finds them.

    """

    tiles: torch.Tensor
    order: torch.Tensor
    ranks: torch.Tensor
    arrivals: torch.Tensor


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
def _reduce(x, a, token, part, parts, width, rows, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """A x over one part of the inner dimension: float32 ``[TILE, ROWS]``."""
    row = tl.arange(0, ROWS)
    total = tl.zeros((TILE, ROWS), tl.float32)
    for start in range(part * BLOCK, width, BLOCK * parts):
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


@triton.jit
def _store_sum(total, here, mask, stride, parts, arrivals):
    """Stores a part of a sum; whoever comes last adds all of them, in order, into the first one's place."""
    tl.store(here + tl.program_id(1) * stride, total, mask=mask)
    if parts > 1:
        # All of this program's threads have stored before it counts as arrived.
        tl.debug_barrier()
        if tl.atomic_add(arrivals, 1, sem="acq_rel") == parts - 1:
            # Past the first-level cache, which does not hear of other programs' stores.
            total = tl.load(here, mask=mask, other=0.0, cache_modifier=".cg")
            for part in tl.range(1, parts, num_stages=1):
                total += tl.load(here + part * stride, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(here, total, mask=mask)
            tl.store(arrivals, 0)


@triton.jit(do_not_specialize=["places", "parts"])
def _shrink(
    x,  # [tokens, width]
    a0, a1, a2,  # [slots, 1, RANK, width] by slice
    reduced,  # float32 [parts, SLICES, places, RANK], of which the first part becomes the sum
    tiles, order, ranks, arrivals,
    width,
    places,
    parts,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
    SLICES: tl.constexpr,
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
    stride = SLICES * places.to(tl.int64) * RANK
    out = reduced + piece * places.to(tl.int64) * RANK + place[:, None] * RANK
    arrivals += tl.program_id(0) * SLICES + piece
    if rank > 0:
        if piece == 0:
            total = _reduce(x, a0 + slot * RANK * width, token, part, parts, width, rank, HALF, TILE, BLOCK, EVEN)
            column = tl.arange(0, HALF)
            mask = real[:, None] & (column < RANK)
            _store_sum(total, out + column[None, :], mask, stride, parts, arrivals)
    else:
        a = a0
        if piece == 1:
            a = a1
        if piece == 2:
            a = a2
        total = _reduce(x, a + slot * RANK * width, token, part, parts, width, RANK, COLUMNS, TILE, BLOCK, EVEN)
        column = tl.arange(0, COLUMNS)
        mask = real[:, None] & (column < RANK)
        _store_sum(total, out + column[None, :], mask, stride, parts, arrivals)


@triton.jit
def _load_reduced(reduced, place, real, places, rank, piece, RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """A x as B's columns want it, float32 ``[TILE, COLUMNS]``, and which of these columns are in use."""
    lane = tl.arange(0, COLUMNS)
    column = tl.where(rank > 0, lane % (RANK // 2), lane)
    used = (lane < RANK) & (column < tl.where(rank < 0, RANK, rank))
    here = reduced + tl.where(rank > 0, 0, piece) * places.to(tl.int64) * RANK + place[:, None] * RANK + column[None, :]
    total = tl.load(here, mask=real[:, None] & used[None, :], other=0.0)
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
    total, used = _load_reduced(reduced, place, real, places, rank, piece, RANK, COLUMNS)
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
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    if tl.load(tiles + 3 * tl.program_id(0) + 2) < 0:
        return
    slot, place, real, token = _tile(tiles, order, TILE)
    # Tokens without a slot go the same way, with nothing to add: a branch would cost all tokens a change of layout.
    rank = tl.where(slot < 0, 0, tl.load(ranks + tl.maximum(slot, 0)))
    slot = tl.maximum(slot, 0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = real[:, None] & (n < width)[None, :]
    here = y + token[:, None] * (2 * width) + n[None, :]
    gate = tl.load(here, mask=mask, other=0.0)
    up = tl.load(here + width, mask=mask, other=0.0)
    total, used = _load_reduced(reduced, place, real, places, rank, 0, RANK, COLUMNS)
    gate = _add_product(gate, total, b0 + slot * width * RANK, n, width, used, RANK, COLUMNS)
    if rank < 0:
        total, used = _load_reduced(reduced, place, real, places, rank, 1, RANK, COLUMNS)
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


def shrink(x: torch.Tensor, lora_a: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
    """A x of every token with a slot, by place in the batch's order: float32 ``[slices, tokens, rank]``.

    Args:
        x: ``[tokens, in]``.
        lora_a: by slice, ``[slots, 1, rank, in]``.
        batch: its tokens.

    """
    x = x.contiguous()
    tokens, width = x.shape
    slots, _, rank, _ = lora_a[0].shape
    parts = 1
    while parts < MAX_PARTS and triton.cdiv(tokens, TILE) * parts * 2 <= TARGET_PROGRAMS:
        parts *= 2
    block = 128 if rank <= 64 else 64
    reduced = torch.empty((parts, len(lora_a), tokens, rank), dtype=torch.float32, device=x.device)
    a0, a1, a2 = (lora_a[min(i, len(lora_a) - 1)] for i in range(MAX_SLICES))
    _shrink[(most_tiles(tokens, slots), parts, len(lora_a))](
        x, a0, a1, a2, reduced, *batch, width, tokens, parts,
        RANK=rank, COLUMNS=max(rank, 16), HALF=max(rank // 2, 16), SLICES=len(lora_a), BLOCK=block,
        EVEN=width % block == 0, TILE=TILE, num_warps=4, num_stages=_stages(x.device),
    )  # fmt: skip
    return reduced[0]


def expand(y: torch.Tensor, reduced: torch.Tensor, lora_b: Sequence[torch.Tensor], batch: Batch) -> None:
    """Adds B (A x) in place to ``y``, ``[tokens, out of all slices]``; ``lora_b``: ``[slots, 1, out, rank]`` each."""
    assert y.is_contiguous()
    slices, tokens, rank = reduced.shape
    widths = [b.shape[2] for b in lora_b]
    block = 128 if rank <= 128 else 64
    b0, b1, b2 = (lora_b[min(i, slices - 1)] for i in range(MAX_SLICES))
    width0, width1, width2 = (widths[i] if i < slices else 0 for i in range(MAX_SLICES))
    grid = (most_tiles(tokens, lora_b[0].shape[0]), sum(triton.cdiv(width, block) for width in widths))
    _expand[grid](
        y, reduced, b0, b1, b2, batch.tiles, batch.order, batch.ranks, tokens, y.shape[1], width0, width1, width2,
        RANK=rank, COLUMNS=max(rank, 16), SLICES=slices, BLOCK=block, TILE=TILE, num_warps=4,
    )  # fmt: skip


def activate(
    y: torch.Tensor, h: torch.Tensor, reduced: torch.Tensor, lora_b: Sequence[torch.Tensor], batch: Batch
) -> None:
    """Writes silu(gate) * up of ``y + B (A x)`` into ``h``, ``[..., width]``; ``y`` is gate and up side by side."""
    assert y.is_contiguous()
    _, tokens, rank = reduced.shape
    block = 64
    grid = (most_tiles(tokens, lora_b[0].shape[0]), triton.cdiv(h.shape[-1], block))
    _activate[grid](
        y, h, reduced, *lora_b, batch.tiles, batch.order, batch.ranks, tokens, h.shape[-1],
        RANK=rank, COLUMNS=max(rank, 16), BLOCK=block, TILE=TILE, num_warps=4,
    )  # fmt: skip
