"""Records of data, from files and from the hub."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoact_remote.errors import ZoActError

SAVED = ("state.json", "dataset_dict.json")
"""One of these is in a directory that datasets' save_to_disk wrote."""
LARGEST_CELL = (1 << 31) - 1
"""Characters in a cell of CSV; Python's own bound is 131,072."""


class RecordError(ZoActError, ValueError):
    """A record that does not fit its task, or a source that holds no records. The message says where and what."""


class Record(dict[str, Any]):
    """A record, by field.

    Attributes:
        place: where it came from, such as ``films.csv:12``.

    """

    def __init__(self, fields: Mapping[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place


def load_records(source: str | os.PathLike[str]) -> list[Record]:
    """The records of a file, or of a data set on the hub.

    Args:
        source: a file of JSON Lines, CSV, TSV (no quoting) or Parquet, told apart by how its name ends and JSON Lines
            otherwise; else a data set on the hub, or a directory that datasets saved or can load,
            ``NAME[:CONFIG][@SPLIT]``, such as ``super_glue:copa@validation`` or ``ag_news@train[:1000]``, whose split
            is ``train`` if not given. Parquet needs pyarrow, the hub and directories need datasets. Where a data set
            numbers labels and names them, records have the names.

    Raises:
        RecordError: a record cannot be read, and the message names file and line; or there is none; or a library is
            missing.
        OSError: the file cannot be opened.

    """
    path = Path(source)
    suffix = path.suffix.lower()
    in_file = path.is_file() or suffix in _READERS
    try:
        found = list(_READERS.get(suffix, _read_jsonl)(path) if in_file else _read_hub(os.fspath(source)))
    except UnicodeDecodeError as error:
        raise RecordError(f"{source}: not UTF-8: {error}") from None
    if not found:
        raise RecordError(f"{source}: holds no records")
    return found


def load_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a JSON Lines file. Blank lines are passed over.

    Raises:
        RecordError: a line is not a JSON object; the message names file and line.

    """
    return list(_read_jsonl(Path(path)))


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            if line.lstrip().startswith("["):
                raise RecordError(
                    f"{place}: not a JSON object, but an array; there must be one object a line, as jq -c '.[]' writes"
                )
            try:
                record = json.loads(line)
                if "\\u" in line:  # half a character, which JSON can name and UTF-8 cannot hold
                    json.dumps(record, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:  # a number or a nesting may be too large
                raise RecordError(f"{place}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise RecordError(f"{place}: not a JSON object, but {type(record).__name__}")
            yield Record(record, place)


def _read_csv(path: Path) -> Iterator[Record]:
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with path.open(encoding="utf-8-sig", newline="") as file, _long_cells():
        reader = csv.reader(file, strict=True, **(tabs if path.suffix.lower() == ".tsv" else {}))
        line = 1
        try:
            header = next(reader, [])
            if not header or len(set(header)) != len(header):
                raise RecordError(f"{path}:1: the first line must name the fields, each once; it holds {header}")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise RecordError(
                        f"{path}:{line}: has {len(cells)} cells, not one for each of {', '.join(map(repr, header))}"
                    )
                if cells:
                    yield Record(dict(zip(header, cells, strict=True)), f"{path}:{line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise RecordError(f"{path}:{line}: {error}") from None


@contextmanager
def _long_cells() -> Iterator[None]:
    # The bound is one for all readers of the process.
    before = csv.field_size_limit(LARGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise RecordError(f"{path}: to read Parquet: pip install 'zoact-remote[parquet]'") from None
    with path.open("rb") as file:
        try:
            found = parquet.read_table(file).to_pylist()
        except ValueError as error:  # pyarrow.ArrowInvalid is one
            raise RecordError(f"{path}: not Parquet: {error}") from None
    for number, record in enumerate(found, start=1):
        yield Record(record, f"{path}:{number}")


def _read_hub(source: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise RecordError(f"{source} is not a file; to load it from the hub: pip install 'zoact-remote[hub]'") from None
    name, config, split = _parts(source)
    saved = config is None and any((Path(name) / file).is_file() for file in SAVED)
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library's own, or of what it loads with
        where = "" if Path(name).exists() else " from the hub"
        raise RecordError(f"{source} could not be loaded{where}: {error}") from error
    if saved:
        splits = found if isinstance(found, dict) else {"train": found}
        if split not in splits:
            raise RecordError(f"{source}: has no split {split!r}; there is {', '.join(map(repr, splits))}")
        found = splits[split]
    names = {field: getattr(feature, "names", None) for field, feature in found.features.items()}
    for number, record in enumerate(found, start=1):
        named = {field: _label_name(value, names[field]) for field, value in record.items()}
        yield Record(named, f"{source}:{number}")


def _parts(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a data set. A directory may be named with their marks."""
    if Path(source).exists():
        return source, None, "train"
    path, _, split = source.partition("@")
    name, _, config = path.partition(":")
    return name, config or None, split or "train"


def _label_name(value: Any, names: list[str] | None) -> Any:
    # Labels that are kept secret are -1.
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
