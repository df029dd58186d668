"""Records become rows, and what does not fit is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from zoact_remote import InvalidValue, Task, load_jsonl
from zoact_remote.tasks import BUILTIN, RecordError

SENTIMENT = Task("{text} It was", {0: " terrible", 1: " great"})
ROW = {"prompt": "Fine. It was", "choices": [" terrible", " great"], "answer": 1}


@pytest.mark.parametrize("label", [1, "1"])
def test_labels_may_be_integers_or_text(label: Any) -> None:
    assert SENTIMENT.row({"text": "Fine.", "label": label}) == ROW


def test_labels_may_be_booleans() -> None:
    task = Task("{q}?", {"true": " yes", "false": " no"}, label_field="answer")
    assert [task.row({"q": "So", "answer": value})["answer"] for value in (True, False, "true")] == [0, 1, 0]


def test_completion() -> None:
    task = Task("Question: {question}\nAnswer:", completion=" {answer}")
    assert task.row({"question": "2 + 2?", "answer": 4}) == {"prompt": "Question: 2 + 2?\nAnswer:", "completion": " 4"}


def test_values_are_not_templates() -> None:
    task = Task("{{{text}}}", {"a": " a", "b": " b"})
    assert task.row({"text": "{label} {0.__class__}", "label": "a"})["prompt"] == "{{label} {0.__class__}}"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": 1}, "record 1: field 'text' is missing: {\"label\": 1}"),
        ({"text": "Fine."}, "record 1: field 'label' is missing"),
        ({"text": "Fine.", "label": 2}, "record 1: 'label' is '2', not one of '0', '1'"),
    ],
)
def test_records_that_do_not_fit(record: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        SENTIMENT.rows([{"text": "Fine.", "label": 1}, record])
    assert str(caught.value).startswith(message)


def test_long_records_are_shown_in_part() -> None:
    with pytest.raises(RecordError) as caught:
        SENTIMENT.row({"body": "x" * 10_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "{text}"}, "either labels or a completion"),
        ({"template": "{text}", "labels": {0: "a", 1: "b"}, "completion": "c"}, "either labels or a completion"),
        ({"template": "{text}", "labels": {0: " one"}}, "at least two"),
        ({"template": "{text}", "labels": {0: " same", 1: " same"}}, "different"),
        ({"template": "{text}", "labels": {0: " a", "0": " b", 1: " c"}}, "different"),
        ({"template": "{0}", "completion": "c"}, "plain names"),
        ({"template": "{}", "completion": "c"}, "plain names"),
        ({"template": "{text.__class__}", "completion": "c"}, "plain names"),
        ({"template": "{text!r}", "completion": "c"}, "plain names"),
        ({"template": "{text:>9}", "completion": "c"}, "plain names"),
        ({"template": "{text", "completion": "c"}, "template: "),
        ({"template": "{text}", "completion": "{a[0]}"}, "completion: "),
    ],
)
def test_tasks_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Task(**arguments)


@pytest.mark.parametrize("task", [SENTIMENT, Task("{q}", completion=" {a}"), *BUILTIN.values()])
def test_a_task_survives_json(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps(task.to_dict()), encoding="utf-8")
    assert Task.from_file(path) == task


@pytest.mark.parametrize("data", [{}, {"labels": {"0": "a", "1": "b"}}, {"template": "{t}", "label": {}}])
def test_from_dict_names_what_is_wrong(data: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="needs 'template'"):
        Task.from_dict(data)


def test_builtin_tasks() -> None:
    records = {
        "sst2": {"text": "a fine film .", "label": 1},
        "subj": {"text": "he leaves .", "label": 1},
        "trec": {"text": "Who ?", "label": 3},
        "agnews": {"title": "Cup", "text": "A final.", "label": 1},
        "tickets": {"text": "it crashes", "label": "bug"},
    }
    chosen = {name: (row["prompt"], row["choices"][row["answer"]]) for name, row in rows_of(records).items()}
    assert chosen == {
        "sst2": ("a fine film . It was", " great"),
        "subj": ("he leaves . This is", " objective"),
        "trec": ("Question: Who ?\nAnswer type:", " human"),
        "agnews": ("Article: Cup. A final.\nTopic:", " sports"),
        "tickets": ("Customer: it crashes\nThis is about", " bugs"),
    }


def rows_of(records: dict[str, Any]) -> dict[str, Any]:
    assert set(records) == set(BUILTIN)
    return {name: BUILTIN[name].row(record) for name, record in records.items()}


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Fine.", "label": 1}\n\n{"text": "Café\u2028.", "label": 0}\n', encoding="utf-8")
    assert [record["text"] for record in load_jsonl(path)] == ["Fine.", "Café\u2028."]
    assert SENTIMENT.load_rows(path)[0] == ROW


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":3: not JSON"),
        ("[1]", ":3: not a JSON object, but list"),
        ('{"text": "x"}', ":3: field 'label' is missing"),
    ],
)
def test_lines_that_do_not_fit(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Fine.", "label": 1}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(RecordError) as caught:
        SENTIMENT.load_rows(path)
    assert str(caught.value).startswith(f"{path}{message}")
