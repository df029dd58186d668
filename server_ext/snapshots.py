"""Snapshots: coefficients on disk, so that a version need not be replayed from the start.

The journal is the truth and a snapshot a shortcut. It carries the digest of its coefficients; one that does not match
is removed, and replay starts from the one before. Losing all of them costs time, nothing else.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server_ext import coefficient_files
from server_ext.logs import log
from zoact_remote.layout import Layout

SUFFIX = ".safetensors"


class Snapshots:
    """The snapshots of one engine's adapters: ``DIRECTORY/KEY/VERSION.safetensors``.

    Args:
        directory: made when needed.
        every: changes from one snapshot to the next, which bounds the replay of the newest version.

    """

    def __init__(self, directory: Path, every: int) -> None:
        self.every = every
        self._directory = directory

    def versions(self, key: str) -> list[int]:
        """Versions that an adapter has snapshots of, in order."""
        return sorted(int(path.stem) for path in (self._directory / key).glob(f"*{SUFFIX}"))

    def write(self, key: str, version: int, digest: str, flat: NDArray[np.float32]) -> None:
        """Writes a snapshot (float32 ``[layout.size]``), and removes older ones that are not worth their space."""
        coefficient_files.write(self._path(key, version), digest, flat)
        for other in superseded(self.versions(key), self.every):
            self._path(key, other).unlink(missing_ok=True)

    def read(self, key: str, version: int, layout: Layout) -> NDArray[np.float32] | None:
        """A snapshot's coefficients; None, and it is gone, if they are not what was written."""
        path = self._path(key, version)
        try:
            return coefficient_files.read(path, layout)[1]
        except (OSError, ValueError):
            log.warning("snapshot discarded", path=str(path))
            path.unlink(missing_ok=True)
            return None

    def remove(self, key: str) -> None:
        """Removes all of an adapter's snapshots."""
        shutil.rmtree(self._directory / key, ignore_errors=True)

    def _path(self, key: str, version: int) -> Path:
        return self._directory / key / f"{version}{SUFFIX}"


def superseded(versions: list[int], every: int) -> list[int]:
    """Snapshots to remove: the two newest stay, and behind them ever fewer, so that n changes leave about 2 log2(n).

    A version then replays from one that is no further back than twice its own age, ``every`` at least.
    """
    if not versions:
        return []
    newest = versions[-1] // every
    before, found = None, []
    for version in versions[:-2]:
        number = version // every
        # A server that stops writes one wherever it is: of those between two regular ones the first will do.
        if number == before or newest - number > 2 * (number & -number):
            found.append(version)
        before = number
    return found
