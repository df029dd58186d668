"""Adapters, kept in step between journal, disk and engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server_ext import schemas
from server_ext.adapters import Adapter
from server_ext.coefficients import LARGEST_COEFFICIENT, largest_step
from server_ext.disk import JournalThread, in_thread
from server_ext.engines.base import Engine
from server_ext.errors import ApiError, invalid, no_room
from server_ext.journal import TERMS_AT_ONCE, AdapterRow, Entry, Journal
from server_ext.logs import log
from server_ext.metrics import Metrics
from server_ext.room import NoRoom
from server_ext.state_files import StateFiles
from server_ext.store import Point
from server_ext.together import to_its_end
from server_ext.versions import Versions
from zoact_remote.digest import basis_digest
from zoact_remote.layout import Layout, select_sites
from zoact_remote.wire import Change, Rollback, Update

SNAPSHOT_EVERY = 32
"""Changes from one snapshot to the next."""


class Registry:
    """All adapters of one engine, with journal, bases, imports and snapshots in one directory that is theirs alone.

    Args:
        engine: holds their coefficients.
        directory: made if it is not there.
        metrics: count what happens.
        snapshot_every: changes from one snapshot to the next.

    Raises:
        ValueError: another server uses the directory, or what is in it is of another model.

    """

    def __init__(self, engine: Engine, directory: Path, metrics: Metrics, snapshot_every: int = SNAPSHOT_EVERY) -> None:
        self._engine = engine
        self._directory = directory
        self._metrics = metrics
        self._snapshot_tasks: set[asyncio.Task[None]] = set()
        with ExitStack() as undo:
            self._files = StateFiles(directory, snapshot_every)
            undo.callback(self._files.close)
            journal = Journal(directory / "journal.sqlite")
            undo.callback(journal.close)
            self._adapters = {row.name: Adapter(row, self._layout(row)) for row in journal.adapters()}
            self._files.sweep({adapter.row.key for adapter in self.all()})
            undo.pop_all()
        self._journal = JournalThread(journal)
        self._versions = Versions(engine, self._journal, self._files, metrics)

    async def restore(self) -> None:
        """Brings every adapter back at its last version. One that is damaged is marked so, and the others serve."""
        for adapter in self.all():
            if adapter.row.basis.digest is not None:
                async with adapter.lock:
                    with suppress(ApiError):
                        await self._load(adapter)

    async def close(self) -> None:
        """Writes a snapshot of what has changed since its last one, so that the next start has nothing to replay."""
        await asyncio.gather(*self._snapshot_tasks)
        for adapter in self.all():
            ready = adapter.digest is not None and adapter.failure is None
            if ready and adapter.version not in self._files.snapshots.versions(adapter.row.key):
                self._start_snapshot(adapter)
                await asyncio.gather(*self._snapshot_tasks)
        await self._journal.close()
        self._files.close()

    # Finding adapters -------------------------------------------------------------------------------------------------

    def all(self) -> list[Adapter]:
        """Every adapter, oldest first."""
        return list(self._adapters.values())

    def __contains__(self, name: str) -> bool:
        """Whether there is an adapter of a name."""
        return name in self._adapters

    def adapter(self, name: str) -> Adapter:
        """Raises ApiError (404) for a name that is not there."""
        try:
            return self._adapters[name]
        except KeyError:
            raise ApiError(404, "adapter_not_found", f"there is no adapter {name!r}", "adapter") from None

    def check_free(self, name: str) -> None:
        """Raises ApiError (409) for a name that is taken."""
        if name in self:
            raise _taken(name)

    async def calibrated(self, name: str) -> Adapter:
        """As ``adapter``; raises ApiError too if it has no basis yet (409), or failed and does so again (500)."""
        adapter = self.adapter(name)
        if adapter.failure is not None:
            async with adapter.lock:
                self._check_there(adapter)
                await self._mend(adapter)
        self._check_calibrated(adapter)
        return adapter

    @asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[Adapter]:
        """An adapter that nobody else changes meanwhile."""
        adapter = self.adapter(name)
        async with adapter.lock:
            self._check_there(adapter)
            yield adapter

    # Changing adapters ------------------------------------------------------------------------------------------------

    @to_its_end
    async def add(self, row: AdapterRow, layout: Layout) -> Adapter:
        """Adds an adapter. Raises ApiError if its name is taken (409), or the disk failed (503)."""
        adapter = Adapter(row, layout)
        await self._add(adapter)
        return adapter

    @to_its_end
    async def add_imported(
        self, row: AdapterRow, layout: Layout, basis: dict[str, NDArray[np.float32]], flat: NDArray[np.float32]
    ) -> Adapter:
        """Adds an adapter that has its basis, and coefficients at version 0; the row holds the digests of both.

        Its files are on disk and the engine holds it before the journal says that it is there.

        Raises:
            ApiError: its name is taken (409), the disk failed (503), or the engine has no memory left for it (507).

        """
        assert row.imported_digest is not None
        self.check_free(row.name)
        adapter = Adapter(row, layout)
        try:
            await in_thread(self._files.write_basis, row.key, basis)
            await in_thread(self._files.write_import, row.key, row.imported_digest, flat)
            await self._versions.load(adapter)
        except BaseException:
            await self._forget(adapter)
            raise
        try:
            await self._add(adapter)
        except BaseException:
            # Its row may be in the journal after a restart, which removes the files if it is not.
            await self._drop_if_unused(adapter)
            raise
        return adapter

    async def _add(self, adapter: Adapter) -> None:
        try:
            await self._journal(Journal.add_adapter, adapter.row)
        except KeyError:
            raise _taken(adapter.row.name) from None
        self._adapters[adapter.row.name] = adapter

    @to_its_end
    async def remove(self, adapter: Adapter) -> None:
        """Removes an adapter and its history. Raises ApiError (503) if the disk failed."""
        await self._journal(Journal.remove_adapter, adapter.row.key)
        adapter.deleted = True
        del self._adapters[adapter.row.name]
        await self._forget(adapter)

    async def _forget(self, adapter: Adapter) -> None:
        """Removes what there is of an adapter beside the journal. Files that cannot be removed are so at a start."""
        try:
            await self._drop_if_unused(adapter)
            await in_thread(self._files.remove, adapter.row.key)
        except Exception:
            log.warning("adapter not removed altogether", adapter=adapter.row.name, exc_info=True)

    @to_its_end
    async def set_basis(
        self, adapter: Adapter, vectors: dict[str, NDArray[np.float32]], energy: dict[str, float], positions_seen: int
    ) -> str:
        """Gives an adapter its basis, and returns the digest of it."""
        digest = await in_thread(basis_digest, vectors)
        await in_thread(self._files.write_basis, adapter.row.key, vectors)
        found = {"digest": digest, "energy": energy, "positions_seen": positions_seen}
        basis = adapter.row.basis.model_copy(update=found)
        await self._journal(Journal.set_basis, adapter.row.key, basis)
        adapter.row = replace(adapter.row, basis=basis)
        await self._load(adapter)
        return digest

    async def change(self, adapter: Adapter, change: Change, path: str = "") -> schemas.UpdateResult:
        """Applies an update or a rollback to an adapter that is held for changing.

        Args:
            adapter: a calibrated one.
            change: what to do.
            path: of the change in the call, for error messages.

        Raises:
            ApiError: the change is stale (412), uses a key of another one (409), goes back to a version that is not
                there (404) or is too large (400), the adapter has no basis yet (409) or cannot be brought back after a
                failure (500), or the engine has no memory left (507); nothing changed. The disk failed (503); the
                change may be there after a restart.

        """
        await self._mend(adapter)
        self._check_calibrated(adapter)
        before = await self._made_before(adapter, change, path)
        if before is not None:
            return before
        if change.base_version != adapter.version:
            raise ApiError(
                412,
                "stale_version",
                f"{path}base_version: {change.base_version} is not the newest version ({adapter.version}); "
                "nothing changed",
                f"{path}base_version",
                current_version=adapter.version,
            )
        if isinstance(change, Rollback):
            self.existing(adapter, change.to_version, "to_version")
            await self._versions.hold(adapter, change.to_version)
            largest = math.inf
        else:
            largest = await self._largest_after(adapter, change, path)
        assert adapter.digest is not None
        try:
            with self._metrics.appending():
                version = await self._journal(Journal.append, adapter.row.key, change, adapter.digest)
            base = change.to_version if isinstance(change, Rollback) else change.base_version
            digest = await self._versions.make(adapter, version, base, change)
        except ApiError:
            raise  # The journal does not have it, as long as this process lasts.
        except NoRoom as error:
            await self._take_back(adapter, version)
            raise no_room(error) from error
        except BaseException as error:
            # The change stands in the journal, or may do so: it happened, whatever the engine made of it.
            adapter.failure = repr(error)
            raise
        adapter.version = version
        adapter.largest = largest
        self._metrics.changed(adapter.row.tenant, change)
        await self._versions.note_digest(adapter, version, digest)
        if version % self._files.snapshots.every == 0:
            self._start_snapshot(adapter)
        return schemas.UpdateResult(version=version, digest=digest, applied=True)

    async def _take_back(self, adapter: Adapter, version: int) -> None:
        """Strikes the newest change, which the engine has not begun with and nobody has been told of."""
        try:
            await self._journal(Journal.retract, adapter.row.key, version)
        except BaseException as error:
            adapter.failure = repr(error)
            raise

    async def _made_before(self, adapter: Adapter, change: Change, path: str) -> schemas.UpdateResult | None:
        """The answer to a change whose key has been used, if it has."""
        if change.key is None:
            return None
        entry = await self._journal(Journal.find, adapter.row.key, change.key)
        if entry is None:
            return None
        if entry.change != change:
            raise ApiError(409, "key_conflict", f"{path}key: another change was sent under this key", f"{path}key")
        digest = entry.digest or await self._versions.hold(adapter, entry.version)
        return schemas.UpdateResult(version=entry.version, digest=digest, applied=False)

    async def _largest_after(self, adapter: Adapter, update: Update, path: str) -> float:
        """A bound on the coefficients after an update; ApiError if it is too large."""

        def bound() -> float:
            kept = (1.0 - update.decay) * adapter.largest if update.decay < 1.0 else 0.0
            return kept + largest_step(update, adapter.row.distribution)

        if bound() > LARGEST_COEFFICIENT:
            # The bound has added up every step so far, whatever its sign: look at what they came to.
            adapter.largest = float(np.abs(await self._engine.read(adapter.row.key, adapter.version)).max())
            if bound() > LARGEST_COEFFICIENT:
                limit = f"{LARGEST_COEFFICIENT:g}"
                raise invalid(f"{path}terms", f"coefficients could come to {bound():.3g}, beyond the limit of {limit}")
        return bound()

    # Versions ---------------------------------------------------------------------------------------------------------

    async def entries(self, adapter: Adapter, after: int, limit: int) -> list[Entry]:
        """An adapter's history behind a version: so many entries, or fewer if they are long.

        Raises ApiError (404) if the adapter was deleted meanwhile.
        """
        newest, digest = adapter.version, adapter.digest
        entries = await self._journal(Journal.entries, adapter.row.key, after, newest, limit, TERMS_AT_ONCE)
        self._check_there(adapter)
        # The newest version's digest may be known without having reached the disk.
        return [replace(entry, digest=digest) if entry.version == newest else entry for entry in entries]

    async def basis(self, adapter: Adapter) -> dict[str, NDArray[np.float32]]:
        """A calibrated adapter's basis: float32 ``[in_features, rank]`` by input."""
        try:
            return await in_thread(self._files.read_basis, adapter.row.key, adapter.row.basis.digest)
        except FileNotFoundError:
            self._check_there(adapter)
            raise

    def existing(self, adapter: Adapter, version: int | None, param: str = "version") -> int:
        """A version, the newest for None. Raises ApiError (404) for one that is not there."""
        if version is None:
            return adapter.version
        if version > adapter.version:
            raise ApiError(
                404, "version_not_found", f"{param}: no version {version}; the newest is {adapter.version}", param
            )
        return version

    @asynccontextmanager
    async def at(self, adapter: Adapter, version: int) -> AsyncIterator[Point]:
        """An existing version, which the engine holds for as long as the context lasts, whatever changes meanwhile.

        Of one adapter there are so many versions at a time; for a further one it waits. Raises ApiError if the adapter
        was deleted meanwhile (404), or failed and does so again (500), or if the engine has no memory left (507).
        """
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(adapter.reading.use(version))
                if version == adapter.version and adapter.failure is None:
                    self._check_there(adapter)
                    stack.enter_context(adapter.pinned(version))
                else:
                    async with adapter.lock:
                        self._check_there(adapter)
                        await self._mend(adapter)
                        await self._versions.hold(adapter, version)
                        stack.enter_context(adapter.pinned(version))
                yield adapter.point(version)
        finally:
            if adapter.deleted:
                await self._drop_if_unused(adapter)

    async def _mend(self, adapter: Adapter) -> None:
        """Brings an adapter that is locked back if something has gone wrong with it, as ``_load`` does."""
        if adapter.failure is not None:
            log.warning("adapter is loaded again", adapter=adapter.row.name, after=adapter.failure)
            # Nobody begins to read it before it is mended, and what is read already must not be taken away.
            await adapter.unread()
            await self._load(adapter)

    async def _load(self, adapter: Adapter) -> None:
        """Has the engine hold an adapter that is locked as the journal says.

        Raises ApiError if it does not (500), or has no memory left for it (507), or the disk failed (503).
        """
        try:
            await self._versions.load(adapter)
        except ApiError as error:
            adapter.failure = repr(error)
            log.warning("adapter not loaded", adapter=adapter.row.name, error=error.message)
            raise
        except BaseException as error:
            adapter.failure = repr(error)
            if not isinstance(error, Exception):
                raise
            log.exception("adapter not loaded", adapter=adapter.row.name)
            message = f"{adapter.row.name!r} could not be brought back from the journal; the server's log says why"
            raise ApiError(500, "adapter_failed", message, "adapter") from error
        adapter.failure = None

    def _start_snapshot(self, adapter: Adapter) -> None:
        """Writes a snapshot of the newest version, beside whatever else goes on."""
        pin = ExitStack()
        pin.enter_context(adapter.pinned(adapter.version))
        task = asyncio.create_task(self._snapshot(adapter, adapter.point(adapter.version), pin))
        self._snapshot_tasks.add(task)
        task.add_done_callback(self._snapshot_tasks.discard)

    async def _snapshot(self, adapter: Adapter, point: Point, pin: ExitStack) -> None:
        try:
            with pin:
                flat = await self._engine.read(point.key, point.version)
            await in_thread(self._files.snapshots.write, point.key, point.version, point.digest, flat)
        except Exception:
            log.warning("snapshot not written", adapter=adapter.row.name, version=point.version, exc_info=True)
        if adapter.deleted:
            await in_thread(self._files.snapshots.remove, adapter.row.key)
            await self._drop_if_unused(adapter)

    async def _drop_if_unused(self, adapter: Adapter) -> None:
        if not adapter.in_use:
            await self._engine.drop(adapter.row.key)

    def _check_calibrated(self, adapter: Adapter) -> None:
        """Raises ApiError (409) if an adapter has no basis yet."""
        if adapter.digest is None:
            name = adapter.row.name
            raise ApiError(409, "basis_missing", f"{name!r} has no basis yet: POST rows to its /basis first", "adapter")

    def _check_there(self, adapter: Adapter) -> None:
        """Raises ApiError (404) if an adapter was deleted while somebody waited for it."""
        if adapter.deleted:
            raise ApiError(404, "adapter_not_found", f"there is no adapter {adapter.row.name!r}", "adapter")

    def _layout(self, row: AdapterRow) -> Layout:
        if row.model_digest != self._engine.model.digest:
            raise ValueError(
                f"{self._directory} holds adapters of another model, such as {row.name}: its digest is "
                f"{row.model_digest}, not {self._engine.model.digest}; serve that one, or take another state directory"
            )
        return Layout(select_sites(self._engine.sites, row.sites), row.rank)


def _taken(name: str) -> ApiError:
    return ApiError(409, "adapter_exists", f"an adapter {name!r} exists already", "name")
