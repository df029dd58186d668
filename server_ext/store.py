"""What an engine keeps of every adapter beside the model: basis and coefficients, on the model's device."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from server_ext.coefficients import Coefficients
from server_ext.noise import DrawCache, Noise
from server_ext.room import UNMEASURED_PASSES, Room
from zoact_remote.layout import Layout
from zoact_remote.noise import LANES, Distribution
from zoact_remote.wire import Update

LEAST_DRAWS, MOST_DRAWS = 64 << 20, 4 << 30
"""Bytes that draws may be kept in."""
PIECE_S = 0.1
"""Seconds that a version is made for, before others have the device."""
BUFFERS_OF_UPDATE, BUFFERS_OF_NORMALISED_UPDATE = 2, 8
"""Of the coefficients' size, that making a version takes for a while, itself among them."""


@dataclass(frozen=True)
class Point:
    """A place in coefficient space where the model is evaluated.

    Attributes:
        key: the adapter's key in the engine.
        version: the version of its coefficients.
        digest: digest of those coefficients.
        seed: seed of the perturbation.
        epsilon: the perturbation's size, its side in the sign; 0 for none.

    """

    key: str
    version: int
    digest: str
    seed: int = 0
    epsilon: float = 0.0

    @property
    def name(self) -> str:
        """A name that no other coefficients ever have: vLLM hashes cached blocks by it."""
        probe = f"{self.seed:+d}*{self.epsilon!r}" if self.epsilon else ""
        return f"zoact:{self.key}@{self.version}.{self.digest.removeprefix('sha256:')[:16]}{probe}"


class AdapterState:
    """One adapter on the device: its basis, and its coefficients at every version that is in use."""

    def __init__(self, noise: Noise, basis: dict[str, torch.Tensor], room: Room | None = None) -> None:
        self.noise = noise
        self._room = room or Room(noise.device, UNMEASURED_PASSES)
        self.basis = {name: vectors.to(noise.device, torch.float32).contiguous() for name, vectors in basis.items()}
        self.versions: dict[int, Coefficients] = {}
        self._pieces: Iterator[None] = iter(())
        self._digest: str | None = None

    @property
    def layout(self) -> Layout:
        """Where the adapter acts."""
        return self.noise.layout

    def hold(
        self, version: int, base: int | torch.Tensor | None, update: Update | None, keep: Collection[int]
    ) -> str | None:
        """Takes in a version, lets go of all others but those to keep, and returns its coefficients' digest.

        Args:
            version: the version.
            base: what it is made from: a version held, coefficients (float32 ``[layout.size]``), or None for zeros.
            update: applied to the base; None for none.
            keep: versions still needed.

        Returns:
            None if there is more to do than in ``PIECE_S``: :meth:`hold_on` goes on with it.

        Raises:
            RuntimeError: the base is not held.
            NoRoom: the device has no memory for it.

        """
        self._digest, self._pieces = None, self._hold(version, base, update, keep)
        return self.hold_on()

    def hold_on(self) -> str | None:
        """Goes on with the version that is being taken in, and returns what :meth:`hold` does."""
        deadline = time.monotonic() + PIECE_S
        for _ in self._pieces:
            if self.noise.device.type == "cuda":
                torch.cuda.synchronize(self.noise.device)  # what is launched has yet to be done
            if time.monotonic() > deadline:
                return None
        if self._digest is None:
            raise RuntimeError("no version is being taken in")
        return self._digest

    def _hold(
        self, version: int, base: int | torch.Tensor | None, update: Update | None, keep: Collection[int]
    ) -> Iterator[None]:
        """Takes in a version, piece by piece."""
        buffers = 0 if isinstance(base, int) else 1
        if update is not None:
            buffers += BUFFERS_OF_UPDATE if update.normaliser is None else BUFFERS_OF_NORMALISED_UPDATE
        self._room.check(buffers * 4 * self.layout.size)
        made = self[base] if isinstance(base, int) else Coefficients(self.noise, base)
        if update is not None:
            made = yield from made.after_in_pieces(update)
        self.versions[version] = made
        for other in self.versions.keys() - {version, *keep}:
            del self.versions[other]
        self._digest = made.digest()

    def __getitem__(self, version: int) -> Coefficients:
        try:
            return self.versions[version]
        except KeyError:
            raise RuntimeError(f"version {version} is not held, only {sorted(self.versions)}") from None


class AdapterStore:
    """All adapters of an engine, by key.

    Args:
        device: the model's.
        passes: bytes of it that a pass of the model takes at most, see :class:`Room`.

    """

    def __init__(self, device: torch.device, passes: int = UNMEASURED_PASSES) -> None:
        self.device = device
        self._adapters: dict[str, AdapterState] = {}
        self._cache = DrawCache(0)
        self._room = Room(device, passes, self._cache.clear)
        # On a GPU, where drawing anew takes many launches, up to a quarter of what there is for adapters.
        self._cache.limit = min(max(LEAST_DRAWS, (self._room.free() or 0) // 4), MOST_DRAWS)

    def put(self, key: str, layout: Layout, distribution: Distribution, basis: dict[str, torch.Tensor]) -> None:
        """Takes in an adapter, without any version of it as yet, in place of one of that key.

        Raises:
            NoRoom: the device has no memory for it, its first version and the making of another. It holds none of that
                key then.

        """
        self.drop(key)
        vectors = sum(4 * matrix.numel() for matrix in basis.values())
        counters = Noise.COUNTER_BYTES * layout.size // LANES[distribution]
        self._room.check(vectors + counters + (1 + BUFFERS_OF_NORMALISED_UPDATE) * 4 * layout.size)
        noise = Noise(layout, distribution, self.device, self._cache)
        self._adapters[key] = AdapterState(noise, basis, self._room)

    def __getitem__(self, key: str) -> AdapterState:
        try:
            return self._adapters[key]
        except KeyError:
            raise RuntimeError(f"the engine holds no adapter {key}") from None

    def drop(self, key: str) -> None:
        """Forgets an adapter."""
        state = self._adapters.pop(key, None)
        if state is not None:
            state.noise.forget()
