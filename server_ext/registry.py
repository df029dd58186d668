"""Adapters, kept in step between journal, disk and engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from server_ext import basis_files, schemas
from server_ext.adapters import Adapter, OldVersions
from server_ext.coefficients import LARGEST_COEFFICIENT, Coefficients, largest_step
from server_ext.engines.base import Engine
from server_ext.errors import ApiError, invalid
from server_ext.journal import AdapterRow, Journal, UpdateRow
from server_ext.locks import WriteHold
from server_ext.store import Point, basis_digest
from zoact_remote.layout import Layout, select_sites
from zoact_remote.wire import Update

T = TypeVar("T")


class Registry:
    """All adapters of one engine, with their journal and bases in one directory.

    What changes an adapter takes it as held for writing, and what reads it as held for reading: see ``writing`` and
    ``reading``.
    """

    def __init__(self, engine: Engine, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._engine = engine
        self._directory = directory
        self._journal = Journal(directory / "journal.sqlite")
        # One thread: SQLite sees its statements in order, and commits wait for the disk beside the event loop.
        self._disk = ThreadPoolExecutor(1, "zoact-disk")
        self._adapters: dict[str, Adapter] = {}
        self._old_versions = OldVersions(engine, self._put_old_version)

    async def restore(self) -> None:
        """Brings every adapter of the journal back at its last version.

        Raises:
            ValueError: the journal belongs to another model, or what is on disk is damaged.

        """
        for row in await self._on_disk(self._journal.adapters):
            try:
                layout = Layout(select_sites(self._engine.sites, row.sites), row.rank)
            except ValueError as error:
                raise ValueError(f"adapter {row.name} in {self._directory} is not of this model: {error}") from None
            adapter = self._adapters[row.name] = Adapter(row, layout)
            if row.basis.digest is not None:
                await self._load(adapter)

    async def close(self) -> None:
        await self._on_disk(self._journal.close)
        self._disk.shutdown()

    # Finding and holding adapters -------------------------------------------------------------------------------------

    def all(self) -> list[Adapter]:
        """Every adapter, oldest first."""
        return list(self._adapters.values())

    def adapter(self, name: str) -> Adapter:
        """Raises ApiError (404) for a name that is not there."""
        try:
            return self._adapters[name]
        except KeyError:
            raise ApiError(404, "adapter_not_found", f"there is no adapter {name!r}", "adapter") from None

    def calibrated(self, name: str) -> Adapter:
        """As ``adapter``; raises ApiError (409) too if it has no basis yet."""
        adapter = self.adapter(name)
        if adapter.digest is None:
            raise ApiError(409, "basis_missing", f"{name!r} has no basis yet: POST rows to its /basis first", "adapter")
        return adapter

    @asynccontextmanager
    async def reading(self, name: str) -> AsyncIterator[Adapter]:
        """A calibrated adapter that does not change meanwhile."""
        adapter = self.calibrated(name)
        async with adapter.lock.read():
            if adapter.deleted:
                self.adapter(name)
            yield adapter

    @asynccontextmanager
    async def writing(self, name: str) -> AsyncIterator[tuple[Adapter, WriteHold]]:
        """An adapter that nobody else reads or changes meanwhile."""
        adapter = self.adapter(name)
        async with adapter.lock.write() as hold:
            if adapter.deleted:
                self.adapter(name)
            yield adapter, hold

    # Changing adapters ------------------------------------------------------------------------------------------------

    async def add(self, row: AdapterRow, layout: Layout) -> Adapter:
        """Adds an adapter. Raises ApiError (409) if its name is taken."""
        try:
            await self._on_disk(self._journal.add_adapter, row)
        except KeyError:
            raise ApiError(409, "adapter_exists", f"an adapter {row.name!r} exists already", "name") from None
        adapter = self._adapters[row.name] = Adapter(row, layout)
        return adapter

    async def remove(self, adapter: Adapter) -> None:
        """Removes an adapter and its history."""
        await self._on_disk(self._journal.remove_adapter, adapter.row.key)
        adapter.deleted = True
        del self._adapters[adapter.row.name]
        await self._old_versions.forget(adapter)
        await self._engine.drop(adapter.row.key)
        await self._on_disk(self._basis_path(adapter).unlink, True)

    async def set_basis(
        self, adapter: Adapter, vectors: dict[str, NDArray[np.float32]], energy: dict[str, float], positions_seen: int
    ) -> str:
        """Gives an adapter its basis, and returns the digest of it."""
        digest = basis_digest(vectors)
        await self._on_disk(basis_files.write, self._basis_path(adapter), vectors)
        found = {"digest": digest, "energy": energy, "positions_seen": positions_seen}
        basis = adapter.row.basis.model_copy(update=found)
        await self._on_disk(self._journal.set_basis, adapter.row.key, basis)
        adapter.row = replace(adapter.row, basis=basis)
        await self._load(adapter)
        return digest

    async def _load(self, adapter: Adapter) -> None:
        """Puts an adapter into the engine as its journal says."""
        key = adapter.row.key
        basis = await self.basis(adapter)
        if basis_digest(basis) != adapter.row.basis.digest:
            raise ValueError(f"the basis file of {adapter.row.name} is damaged: {self._basis_path(adapter)}")
        adapter.digest = await self._engine.put(key, adapter.layout, adapter.row.distribution, basis, None, 0)
        adapter.version, adapter.largest = 0, math.inf
        for row in await self._on_disk(self._journal.updates, key):
            adapter.digest = await self._engine.update(key, row.update)
            adapter.version = row.version
            if row.digest is None:
                await self._on_disk(self._journal.set_digest, key, row.version, adapter.digest)
            elif row.digest != adapter.digest and adapter.row.distribution == "rademacher":
                raise ValueError(
                    f"version {row.version} of {adapter.row.name} replays to other coefficients than were acknowledged"
                )

    async def apply(self, adapter: Adapter, update: Update, path: str = "") -> schemas.UpdateResult:
        """Journals an update, then applies it.

        Args:
            adapter: held for writing.
            update: the update.
            path: where the call has it, for errors.

        Raises:
            ApiError: the update is stale (412), uses a key of another one (409) or is too large (400); nothing changed.

        """
        self.calibrated(adapter.row.name)
        key = adapter.row.key
        if update.key is not None:
            before = await self._on_disk(self._journal.find, key, update.key)
            if before is not None:
                if before.update != update:
                    raise ApiError(
                        409, "key_conflict", f"{path}key: another update was sent under this key", f"{path}key"
                    )
                assert before.digest is not None
                return schemas.UpdateResult(version=before.version, digest=before.digest, applied=False)
        if update.base_version != adapter.version:
            raise ApiError(
                412,
                "stale_version",
                f"{path}base_version: {update.base_version} is not the newest version ({adapter.version}); "
                "nothing changed",
                f"{path}base_version",
                current_version=adapter.version,
            )
        largest = await self._largest_after(adapter, update, path)
        version = await self._on_disk(self._journal.append, key, update)
        try:
            adapter.digest = await self._engine.update(key, update)
            adapter.version = version
            adapter.largest = largest
        except Exception:
            # The update stands in the journal, so it happened; the engine's copy is what has to catch up.
            await self._load(adapter)
        assert adapter.digest is not None
        await self._on_disk(self._journal.set_digest, key, version, adapter.digest)
        return schemas.UpdateResult(version=version, digest=adapter.digest, applied=True)

    async def _largest_after(self, adapter: Adapter, update: Update, path: str) -> float:
        """A bound on the coefficients after an update; ApiError if it is too large."""

        def bound() -> float:
            kept = (1.0 - update.decay) * adapter.largest if update.decay < 1.0 else 0.0
            return kept + largest_step(update, adapter.row.distribution)

        if bound() > LARGEST_COEFFICIENT:
            # The bound has added up every step so far, whatever its sign: look at what they came to.
            adapter.largest = float(np.abs(await self._engine.read(adapter.row.key)).max())
            if bound() > LARGEST_COEFFICIENT:
                limit = f"{LARGEST_COEFFICIENT:g}"
                raise invalid(f"{path}terms", f"coefficients could come to {bound():.3g}, beyond the limit of {limit}")
        return bound()

    # Versions ---------------------------------------------------------------------------------------------------------

    async def updates(self, adapter: Adapter, after: int, limit: int) -> list[UpdateRow]:
        """An adapter's history behind a version."""
        return await self._on_disk(self._journal.updates, adapter.row.key, after, adapter.version, limit)

    async def coefficients(self, adapter: Adapter, version: int) -> tuple[NDArray[np.float32], str]:
        """The coefficients of an existing version (float32 ``[layout.size]``) and their digest."""
        if version == adapter.version:
            return await self._engine.read(adapter.row.key), adapter.newest.digest
        coefficients = await self._replay(adapter, version)
        return coefficients.flat.numpy(), coefficients.digest()

    async def basis(self, adapter: Adapter) -> dict[str, NDArray[np.float32]]:
        """A calibrated adapter's basis: float32 ``[in_features, rank]`` by input."""
        return await self._on_disk(basis_files.read, self._basis_path(adapter))

    def existing(self, adapter: Adapter, version: int | None) -> int:
        """A version, the newest for None. Raises ApiError (404) for one that is not there."""
        if version is None:
            return adapter.version
        if version > adapter.version:
            raise ApiError(
                404,
                "version_not_found",
                f"version: {version} does not exist; the newest is {adapter.version}",
                "version",
            )
        return version

    @asynccontextmanager
    async def at(
        self, adapter: Adapter, version: int | None, perturbed: bool
    ) -> AsyncIterator[tuple[int, Point | None]]:
        """A version (the newest for None) and its point; no point is needed to evaluate version 0 itself."""
        version = self.existing(adapter, version)
        if version == 0 and not perturbed:
            yield 0, None
        elif version == adapter.version:
            yield version, adapter.newest
        else:
            async with self._old_versions.hold(adapter, version) as point:
                yield version, point

    async def _put_old_version(self, key: str, adapter: Adapter, version: int) -> str:
        coefficients = await self._replay(adapter, version)
        basis = await self.basis(adapter)
        flat = coefficients.flat.numpy()
        return await self._engine.put(key, adapter.layout, adapter.row.distribution, basis, flat, version)

    async def _replay(self, adapter: Adapter, version: int) -> Coefficients:
        rows = await self._on_disk(self._journal.updates, adapter.row.key, 0, version)

        def run() -> Coefficients:
            coefficients = Coefficients(adapter.layout, adapter.row.distribution)
            for row in rows:
                coefficients.apply(row.update)
            return coefficients

        return await asyncio.to_thread(run)

    async def _on_disk(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(function, *args))

    def _basis_path(self, adapter: Adapter) -> Path:
        return self._directory / "bases" / f"{adapter.row.key}.safetensors"
