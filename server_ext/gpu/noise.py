"""The noise specification (``zoact_remote.noise``) in Triton: Z in registers, for kernels to use as they draw it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

RADIANS = tl.constexpr(2.0 * math.pi * 2.0**-24)


def seed_halves(seeds: Sequence[int]) -> NDArray[np.int32]:
    """Lower and upper halves of seeds, ``[2, seeds]``: int32 patterns, in which every seed reaches a kernel."""
    return np.ascontiguousarray(np.array(seeds, "<u8").view("<i4").reshape(-1, 2).T)


@triton.jit
def philox_words(block, site, low, high, STREAM: tl.constexpr):
    """Philox's four output words for each of ``block``: uint32. The seed's halves come as int32."""
    seed = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = tl.zeros_like(block)
    return tl.philox(seed, block, zero, zero + site, zero + STREAM)


@triton.jit
def signs(word):
    """The 32 Rademacher values of every word, float32 ``[words, 32]``."""
    bits = (word[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    return 1.0 - 2.0 * bits.to(tl.float32)


@triton.jit
def normals(first, second):
    """Box-Muller on pairs of words, in float64 as the specification has it: two float32 values a pair."""
    uniform = ((first >> 8).to(tl.float64) + 1.0) * 5.9604644775390625e-08
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    angle = (second >> 8).to(tl.float64) * RADIANS
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)
