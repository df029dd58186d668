"""Records come from files of several kinds and from the hub, and each knows where it came from."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoact_remote import RecordError, load_jsonl, load_records

RECORDS = [{"text": "Fine, he said.\nOnce more.", "label": "1"}, {"text": 'Café\u2028 "x"', "label": "0"}]
LINES = '{"text": "Fine, he said.\\nOnce more.", "label": "1"}\n\n{"text": "Café\u2028 \\"x\\"", "label": "0"}\n'
CELLS = 'text,label\n"Fine, he said.\nOnce more.",1\n\nCafé\u2028 "x",0\n'
TABS = 'text\tlabel\nShe said "no\t0\n'


def file(directory: Path, name: str, content: str) -> Path:
    path = directory / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "content", "lines"), [("r.jsonl", LINES, [1, 3]), ("rows.txt", LINES, [1, 3]), ("r.csv", CELLS, [2, 5])]
)
def test_records_know_their_lines(name: str, content: str, lines: list[int], mark: str, tmp_path: Path) -> None:
    path = file(tmp_path, name, mark + content)
    found = load_records(path)
    assert found == RECORDS
    assert [record.place for record in found] == [f"{path}:{line}" for line in lines]


def test_json_lines(tmp_path: Path) -> None:
    assert load_jsonl(file(tmp_path, "any", LINES)) == RECORDS


def test_how_a_name_ends_may_be_in_capitals(tmp_path: Path) -> None:
    assert load_records(file(tmp_path, "R.CSV", 'a\n"x"\n')) == [{"a": "x"}]
    assert load_records(file(tmp_path, "R.TSV", 'a\n"x"\n')) == [{"a": '"x"'}]


def test_tabs_come_without_quotes(tmp_path: Path) -> None:
    assert load_records(file(tmp_path, "r.tsv", TABS)) == [{"text": 'She said "no', "label": "0"}]


@given(rows=st.lists(st.tuples(st.text(min_size=1), st.text()), min_size=1, max_size=4))
def test_what_csv_writes_is_read(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("csv") / "r.csv"
    rows = [(a.encode(errors="replace").decode(), b.encode(errors="replace").decode()) for a, b in rows]
    with path.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([("a", "b c"), *rows])
    assert [(record["a"], record["b c"]) for record in load_records(path)] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"a": 1}\n{', ":2: not JSON"),
        ("r.jsonl", '{"a": 1}\n\n3', ":3: not a JSON object, but int"),
        ("r.jsonl", '{"a": 1}\n\n[1]', ":3: not a JSON object, but an array; there must be one object a line"),
        ("r.json", '[\n  {"a": 1}\n]', ":1: not a JSON object, but an array; there must be one object a line"),
        ("r.csv", "", ":1: the first line must name the fields"),
        ("r.csv", "a,a\n1,2", ":1: the first line must name the fields, each once; it holds ['a', 'a']"),
        ("r.csv", 'a,b\n"x\ny",2\n1,2,3\n', ":4: has 3 cells, not one for each of 'a', 'b'"),
        ("r.csv", "a,b\n1,2\n1", ":3: has 1 cells"),
        ("r.csv", 'a,b\n1,2\n"x"y,2', ":3: "),
        ("r.csv", "a,b\n", ": holds no records"),
        ("r.jsonl", "\n", ": holds no records"),
        ("r.jsonl", f'{{"a": {"1" * 5000}}}', ":1: not JSON: Exceeds the limit"),
        ("r.jsonl", '{"a": ' + "[" * 100_000, ":1: not JSON: maximum recursion depth"),
        ("r.jsonl", '{"a": "\\ud83d"}', ":1: not JSON: 'utf-8' codec can't encode"),
    ],
)
def test_lines_that_hold_no_record(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = file(tmp_path, name, content)
    with pytest.raises(RecordError) as caught:
        load_records(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes("a,b\nCaf\u00e9,1\n".encode("latin-1"))
    with pytest.raises(RecordError, match=r"r\.csv: not UTF-8"):
        load_records(path)


@pytest.mark.parametrize("name", ["none.csv", "none.json"])
def test_a_missing_file_is_no_data_set(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        load_records(name)


def test_cells_may_be_long(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    for name, comma in (("r.csv", ","), ("r.tsv", "\t")):
        path = file(tmp_path, name, f"a{comma}b\n{'x' * (before + 1)}{comma}y\n")
        assert load_records(path) == [{"a": "x" * (before + 1), "b": "y"}]
    assert csv.field_size_limit() == before, "other readers have their own bound"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow")
    from pyarrow import parquet

    records = [{"text": "a", "label": 1, "answers": {"text": ["x", "y"]}}, {"text": None, "label": 0, "answers": None}]
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    found = load_records(path)
    assert found == records
    assert found[1].place == f"{path}:2"
    with pytest.raises(RecordError, match="not Parquet"):
        load_records(file(tmp_path, "no.parquet", "text"))


@pytest.mark.parametrize(
    ("library", "source", "extra"), [("pyarrow", "r.parquet", "parquet"), ("datasets", "owner/films", "hub")]
)
def test_a_missing_library_is_named(library: str, source: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RecordError, match=rf"{source}.*pip install 'zoact-remote\[{extra}\]'"):
        load_records(source)


class Found(list[dict[str, Any]]):
    features = {"text": None, "label": SimpleNamespace(names=["bad", "good"])}  # noqa: RUF012


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Found:
        asked.append((arguments, options))
        if arguments[0] == "none":
            raise ValueError("no such split")
        if arguments[0] == "directory":
            raise LookupError("an error of its own")
        return Found([{"text": "x", "label": 1}, {"text": "y", "label": -1}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = load_records("owner/films:short@validation[:2]")
    assert found == [{"text": "x", "label": "good"}, {"text": "y", "label": -1}]
    assert found[1].place == "owner/films:short@validation[:2]:2"
    load_records("films")
    assert asked == [
        (("owner/films", "short"), {"split": "validation[:2]"}),
        (("films", None), {"split": "train"}),
    ]
    with pytest.raises(RecordError, match="none could not be loaded from the hub: no such split"):
        load_records("none")
    with pytest.raises(RecordError, match="directory could not be loaded from the hub: an error of its own"):
        load_records("directory")


def test_a_directory_that_datasets_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Found([{"text": "x", "label": 1}])
    loaded: Any = None

    def load_dataset(name: str, config: str | None, split: str) -> Found:
        assert (name, config, split) == (str(other), None, "train")
        return found

    library = SimpleNamespace(load_dataset=load_dataset, load_from_disk=lambda name: loaded)
    monkeypatch.setitem(sys.modules, "datasets", library)
    one, several, other = (tmp_path / name for name in ("one@2", "several", "other:v1@2"))
    for directory, mark in ((one, "state.json"), (several, "dataset_dict.json"), (other, "train.jsonl")):
        directory.mkdir()
        (directory / mark).write_text("{}")
    loaded = found
    assert load_records(one) == [{"text": "x", "label": "good"}]
    loaded = {"train": Found([{"text": "y", "label": 0}]), "test": found}
    assert load_records(several) == [{"text": "y", "label": "bad"}]
    assert load_records(f"{several}@test") == [{"text": "x", "label": "good"}]
    with pytest.raises(RecordError, match="several@dev: has no split 'dev'; there is 'train', 'test'"):
        load_records(f"{several}@dev")
    assert load_records(other) == [{"text": "x", "label": "good"}]
    monkeypatch.delattr(library, "load_from_disk")
    with pytest.raises(RecordError, match="several could not be loaded: "):
        load_records(several)


def test_records_are_plain_data() -> None:
    assert json.loads(json.dumps(load_records(Path(__file__).parents[3] / "examples/data/tickets.jsonl")[0]))
