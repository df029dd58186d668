"""Tasks, rows and methods from options."""

from pathlib import Path
from typing import Any

import pytest

from zoact_remote import EarlyStopping, Guard
from zoact_remote.cli.data import make_task, split, subset, task_of, task_table
from zoact_remote.cli.output import CommandFailed
from zoact_remote.cli.settings import DEFAULTS, TrainingSettings
from zoact_remote.optimizers import SGD, Adam, GaussianAdam


def test_tasks_from_options() -> None:
    records = [{"body": "x", "kind": "a"}, {"body": "y", "kind": "b"}]
    task = make_task(records, text_field="body", label_field="kind")
    assert task.rows(records)[1] == {"prompt": "y\nCategory:", "choices": [" a", " b"], "answer": 1}
    task = make_task([], template="{text}\\nIt was", labels=["0= bad", "1= good = fine"])
    assert task.to_dict()["labels"] == {"0": " bad", "1": " good = fine"}
    assert task.template == "{text}\nIt was"
    assert make_task([], task="sst2").template == "{text} It was"
    Path("films.toml").write_text('template = "{text}?"\ncompletion = " {answer}"')
    assert make_task([], task="films.toml", text_field="q").template == "{q}?"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, "messages"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "completion"),
        ({"prompt": "It was", "choices": [" bad", " good"], "answer": 1}, "choices"),
        ({"prompt": [1, 2], "completion": [3, 4]}, "completion"),
        ({"prompt": "Hi", "completion": [3, 4]}, "completion"),
        ({"prompt": [1, 2], "choices": [[3], [4]], "answer": 1}, "choices"),
    ],
)
def test_records_that_say_what_they_are(record: dict[str, Any], kind: str) -> None:
    task = make_task([record])
    assert task.kind == kind
    assert task.rows([record]) == [record]
    assert task_of([], task.to_dict()) == task, "a run that goes on reads its rows likewise"


def test_words_for_labels_need_no_template() -> None:
    labels = ["0= bad", "1= good"]
    table = task_table(None, None, labels, None, None, None)
    assert task_of([], table) == make_task([], labels=labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sst2", "template": "x"}, "leave out"),
        ({"task": "none"}, "neither a file"),
        ({"task": "rte", "text_field": "body"}, "has no {text} to stand for"),
        ({"labels": ["a"]}, "LABEL=WORD"),
        ({"labels": ["a=b"], "completion": "x"}, "either"),
        ({"label_field": "none"}, "no record has text or a number in 'none': .* --label-field"),
        ({}, "not words"),
    ],
)
def test_tasks_that_cannot_be_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandFailed, match=message):
        make_task([{"text": "x", "label": 0}, {"text": "y", "label": 1}], **arguments)


def test_rows_are_split_and_chosen() -> None:
    rows = list(range(100))
    training, held_out = split(rows, 0.2)
    assert (len(training), len(held_out)) == (80, 20)
    assert sorted([*training, *held_out]) == rows
    assert split(rows, 0.2) == (training, held_out)
    assert subset(rows, 20) == subset(rows, 20)
    for chosen in (training, held_out, subset(rows, 20)):
        assert sorted(chosen) == chosen
        assert 0.2 < sum(row < 50 for row in chosen) / len(chosen) < 0.8, "a file may be in order of label"
        assert 0.2 < sum(row % 2 for row in chosen) / len(chosen) < 0.8, "or its labels may take turns"
    assert subset([1, 2], 4) == [1, 2]


def test_settings_make_the_method() -> None:
    assert isinstance(DEFAULTS.make_optimizer(), Adam)
    sgd = TrainingSettings(optimizer="sgd", momentum=0.9, weight_decay=0.1).make_optimizer()
    assert isinstance(sgd, SGD)
    assert (sgd.momentum, sgd.weight_decay) == (0.9, 0.1)
    gaussian = TrainingSettings(optimizer="gaussian-adam")
    assert isinstance(gaussian.make_optimizer(), GaussianAdam)
    assert (DEFAULTS.noise, gaussian.noise) == ("rademacher", "gaussian")
    assert TrainingSettings(schedule="constant").make_schedule()(399) == 2e-3
    assert TrainingSettings(schedule="constant", learning_rate=1).make_schedule()(399) == 1.0
    assert TrainingSettings(schedule="constant", learning_rate=0).make_schedule()(399) == 0.0
    assert TrainingSettings(schedule="cosine").make_schedule()(399) < 1e-3 * 2e-3
    assert TrainingSettings(warmup=10).make_schedule()(0) == 2e-4
    assert TrainingSettings(estimator="forward-difference", probes=3).make_estimator().ask(lambda: 1).base
    assert [type(made) for made in DEFAULTS.make_callbacks("accuracy")] == [Guard]
    (stopping,) = TrainingSettings(guard=False, patience=2, eval_every=5).make_callbacks("token_f1")
    assert isinstance(stopping, EarlyStopping)
    assert (stopping.patience, stopping.metric) == (2, "token_f1")


def test_labels_in_records_are_words_and_no_templates() -> None:
    records = [{"text": "a", "label": "{text}"}, {"text": "b", "label": "{{}}"}, {"text": "c", "label": "{"}]
    rows = make_task(records).rows(records)
    assert [row["choices"][row["answer"]] for row in rows] == [" {text}", " {{}}", " {"]


def test_a_label_may_be_a_member_of_a_field() -> None:
    records = [{"text": "a", "meta": {"label": "x"}}, {"text": "b", "meta": {"label": "y"}}]
    rows = make_task(records, label_field="meta.label").rows(records)
    assert [row["choices"][row["answer"]] for row in rows] == [" x", " y"]


def test_booleans_are_named_as_they_are_to_be_given() -> None:
    records = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    with pytest.raises(CommandFailed, match="the labels false, true are not words"):
        make_task(records)
    assert [row["answer"] for row in make_task(records, labels=["false= no", "true= yes"]).rows(records)] == [1, 0]


def test_numbers_are_labels_that_need_words() -> None:
    records = [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}, {"text": "c", "label": float("nan")}]
    with pytest.raises(CommandFailed, match="the labels 0, 1 are not words"):
        make_task(records)


def test_a_share_held_out_is_a_number() -> None:
    with pytest.raises(CommandFailed, match="--hold-out"):
        split([1, 2, 3], float("nan"))
