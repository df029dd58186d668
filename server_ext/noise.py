"""The noise specification (``zoact_remote.noise``) in PyTorch, for all of an adapter's sites in one pass."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch

from zoact_remote.cache import Cache
from zoact_remote.layout import Layout
from zoact_remote.noise import LANES, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, STREAMS, Distribution

TERMS_IN_KERNEL = 256
"""Terms that one launch adds."""
_MASK32 = 0xFFFFFFFF


DrawCache = Cache[torch.Tensor]
"""What draws are made of by seed, for many adapters together.

A seed is drawn again and again: on both sides of its probe, and in every update whose window of past probes it stands
in. Of a Rademacher draw Philox's words are kept, one bit a coefficient and most of the work; of a Gaussian one its
values, which take as much room as the words.
"""


class Noise:
    """Draws Z(seed) over a layout's flat buffer.

    The counters depend on the layout alone and are made once: 24 bytes for each 128 Rademacher coefficients (768 for
    Gaussian ones).

    Attributes:
        counter: of every block the number in its site, its upper half, and the site's index: int64 ``[blocks]`` each.

    """

    COUNTER_BYTES = 24
    """Of a block."""

    def __init__(
        self,
        layout: Layout,
        distribution: Distribution,
        device: torch.device | str = "cpu",
        cache: DrawCache | None = None,
    ) -> None:
        self.layout = layout
        self.distribution = distribution
        self.device = torch.device(device)
        self._cache = cache or DrawCache(limit=0)
        lanes = LANES[distribution]
        blocks = [torch.arange(layout.padded(site) // lanes, device=device) for site in layout.sites]
        sites = [torch.full_like(b, s.index) for b, s in zip(blocks, layout.sites, strict=True)]
        block = torch.cat(blocks)
        self.counter = (block & _MASK32, block >> 32, torch.cat(sites))
        # A byte of Philox output is eight signs: looking them up beats taking bits apart.
        byte = torch.arange(256, device=device).unsqueeze(1)
        self._signs_of_byte = (1.0 - 2.0 * ((byte >> torch.arange(8, device=device)) & 1)).to(torch.float32)

    def draw(self, seed: int, scale: float = 1.0) -> torch.Tensor:
        """``scale Z(seed)``: float32 ``[layout.size]``, gaps zero. The scale is rounded to float32 first."""
        if self.distribution == "rademacher":
            flat = self._signs(self._cache.get((self, seed), lambda: self._words(seed)), scale)
        else:
            flat = self._cache.get((self, seed), lambda: self._normals(self._words(seed))) * float32(scale)
        return close_gaps(flat, self.layout)

    def forget(self) -> None:
        """Lets go of the draws that are kept, none of which will be wanted again."""
        self._cache.drop(lambda key: isinstance(key, tuple) and key[0] is self)

    @property
    def terms_at_once(self) -> int:
        """As many as are added in a fraction of a second."""
        return TERMS_IN_KERNEL if has_kernels(self.device) else 1

    def add_terms(self, flat: torch.Tensor, terms: Sequence[tuple[int, float]], *, squared: bool = False) -> None:
        """Adds ``scalar Z(seed)`` of every term in place, one after another; gaps stay zero.

        Args:
            flat: float32 ``[layout.size]``.
            terms: seeds and scalars; these are rounded to float32.
            squared: ``Z(seed)^2`` instead, element by element.

        """
        if squared and self.distribution == "rademacher":  # the squares of signs are all 1
            for _, scalar in terms:
                flat += float32(scalar)
        elif has_kernels(self.device):
            from server_ext.gpu.updates import add_terms

            add_terms(flat, self.distribution, self.counter[0], self.counter[2], terms, squared)
        else:
            for seed, scalar in terms:
                flat += self.draw(seed).square_().mul_(float32(scalar)) if squared else self.draw(seed, scalar)
            return
        close_gaps(flat, self.layout)

    def _words(self, seed: int) -> torch.Tensor:
        """Philox's output: int32 ``[blocks, 4]``."""
        stream = torch.full_like(self.counter[0], STREAMS[self.distribution])
        return _philox(*self.counter, stream, seed).to(torch.int32)

    def _signs(self, words: torch.Tensor, scale: float) -> torch.Tensor:
        # Words lie in memory least significant byte first, as bits are numbered.
        octets = words.view(torch.uint8).reshape(-1).to(torch.int64)
        return (self._signs_of_byte * float32(scale)).index_select(0, octets).reshape(-1)

    def _normals(self, words: torch.Tensor) -> torch.Tensor:
        mantissas = ((words.to(torch.int64) & _MASK32) >> 8).to(torch.float64).reshape(-1, 2, 2)
        radius = torch.sqrt(-2.0 * torch.log((mantissas[..., 0] + 1.0) * 2.0**-24))
        angle = 2.0 * math.pi * 2.0**-24 * mantissas[..., 1]
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).reshape(-1).to(torch.float32)


def has_kernels(device: torch.device) -> bool:
    """Whether kernels of ours draw, add and digest on a device: PyTorch does it with a pass for every operation."""
    return device.type == "cuda" and _triton_compiles()


@cache
def _triton_compiles() -> bool:
    """Whether there is Triton, and the C compiler that it needs."""
    compilers = [os.environ.get("CC"), "gcc", "clang"]
    return find_spec("triton") is not None and any(name and which(name) for name in compilers)


def float32(value: float) -> float:
    """The nearest float32: a Python scalar would otherwise meet a tensor in double precision."""
    return torch.tensor(value, dtype=torch.float32).item()


def close_gaps(flat: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Zeroes, in place, what lies between the sites of a flat buffer."""
    for start, stop in layout.gaps:
        flat[start:stop] = 0
    return flat


def _philox(x0: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor, x3: torch.Tensor, seed: int) -> torch.Tensor:
    """Philox4x32-10 in int64 lanes, ``[blocks, 4]``.

    A product of two 32-bit numbers overflows int64, but wraps to the same 64 bits as in uint64, so that shift and mask
    recover both halves.
    """
    k0, k1 = seed & _MASK32, seed >> 32
    m0, m1 = PHILOX_MULTIPLIERS
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = x0 * m0, x2 * m1
        x0, x1 = ((p1 >> 32) & _MASK32) ^ x1 ^ k0, p1 & _MASK32
        x2, x3 = ((p0 >> 32) & _MASK32) ^ x3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _MASK32, (k1 + PHILOX_WEYL[1]) & _MASK32
    return torch.stack([x0, x1, x2, x3], dim=1)
