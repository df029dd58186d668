"""TOML files, read and written."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from zoact_remote.errors import InvalidValue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds.

    Raises:
        InvalidValue: it is not TOML; the parameter is the file.
        OSError: it cannot be opened.

    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return tomllib.loads(file.read())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidValue(os.fspath(path), f"not TOML: {error}") from None


def dumps(data: Mapping[str, Any]) -> str:
    """Strings, numbers, booleans, lists of them and nested mappings as TOML; what :func:`load` reads is equal."""
    return "\n".join(_lines(data, ())).strip("\n") + "\n"


def _lines(data: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {name: value for name, value in data.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in data.items() if name not in tables}
    if path and (plain or not tables):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for name, value in plain.items():
        yield f"{_key(name)} = {_value(value)}"
    for name, table in tables.items():
        yield from _lines(table, (*path, name))


def _key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    # JSON's strings, numbers, booleans and lists are TOML's, but that TOML has the delete character escaped.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False).replace("\x7f", "\\u007f")
