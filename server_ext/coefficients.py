"""An adapter's coefficients on a device: updates, perturbations and their digest."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch

from server_ext.noise import Noise, close_gaps, float32, has_kernels
from zoact_remote.digest import GAMMA, LAST_SHIFT, MIX, seal
from zoact_remote.layout import Layout
from zoact_remote.noise import Distribution
from zoact_remote.wire import Update

LARGEST_COEFFICIENT = 100.0
"""Trained coefficients stay below 1. Far beyond it activations overflow, and a NaN that one adapter leaves in vLLM's
key-value cache can reach requests of others: attention multiplies what it leaves out by zero."""
SMALLEST_NORMAL = 2.0**-126
"""Of float32's numbers that have all of their digits."""
LARGEST_INEXACT_ROOT = 2.0**-63
"""Square root of that number. Where a divisor is no less, what smaller numbers lose does not show."""
DIGESTED_AT_ONCE = 1 << 20
"""Coefficients; each takes up to 32 bytes for as long as its part of the buffer is digested."""
LARGEST_DRAW = {"rademacher": 1.0, "gaussian": math.sqrt(-2.0 * math.log(2.0**-24))}


def largest_step(update: Update, distribution: Distribution) -> float:
    """The most by which an update's terms can change a coefficient.

    Without knowing its noise a term is at most as large as noise gets, over the least divisor. Terms whose seeds stand
    in the normaliser too are bounded by that noise itself, with Cauchy and Schwarz:
    ``|sum_i a_i z_i| <= sqrt(sum_i a_i^2 / b_i) sqrt(sum_i b_i z_i^2)``.
    """
    sizes: dict[int, float] = {}
    for seed, scalar in update.terms:
        sizes[seed] = sizes.get(seed, 0.0) + abs(scalar)
    largest = LARGEST_DRAW[distribution]
    normaliser = update.normaliser
    if normaliser is None:
        return largest * math.fsum(sizes.values())
    offset = normaliser.offset if normaliser.offset >= SMALLEST_NORMAL else 0.0
    floor = math.sqrt(offset) + normaliser.epsilon
    weights = {seed: weight for seed, weight in normaliser.terms if weight >= SMALLEST_NORMAL}
    if normaliser.epsilon < LARGEST_INEXACT_ROOT:
        weights.clear()
    alone = largest * math.fsum(size for seed, size in sizes.items() if seed not in weights) / floor
    shared = [(size, weights[seed]) for seed, size in sizes.items() if seed in weights]
    normalised = math.sqrt(math.fsum(size * size / weight for size, weight in shared))
    return alone + min(normalised, largest * math.fsum(size for size, _ in shared) / floor)


class Coefficients:
    """C of every site at one version, as one flat buffer on one device. Never changes: an update makes new ones.

    Attributes:
        noise: draws the adapter's perturbations on the same device.
        flat: float32 ``[layout.size]``, gaps zero.

    """

    def __init__(self, noise: Noise, flat: torch.Tensor | None = None) -> None:
        size, device = noise.layout.size, noise.device
        self.noise = noise
        self.flat = torch.zeros(size, device=device) if flat is None else flat.to(device, torch.float32)
        if self.flat.shape != (size,):
            raise ValueError(f"coefficients must have shape [{size}], got {list(self.flat.shape)}")

    @property
    def layout(self) -> Layout:
        """Where the sites lie in the buffer."""
        return self.noise.layout

    def after(self, update: Update) -> Coefficients:
        """What an update makes of them, as ``zoact_remote.replay.apply_update`` does: bit for bit for Rademacher."""
        pieces = self.after_in_pieces(update)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                made: Coefficients = end.value
                return made

    def after_in_pieces(self, update: Update) -> Generator[None, None, Coefficients]:
        """The same, with a pause after every few terms: an update may have thousands."""
        kept = self.flat * float32(1.0 - update.decay) if update.decay else self.flat.clone()
        if update.normaliser is None:
            yield from self._add_terms(kept, update.terms)
            return Coefficients(self.noise, kept)
        step = torch.zeros_like(kept)
        yield from self._add_terms(step, update.terms)
        moment = torch.full_like(kept, update.normaliser.offset)
        yield from self._add_terms(moment, update.normaliser.terms, squared=True)
        # Through float64, since not every float32 square root is correctly rounded: that of MKL's vectors is not.
        root = moment.double().sqrt_().float()
        flat = close_gaps(kept + step / (root + float32(update.normaliser.epsilon)), self.layout)
        return Coefficients(self.noise, flat)

    def _add_terms(
        self, flat: torch.Tensor, terms: Sequence[tuple[int, float]], *, squared: bool = False
    ) -> Generator[None, None, None]:
        at_once = self.noise.terms_at_once
        for first in range(0, len(terms), at_once):
            self.noise.add_terms(flat, terms[first : first + at_once], squared=squared)
            yield

    def at(self, seed: int, epsilon: float) -> torch.Tensor:
        """``C + epsilon Z(seed)``, the sign in epsilon: float32 ``[layout.size]``."""
        return self.flat + self.noise.draw(seed, epsilon) if epsilon else self.flat

    def digest(self) -> str:
        """``zoact_remote.digest.coefficients_digest`` of the buffer, computed on its device."""
        total, squares = self._digest_sums().tolist()
        return seal(total, squares, self.layout)

    def _digest_sums(self) -> torch.Tensor:
        if has_kernels(self.flat.device):
            from server_ext.gpu.updates import digest_sums

            return digest_sums(self.flat)
        # Both wrap mod 2^64.
        sums = torch.zeros(2, dtype=torch.int64, device=self.flat.device)
        for first in range(0, self.layout.size, DIGESTED_AT_ONCE):
            x = self.flat[first : first + DIGESTED_AT_ONCE].view(torch.int32).to(torch.int64) & 0xFFFFFFFF
            x += torch.arange(first, first + len(x), device=x.device) * _signed(GAMMA)
            for shift, multiplier in MIX:
                x = (x ^ _shift_right(x, shift)) * _signed(multiplier)
            x = x ^ _shift_right(x, LAST_SHIFT)
            sums[0] += x.sum()
            sums[1] += (x * x).sum()
        return sums


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that PyTorch wants."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: PyTorch's own is arithmetic on int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
