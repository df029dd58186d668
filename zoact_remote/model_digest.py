"""A digest that tells one frozen model from another without reading all of its weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SAMPLE = 1 << 20


def model_digest(directory: str | os.PathLike[str]) -> str:
    """SHA-256 over a checkpoint's configuration and, of each weight file, its name, size, first and last MiB.

    A safetensors file begins with the names, shapes and offsets of its tensors, so those are covered in full.

    Raises:
        FileNotFoundError: the directory holds no config.json.

    """
    directory = Path(directory)
    sha = hashlib.sha256(b"zoact-model-1\0")
    sha.update((directory / "config.json").read_bytes())
    for path in sorted(p for p in directory.iterdir() if p.suffix in {".safetensors", ".bin", ".gguf"}):
        size = path.stat().st_size
        sha.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            sha.update(file.read(SAMPLE))
            file.seek(max(size - SAMPLE, 0))
            sha.update(file.read(SAMPLE))
    return "sha256:" + sha.hexdigest()
