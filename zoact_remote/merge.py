"""A LoRA merged into a copy of a checkpoint: W + B A in the place of W, everything else as it is.

A merged file has the tensors of the one that it is made from, in the same types and shapes, and so the same header:
it is copied, with other numbers where a layer's weight lies. Only some rows of a weight are in memory at a time. Sums
are computed in float32 and rounded once, to the type that the weight has in the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from zoact_remote.errors import InvalidValue
from zoact_remote.files import PARTIAL
from zoact_remote.tensors import FLOATS, TensorFile, decode, encode

Halves = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]

BLOCK = 1 << 22
"""Numbers, or bytes, that are worked on at a time."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = frozenset({".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"})
"""Files of other formats' weights, which would be those of the model without the LoRA: they are left out."""


def merge(checkpoint: Path, halves: Halves, directory: Path) -> None:
    """Write a checkpoint with a LoRA merged into it.

    Args:
        checkpoint: directory of the model, in safetensors; it stays as it is.
        halves: A ``[rank, in_features]`` and B ``[out_features, rank]`` by layer; a layer gets W + B A.
        directory: where to write; made if it does not exist, and files of the same names in it are replaced.

    Raises:
        InvalidValue: the checkpoint is damaged, lacks a layer's weight or has it quantised, in another shape or in
            another type, or a sum is too large for its type.

    """
    if directory.exists() and directory.samefile(checkpoint):
        raise InvalidValue(str(directory), "must not be the checkpoint itself")
    names = _weight_files(checkpoint)
    with ExitStack() as stack:
        files = {name: stack.enter_context((checkpoint / name).open("rb")) for name in names}
        shards = {name: TensorFile(file, str(checkpoint / name)) for name, file in files.items()}
        _check(checkpoint, shards, halves)
        directory.mkdir(parents=True, exist_ok=True)
        for name, shard in shards.items():
            partial = directory / f"{name}{PARTIAL}"
            try:
                with partial.open("wb") as out:
                    _merge_file(str(checkpoint / name), shard, halves, out)
                os.replace(partial, directory / name)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    for path in checkpoint.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copyfile(path, directory / path.name)


def _weight_files(checkpoint: Path) -> list[str]:
    """Names of the files that hold the weights."""
    index = checkpoint / INDEX
    if not index.is_file():
        if not (checkpoint / WEIGHTS).is_file():
            raise InvalidValue(str(checkpoint), f"holds neither {WEIGHTS} nor {INDEX}")
        return [WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidValue(str(index), "does not say which file holds which weight") from error
    for name in names:
        # Files are written under these names: they must not lead elsewhere.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidValue(str(index), f"names {name!r}, which is no safetensors file beside it")
    return names


def _check(checkpoint: Path, shards: Mapping[str, TensorFile], halves: Halves) -> None:
    """Raises InvalidValue if a weight cannot be added to."""
    method = _quantisation(checkpoint)
    weights = {name: entry for shard in shards.values() for name, entry in shard.entries.items()}
    for layer, (half_a, half_b) in halves.items():
        name, shape = f"{layer}.weight", (half_b.shape[0], half_a.shape[1])
        entry = weights.get(name)
        if entry is not None and entry.shape == shape and entry.dtype in FLOATS:
            continue
        if method is not None:
            raise InvalidValue(
                f"{checkpoint}: {name}",
                f"is quantised ({method}), and a sum would have to be quantised anew: export without --merge, and "
                "serve the export as a LoRA beside this checkpoint",
            )
        if entry is None:
            raise InvalidValue(f"{checkpoint}: {name}", "is not there")
        raise InvalidValue(
            f"{checkpoint}: {name}",
            f"must be of the shape {list(shape)} and one of {', '.join(FLOATS)}, is {entry.dtype} {list(entry.shape)}",
        )


def _quantisation(checkpoint: Path) -> str | None:
    """How a checkpoint is quantised, by its configuration; None where that does not say so."""
    try:
        about = json.loads((checkpoint / "config.json").read_bytes())["quantization_config"]
        return str(about["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _merge_file(path: str, shard: TensorFile, halves: Halves, out: IO[bytes]) -> None:
    out.write(shard.head)
    for name, entry in shard.entries.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in halves:
            for part in shard.raw(name, BLOCK):
                out.write(part)
            continue
        half_a, half_b = halves[layer]
        rows, width = entry.shape
        step = math.ceil(BLOCK / width)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            merged = shard.read(name, first, last) + half_b[first:last] @ half_a
            content = encode(merged, entry.dtype)
            if not np.isfinite(decode(content, entry.dtype)).all():
                raise InvalidValue(f"{path}: {name}", f"holds numbers that are not finite in {FLOATS[entry.dtype]}")
            out.write(content)
