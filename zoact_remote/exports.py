"""The files of an export: a PEFT directory that says which version of which adapter it holds."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from zoact_remote.errors import InvalidValue, ServerError
from zoact_remote.layout import Layout, Site
from zoact_remote.tensors import read_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ABOUT = "zoact.json"
"""What the server says of the export: adapter, version and digests. No part of PEFT's format."""
EXPORTED = (CONFIG, TENSORS, ABOUT)
"""Files of an export."""


def pack(directory: Path) -> bytes:
    """A PEFT directory's files in a tar archive, as a server takes them.

    Raises:
        InvalidValue: a file of it is missing.

    """
    paths = {name: directory / name for name in EXPORTED}
    for name in (CONFIG, TENSORS):
        if not paths[name].is_file():
            raise InvalidValue(str(directory), f"holds no {name}; a LoRA is a PEFT directory, in safetensors")
    return tar_of({name: path.read_bytes() for name, path in paths.items() if path.is_file()})


def unpack(archive: IO[bytes], target: Path) -> None:
    """Unpack an export into a directory, all files of it or none; other members are passed over.

    Raises:
        ServerError: it is no tar archive, or a file is missing.

    """
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        try:
            with tarfile.open(fileobj=archive) as tar:
                for name in EXPORTED:
                    source = tar.extractfile(name)
                    if source is None:
                        raise KeyError(f"{name} is not a file")
                    with source, open(Path(scratch, name), "wb") as file:
                        shutil.copyfileobj(source, file)
        except (tarfile.TarError, KeyError) as error:
            raise ServerError(f"the export could not be unpacked: {error}") from error
        for name in EXPORTED:
            os.replace(Path(scratch, name), target / name)


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """Files by name in an uncompressed tar archive."""
    buffer = io.BytesIO()
    write_tar(files, buffer)
    return buffer.getvalue()


def write_tar(files: Mapping[str, bytes], target: IO[bytes]) -> None:
    """Write files by name to a target, as an uncompressed tar archive."""
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def half_name(layer: str, half: Literal["A", "B"]) -> str:
    """The tensor of a layer's A ``[rank, in_features]`` or B ``[out_features, rank]``."""
    return f"base_model.model.{layer}.lora_{half}.weight"


def half_shapes(sites: Iterable[Site], rank: int) -> dict[str, tuple[int, int]]:
    """The shapes of all tensors of a LoRA of some layers, by the tensors' names."""
    shapes = {}
    for site in sites:
        shapes[half_name(site.name, "A")] = (rank, site.in_features)
        shapes[half_name(site.name, "B")] = (site.out_features, rank)
    return shapes


def read_halves(export: Path, layout: Layout) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """A ``[rank, in_features]`` and B ``[out_features, rank]`` of a float32 export, by layer.

    Args:
        export: the directory.
        layout: of the adapter that was exported.

    Raises:
        InvalidValue: the export is damaged, not float32, or of another layout.

    """
    file = export / TENSORS
    tensors = read_tensors(file)
    shapes = half_shapes(layout.sites, layout.rank)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        differing = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        first = differing[0]
        raise InvalidValue(f"{file}: {first}", f"is {found.get(first)}, must be {shapes.get(first)}")
    return {
        site.name: (tensors[half_name(site.name, "A")], tensors[half_name(site.name, "B")]) for site in layout.sites
    }


def read_coefficients(export: Path, layout: Layout) -> NDArray[np.float32]:
    """The coefficients of a float32 export: float32 ``[layout.size]``.

    Raises:
        InvalidValue: as :func:`read_halves`.

    """
    flat = np.zeros(layout.size, np.float32)
    matrices = layout.matrices(flat)
    for layer, (_, half_b) in read_halves(export, layout).items():
        matrices[layer][:] = half_b
    return flat
