"""Updates applied with NumPy alone: the reference that every server must match.

An update is ``C <- (1 - decay) C + sum_i a_i Z(seed_i)``, or with a normaliser
``C <- (1 - decay) C + (sum_i a_i Z_i) / (sqrt(offset + sum_i b_i Z_i^2) + epsilon)``.
Every scalar is rounded to float32 first and terms are added in listed order, in float32. For Rademacher noise each
``a_i z`` is exact, fused multiply-add or not, so every device reaches the same bits.

A rollback is a version of its own, whose coefficients are those of an earlier one, bit for bit. A version is therefore
reached by the updates of its :func:`lineage` alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from zoact_remote.cache import Cache
from zoact_remote.layout import Layout
from zoact_remote.noise import Distribution, draw
from zoact_remote.wire import Update


class Entry(Protocol):
    """A row of a journal, as far as the order of versions goes."""

    @property
    def version(self) -> int:
        """The version that it made."""
        ...

    @property
    def rollback_to(self) -> int | None:
        """The version whose coefficients it took up again; None for an update."""
        ...


EntryT = TypeVar("EntryT", bound=Entry)


def lineage(entries: Iterable[EntryT], version: int) -> list[EntryT]:
    """The updates that lead from version 0 to a version, oldest first.

    Walked from the end: an update's version comes from the one before it, a rollback's from the version that it names.
    Rollbacks, and the updates that they undid, are left out.

    Raises:
        ValueError: an entry on the way is missing, or a rollback does not lead back.

    """
    made = {entry.version: entry for entry in entries}
    path = []
    while version > 0:
        if version not in made:
            raise ValueError(f"the journal has no version {version}")
        entry = made[version]
        if entry.rollback_to is None:
            path.append(entry)
            version -= 1
        elif 0 <= entry.rollback_to < version:
            version = entry.rollback_to
        else:
            raise ValueError(f"version {version} is a rollback to {entry.rollback_to}, which is not before it")
    return path[::-1]


def direction(layout: Layout, distribution: Distribution, seed: int) -> NDArray[np.float32]:
    """Z(seed) for a whole adapter: float32 ``[layout.size]``, gaps zero."""
    flat = np.zeros(layout.size, dtype=np.float32)
    for offset, site in zip(layout.offsets, layout.sites, strict=True):
        count = layout.count(site)
        flat[offset : offset + count] = draw(distribution, seed, site.index, count)
    return flat


class Replayer:
    """Applies the updates of one adapter, and keeps the directions used last: a seed stands in many updates in a row.

    Signs are kept as bits, Gaussian values as they are.

    Args:
        layout: where the sites lie.
        distribution: the adapter's noise.
        limit: bytes of directions kept at most.

    """

    def __init__(self, layout: Layout, distribution: Distribution, limit: int = 1 << 28) -> None:
        self._layout = layout
        self._distribution = distribution
        self._kept: Cache[NDArray[Any]] = Cache(limit)

    def apply(self, flat: NDArray[np.float32], update: Update) -> NDArray[np.float32]:
        """See :func:`apply_update`."""
        kept = flat * np.float32(1.0 - update.decay) if update.decay else flat.copy()
        if update.normaliser is None:
            return self._add_terms(kept, update.terms)
        step = self._add_terms(np.zeros_like(kept), update.terms)
        moment = np.full_like(kept, np.float32(update.normaliser.offset))
        for seed, scalar in update.normaliser.terms:
            moment += np.float32(scalar) * np.square(self._direction(seed))
        root: NDArray[np.float32] = np.sqrt(moment)
        return kept + step / (root + np.float32(update.normaliser.epsilon))

    def _add_terms(self, flat: NDArray[np.float32], terms: Iterable[tuple[int, float]]) -> NDArray[np.float32]:
        for seed, scalar in terms:
            flat += np.float32(scalar) * self._direction(seed)
        return flat

    def _direction(self, seed: int) -> NDArray[np.float32]:
        if self._distribution != "rademacher":
            return self._kept.get(seed, lambda: self._drawn(seed))
        packed = self._kept.get(seed, lambda: np.packbits(self._drawn(seed) < 0))
        flat = np.unpackbits(packed, count=self._layout.size).astype(np.float32)
        flat *= -2.0
        flat += 1.0
        for start, stop in self._layout.gaps:
            flat[start:stop] = 0.0
        return flat

    def _drawn(self, seed: int) -> NDArray[np.float32]:
        return direction(self._layout, self._distribution, seed)


def apply_update(
    flat: NDArray[np.float32], layout: Layout, distribution: Distribution, update: Update
) -> NDArray[np.float32]:
    """The coefficients after an update.

    Args:
        flat: float32 ``[layout.size]``, left as it is.
        layout: where the sites lie in it.
        distribution: the adapter's noise.
        update: terms, decay and normaliser; its versions are not looked at.

    Returns:
        float32 ``[layout.size]``.

    """
    return Replayer(layout, distribution).apply(flat, update)


def replay(
    layout: Layout,
    distribution: Distribution,
    updates: Iterable[Update],
    start: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The coefficients that updates lead to: float32 ``[layout.size]``.

    Args:
        layout: where the sites lie in them.
        distribution: the adapter's noise.
        updates: those of one :func:`lineage`: a journal with rollbacks holds more of them than count.
        start: version 0's coefficients, float32 ``[layout.size]``, of an adapter that was imported; None for zeros.

    """
    flat = np.zeros(layout.size, dtype=np.float32) if start is None else start
    replayer = Replayer(layout, distribution)
    for update in updates:
        flat = replayer.apply(flat, update)
    return flat
