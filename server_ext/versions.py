"""Versions of adapters, brought into the engine: from what it holds, a snapshot or an import, by way of the journal."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from server_ext.adapters import Adapter
from server_ext.disk import JournalThread, in_thread
from server_ext.engines.base import Engine
from server_ext.errors import ApiError, no_room
from server_ext.journal import TERMS_AT_ONCE, Entry, Journal
from server_ext.logs import log
from server_ext.metrics import Metrics
from server_ext.room import NoRoom
from server_ext.state_files import StateFiles
from zoact_remote.wire import Change, Update


class Versions:
    """Has the engine hold versions of adapters, each of which is locked by whoever calls.

    Args:
        engine: holds them.
        journal: how they came about.
        files: bases, imports and snapshots.
        metrics: count what is replayed.

    """

    def __init__(self, engine: Engine, journal: JournalThread, files: StateFiles, metrics: Metrics) -> None:
        self._engine = engine
        self._journal = journal
        self._files = files
        self._metrics = metrics

    async def load(self, adapter: Adapter) -> None:
        """Brings an adapter into the engine, at its newest version, and forgets what the engine held of it before.

        Raises ApiError (507) if the engine has no room for it.
        """
        row = adapter.row
        basis = await in_thread(self._files.read_basis, row.key, row.basis.digest)
        adapter.digests = {}
        with _refused_without_room():
            await self._engine.put(row.key, adapter.layout, row.distribution, basis)
        version = await self._journal(Journal.newest, row.key)
        await self.hold(adapter, version)
        adapter.version, adapter.largest = version, math.inf

    async def hold(self, adapter: Adapter, version: int) -> str:
        """Sees to it that the engine holds a version, and returns its digest. Raises ApiError (507) if it cannot."""
        if version in adapter.digests:
            return adapter.digests[version]
        start, flat, versions = await self._way_to(adapter, version)
        if start not in adapter.digests:
            with _refused_without_room():
                await self.make(adapter, start, flat, None)
        async for entry in self._entries_of(adapter, versions):
            with _refused_without_room():
                digest = await self.make(adapter, entry.version, start, entry.change)
            if entry.digest is None:
                await self.note_digest(adapter, entry.version, digest)
            elif entry.digest != digest and adapter.row.distribution == "rademacher":
                # The engine holds something else than this version, and must not be taken at its word.
                del adapter.digests[entry.version]
                raise ValueError(
                    f"version {entry.version} of {adapter.row.name} replays to other coefficients than before"
                )
            start = entry.version
        self._metrics.replayed(len(versions))
        return adapter.digests[version]

    async def make(
        self, adapter: Adapter, version: int, base: int | NDArray[np.float32] | None, change: Change | None
    ) -> str:
        """Has the engine take in a version. To what it goes back to, a rollback adds nothing."""
        update = change if isinstance(change, Update) else None
        keep = adapter.needed()
        # Beforehand: an engine that fails may have let go of the others already.
        adapter.digests = {v: d for v, d in adapter.digests.items() if v in keep}
        adapter.digests[version] = digest = await self._engine.hold(adapter.row.key, version, base, update, keep)
        return digest

    async def note_digest(self, adapter: Adapter, version: int, digest: str) -> None:
        """Writes down what a change came to."""
        try:
            await self._journal(Journal.set_digest, adapter.row.key, version, digest)
        except ApiError:
            # Whoever replays the change finds its digest again: a full disk is no reason to fail what has been done.
            log.warning("digest not written", version=version)

    async def _entries_of(self, adapter: Adapter, versions: Sequence[int]) -> AsyncIterator[Entry]:
        """A few at a time: all adapters share the journal's thread."""
        while versions:
            entries = await self._journal(Journal.entries_of, adapter.row.key, versions, TERMS_AT_ONCE)
            versions = versions[len(entries) :]
            for entry in entries:
                yield entry

    async def _way_to(self, adapter: Adapter, version: int) -> tuple[int, NDArray[np.float32] | None, list[int]]:
        """A version to start from, its coefficients if they are in a file, and the versions to make from there on."""
        row, key, layout = adapter.row, adapter.row.key, adapter.layout
        held, snapshots = set(adapter.digests), set(await in_thread(self._files.snapshots.versions, key))
        while True:
            start, versions = await self._journal(Journal.path, key, version, held | snapshots)
            if start in held or adapter.is_model(start):
                return start, None, versions
            if start == 0:
                return start, await in_thread(self._files.read_import, key, row.imported_digest, layout), versions
            flat = await in_thread(self._files.snapshots.read, key, start, layout)
            if flat is not None:
                return start, flat, versions
            snapshots.remove(start)


@contextmanager
def _refused_without_room() -> Iterator[None]:
    """Refuses a call for which the engine has no memory left."""
    try:
        yield
    except NoRoom as error:
        raise no_room(error) from error
