"""Coefficients on disk: a safetensors file that carries their digest, so that damage shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from zoact_remote.digest import coefficients_digest
from zoact_remote.files import write_atomically
from zoact_remote.layout import Layout


def write(path: Path, digest: str, flat: NDArray[np.float32]) -> None:
    """Writes coefficients, float32 ``[layout.size]``, with their digest."""
    write_atomically(path, save({"flat": flat}, metadata={"digest": digest}))


def read(path: Path, layout: Layout) -> tuple[str, NDArray[np.float32]]:
    """Digest and coefficients.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold what was written.

    """
    try:
        with safe_open(path, framework="numpy") as file:
            flat: NDArray[np.float32] = file.get_tensor("flat")
            digest = (file.metadata() or {}).get("digest")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    fits = flat.shape == (layout.size,) and flat.dtype == np.float32
    if digest is None or not fits or coefficients_digest(flat, layout) != digest:
        raise ValueError(f"{path} is damaged")
    return digest, flat
