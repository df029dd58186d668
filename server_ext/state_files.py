"""What lies in an engine's directory beside the journal: bases, imported coefficients, snapshots and a lock.

Files are named by adapters' keys, which are never used twice. Of a basis and of imported coefficients nothing else
exists, so they are on disk before the journal speaks of them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server_ext import basis_files, coefficient_files
from server_ext.snapshots import Snapshots
from zoact_remote.digest import basis_digest
from zoact_remote.files import PARTIAL
from zoact_remote.layout import Layout
from zoact_remote.locks import InUse, lock

SUFFIX = ".safetensors"


class StateFiles:
    """The files of all adapters of one engine, which are its alone until they are closed.

    Args:
        directory: made when needed.
        snapshot_every: changes from one snapshot to the next.

    Attributes:
        snapshots: of coefficients.

    Raises:
        ValueError: another server uses the directory.

    """

    def __init__(self, directory: Path, snapshot_every: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.snapshots = Snapshots(directory / "snapshots", snapshot_every)
        self._directory = directory
        try:
            self._lock = lock(directory)
        except InUse as error:
            raise ValueError(f"another server uses {directory} ({error})") from None

    def close(self) -> None:
        """Lets other servers in."""
        self._lock.close()

    def write_basis(self, key: str, basis: dict[str, NDArray[np.float32]]) -> None:
        """Writes a basis: float32 ``[in_features, rank]`` by input."""
        basis_files.write(self._basis(key), basis)

    def read_basis(self, key: str, digest: str | None) -> dict[str, NDArray[np.float32]]:
        """Reads the basis that has a digest.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged.

        """
        basis = basis_files.read(self._basis(key))
        if basis_digest(basis) != digest:
            raise ValueError(f"the basis file {self._basis(key)} is damaged")
        return basis

    def write_import(self, key: str, digest: str, flat: NDArray[np.float32]) -> None:
        """Writes imported coefficients, float32 ``[layout.size]``, with their digest."""
        coefficient_files.write(self._import(key), digest, flat)

    def read_import(self, key: str, digest: str | None, layout: Layout) -> NDArray[np.float32]:
        """Reads the imported coefficients that have a digest.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they are damaged.

        """
        found, flat = coefficient_files.read(self._import(key), layout)
        if found != digest:
            raise ValueError(f"{self._import(key)} holds other coefficients than those that were imported")
        return flat

    def remove(self, key: str) -> None:
        """Removes all files of an adapter."""
        self._basis(key).unlink(missing_ok=True)
        self._import(key).unlink(missing_ok=True)
        self.snapshots.remove(key)

    def sweep(self, keys: Collection[str]) -> None:
        """Removes what a killed server left behind: files half written, and those of adapters that are gone."""
        for path in self._directory.rglob(f"*{PARTIAL}"):
            path.unlink()
        found = {path.stem for kind in ("bases", "imports") for path in self._directory.glob(f"{kind}/*")}
        found |= {path.name for path in self._directory.glob("snapshots/*")}
        for key in found.difference(keys):
            self.remove(key)

    def _basis(self, key: str) -> Path:
        return self._directory / "bases" / f"{key}{SUFFIX}"

    def _import(self, key: str) -> Path:
        return self._directory / "imports" / f"{key}{SUFFIX}"
