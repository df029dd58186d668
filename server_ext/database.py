"""SQLite files whose commits have reached the disk when they return."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def connect(path: Path) -> sqlite3.Connection:
    """Opens a file, which is made if it does not exist. Statements outside a transaction commit by themselves."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        db.execute(f"PRAGMA {pragma}")
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Commits what is done within as a whole, or nothing of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        # A commit that fails, for a full disk say, leaves the transaction open.
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
