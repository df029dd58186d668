"""Tensors in a safetensors file, read with NumPy alone.

The format: the header's length as 8 bytes, little-endian; the header, a JSON object of ``dtype``, ``shape`` and
``data_offsets`` by name; the tensors' bytes, to which the offsets refer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoact_remote.errors import InvalidValue

LENGTH_BYTES = 8


def read_tensors(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """The tensors of a file, by name.

    Raises:
        InvalidValue: the file is damaged, or holds a tensor that is not float32.

    """
    content = Path(path).read_bytes()
    start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    try:
        header = json.loads(content[LENGTH_BYTES:start]) if start <= len(content) else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise InvalidValue(str(path), "is no safetensors file, or was cut off")
    data = memoryview(content)[start:]
    header.pop("__metadata__", None)
    return {name: _tensor(f"{path}: {name}", data, about) for name, about in header.items()}


def _tensor(param: str, data: memoryview, about: Mapping[str, Any]) -> NDArray[np.float32]:
    try:
        dtype, shape, (first, last) = about["dtype"], tuple(map(int, about["shape"])), about["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValue(param, "the header does not describe a tensor") from error
    if dtype != "F32":
        raise InvalidValue(param, f"must be float32 (F32), is {dtype}")
    if not (0 <= first <= last <= len(data) and last - first == 4 * math.prod(shape)):
        raise InvalidValue(param, f"bytes {first} to {last} of {len(data)} do not hold float32 {list(shape)}")
    return np.frombuffer(data[first:last], dtype="<f4").reshape(shape).astype(np.float32, copy=False)
