"""Bases on disk: one safetensors file an adapter. The data that a basis came from is not kept, so the file is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save


def write(path: Path, basis: dict[str, NDArray[np.float32]]) -> None:
    """Writes a basis (float32 ``[d, rank]`` by input) so that after a crash the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        file.write(save({name: np.ascontiguousarray(vectors) for name, vectors in basis.items()}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    """Reads a basis.

    Raises:
        FileNotFoundError: there is none.

    """
    return dict(load_file(path))
