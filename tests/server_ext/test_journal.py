"""The journal against a dictionary, through any sequence of calls, restarts and crashes."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import tempfile
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from server_ext.journal import LONGEST_ROLLBACK, AdapterRow, Entry, Journal
from server_ext.schemas import BasisInfo
from tests.strategies import updates
from zoact_remote import Update
from zoact_remote.wire import Change, Rollback

BEFORE = "sha256:before"
CREATED = datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=timezone.utc)


def adapter_row(key: str, name: str = "acme/triage") -> AdapterRow:
    sites = ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj")
    return AdapterRow(key, name, "sha256:model", 4, sites, "gaussian", 1, BasisInfo(positions="both"), CREATED)


Written: TypeAlias = tuple[int, Change, str, str | None]
"""Version, change, digest before and after."""


def contents(entries: list[Entry]) -> list[Written]:
    return [(entry.version, entry.change, entry.digest_before, entry.digest) for entry in entries]


class JournalMachine(RuleBasedStateMachine):
    """Calls the journal and a dictionary alike."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="zoact-journal-"))
        self.path = self.directory / "journal.sqlite"
        self.journal = Journal(self.path)
        self.adapters: dict[str, AdapterRow] = {}
        self.history: dict[str, list[Written]] = {}
        self.made = 0

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.directory)

    @rule(target=keys, name=st.sampled_from(["acme/a", "acme/b", "umbra/a"]))
    def add(self, name: str):  # type: ignore[no-untyped-def]
        self.made += 1
        row = adapter_row(f"key{self.made}", name)
        if name in {adapter.name for adapter in self.adapters.values()}:
            with pytest.raises(KeyError):
                self.journal.add_adapter(row)
            return multiple()
        self.journal.add_adapter(row)
        self.adapters[row.key], self.history[row.key] = row, []
        return row.key

    @rule(key=consumes(keys))
    def remove(self, key: str) -> None:
        self.journal.remove_adapter(key)
        del self.adapters[key], self.history[key]

    @rule(key=keys, digest=st.text("0123456789abcdef", min_size=1, max_size=8), energy=st.floats(0, 1))
    def set_basis(self, key: str, digest: str, energy: float) -> None:
        basis = BasisInfo(digest=digest, energy={"input": energy}, positions_seen=7)
        self.journal.set_basis(key, basis)
        self.adapters[key] = replace(self.adapters[key], basis=basis)

    @rule(
        key=keys,
        update=updates(),
        back=st.none() | st.integers(0, 9),
        idempotency=st.none() | st.sampled_from("xyz"),
        lag=st.integers(-1, 1),
    )
    def append(self, key: str, update: Update, back: int | None, idempotency: str | None, lag: int) -> None:
        history = self.history[key]
        base = max(0, len(history) + lag)
        change: Change = replace(update, base_version=base, key=idempotency)
        if back is not None:
            change = Rollback(base, min(back, len(history)), idempotency)
        taken = idempotency is not None and idempotency in {written.key for _, written, _, _ in history}
        before = f"sha256:{len(history)}"
        if base != len(history):
            with pytest.raises(ValueError, match="cannot follow"):
                self.journal.append(key, change, before)
        elif taken:
            with pytest.raises(sqlite3.IntegrityError):
                self.journal.append(key, change, before)
        else:
            assert self.journal.append(key, change, before) == len(history) + 1
            if history and history[-1][3] is None:
                history[-1] = (*history[-1][:3], before)
            history.append((len(history) + 1, change, before, None))

    @rule(key=keys, digest=st.sampled_from(["sha256:1", "sha256:2"]), data=st.data())
    def set_digest(self, key: str, digest: str, data: st.DataObject) -> None:
        if self.history[key]:
            version = data.draw(st.integers(1, len(self.history[key])))
            self.journal.set_digest(key, version, digest)
            self.history[key][version - 1] = (*self.history[key][version - 1][:3], digest)

    @rule(key=keys, known=st.sets(st.integers(1, 9)), data=st.data())
    def find_path(self, key: str, known: set[int], data: st.DataObject) -> None:
        """The path makes what making every version in turn makes."""
        history = self.history[key]
        version = data.draw(st.integers(0, len(history)))
        made: list[tuple[int, ...]] = [()]
        for number, change, _, _ in history:
            made.append(made[change.to_version] if isinstance(change, Rollback) else (*made[number - 1], number))
        start, versions = self.journal.path(key, version, known)
        assert start == 0 or start in known
        state = made[start]
        entries = self.journal.entries_of(key, versions, math.inf)
        assert [entry.version for entry in entries] == versions
        for entry in entries:
            assert entry.version not in known
            state = state if isinstance(entry.change, Rollback) else (*state, entry.version)
        assert state == made[version]
        assert (versions[-1] if versions else start) == version

    @rule(key=keys, idempotency=st.sampled_from("xyz"))
    def find(self, key: str, idempotency: str) -> None:
        found = self.journal.find(key, idempotency)
        expected = [written for written in self.history[key] if written[1].key == idempotency]
        assert contents([found] if found else []) == expected

    @rule(key=keys, after=st.integers(0, 5), until=st.none() | st.integers(0, 5), limit=st.integers(0, 3))
    def page(self, key: str, after: int, until: int | None, limit: int) -> None:
        last = len(self.history[key]) if until is None else until
        assert contents(self.journal.entries(key, after, until, limit)) == self.history[key][after:last][:limit]

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.journal = Journal(self.path)

    @rule()
    def crash(self) -> None:
        """The files as they are, without a close: what a process that dies leaves behind."""
        copy = Path(tempfile.mkdtemp(dir=self.directory))
        for file in self.path.parent.glob("journal.sqlite*"):
            # The shared memory file is an index of the log beside it, which SQLite builds anew.
            if not file.name.endswith("-shm"):
                shutil.copy(file, copy)
        self.journal.close()
        self.path = copy / "journal.sqlite"
        self.journal = Journal(self.path)

    @invariant()
    def holds_what_was_written(self) -> None:
        assert self.journal.adapters() == list(self.adapters.values())
        for key, history in self.history.items():
            assert self.journal.newest(key) == len(history)
            assert contents(self.journal.entries(key)) == history

    @invariant()
    def another_connection_sees_it(self) -> None:
        other = Journal(self.path)
        try:
            assert other.adapters() == list(self.adapters.values())
        finally:
            other.close()


TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def test_every_commit_waits_for_the_disk(path: Path) -> None:
    journal = Journal(path)
    (mode,) = journal._db.execute("PRAGMA journal_mode").fetchone()
    (synchronous,) = journal._db.execute("PRAGMA synchronous").fetchone()
    assert (mode, synchronous) == ("wal", 2)


def test_a_removed_adapters_history_is_not_its_successors(path: Path) -> None:
    journal = Journal(path)
    journal.add_adapter(adapter_row("first"))
    journal.append("first", Update(0, ((1, 0.5),), key="k"), BEFORE)
    journal.remove_adapter("first")
    journal.add_adapter(adapter_row("second"))
    assert journal.newest("first") == journal.newest("second") == 0
    assert journal.find("second", "k") is None


def test_an_update_of_an_unknown_adapter_is_refused(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(sqlite3.IntegrityError):
        journal.append("nobody", Update(0, ((1, 0.5),)), BEFORE)


def test_a_part_of_a_history_is_bounded_by_its_terms(path: Path) -> None:
    journal = Journal(path)
    journal.add_adapter(adapter_row("a"))
    for version in range(4):
        journal.append("a", Update(version, tuple((seed, 0.5) for seed in range(3))), BEFORE)
    assert [entry.version for entry in journal.entries("a", terms=5)] == [1, 2]
    assert [entry.version for entry in journal.entries("a", after=2, terms=1)] == [3], "one at least"
    assert len(journal.entries("a", terms=100)) == 4
    assert [entry.version for entry in journal.entries_of("a", [1, 3, 4], terms=5)] == [1, 3]
    assert [entry.version for entry in journal.entries_of("a", [4], terms=1)] == [4], "one at least"


def test_a_rollback_is_found_among_long_updates(path: Path) -> None:
    journal = Journal(path)
    journal.add_adapter(adapter_row("a"))
    long = tuple((2**64 - 1 - seed, -1.2345678901234567e-30) for seed in range(500))
    for version in range(3):
        journal.append("a", Update(version, long), BEFORE)
    journal.append("a", Rollback(3, 1, key="k" * 64), BEFORE)
    journal.append("a", Update(4, long), BEFORE)
    assert journal.path("a", 5, []) == (0, [1, 5])
    assert journal.path("a", 4, [1]) == (1, [4])
    longest = json.dumps(Rollback(2**63 - 1, 2**63 - 1).to_json())
    assert len(longest) < LONGEST_ROLLBACK


def test_a_change_that_is_taken_back_leaves_nothing(path: Path) -> None:
    journal = Journal(path)
    journal.add_adapter(adapter_row("a"))
    journal.append("a", Update(0, ((1, 0.5),)), BEFORE)
    journal.append("a", Update(1, ((2, 0.5),), key="k"), BEFORE)
    journal.retract("a", 2)
    assert (journal.newest("a"), journal.find("a", "k")) == (1, None)
    assert journal.append("a", Update(1, ((3, 0.5),), key="k"), BEFORE) == 2


def test_a_refused_update_leaves_no_transaction_open(path: Path) -> None:
    journal = Journal(path)
    journal.add_adapter(adapter_row("a"))
    with pytest.raises(ValueError, match="cannot follow"):
        journal.append("a", Update(3, ()), BEFORE)
    assert journal.append("a", Update(0, ()), BEFORE) == 1
    second = Journal(path)
    assert second.append("a", Update(1, ()), BEFORE) == 2


def test_times_are_kept_with_their_zone(path: Path) -> None:
    journal = Journal(path)
    journal.add_adapter(adapter_row("a"))
    journal.append("a", Update(0, ()), BEFORE)
    (entry,) = journal.entries("a")
    assert journal.adapters()[0].created == CREATED
    assert entry.time.utcoffset() == timedelta(0)
    assert abs(entry.time - datetime.now(timezone.utc)) < timedelta(minutes=1)


def test_a_journal_of_the_format_before_is_taken_over(path: Path) -> None:
    journal = Journal(path)
    journal.add_adapter(adapter_row("a"))
    journal.append("a", Update(0, ()), BEFORE)
    rows, entries = journal.adapters(), journal.entries("a")
    journal.close()
    db = sqlite3.connect(path)
    db.executescript("ALTER TABLE adapters DROP COLUMN imported_digest; PRAGMA user_version=2;")
    db.close()
    for _ in range(2):
        journal = Journal(path)
        assert (journal.adapters(), journal.entries("a")) == (rows, entries)
        journal.close()
    journal = Journal(path)
    imported = replace(adapter_row("b", "acme/b"), imported_digest="sha256:start")
    journal.add_adapter(imported)
    assert journal.adapters() == [*rows, imported]


@pytest.mark.parametrize("found", [1, 99, -1])
def test_a_journal_of_another_format_is_refused(path: Path, found: int) -> None:
    Journal(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={found}")
    db.close()
    with pytest.raises(ValueError, match=f"format {found}; this release reads format 3"):
        Journal(path)


def test_a_file_that_is_no_journal_is_refused(path: Path) -> None:
    path.write_text("not a database, and long enough to be seen as such" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Journal(path)


def test_a_commit_that_fails_leaves_nothing_behind(path: Path) -> None:
    """The disk is full: SQLite says so when the log would grow."""
    journal = Journal(path)
    journal.add_adapter(adapter_row("a"))
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count={pages + 2}")

    def fill() -> None:
        for version in range(100):
            journal.append("a", Update(version, tuple((seed, 0.5) for seed in range(500))), BEFORE)

    with pytest.raises(sqlite3.OperationalError, match="full"):
        fill()
    written = journal.newest("a")
    assert contents(journal.entries("a"))[-1][0] == written > 0
    journal._db.execute(f"PRAGMA max_page_count={pages + 100}")
    assert journal.append("a", Update(written, ()), BEFORE) == written + 1
