"""The digests that say whether two sets of coefficients, or two bases, are the same, bit for bit.

Coefficients live on an accelerator, and an update of them takes microseconds there, so their digest must not copy them
to the host. Each 32-bit word, tagged with its place, goes through a 64-bit mixer; the words' sum and the sum of their
squares, mod 2^64, are then hashed with SHA-256 together with the layout. Both sums are a single pass in integer
arithmetic, in any order, on any device.

The mixer is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014). The digest detects accidents and drift; it is not made to withstand someone who forges coefficients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from zoact_remote.layout import Layout

DIGEST_TAG = b"zoact-coefficients-1"
BASIS_TAG = b"zoact-basis-1"
GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


def coefficients_digest(flat: NDArray[np.float32], layout: Layout) -> str:
    """Digest of a flat buffer of coefficients.

    Args:
        flat: float32 ``[layout.size]``, gaps zero.
        layout: where the sites lie in it.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.

    """
    words = np.ascontiguousarray(flat, dtype=np.float32).view(np.uint32).astype(np.uint64)
    x = words + np.arange(len(words), dtype=np.uint64) * np.uint64(GAMMA)
    for shift, multiplier in MIX:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(multiplier)
    x ^= x >> np.uint64(LAST_SHIFT)
    return seal(int(x.sum(dtype=np.uint64)), int((x * x).sum(dtype=np.uint64)), layout)


def seal(total: int, squares: int, layout: Layout) -> str:
    """SHA-256 over the layout and the two sums, each taken mod 2^64."""
    sha = hashlib.sha256(DIGEST_TAG)
    for site in layout.sites:
        sha.update(f"\0{site.name}\0{site.out_features}\0{layout.rank}".encode())
    for value in (total, squares):
        sha.update((value % 2**64).to_bytes(8, "little"))
    return "sha256:" + sha.hexdigest()


def basis_digest(basis: Mapping[str, NDArray[np.float32]]) -> str:
    """Digest of a basis: SHA-256 over its inputs' names, shapes and little-endian float32 bytes, in order of name.

    Args:
        basis: float32 ``[in_features, rank]`` by input.

    """
    sha = hashlib.sha256(BASIS_TAG)
    for name in sorted(basis):
        vectors = np.ascontiguousarray(basis[name], dtype="<f4")
        sha.update(f"\0{name}\0{vectors.shape[0]}\0{vectors.shape[1]}\0".encode())
        sha.update(vectors.tobytes())
    return "sha256:" + sha.hexdigest()
