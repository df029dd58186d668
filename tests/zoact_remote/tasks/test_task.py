"""Records become rows, and what does not fit is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoact_remote import Example, InvalidValue, Record, RecordError, Task
from zoact_remote.metrics import OF_TEXT
from zoact_remote.tasks import BUILTIN

SENTIMENT = Task("{text} It was", {0: " terrible", 1: " great"})
SPAN = Task("{q}?", completion=" {answers.text}\n", metric="exact_match", max_tokens=8)
CHAT = Task(messages="turns")
ROWS = Task("{prompt}", completion="{completion}")
CHOICE_ROWS = Task("{prompt}", choices="{choices}", label_field="answer")
OPTIONS = Task("{q}\nAnswer:", choices=" {options}", label_field="answer")
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4 "},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def row(task: Task, record: dict[str, Any]) -> dict[str, Any]:
    (found,) = task.rows([record])
    return found


@pytest.mark.parametrize("label", [1, "1", 1.0, np.int64(1), np.float32(1)])
def test_labels_may_be_numbers_or_text(label: Any) -> None:
    expected = {"prompt": "Fine. It was", "choices": [" terrible", " great"], "answer": 1}
    assert row(SENTIMENT, {"text": "Fine.", "label": label}) == expected


def test_labels_may_be_booleans() -> None:
    task = Task("{q}?", {"true": " yes", "false": " no"}, label_field="answer")
    assert [row(task, {"q": "So", "answer": value})["answer"] for value in (True, False, "true", np.False_)] == [
        0,
        1,
        0,
        1,
    ]


def test_labels_may_share_a_word() -> None:
    task = Task("{q}", {0: " no", 1: " yes", "neg": " no", "pos": " yes"})
    found = task.rows([{"q": "", "label": label} for label in (0, 1, "neg", "pos")])
    assert [(r["choices"], r["answer"]) for r in found] == [([" no", " yes"], answer) for answer in (0, 1, 0, 1)]


def test_words_of_labels_may_hold_fields() -> None:
    task = Task("{q}", {1: " {option1}", 2: " {option2}"})
    expected = {"prompt": "?", "choices": [" a", " b"], "answer": 1}
    assert row(task, {"q": "?", "option1": "a", "option2": "b", "label": "2"}) == expected


def test_choices_from_a_list() -> None:
    record = {"q": "Which", "options": ["a", "b", 3], "answer": 2}
    assert row(OPTIONS, record) == {"prompt": "Which\nAnswer:", "choices": [" a", " b", " 3"], "answer": 2}


def test_a_label_may_have_any_field() -> None:
    task = Task("{text}", {"no": " no", "yes": " yes"}, label_field="is_spam?")
    assert row(task, {"text": "Hi", "is_spam?": "yes"})["answer"] == 1


@pytest.mark.parametrize(
    ("task", "found"),
    [
        (ROWS, {"prompt": [1, 2], "completion": [3, 4]}),
        (ROWS, {"prompt": "Hi", "completion": [3]}),
        (ROWS, {"prompt": [1, 2], "completion": " there"}),
        (CHOICE_ROWS, {"prompt": [1, 2], "choices": [[3], [4, 5]], "answer": 1}),
        (CHOICE_ROWS, {"prompt": "Hi", "choices": [" a", [4, 5]], "answer": 0}),
    ],
)
def test_rows_may_hold_token_ids(task: Task, found: dict[str, Any]) -> None:
    assert row(task, found) == found
    assert row(task, found | {"prompt": np.array([7, 8])}) == found | {"prompt": [7, 8]}


def test_text_is_not_compared_with_token_ids() -> None:
    task = Task("{prompt}", completion="{completion}", metric="exact_match")
    with pytest.raises(RecordError, match="record 0: field 'completion' holds token ids, and exact_match compares"):
        task.examples([{"prompt": "Hi", "completion": [3, 4]}])
    assert ROWS.examples([{"prompt": "Hi", "completion": [3]}]) == [Example({"prompt": "Hi", "completion": [3]})]


def test_numbers_are_texts_where_records_are_no_rows() -> None:
    assert row(Task("{q}", completion="{a}"), {"q": "2 + 2 =", "a": [4, 5]}) == {"prompt": "2 + 2 =", "completion": "4"}


@pytest.mark.parametrize(
    ("settings", "answers", "cut"),
    [
        ({"completion": "\n{a}"}, ["Rome"], 1),
        ({"completion": " {a}"}, ["Rome\nor Paris"], 1),
        ({"completion": " {a}"}, ["Rome\nor Paris"] * 2 + ["Rome"] * 8, 2),
        ({"completion": " {a}"}, ["Rome\nor Paris"] + ["Rome"] * 9, 0),
        ({"completion": " {a}\n"}, ["Rome"], 0),
        ({"completion": "\n{a}", "stop": ""}, ["Rome"], 0),
        ({"completion": "\n{a}", "stop": "\n\n"}, ["Rome"], 0),
        ({"completion": "\n{a}", "metric": "perplexity"}, ["Rome"], 0),
        ({"completion": " {a}", "metric": "number_match"}, ["none\nat all"], 0),
        ({"completion": " {a}", "metric": "number_match"}, ["4\nis right"], 0),
        ({"completion": " {a}", "metric": "token_f1"}, [["Rome\nor Paris", "Rome"]], 0),
    ],
)
def test_a_stop_that_cuts_the_answers(settings: dict[str, Any], answers: list[Any], cut: int) -> None:
    task = Task(**{"template": "{q}", "metric": "exact_match"} | settings)
    records = [{"q": "Where", "a": answer} for answer in answers]
    assert len(task.rows(records)) == len(records), "only what is judged needs to be right"
    if not cut:
        assert len(task.examples(records)) == len(records)
        return
    with pytest.raises(
        RecordError, match=rf"record 0: .* stop '\\n', .* {cut} of {len(records)} in all .*another stop"
    ):
        task.examples(records)


def test_a_stop_that_cuts_a_conversation() -> None:
    with pytest.raises(RecordError, match=r"record 0: .* stop 's\.', before this answer and 1 of 2 in all"):
        Task(messages="turns", metric="exact_match", stop="s.").examples([{"turns": TURNS}])


@pytest.mark.parametrize("choice_labels", ["options.label", ["A", "B", "C", "D"]])
def test_labels_of_choices_from_a_list(choice_labels: Any) -> None:
    task = Task("{q}", choices="{options.text}", choice_labels=choice_labels, label_field="key")
    record = {"q": "Which", "options": {"text": ["x", "y"], "label": ["A", "B"]}, "key": "B"}
    assert row(task, record) == {"prompt": "Which", "choices": ["x", "y"], "answer": 1}
    with pytest.raises(RecordError, match="record 0: field 'key' is 'C', not one of 'A', 'B'"):
        row(task, record | {"key": "C"})


def test_completions() -> None:
    record = {"q": "Where", "answers": {"text": ["Rome", "in Rome", "Rome"]}}
    expected = Example({"prompt": "Where?", "completion": " Rome\n"}, ("Rome", "in Rome"))
    assert SPAN.examples([record]) == [expected]


def test_every_turn_of_the_assistant_is_a_row() -> None:
    first, last = Example({"messages": TURNS[:3]}, ("4",)), Example({"messages": TURNS}, ("Yes.",))
    assert CHAT.examples([{"turns": TURNS}]) == [first, last]
    assert CHAT.examples([{"turns": np.array(TURNS)}]) == [first, last]
    assert Task(messages="turns", turns="last").examples([{"turns": TURNS}]) == [last]
    assert CHAT.examples([{"turns": TURNS[:4]}]) == [first]


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        (SENTIMENT, {"label": 1}, "field 'text' is missing; there is 'label'"),
        (SENTIMENT, {"text": "Fine."}, "field 'label' is missing; there is 'text'"),
        (SENTIMENT, {"text": "Fine.", "label": 2}, "field 'label' is '2', not one of '0', '1'"),
        (SENTIMENT, {"text": "Fine.", "label": None}, "field 'label' is null"),
        (SENTIMENT, {"text": "Fine.", "label": float("nan")}, "field 'label' is empty (NaN)"),
        (SENTIMENT, {"text": "Fine.", "label": [1]}, "field 'label' must hold text or a number, not [1] (list)"),
        (ROWS, {"prompt": [], "completion": "x"}, "field 'prompt' must hold text or a number, not [] (list)"),
        (ROWS, {"prompt": [1, 2.5], "completion": "x"}, "field 'prompt' must hold text or token ids alone, not [1, 2."),
        (ROWS, {"prompt": "x", "completion": [3, " a"]}, "field 'completion' must hold text or token ids alone"),
        (ROWS, {"prompt": "x", "completion": [True]}, "field 'completion' must hold text or token ids alone"),
        (CHOICE_ROWS, {"prompt": "x", "choices": [3, 4], "answer": 0}, "field 'choices' must hold a text or token ids"),
        (CHOICE_ROWS, {"prompt": "x", "choices": "ab", "answer": 0}, "there must be two choices or more, not ['ab']"),
        (SPAN, {"q": "x", "answers": {}}, "field 'answers.text' is missing; there is nothing"),
        (SPAN, {"q": "x", "answers": {"text": []}}, "field 'answers.text' is an empty list"),
        (SPAN, {"q": "x", "answers": {"text": ["a", " "]}}, "the completion is empty"),
        (OPTIONS, {"q": "x", "options": ["a"], "answer": 0}, "there must be two choices or more, not [' a']"),
        (OPTIONS, {"q": "x", "options": ["a", ""], "answer": 0}, "the choice is empty"),
        (OPTIONS, {"q": "x", "options": ["a", "b"], "answer": 2}, "field 'answer' is '2', not one of '0', '1'"),
        (CHAT, {"turns": "hello"}, "field 'turns' must hold a list of messages, not 'hello'"),
        (CHAT, {"turns": [*TURNS, {"from": "x"}]}, "field 'turns[5]' must have role and content alone, not"),
        (CHAT, {"turns": [{"role": "user", "content": None}]}, "field 'turns[0]' must hold text alone"),
        (CHAT, {"turns": TURNS[:2]}, "field 'turns' has no turn of the assistant"),
        (CHAT, {"turns": TURNS[2:3]}, "field 'turns' has no turn of the assistant that answers anything"),
    ],
)
def test_records_that_do_not_fit(task: Task, record: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as numbered:
        task.rows([record])
    assert str(numbered.value).startswith(f"record 0: {message}")
    with pytest.raises(RecordError) as placed:
        task.rows([Record(record, "films.csv:7")])
    assert str(placed.value).startswith(f"films.csv:7: {message}")


def test_choices_need_a_label_each() -> None:
    task = Task("{q}", choices="{o}", choice_labels=["A"])
    with pytest.raises(RecordError, match="2 choices, but their labels are"):
        task.rows([{"q": "x", "o": ["a", "b"], "label": "A"}])


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({}, "task", "needs one of labels, choices, completion, messages; got none"),
        ({"template": "{t}"}, "task", "got none"),
        ({"labels": {0: "a", 1: "b"}, "completion": "c"}, "task", "got labels and completion"),
        ({"completion": "c"}, "template", "must be text, got None"),
        ({"template": "{0}", "completion": "c"}, "template", "plain names"),
        ({"template": "{t", "completion": "c"}, "template", "expected '}'"),
        ({"template": "t", "completion": "{a[0]}"}, "completion", "plain names"),
        ({"template": "t", "completion": 3}, "completion", "must be text, got 3"),
        ({"template": "t", "labels": {0: " one"}}, "labels", "at least two different"),
        ({"template": "t", "labels": {0: " same", 1: " same"}}, "labels", "at least two different"),
        ({"template": "t", "labels": {0: " a", "0": " b", 1: " c"}}, "labels", "at least two different"),
        ({"template": "t", "labels": {0: " a", 1: 2}}, "labels.1", "must be text, got 2"),
        ({"template": "t", "labels": {0: " a", 1: "{"}}, "labels.1", "Single"),
        ({"template": "t", "labels": [" a", " b"]}, "labels", "must be a table"),
        ({"template": "t", "labels": {0: " a", 1: " b"}}, "template", "needs a field in braces"),
        ({"template": "t", "labels": {0: "a", 1: "b"}, "stop": "."}, "stop", "is not for a task with labels"),
        ({"template": "t", "completion": "c", "label_field": "x"}, "label_field", "is not for a task with completion"),
        ({"template": "t", "messages": "m"}, "template", "is not for a task with messages"),
        ({"messages": "{m}"}, "messages", "must be a field's name"),
        ({"messages": "m", "turns": "first"}, "turns", "must be one of all, last"),
        ({"template": "t", "choices": "{o}", "label_field": 3}, "label_field", "must be a field's name"),
        ({"template": "t", "choices": "{o}", "label_field": ""}, "label_field", "must be a field's name"),
        ({"template": "t", "choices": "{o}", "choice_labels": ["A", "A"]}, "choice_labels", "must differ"),
        ({"template": "t", "choices": "{o}", "choice_labels": 4}, "choice_labels", "must be a list of texts"),
        ({"template": "t", "choices": "{o}", "metric": "macro_f1"}, "metric", "must be one of accuracy here"),
        ({"template": "t", "labels": {0: "{a}", 1: "b"}, "metric": "macro_f1"}, "metric", "is taken over words"),
        ({"template": "t", "completion": "c", "metric": "accuracy"}, "metric", "must be one of perplexity, exact"),
        ({"template": "t", "completion": "c", "max_tokens": 0}, "max_tokens", "whole number of at least 1"),
        ({"template": "t", "completion": "c", "max_tokens": 1.5}, "max_tokens", "whole number of at least 1"),
        ({"template": "t", "completion": "c", "stop": 3}, "stop", "must be text"),
        ({"template": "t", "completion": "c", "values": {"q": "x"}}, "values.q", "must be a table"),
        ({"template": "t", "completion": "c", "values": {"q": {"a": 1}}}, "values.q.a", "must be text"),
        ({"template": "t", "completion": "c", "values": {"{q}": {"a": "b"}}}, "values", "must be a field's name"),
        ({"template": "t", "completion": "c", "label": "x"}, "label", "is unknown; a task may have template, labels"),
    ],
)
def test_tasks_that_make_no_sense(settings: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        Task.from_dict(settings)
    assert caught.value.param == param
    assert message in str(caught.value)


def test_what_follows_from_the_kind() -> None:
    assert (SENTIMENT.kind, SENTIMENT.metric, SENTIMENT.label_field, SENTIMENT.stop) == (
        "labels",
        "accuracy",
        "label",
        None,
    )
    completion = Task("{q}", completion="{a}")
    assert (completion.metric, completion.stop, completion.max_tokens) == ("perplexity", "\n", 64)
    assert (CHAT.metric, CHAT.stop, CHAT.turns) == ("perplexity", "", "all")
    for metric in OF_TEXT:
        assert Task("{q}", completion="{a}", metric=metric).metric == metric  # type: ignore[arg-type]


@pytest.mark.parametrize("task", [SENTIMENT, SPAN, CHAT, OPTIONS, *BUILTIN.values()])
def test_a_task_survives_its_file(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_text(task.to_toml(), encoding="utf-8")
    assert Task.from_file(path) == task


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template = ", "not TOML"),
        ('template = "{t}"\nlabel = 3', "label: is unknown; a task may have"),
        ('template = "{t}"\n[labels]\n0 = " a"\n1 = 2', "labels.1: must be text, got 2"),
    ],
)
def test_a_file_at_fault_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_text(text)
    with pytest.raises(InvalidValue) as caught:
        Task.from_file(path)
    assert str(caught.value).startswith(f"{path}: {message}")
