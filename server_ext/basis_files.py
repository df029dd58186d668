"""Bases on disk: one safetensors file an adapter. The data that a basis came from is not kept, so the file is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from zoact_remote.files import write_atomically


def write(path: Path, basis: dict[str, NDArray[np.float32]]) -> None:
    """Writes a basis: float32 ``[in_features, rank]`` by input."""
    write_atomically(path, save({name: np.ascontiguousarray(vectors) for name, vectors in basis.items()}))


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    """Reads a basis.

    Raises:
        FileNotFoundError: there is none.

    """
    return dict(load_file(path))
