"""Tensors in safetensors files, read with NumPy alone. Nothing that a file says of itself is taken on trust.

The format: the header's length as 8 bytes, little-endian; the header, a JSON object of ``dtype``, ``shape`` and
``data_offsets`` by name; the tensors' bytes, to which the offsets refer, one tensor behind the other without a gap.

NumPy has no bfloat16: a number of it is the upper half of a float32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from zoact_remote.errors import InvalidValue

LENGTH_BYTES = 8
MAX_DIMENSIONS = 32
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types whose numbers can be read and written, as safetensors and PyTorch call them."""
_STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: in the format's words, such as ``BF16``.
        shape: its dimensions.
        start: where its bytes begin in the file.
        stop: where they end.

    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file, whose tensors are read when they are asked for.

    Args:
        file: open, and seekable.
        name: of the file, for error messages.
        longest_head: bytes that may stand before the tensors'.

    Attributes:
        head: all that stands before the tensors' bytes.
        entries: the tensors by name, in the order of their bytes.

    Raises:
        InvalidValue: the file is damaged, or its head is longer.

    """

    def __init__(self, file: IO[bytes], name: str, longest_head: float = math.inf) -> None:
        self._file = file
        self._name = name
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = file.read(LENGTH_BYTES)
        start = LENGTH_BYTES + int.from_bytes(length, "little")
        header = None
        if start > longest_head:
            raise InvalidValue(name, f"has a head of {start} bytes, longer than {longest_head}")
        if len(length) == LENGTH_BYTES and start <= size:
            self.head = length + file.read(start - LENGTH_BYTES)
            with suppress(ValueError, RecursionError):
                header = json.loads(self.head[LENGTH_BYTES:])
        if not isinstance(header, dict):
            raise InvalidValue(name, "is no safetensors file, or was cut off")
        header.pop("__metadata__", None)
        found = {tensor: _entry(f"{name}: {tensor}", about, start) for tensor, about in header.items()}
        self.entries = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
        end = start
        for tensor, entry in self.entries.items():
            if entry.start != end or entry.stop > size:
                raise InvalidValue(
                    f"{name}: {tensor}",
                    f"must lie in the file's {size} bytes from byte {end}, lies from {entry.start} to {entry.stop}",
                )
            end = entry.stop
        if end != size:
            raise InvalidValue(name, f"ends with {size - end} bytes that belong to no tensor")

    def read(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """A tensor's values as float32, exactly; of rows ``first`` to ``last`` (not included) alone, if they are given.

        Raises:
            InvalidValue: its numbers are not among :data:`FLOATS`.

        """
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise InvalidValue(f"{self._name}: {name}", f"must be one of {', '.join(FLOATS)}, is {entry.dtype}")
        rows, rest = (entry.shape[0], entry.shape[1:]) if entry.shape else (1, ())
        last = rows if last is None else last
        row_bytes = math.prod(rest) * _STORED[entry.dtype].itemsize
        self._file.seek(entry.start + first * row_bytes)
        values = decode(self._file.read((last - first) * row_bytes), entry.dtype)
        return values.reshape((last - first, *rest) if entry.shape else ())

    def raw(self, name: str, chunk: int) -> Iterator[bytes]:
        """A tensor's bytes, as an iterator of chunks of some bytes at most."""
        entry = self.entries[name]
        for at in range(entry.start, entry.stop, chunk):
            self._file.seek(at)
            yield self._file.read(min(chunk, entry.stop - at))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """The tensors of a float32 file, by name.

    Raises:
        InvalidValue: the file is damaged, or holds a tensor that is not float32.

    """
    with open(path, "rb") as file:
        tensors = TensorFile(file, str(path))
        for name, entry in tensors.entries.items():
            if entry.dtype != "F32":
                raise InvalidValue(f"{path}: {name}", f"must be float32 (F32), is {entry.dtype}")
        return {name: tensors.read(name) for name in tensors.entries}


def decode(content: bytes, dtype: str) -> NDArray[np.float32]:
    """Stored numbers of one of :data:`FLOATS` as float32, exactly."""
    stored = np.frombuffer(content, _STORED[dtype])
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """Float32 numbers as one of :data:`FLOATS`, rounded to nearest, ties to even; what is too large is infinite."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(_STORED[dtype]).tobytes()
    words = np.ascontiguousarray(values).view(np.uint32)
    # Half of the last place that stays, less one where that place is even: what carries into it rounds up.
    rounded = (words + (np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # The carry must not make a number of what is none.
    kept = np.where(np.isnan(values), (words >> np.uint32(16)) | np.uint32(0x40), rounded)
    return kept.astype(_STORED[dtype]).tobytes()


def _entry(param: str, about: Mapping[str, Any], start: int) -> Entry:
    try:
        dtype, shape, (first, last) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValue(param, "the header does not describe a tensor") from error
    whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    if not isinstance(dtype, str) or not whole or len(shape) > MAX_DIMENSIONS or last < first:
        raise InvalidValue(param, "the header does not describe a tensor")
    if dtype in FLOATS and last - first != _STORED[dtype].itemsize * math.prod(shape):
        raise InvalidValue(param, f"{last - first} bytes do not hold {FLOATS[dtype]} {list(shape)}")
    return Entry(dtype, shape, start + first, start + last)
