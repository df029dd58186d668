"""A digest that tells one frozen model from another without reading all of its weights.

A merge or fine-tuning changes numbers all over a tensor, which samples of 1/64 of it show; a change that lies between
two of them, such as one to a few tokens' embeddings, they do not. Hashing everything would take 10 s for 16 GB and 90 s
for 140 GB at every start (1.6 GB/s a core, and a cold disk may be slower), where samples take 0.3 s and 3 s.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from zoact_remote.errors import InvalidValue
from zoact_remote.tensors import TensorFile

SCHEME = b"zoact-model-2"
"""Changes whenever what is hashed does."""
SAMPLE = 1 << 14
"""Bytes of a sample."""
STRIDE = 1 << 20
"""Bytes from the beginning of a sample to that of the next."""
CONFIG = "config.json"
SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".bin", ".pt", ".gguf")
"""Of weight files, in the order in which vLLM and Transformers look for them: the first format that is there counts."""


def model_digest(directory: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> str:
    """SHA-256 over a checkpoint's configuration and, of each weight file, its name, size, header and samples.

    Samples are taken of every tensor of a safetensors file, and of a file in another format as a whole: one begins at
    every MiB of it, and one ends with its last byte.

    Args:
        directory: of the checkpoint.
        config: the configuration, if it lies elsewhere.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no configuration, or no weight file.

    """
    directory = Path(directory)
    sha = hashlib.sha256(SCHEME + b"\0")
    sha.update(Path(config or directory / CONFIG).read_bytes())
    files = _weight_files(directory)
    # From a cold disk, samples take as long as they wait for it.
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(files, pool.map(_file_digest, files), strict=True):
            sha.update(f"\0{path.name}\0".encode() + digest)
    return "sha256:" + sha.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    for suffix in SUFFIXES:
        if files := sorted(directory.glob(f"*{suffix}")):
            return files
    raise FileNotFoundError(f"{directory} holds no weights ({', '.join(SUFFIXES)}) to tell the model by")


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    sha = hashlib.sha256(size.to_bytes(8, "little"))
    spans = [(0, size)]
    with path.open("rb") as file:
        if path.suffix == SAFETENSORS:
            # One that is damaged is no error of the digest's: it is sampled as a whole.
            with suppress(InvalidValue):
                tensors = TensorFile(file, str(path))
                sha.update(tensors.head)
                spans = [(entry.start, entry.stop) for entry in tensors.entries.values()]
        for start, stop in spans:
            for at in _samples(start, stop):
                file.seek(at)
                sha.update(file.read(min(SAMPLE, stop - at)))
    return sha.digest()


def _samples(start: int, stop: int) -> Iterator[int]:
    """Where the samples of some bytes of a file begin."""
    yield from range(start, stop, STRIDE)
    if stop - start > SAMPLE:
        yield stop - SAMPLE
