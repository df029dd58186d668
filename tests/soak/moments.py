"""Moments at which a server writes its files, seen from outside by inotify."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from pathlib import Path

IN_MODIFY, IN_CREATE = 0x2, 0x100
EVENT = struct.Struct("iIII")
PLACES = {"journal": "", "basis": "bases", "snapshot": "snapshots"}
"""Kinds of moments, and the folder of a state directory where they show."""

_libc = ctypes.CDLL(None, use_errno=True)


class Moments:
    """Watches a server's state directory.

    Args:
        state: the directory; it need not be there.

    """

    def __init__(self, state: Path) -> None:
        self._folders = {kind: state / place for kind, place in PLACES.items()}
        for folder in self._folders.values():
            folder.mkdir(parents=True, exist_ok=True)

    def wait(self, kind: str, timeout: float) -> bool:
        """Waits until a file of a kind (``PLACES``) is being written. Returns False after ``timeout`` seconds."""
        folder = self._folders[kind]
        watch = _libc.inotify_init1(os.O_NONBLOCK)
        if watch < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        try:
            for path in (folder, *(each for each in folder.iterdir() if kind == "snapshot" and each.is_dir())):
                # A folder may go in the meantime, with the adapter that it belongs to.
                _libc.inotify_add_watch(watch, os.fsencode(path), IN_MODIFY | IN_CREATE)
            deadline = time.monotonic() + timeout
            while (left := deadline - time.monotonic()) > 0:
                if select.select([watch], [], [], left)[0] and self._shows(kind, os.read(watch, 65536)):
                    return True
            return False
        finally:
            os.close(watch)

    def _shows(self, kind: str, events: bytes) -> bool:
        at = 0
        while at < len(events):
            _, _, _, length = EVENT.unpack_from(events, at)
            at += EVENT.size
            name = events[at : at + length].rstrip(b"\0")
            at += length
            # A snapshot's folder is made right before the first one in it.
            if kind == "snapshot" or name.endswith(b"-wal" if kind == "journal" else b".partial"):
                return True
        return False
