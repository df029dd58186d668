"""An update's terms added to coefficients, and their digest, each in one pass over the buffer.

An update has a term for every probe of the optimizer's window: dozens, of which each is several passes in PyTorch, and
as many launches of kernels, which on a small model take longer. Here Z is drawn in registers, as it is for slots
(``server_ext.gpu.slots``), and terms are added one after another, so that the sums are the specification's: for
Rademacher noise bit for bit, since a sign times a scalar is exact, and otherwise up to the last bits of logarithms and
cosines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from server_ext.gpu.noise import normals, philox_words, seed_halves, signs
from zoact_remote.digest import GAMMA, LAST_SHIFT, MIX
from zoact_remote.noise import LANES, STREAMS, Distribution

assert LANES == {"rademacher": 128, "gaussian": 4}
BLOCKS: dict[Distribution, int] = {"rademacher": 16, "gaussian": 256}
"""Of Philox's, that one program works on."""
ELEMENTS = 4096
"""Coefficients that one program digests."""
_GAMMA, _LAST_SHIFT = tl.constexpr(GAMMA), tl.constexpr(LAST_SHIFT)
(_SHIFT0, _MULTIPLIER0), (_SHIFT1, _MULTIPLIER1) = (tuple(map(tl.constexpr, step)) for step in MIX)


@triton.jit(do_not_specialize=["count"])
def _add_terms(
    flat,  # float32 [blocks * LANES]
    counters,  # int64 [blocks]: number of the block in its site
    sites,  # int64 [blocks]
    terms,  # int32 [3, count]: halves of the seed, and the scalar's bits
    count,
    blocks,
    STREAM: tl.constexpr,
    LANES: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    place = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mine = place < blocks
    block = tl.load(counters + place, mask=mine, other=0).to(tl.int32)
    site = tl.load(sites + place, mask=mine, other=0).to(tl.int32)
    here = flat + place.to(tl.int64) * LANES
    mask = mine
    if LANES == 128:
        here = here[:, None] + tl.arange(0, 32)[None, :]
        mask = mine[:, None]
    # A quarter of a block's values comes from each of Philox's words, or from their pairs.
    c0 = tl.load(here, mask=mask, other=0.0)
    c1 = tl.load(here + LANES // 4, mask=mask, other=0.0)
    c2 = tl.load(here + LANES // 2, mask=mask, other=0.0)
    c3 = tl.load(here + 3 * LANES // 4, mask=mask, other=0.0)
    for i in range(count):
        scale = tl.load(terms + 2 * count + i).to(tl.float32, bitcast=True)
        w0, w1, w2, w3 = philox_words(block, site, tl.load(terms + i), tl.load(terms + count + i), STREAM)
        if LANES == 128:
            z0 = signs(w0)
            z1 = signs(w1)
            z2 = signs(w2)
            z3 = signs(w3)
        else:
            z0, z1 = normals(w0, w1)
            z2, z3 = normals(w2, w3)
        if SQUARED:
            z0 *= z0
            z1 *= z1
            z2 *= z2
            z3 *= z3
        c0 += scale * z0
        c1 += scale * z1
        c2 += scale * z2
        c3 += scale * z3
    tl.store(here, c0, mask=mask)
    tl.store(here + LANES // 4, c1, mask=mask)
    tl.store(here + LANES // 2, c2, mask=mask)
    tl.store(here + 3 * LANES // 4, c3, mask=mask)


@triton.jit
def _digest(
    words,  # int32 [size]
    sums,  # int64 [2]
    size,
    ELEMENTS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = place < size
    x = tl.load(words + place, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    x += place.to(tl.uint64) * _GAMMA
    x = (x ^ (x >> _SHIFT0)) * _MULTIPLIER0
    x = (x ^ (x >> _SHIFT1)) * _MULTIPLIER1
    x = tl.where(mask, x ^ (x >> _LAST_SHIFT), 0)
    tl.atomic_add(sums, tl.sum(x).to(tl.int64))
    tl.atomic_add(sums + 1, tl.sum(x * x).to(tl.int64))


def add_terms(
    flat: torch.Tensor,
    distribution: Distribution,
    counters: torch.Tensor,
    sites: torch.Tensor,
    terms: Sequence[tuple[int, float]],
    squared: bool = False,
) -> None:
    """Adds ``scalar Z(seed)`` of every term in place, in order, gaps included.

    Args:
        flat: float32 ``[blocks * lanes]``, with the distribution's ``LANES``.
        distribution: of Z.
        counters: of every block its number in its site, int64 ``[blocks]``.
        sites: and the site's index.
        terms: seeds and scalars; these are rounded to float32.
        squared: ``Z(seed)^2`` instead, element by element.

    """
    if not terms:
        return
    if squared and distribution == "rademacher":
        raise ValueError("the squares of signs are all 1")
    seeds, scalars = zip(*terms, strict=True)
    table = torch.from_numpy(np.concatenate([seed_halves(seeds), np.array([scalars], np.float32).view(np.int32)]))
    blocks = BLOCKS[distribution]
    _add_terms[(triton.cdiv(len(counters), blocks),)](
        flat, counters, sites, table.to(flat.device), len(terms), len(counters),
        STREAM=STREAMS[distribution], LANES=LANES[distribution], SQUARED=squared, BLOCKS=blocks, num_warps=4,
        # A fused multiplication and addition rounds once, PyTorch twice; times a sign there is nothing to round.
        enable_fp_fusion=distribution == "rademacher",
    )  # fmt: skip


def digest_sums(flat: torch.Tensor) -> torch.Tensor:
    """The sums that ``zoact_remote.digest`` hashes, as int64 patterns, ``[2]``."""
    # Both wrap mod 2^64, so that programs may add to them in any order.
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    _digest[(triton.cdiv(len(flat), ELEMENTS),)](flat.view(torch.int32), sums, len(flat), ELEMENTS=ELEMENTS)
    return sums
