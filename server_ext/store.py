"""What an engine keeps of every adapter beside the model: basis and coefficients, on the model's device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from server_ext.coefficients import Coefficients
from server_ext.noise import WordCache
from zoact_remote.layout import Layout
from zoact_remote.noise import Distribution
from zoact_remote.wire import Update


@dataclass(frozen=True)
class Point:
    """A place in coefficient space where the model is evaluated.

    Attributes:
        key: the adapter's key in the engine.
        version: the version that its coefficients must have.
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
    """One adapter on the device."""

    def __init__(
        self,
        layout: Layout,
        distribution: Distribution,
        basis: dict[str, torch.Tensor],
        flat: torch.Tensor | None,
        version: int,
        device: torch.device,
        cache: WordCache,
    ) -> None:
        self.layout = layout
        self.basis = {name: vectors.to(device, torch.float32).contiguous() for name, vectors in basis.items()}
        self.coefficients = Coefficients(layout, distribution, device, flat, cache)
        self.version = version

    def update(self, update: Update) -> str:
        """Applies an update to the version that it names and returns the digest after it.

        Raises:
            RuntimeError: the update names another version than the one held.

        """
        if update.base_version != self.version:
            raise RuntimeError(
                f"update of version {update.base_version} reached coefficients of version {self.version}"
            )
        self.coefficients.apply(update)
        self.version += 1
        return self.coefficients.digest()

    def coefficients_at(self, point: Point) -> torch.Tensor:
        """C + epsilon Z(seed): float32 ``[layout.size]``."""
        self.check(point)
        if not point.epsilon:
            return self.coefficients.flat
        return self.coefficients.flat + self.coefficients.perturbation(point.seed, point.epsilon)

    def check(self, point: Point) -> None:
        """Raises RuntimeError unless the point's version is the one held."""
        if point.version != self.version:
            raise RuntimeError(f"{point.key} is at version {self.version}, but version {point.version} was asked for")


class AdapterStore:
    """All adapters of an engine, by key."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._adapters: dict[str, AdapterState] = {}
        self._cache = WordCache()

    def put(
        self,
        key: str,
        layout: Layout,
        distribution: Distribution,
        basis: dict[str, torch.Tensor],
        flat: torch.Tensor | None,
        version: int,
    ) -> str:
        """Takes in an adapter (zero coefficients for ``flat=None``) and returns its coefficients' digest."""
        state = AdapterState(layout, distribution, basis, flat, version, self.device, self._cache)
        self._adapters[key] = state
        return state.coefficients.digest()

    def __getitem__(self, key: str) -> AdapterState:
        try:
            return self._adapters[key]
        except KeyError:
            raise RuntimeError(f"the engine holds no adapter {key}") from None

    def drop(self, key: str) -> None:
        self._adapters.pop(key, None)


def basis_digest(basis: dict[str, NDArray[np.float32]]) -> str:
    """SHA-256 over the bases' names, shapes and float32 bytes, in order of name."""
    sha = hashlib.sha256(b"zoact-basis-1")
    for name in sorted(basis):
        vectors = np.ascontiguousarray(basis[name], dtype="<f4")
        sha.update(f"\0{name}\0{vectors.shape[0]}\0{vectors.shape[1]}\0".encode())
        sha.update(vectors.tobytes())
    return "sha256:" + sha.hexdigest()
