"""The journal: the only truth about adapters. Coefficients anywhere else are a cache of it, but for those that an
adapter was imported with: of them it holds the digest, and ``server_ext.state_files`` the numbers.

SQLite in WAL mode with ``synchronous=FULL``: an entry has reached the disk when ``append`` returns, and a change is
appended before it is applied and before it is acknowledged. An entry is the idempotency record too. The digest of the
coefficients after a change is written beside it once the engine has answered; an entry that has none yet was cut off
between the two, and the next replay fills it in, or the next change.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from server_ext.database import connect, transaction
from server_ext.schemas import BasisInfo, tenant_of
from zoact_remote.noise import NOISE_VERSION, Distribution
from zoact_remote.wire import Change, Rollback, change_from_json

TERMS_AT_ONCE = 1 << 15
"""Of entries that are read in one call: all adapters wait for the same journal."""
LONGEST_ROLLBACK = 1000
"""Characters that a rollback is written in at most."""
SCHEMA_VERSION = 3
SCHEMA = """
CREATE TABLE adapters (
    key TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    model_digest TEXT NOT NULL,
    rank INTEGER NOT NULL,
    sites TEXT NOT NULL,
    distribution TEXT NOT NULL,
    noise_version INTEGER NOT NULL,
    basis TEXT NOT NULL,
    created TEXT NOT NULL,
    imported_digest TEXT
) STRICT;
CREATE TABLE entries (
    adapter TEXT NOT NULL REFERENCES adapters(key) ON DELETE CASCADE,
    version INTEGER NOT NULL,
    change TEXT NOT NULL,
    noise_version INTEGER NOT NULL,
    idempotency_key TEXT,
    digest_before TEXT NOT NULL,
    digest TEXT,
    time TEXT NOT NULL,
    PRIMARY KEY (adapter, version),
    UNIQUE (adapter, idempotency_key)
) STRICT;
"""

UPGRADES = {2: "ALTER TABLE adapters ADD COLUMN imported_digest TEXT;"}
"""What makes a journal of an earlier format one of the next."""

ENTRY_COLUMNS = "version, change, noise_version, idempotency_key, digest_before, digest, time"


@dataclass(frozen=True)
class AdapterRow:
    """An adapter as the journal knows it. ``key`` is never used twice, ``name`` may be after a deletion.

    ``imported_digest`` is that of version 0's coefficients where they were imported; None where version 0 is the model
    itself.
    """

    key: str
    name: str
    model_digest: str
    rank: int
    sites: tuple[str, ...]
    distribution: Distribution
    noise_version: int
    basis: BasisInfo
    created: datetime
    imported_digest: str | None = None

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return tenant_of(self.name)


@dataclass(frozen=True)
class Entry:
    """A change that is part of an adapter's history.

    Attributes:
        version: the version that it led to.
        change: its content.
        noise_version: version of the noise specification that its seeds are read by.
        digest_before: of the coefficients that it was made for.
        digest: of the coefficients after it; None until the engine has applied it.
        time: when it was written.

    """

    version: int
    change: Change
    noise_version: int
    digest_before: str
    digest: str | None
    time: datetime


class Journal:
    """One SQLite file. Calls block (a commit waits for the disk) and must come from one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._db = connect(path)
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found == 0:
            self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        elif found in UPGRADES:
            self._db.executescript(f"BEGIN; {UPGRADES[found]} PRAGMA user_version={found + 1}; COMMIT;")
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
            adapter.model_digest,
            adapter.rank,
            json.dumps(adapter.sites),
            adapter.distribution,
            adapter.noise_version,
            adapter.basis.model_dump_json(),
            adapter.created.isoformat(),
            adapter.imported_digest,
        )
        try:
            self._db.execute("INSERT INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
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
            "SELECT key, name, model_digest, rank, sites, distribution, noise_version, basis, created, imported_digest "
            "FROM adapters ORDER BY rowid"
        )
        return [
            AdapterRow(
                key, name, model, rank, tuple(json.loads(sites)), distribution, noise_version,
                BasisInfo.model_validate_json(basis), datetime.fromisoformat(created), imported,
            )
            for key, name, model, rank, sites, distribution, noise_version, basis, created, imported in rows
        ]  # fmt: skip

    def append(self, adapter: str, change: Change, digest_before: str) -> int:
        """Writes a change to disk and returns the version that it leads to.

        Raises:
            ValueError: the change does not follow the newest version.

        """
        with transaction(self._db):
            newest = self.newest(adapter)
            if change.base_version != newest:
                raise ValueError(f"a change of version {change.base_version} cannot follow version {newest}")
            now = datetime.now(timezone.utc).isoformat()
            # The key has a column of its own.
            content = json.dumps(replace(change, key=None).to_json())
            self._db.execute(
                f"INSERT INTO entries (adapter, {ENTRY_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, NULL, ?)",
                (adapter, newest + 1, content, NOISE_VERSION, change.key, digest_before, now),
            )
            # If the disk was full when the newest version's own digest should have been written.
            self._db.execute(
                "UPDATE entries SET digest = ? WHERE adapter = ? AND version = ? AND digest IS NULL",
                (digest_before, adapter, newest),
            )
        return newest + 1

    def retract(self, adapter: str, version: int) -> None:
        """Takes back the newest change, which nobody has been told of."""
        self._db.execute("DELETE FROM entries WHERE adapter = ? AND version = ?", (adapter, version))

    def set_digest(self, adapter: str, version: int, digest: str) -> None:
        """Records the digest of the coefficients after a change."""
        self._db.execute("UPDATE entries SET digest = ? WHERE adapter = ? AND version = ?", (digest, adapter, version))

    def newest(self, adapter: str) -> int:
        """The newest version, 0 for none."""
        query = "SELECT coalesce(max(version), 0) FROM entries WHERE adapter = ?"
        return int(self._db.execute(query, (adapter,)).fetchone()[0])

    def entries(
        self, adapter: str, after: int = 0, until: int | None = None, limit: int = -1, terms: float = math.inf
    ) -> list[Entry]:
        """Entries with ``after < version <= until``, in order: at most ``limit``, and none after so many terms."""
        query = (
            f"SELECT {ENTRY_COLUMNS} FROM entries "
            "WHERE adapter = ? AND version > ? AND version <= ? ORDER BY version LIMIT ?"
        )
        bounds = (adapter, after, 2**62 if until is None else until, limit)
        return _first((_entry(*row) for row in self._db.execute(query, bounds)), terms)

    def find(self, adapter: str, idempotency_key: str) -> Entry | None:
        """The entry that was written under a key."""
        query = f"SELECT {ENTRY_COLUMNS} FROM entries WHERE adapter = ? AND idempotency_key = ?"
        row = self._db.execute(query, (adapter, idempotency_key)).fetchone()
        return _entry(*row) if row else None

    def entries_of(self, adapter: str, versions: Sequence[int], terms: float) -> list[Entry]:
        """Entries of the first of some versions: one at least, and none after so many terms."""
        return _first((entry for version in versions for entry in self.entries(adapter, version - 1, version)), terms)

    def path(self, adapter: str, version: int, known: Collection[int]) -> tuple[int, list[int]]:
        """How to come by a version from known ones.

        Args:
            adapter: key of the adapter.
            version: an existing one.
            known: versions whose coefficients are at hand; those of version 0 always are.

        Returns:
            The known version to start from, and the versions to make from there on. Only the last of them can be a
            rollback: what came before one makes no difference to what comes after it.

        """
        # Updates may be long, and there may be a thousand of them: only what is as short as a rollback is read.
        query = (
            f"SELECT CASE WHEN length(change) < {LONGEST_ROLLBACK} THEN json_extract(change, '$.to_version') END "
            "FROM entries WHERE adapter = ? AND version = ?"
        )
        versions: list[int] = []
        while version and version not in known:
            (back_to,) = self._db.execute(query, (adapter, version)).fetchone()
            if back_to is None or not versions:
                versions.append(version)
            # Those after a rollback start from what it brought back.
            version = version - 1 if back_to is None else back_to
        return version, versions[::-1]


def _first(entries: Iterable[Entry], terms: float) -> list[Entry]:
    """Entries up to the one with which they have so many terms."""
    found: list[Entry] = []
    for entry in entries:
        found.append(entry)
        terms -= _terms_in(entry.change)
        if terms <= 0:
            break
    return found


def _terms_in(change: Change) -> int:
    if isinstance(change, Rollback):
        return 0
    return len(change.terms) + (0 if change.normaliser is None else len(change.normaliser.terms))


def _entry(
    version: int, change: str, noise_version: int, key: str | None, before: str, digest: str | None, time: str
) -> Entry:
    content = replace(change_from_json(json.loads(change)), key=key)
    return Entry(version, content, noise_version, before, digest, datetime.fromisoformat(time))
