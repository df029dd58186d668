"""Adapters while the server runs, and which of their versions are in use."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from server_ext import schemas
from server_ext.journal import AdapterRow
from server_ext.key_limit import KeyLimit
from server_ext.store import Point
from zoact_remote.layout import Layout

BYTES_PER_COEFFICIENT = 4
VERSIONS_READ_AT_ONCE = 8
"""Of one adapter; whoever wants another one waits. As many as vLLM has slots by default: beyond them is memory to lose,
and no time to win."""
OLD_VERSIONS_KEPT = 2
"""Past versions of an adapter that the engine goes on to hold after they were last used."""


class Adapter:
    """An adapter's row in the journal, and what follows from it.

    Whoever evaluates a version pins it for as long as that takes: changes go on meanwhile and leave it as it is. So the
    engine holds the newest version, at most ``VERSIONS_READ_AT_ONCE`` and ``OLD_VERSIONS_KEPT`` others, and the one
    that another was just made from.

    Attributes:
        row: as journalled.
        layout: where it acts.
        version: the newest one.
        digest: of the newest coefficients; None before calibration.
        digests: of the versions that the engine holds.
        largest: no coefficient of the newest version is larger; infinite where that is not known.
        reading: lets those in who evaluate versions.
        lock: held by whoever changes the adapter, or what the engine holds of it.
        deleted: set once it is gone, for those who waited for the lock.
        failure: what left the engine with something else than the journal says, in words: an exception would keep what
            its frames hold. None if nothing did. The next call loads the adapter again.

    """

    def __init__(self, row: AdapterRow, layout: Layout) -> None:
        self.row = row
        self.layout = layout
        self.version = 0
        self.digests: dict[int, str] = {}
        self.largest = math.inf
        self.reading = KeyLimit(VERSIONS_READ_AT_ONCE)
        self.lock = asyncio.Lock()
        self.deleted = False
        self.failure: str | None = None
        self._pins: Counter[int] = Counter()
        self._unread = asyncio.Event()
        self._unread.set()
        self._lately: deque[int] = deque(maxlen=OLD_VERSIONS_KEPT)

    @property
    def digest(self) -> str | None:
        """Of the newest coefficients; None before calibration."""
        return self.digests.get(self.version)

    @property
    def state(self) -> Literal["new", "ready", "failed"]:
        """Before calibration ``new``; ``failed`` until it has been loaded again."""
        return "failed" if self.failure is not None else "new" if self.row.basis.digest is None else "ready"

    @property
    def in_use(self) -> bool:
        """Whether any version is pinned."""
        return bool(self._pins)

    def is_model(self, version: int) -> bool:
        """Whether a version is the model itself, with no coefficients but zeros."""
        return version == 0 and self.row.imported_digest is None

    def point(self, version: int) -> Point:
        """A version that the engine holds."""
        return Point(self.row.key, version, self.digests[version])

    @contextmanager
    def pinned(self, version: int) -> Iterator[None]:
        """Keeps a version in the engine."""
        self._pins[version] += 1
        self._unread.clear()
        try:
            yield
        finally:
            self._pins[version] -= 1
            if not self._pins[version]:
                del self._pins[version]
            if not self._pins:
                self._unread.set()
            if version != self.version and version in self.digests and version not in self._lately:
                self._lately.append(version)

    async def unread(self) -> None:
        """Waits until no version is pinned."""
        await self._unread.wait()

    def needed(self) -> set[int]:
        """Versions that the engine must go on to hold."""
        return {self.version, *self._pins, *self._lately}

    def info(self) -> schemas.AdapterInfo:
        return schemas.AdapterInfo(
            name=self.row.name,
            version=self.version,
            rank=self.layout.rank,
            noise=schemas.NoiseInfo(distribution=self.row.distribution, version=self.row.noise_version),
            sites=[site.name for site in self.layout.sites],
            parameters=self.layout.parameters,
            basis=self.row.basis,
            digest=self.digest,
            imported_digest=self.row.imported_digest,
            created=self.row.created,
            state=self.state,
        )
