"""The ready-made tasks on records as their data sets have them."""

import os
from pathlib import Path
from typing import Any

import pytest

from zoact_remote import load_records
from zoact_remote.cli import options
from zoact_remote.tasks import BUILTIN

PREMISE = {"premise": "It rains.", "hypothesis": "It is wet."}
COPA = {"premise": "I woke up.", "choice1": "I slept.", "choice2": "The alarm rang.", "label": 1}
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("sst2", {"text": "a fine film .", "label": 1}, "a fine film . It was", " great"),
    ("sst2", {"text": "a dull film .", "label": "negative"}, "a dull film . It was", " terrible"),
    ("sst5", {"text": "a film .", "label": 2}, "a film . It was", " okay"),
    ("sst5", {"text": "a film .", "label": "very positive"}, "a film . It was", " great"),
    ("subj", {"text": "he leaves .", "label": 1}, "he leaves . This is", " objective"),
    ("subj", {"text": "he leaves .", "label": "subjective"}, "he leaves . This is", " subjective"),
    ("trec", {"text": "Who ?", "label": 3}, "Question: Who ?\nAnswer type:", " human"),
    ("trec", {"text": "Who ?", "label": "LOC"}, "Question: Who ?\nAnswer type:", " location"),
    ("agnews", {"title": "Cup", "text": "A final.", "label": 1}, "Article: Cup. A final.\nTopic:", " sports"),
    ("rte", PREMISE | {"label": "not_entailment"}, 'It rains.\nDoes this mean that "It is wet." is true? ', "No"),
    ("cb", PREMISE | {"label": "neutral"}, 'Suppose It rains. Can we infer that "It is wet."? Yes, No, or ', "Maybe"),
    ("boolq", {"passage": "P.", "question": "is it so", "label": True}, "P. Is it so?\n", "Yes"),
    ("boolq", {"passage": "P.", "question": "is it so", "label": "False"}, "P. Is it so?\n", "No"),
    (
        "wic",
        {"word": "bank", "sentence1": "A.", "sentence2": "B.", "label": False},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA.\nB.\n',
        "No",
    ),
    ("copa", COPA | {"question": "cause"}, "I woke up because", " the alarm rang."),
    ("copa", COPA | {"question": "effect", "label": "choice1"}, "I woke up so", " I slept."),
    ("tickets", {"text": "it crashes", "label": "bug"}, "Customer: it crashes\nThis is about", " bugs"),
    (
        "squad",
        {"context": "C.", "question": " When?", "answers": ["1999", "in 1999"]},
        "Context: C.\nQuestion: When?\nAnswer:",
        " 1999\n",
    ),
    ("mawps", {"question": "2 + 2 ?", "label": 4.0}, "Question: 2 + 2 ?\nAnswer:", " 4\n"),
    (
        "gsm8k",
        {"question": "2 + 2?", "answer": "It is 4.\n#### 4"},
        "Question: 2 + 2?\nAnswer:",
        " It is 4.\n#### 4\n\n",
    ),
]


@pytest.mark.parametrize(("name", "record", "prompt", "answer"), CASES)
def test_ready_made_tasks(name: str, record: dict[str, Any], prompt: str, answer: str) -> None:
    (row,) = BUILTIN[name].rows([record])
    assert row["prompt"].startswith(prompt)
    assert (row["completion"] if "completion" in row else row["choices"][row["answer"]]) == answer


def test_all_of_them_are_tried_and_offered() -> None:
    assert {name for name, *_ in CASES} == set(BUILTIN)
    (offered,) = options.TaskName.__metadata__  # type: ignore[attr-defined]
    assert offered.help.endswith(f"built-in task: {', '.join(BUILTIN)}.")


@pytest.mark.parametrize("name", sorted(set(BUILTIN) - {"tickets"}))
@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_ready_made_tasks_fit_whole_data_sets(name: str, part: str) -> None:
    home = os.environ.get("ZOACT_DATA")
    if home is None:
        pytest.skip("ZOACT_DATA names no directory of NAME/train.jsonl, NAME/dev.jsonl and NAME/test.jsonl")
    (path, *_) = [*Path(home).glob(f"{name}*/{part}.jsonl"), None]
    if path is None:
        pytest.skip(f"no {name}*/{part}.jsonl under ZOACT_DATA")
    records = load_records(path)
    examples = BUILTIN[name].examples(records)
    assert len(examples) == len(records) > 0
    if BUILTIN[name].labels is not None:
        answers = {example.row["answer"] for example in examples}
        assert answers <= set(range(len(examples[0].row["choices"])))
        assert len(answers) > 1
