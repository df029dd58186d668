"""The journal: the only truth about adapters. Coefficients anywhere else are a cache of it.

SQLite in WAL mode with ``synchronous=FULL``: a row has reached the disk when ``append`` returns, and an update is
appended before it is applied and before it is acknowledged. A row is the idempotency record too. The digest of the
coefficients after an update is written beside the row once the engine has answered; a row that has none yet was cut off
between the two, and the next replay fills it in.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from server_ext.schemas import BasisInfo
from zoact_remote.noise import Distribution
from zoact_remote.wire import Update

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE adapters (
    key TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    rank INTEGER NOT NULL,
    sites TEXT NOT NULL,
    distribution TEXT NOT NULL,
    noise_version INTEGER NOT NULL,
    basis TEXT NOT NULL,
    created TEXT NOT NULL
) STRICT;
CREATE TABLE updates (
    adapter TEXT NOT NULL REFERENCES adapters(key) ON DELETE CASCADE,
    version INTEGER NOT NULL,
    content TEXT NOT NULL,
    idempotency_key TEXT,
    digest TEXT,
    time TEXT NOT NULL,
    PRIMARY KEY (adapter, version),
    UNIQUE (adapter, idempotency_key)
) STRICT;
"""


@dataclass(frozen=True)
class AdapterRow:
    """An adapter as the journal knows it. ``key`` is never used twice, ``name`` may be after a deletion."""

    key: str
    name: str
    rank: int
    sites: tuple[str, ...]
    distribution: Distribution
    noise_version: int
    basis: BasisInfo
    created: datetime


@dataclass(frozen=True)
class UpdateRow:
    """An update that is part of an adapter's history.

    Attributes:
        version: the version that it led to.
        update: its content.
        digest: of the coefficients after it; None until the engine has applied it.
        time: when it was written.

    """

    version: int
    update: Update
    digest: str | None
    time: datetime


class Journal:
    """One SQLite file. Calls block (a commit waits for the disk) and must come from one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
            self._db.execute(f"PRAGMA {pragma}")
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found == 0:
            self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        elif found != SCHEMA_VERSION:
            raise ValueError(f"{path} is a journal of format {found}; this release reads format {SCHEMA_VERSION}")

    def close(self) -> None:
        self._db.close()

    def add_adapter(self, adapter: AdapterRow) -> None:
        """Adds an adapter.

        Raises:
            KeyError: its name is taken.

        """
        row = (
            adapter.key,
            adapter.name,
            adapter.rank,
            json.dumps(adapter.sites),
            adapter.distribution,
            adapter.noise_version,
            adapter.basis.model_dump_json(),
            adapter.created.isoformat(),
        )
        try:
            self._db.execute("INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise KeyError(adapter.name) from None

    def set_basis(self, key: str, basis: BasisInfo) -> None:
        """Records what an adapter's basis turned out to be."""
        self._db.execute("UPDATE adapters SET basis = ? WHERE key = ?", (basis.model_dump_json(), key))

    def remove_adapter(self, key: str) -> None:
        """Removes an adapter and its history."""
        self._db.execute("DELETE FROM adapters WHERE key = ?", (key,))

    def adapters(self) -> list[AdapterRow]:
        """All adapters, oldest first."""
        rows = self._db.execute(
            "SELECT key, name, rank, sites, distribution, noise_version, basis, created FROM adapters ORDER BY rowid"
        )
        return [
            AdapterRow(
                key, name, rank, tuple(json.loads(sites)), distribution, noise_version,
                BasisInfo.model_validate_json(basis), datetime.fromisoformat(created),
            )
            for key, name, rank, sites, distribution, noise_version, basis, created in rows
        ]  # fmt: skip

    def append(self, adapter: str, update: Update) -> int:
        """Writes an update to disk and returns the version that it leads to.

        Raises:
            ValueError: the update does not follow the newest version.

        """
        content = json.dumps(replace(update, key=None).to_json())
        with self._transaction():
            newest = self.newest(adapter)
            if update.base_version != newest:
                raise ValueError(f"update of version {update.base_version} cannot follow version {newest}")
            self._db.execute(
                "INSERT INTO updates (adapter, version, content, idempotency_key, time) VALUES (?, ?, ?, ?, ?)",
                (adapter, newest + 1, content, update.key, datetime.now(timezone.utc).isoformat()),
            )
        return newest + 1

    def set_digest(self, adapter: str, version: int, digest: str) -> None:
        """Records the digest of the coefficients after an update."""
        self._db.execute("UPDATE updates SET digest = ? WHERE adapter = ? AND version = ?", (digest, adapter, version))

    def newest(self, adapter: str) -> int:
        """The newest version, 0 for none."""
        query = "SELECT coalesce(max(version), 0) FROM updates WHERE adapter = ?"
        return int(self._db.execute(query, (adapter,)).fetchone()[0])

    def updates(self, adapter: str, after: int = 0, until: int | None = None, limit: int = -1) -> list[UpdateRow]:
        """Updates with ``after < version <= until``, in order."""
        query = (
            "SELECT version, content, idempotency_key, digest, time FROM updates "
            "WHERE adapter = ? AND version > ? AND version <= ? ORDER BY version LIMIT ?"
        )
        bounds = (adapter, after, 2**62 if until is None else until, limit)
        return [self._update_row(*row) for row in self._db.execute(query, bounds)]

    def find(self, adapter: str, idempotency_key: str) -> UpdateRow | None:
        """The update that was written under a key."""
        query = (
            "SELECT version, content, idempotency_key, digest, time FROM updates "
            "WHERE adapter = ? AND idempotency_key = ?"
        )
        row = self._db.execute(query, (adapter, idempotency_key)).fetchone()
        return self._update_row(*row) if row else None

    @staticmethod
    def _update_row(version: int, content: str, key: str | None, digest: str | None, time: str) -> UpdateRow:
        update = replace(Update.from_json(json.loads(content)), key=key)
        return UpdateRow(version, update, digest, datetime.fromisoformat(time))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
