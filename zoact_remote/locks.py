"""Directories that one process at a time may use.

The system lets go of a lock when its process ends, however it ends. On Windows nothing is locked.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from zoact_remote.errors import ZoActError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
"""The file in a directory that is locked, and that says by which process."""


class InUse(ZoActError):
    """Another process uses the directory: the message says which.

    Attributes:
        process: its id; None if that cannot be told.

    """

    def __init__(self, process: int | None) -> None:
        super().__init__("another process" if process is None else f"process {process}")
        self.process = process


def lock(directory: Path) -> IO[str]:
    """A file that keeps other processes out of a directory, which is there, until it is closed.

    Raises:
        InUse: another process keeps us out.
        OSError: the file cannot be written.

    """
    # Whoever may open the file may lock it.
    file = open(directory / LOCK, "a+", opener=lambda path, flags: os.open(path, flags, 0o600))  # noqa: SIM115
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            process = file.read().strip()
        raise InUse(int(process) if process.isdecimal() else None) from None
    try:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except OSError:
        with suppress(OSError):
            file.close()
        raise
    return file


def is_locked(directory: Path) -> bool:
    """Whether a process uses a directory now.

    Raises:
        OSError: the file cannot be read.

    """
    if fcntl is None or not (directory / LOCK).is_file():
        return False
    # Opened to read alone, and what it says is left alone: the directory may be somebody else's.
    with open(directory / LOCK, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
