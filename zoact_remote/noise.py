"""The noise specification, version 1, and its NumPy reference.

A probe direction Z(seed) is a pure function of ``(distribution, seed, site, element)``. Nothing about it depends on a
device, a library's generator or the order of draws, so a server, a replica and an auditor with NumPy alone all see the
same numbers.

Generator
    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
    Key: the 64-bit seed, low word first.
    Counter: ``(block mod 2^32, block div 2^32, site, stream)`` with ``block = element div lanes``.
Rademacher (stream 0, 128 lanes)
    Element ``e`` of a block reads bit ``e mod 32`` (least significant first) of output word ``e div 32``;
    ``z = -1`` where the bit is set, ``+1`` where it is not.
Gaussian (stream 1, 4 lanes)
    Box-Muller on output words (0, 1) and (2, 3). From a pair (a, b): ``u = (a div 2^8 + 1) / 2^24`` in (0, 1],
    ``t = 2 pi (b div 2^8) / 2^24``, ``z = sqrt(-2 ln u) (cos t, sin t)``, computed in float64 and rounded to float32.

Elements are numbered row-major over a site's unsharded coefficients ``[out_features, rank]``, so a tensor-parallel rank
draws just its rows by naming its first element.

Rademacher noise agrees bit for bit between implementations. Gaussian noise agrees to one unit in the last place of
float32, since libraries round logarithm and sine differently.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Distribution = Literal["rademacher", "gaussian"]

NOISE_VERSION = 1
DISTRIBUTIONS: tuple[Distribution, ...] = ("rademacher", "gaussian")
STREAMS: dict[str, int] = {"rademacher": 0, "gaussian": 1}
LANES: dict[str, int] = {"rademacher": 128, "gaussian": 4}
MAX_SEED = 2**64 - 1

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint32]:
    """Philox4x32-10 of every row of ``counter`` under the key ``seed``.

    Args:
        counter: uint64 ``[blocks, 4]``, each entry below 2^32.
        seed: 0 to 2^64 - 1.

    Returns:
        uint32 ``[blocks, 4]``.

    """
    x0, x1, x2, x3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    m0, m1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = x0 * m0, x2 * m1
        x0, x1, x2, x3 = (
            (p1 >> _SHIFT32) ^ x1 ^ np.uint64(k0),
            p1 & _MASK32,
            (p0 >> _SHIFT32) ^ x3 ^ np.uint64(k1),
            p0 & _MASK32,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & 0xFFFFFFFF, (k1 + PHILOX_WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32)


def draw(distribution: Distribution, seed: int, site: int, count: int, first: int = 0) -> NDArray[np.float32]:
    """Elements ``first`` to ``first + count`` of Z(seed) at a site.

    Args:
        distribution: ``"rademacher"`` or ``"gaussian"``.
        seed: 0 to 2^64 - 1.
        site: the site's index in the model, 0 to 2^32 - 1.
        count: number of elements.
        first: the first element's number, row-major over the unsharded coefficients.

    Returns:
        float32 ``[count]``.

    Raises:
        ValueError: an unknown distribution, or a seed or site out of range.

    """
    if distribution not in STREAMS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must lie in 0 to 2^64 - 1, got {seed}")
    if not 0 <= site < 2**32:
        raise ValueError(f"site must lie in 0 to 2^32 - 1, got {site}")
    lanes = LANES[distribution]
    blocks = np.arange(first // lanes, -(-(first + count) // lanes), dtype=np.uint64)
    counter = np.empty((len(blocks), 4), dtype=np.uint64)
    counter[:, 0], counter[:, 1] = blocks & _MASK32, blocks >> _SHIFT32
    counter[:, 2], counter[:, 3] = site, STREAMS[distribution]
    words = philox4x32(counter, seed)
    values = _signs(words) if distribution == "rademacher" else _normals(words)
    skip = first % lanes
    return values[skip : skip + count]


def _signs(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return (1.0 - 2.0 * bits.reshape(-1)).astype(np.float32)


def _normals(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    mantissas = (words >> np.uint32(8)).astype(np.float64).reshape(-1, 2, 2)
    radius = np.sqrt(-2.0 * np.log((mantissas[..., 0] + 1.0) * 2.0**-24))
    angle = 2.0 * np.pi * 2.0**-24 * mantissas[..., 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1).astype(np.float32)
