"""What may have happened to a server's files besides its death: no room, a torn page, a snapshot gone bad."""

from __future__ import annotations

import random
import resource
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

from server_ext.journal import Journal
from zoact_remote import Update

JOURNAL = "journal.sqlite"


def fill_disk(pid: int, state: Path, rng: random.Random) -> None:
    """Lets a running server write no further than some place in its files: partial writes, then none."""
    log = state / f"{JOURNAL}-wal"
    written = log.stat().st_size if log.exists() else 0
    room = rng.choice([0, 1, 4096, rng.randrange(written + 1), written + rng.randrange(1, 20000)])
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def make_room(pid: int) -> None:
    """Undoes :func:`fill_disk`."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def tear_journal(state: Path, rng: random.Random) -> bool:
    """Leaves what a power cut in the middle of a commit leaves: some of its bytes are in the log, the others are not.

    The commit is that of an update which nobody acknowledged. Returns False if there is no adapter to update.
    """
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        _copy_journal(state, copy)
        log = copy / f"{JOURNAL}-wal"
        before = log.read_bytes() if log.exists() else b""
        with closing(Journal(copy / JOURNAL)) as journal:
            ready = [row.key for row in journal.adapters() if row.basis.digest is not None]
            if not ready:
                return False
            key = rng.choice(ready)
            lost = Update(journal.newest(key), tuple((seed, 0.5) for seed in range(200)), key="torn")
            journal.append(key, lost, "sha256:torn")
            after = log.read_bytes()
        before = before.ljust(len(after), b"\0")
        differing = [i for i in range(len(after)) if after[i] != before[i]]
        cut = rng.randrange(differing[0], differing[-1])
        whole = after[: cut + 1] + (b"" if rng.random() < 0.5 else before[cut + 1 :])
        (state / f"{JOURNAL}-wal").write_bytes(whole)
    return True


def spoil_snapshot(state: Path, rng: random.Random) -> bool:
    """Damages the newest snapshot of one adapter. Returns False if there is none."""
    folders = [folder for folder in (state / "snapshots").iterdir() if list(folder.glob("*.safetensors"))]
    if not folders:
        return False
    newest = max(rng.choice(folders).glob("*.safetensors"), key=lambda path: int(path.stem))
    content = bytearray(newest.read_bytes())
    kind = rng.choice(["bit", "cut", "garbage", "empty"])
    if kind == "bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "garbage":
        content = bytearray(rng.randbytes(len(content)))
    newest.write_bytes(b"" if kind == "empty" else bytes(content))
    return True


def unfinished(state: Path) -> tuple[int, int]:
    """What a dead server left half done: changes in the journal without a digest, and files partly written."""
    with tempfile.TemporaryDirectory() as directory:
        # A copy: to read the journal is to recover it, which is the server's part.
        _copy_journal(state, Path(directory))
        with closing(sqlite3.connect(Path(directory, JOURNAL))) as db:
            changes = 0
            with suppress(sqlite3.OperationalError):  # killed before there were tables
                (changes,) = db.execute("SELECT count(*) FROM entries WHERE digest IS NULL").fetchone()
    return changes, len(list(state.rglob("*.partial")))


def _copy_journal(state: Path, directory: Path) -> None:
    for path in state.glob(f"{JOURNAL}*"):
        # The file of shared memory is an index of the log beside it, which SQLite builds anew.
        if not path.name.endswith("-shm"):
            shutil.copy(path, directory)
