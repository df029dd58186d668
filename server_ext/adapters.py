"""Adapters while the server runs, and their versions other than the newest."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server_ext import schemas
from server_ext.engines.base import Engine
from server_ext.journal import AdapterRow
from server_ext.locks import ReadWriteLock
from server_ext.store import Point
from zoact_remote.layout import Layout

OLD_VERSIONS_KEPT = 4
"""Versions other than adapters' newest that the engine holds beyond those in use."""


class Adapter:
    """An adapter's row in the journal, and what follows from it.

    Attributes:
        row: as journalled.
        layout: where it acts.
        version: the newest one.
        digest: of the newest coefficients; None before calibration.
        largest: no coefficient is larger; infinite where that is not known.
        lock: held for reading while the adapter is in use, for writing while it changes.
        deleted: set once it is gone, for those who waited for the lock.

    """

    def __init__(self, row: AdapterRow, layout: Layout) -> None:
        self.row = row
        self.layout = layout
        self.version = 0
        self.digest: str | None = None
        self.largest = math.inf
        self.lock = ReadWriteLock()
        self.deleted = False

    @property
    def newest(self) -> Point:
        """The newest coefficients of a calibrated adapter."""
        assert self.digest is not None
        return Point(self.row.key, self.version, self.digest)

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
            created=self.row.created,
            state="new" if self.digest is None else "ready",
        )


@dataclass
class _Held:
    point: Point
    users: int = 0


class OldVersions:
    """Brings past versions into the engine, each under a key of its own, and lets the longest unused go."""

    def __init__(self, engine: Engine, put: Callable[[str, Adapter, int], Awaitable[str]]) -> None:
        """``put(key, adapter, version)`` rebuilds a version in the engine under a key and returns its digest."""
        self._engine = engine
        self._put = put
        self._held: dict[str, _Held] = {}
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def hold(self, adapter: Adapter, version: int) -> AsyncIterator[Point]:
        """The point of a version, in the engine for as long as the context lasts."""
        key = f"{adapter.row.key}-{version}"
        async with self._lock:
            held = self._held.pop(key, None) or _Held(Point(key, version, await self._put(key, adapter, version)))
            self._held[key] = held
            held.users += 1
        try:
            yield held.point
        finally:
            held.users -= 1
            async with self._lock:
                unused = [key for key, held in self._held.items() if not held.users]
                await self._forget(
                    unused[: len(self._held) - OLD_VERSIONS_KEPT] if len(self._held) > OLD_VERSIONS_KEPT else []
                )

    async def forget(self, adapter: Adapter) -> None:
        """Lets all of an adapter's past versions go. Nobody may be using them."""
        async with self._lock:
            await self._forget([key for key in self._held if key.startswith(f"{adapter.row.key}-")])

    async def _forget(self, keys: list[str]) -> None:
        for key in keys:
            del self._held[key]
            await self._engine.drop(key)
