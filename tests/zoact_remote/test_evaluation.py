"""Figures of rows and of tasks, from servers that are tables."""

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from zoact_remote import InvalidValue, Record, RecordError, Row, Scores, Task, evaluate, evaluate_task
from zoact_remote.errors import BadRequest, TooLarge
from zoact_remote.evaluation import calibrated, generate_texts
from zoact_remote.wire import Generation, RowScore

TOO_MANY = TooLarge("rows: too many", status=400, code="batch_too_large", param="rows")
TOO_LARGE = TooLarge("the body is too large", status=413, code="request_too_large")


class Table:
    """Answers with log-likelihoods written into the rows.

    Args:
        most: rows that it takes in a call.
        refusal: of a call with more.
        bad: prompt of a row that it takes in no call.

    """

    def __init__(self, most: int = 1024, refusal: BadRequest = TOO_MANY, bad: str | None = None) -> None:
        self.most = most
        self.refusal = refusal
        self.bad = bad
        self.calls: list[tuple[int, int | None]] = []

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        if len(rows) > self.most:
            raise self.refusal
        for i, row in enumerate(rows):
            if row["prompt"] == self.bad:
                raise TooLarge(f"rows[{i}].prompt: is rows[{i}].prompt", status=400, param=f"rows[{i}].prompt")
        self.calls.append((len(rows), version))
        scored = [
            RowScore(
                tuple(row["logprobs"]),
                tuple(row.get("tokens", (1,) * len(row["logprobs"]))),
                -row["logprobs"][row.get("answer", 0)],
            )
            for row in rows
        ]
        return Scores(7 if version is None else version, tuple(scored), 0.0, 10)


class Author:
    """Scores every row alike, and generates what it was told to, the first of them last.

    Args:
        texts: by prompt, or by the content of the last message.

    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts
        self.versions: set[int | None] = set()
        self._others = threading.Event()

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        return Scores(3, tuple(RowScore((-2.0,), (4,), 0.5) for _ in rows), 0.5, 10)

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        max_tokens: int = 64,
        stop: str | Sequence[str] = (),
        version: int | None = None,
    ) -> Generation:
        asked = prompt if messages is None else messages[-1]["content"]
        assert isinstance(asked, str)
        if len(self.texts) > 1 and asked == next(iter(self.texts)):
            assert self._others.wait(60)
        self.versions.add(version)
        if asked not in self.texts:
            raise BadRequest("max_tokens: at most 3 tokens fit", status=400, param="max_tokens")
        self._others.set()
        text = self.texts[asked][:max_tokens]
        return Generation(3, text.partition(stop)[0] if isinstance(stop, str) else text, (), "stop")


def choice(answer: int, *logprobs: float, words: Sequence[str] = (" no", " yes")) -> dict[str, Any]:
    return {"prompt": "?", "choices": list(words), "answer": answer, "logprobs": logprobs}


def test_a_favoured_label_loses_its_head_start() -> None:
    rows = [choice(0, -1.0, -2.0), choice(0, -1.1, -2.1), choice(1, -1.0, -1.2), choice(1, -3.0, -3.1)]
    found = evaluate(Table(), rows)
    assert found.predictions == (0, 0, 0, 0)
    assert found.accuracy == 0.5
    assert found.calibrated_accuracy == 1.0
    assert found.loss == pytest.approx(np.mean([1.0, 1.1, 1.2, 3.1]))
    assert found.to_json() == {
        "version": 7,
        "loss": found.loss,
        "accuracy": 0.5,
        "calibrated_accuracy": 1.0,
        "macro_f1": pytest.approx(1 / 3),
        "perplexity": None,
        "rows": 4,
        "tokens": 10,
    }


def test_calibration_ignores_how_likely_a_row_is_as_a_whole() -> None:
    scores = np.array([[-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.5]])
    shifts = np.array([[5.0], [-7.0], [0.0]])
    np.testing.assert_allclose(calibrated(scores), calibrated(scores + shifts))
    np.testing.assert_allclose(calibrated(scores).mean(axis=0), 0.0, atol=1e-12)


def test_batches_keep_to_one_version() -> None:
    table, seen = Table(), list[tuple[int, int]]()
    rows = [choice(0, -1.0, -2.0)] * 5
    found = evaluate(table, rows, rows_per_call=2, progress=lambda done, total: seen.append((done, total)))
    assert table.calls == [(2, None), (2, 7), (1, 7)]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert (found.version, found.tokens, len(found.logprobs)) == (7, 30, 5)
    assert evaluate(table, rows, version=0).version == 0


@pytest.mark.parametrize("refusal", [TOO_MANY, TOO_LARGE])
def test_a_batch_that_is_too_much_is_sent_in_halves(refusal: BadRequest) -> None:
    table = Table(most=3, refusal=refusal)
    rows = [choice(i % 2, -1.0, -2.0) for i in range(11)]
    assert evaluate(table, rows, rows_per_call=10) == evaluate(Table(), rows, rows_per_call=3)
    assert [count for count, _ in table.calls] == [3, 3, 3, 2]
    with pytest.raises(BadRequest, match="too many"):
        evaluate(Table(most=0), rows)
    with pytest.raises(BadRequest, match="stale"):
        evaluate(Table(most=3, refusal=BadRequest("stale", param="version")), rows)
    with pytest.raises(BadRequest, match="no rows"):
        evaluate(Table(most=3, refusal=BadRequest("no rows like these", param="rows")), rows)


def test_a_row_at_fault_is_named_by_its_place_in_all() -> None:
    rows = [choice(0, -1.0, -2.0) for _ in range(9)]
    rows[7]["prompt"] = "bad"
    with pytest.raises(TooLarge) as caught:
        evaluate(Table(most=5, bad="bad"), rows, rows_per_call=4)
    assert caught.value.param == "rows[7].prompt"
    assert caught.value.message == "rows[7].prompt: is rows[3].prompt"


def test_completions_have_no_accuracy() -> None:
    rows = [
        {"prompt": "2 + 2 =", "completion": " 4", "logprobs": [-0.5], "tokens": [1]},
        {"prompt": "", "completion": " a b c", "logprobs": [-3.5], "tokens": [3]},
    ]
    found = evaluate(Table(), rows)
    assert (found.accuracy, found.calibrated_accuracy, found.macro_f1) == (None, None, None)
    assert found.predictions == (None, None)
    assert found.loss == 2.0
    assert found.perplexity == pytest.approx(math.e)
    assert evaluate(Table(), [rows[0], choice(0, -1.0, -2.0)]).accuracy == 1.0


def test_choices_that_differ_by_row_are_not_calibrated() -> None:
    found = evaluate(Table(), [choice(0, -1.0, -2.0), choice(1, -1.0, -2.0, -3.0, words=(" a", " b", " c"))])
    assert found.accuracy == 0.5
    assert found.calibrated_accuracy is None
    assert found.macro_f1 is None


def test_a_version_whose_scores_are_no_numbers_has_no_accuracy() -> None:
    rows = [choice(0, -1.0, -2.0), choice(0, math.nan, math.nan)]
    found = evaluate(Table(), rows)
    assert all(math.isnan(getattr(found, name)) for name in ("accuracy", "calibrated_accuracy", "macro_f1"))
    assert found.to_json()["accuracy"] is None
    apart = evaluate(Table(), [*rows, choice(0, -1.0, -2.0, words=(" a", " b"))])
    assert math.isnan(apart.figure("accuracy"))


def test_figures_by_name() -> None:
    found = evaluate(Table(), [choice(0, -1.0, -2.0), choice(1, -1.0, -3.0)])
    assert (found.figure("accuracy"), found.figure("loss")) == (0.5, 2.0)
    for name in ("perplexity", "exact_match", "version"):
        with pytest.raises(InvalidValue, match=f"^metric: must be one of accuracy, macro_f1, loss .*'{name}'"):
            found.figure(name)


def test_arguments_are_checked() -> None:
    with pytest.raises(InvalidValue, match="rows"):
        evaluate(Table(), [])
    with pytest.raises(InvalidValue, match="rows_per_call"):
        evaluate(Table(), [choice(0, -1.0, -2.0)], rows_per_call=0)


def test_a_task_of_spans() -> None:
    task = Task("{q}", completion=" {answers}\n", metric="token_f1")
    records = [
        {"q": "Who?", "answers": ["Ann Lee", "Ann"]},
        {"q": "Where?", "answers": ["in Rome"]},
        {"q": "When?", "answers": ["1999"]},
    ]
    author = Author({"Who?": " Ann\nWho else?", "Where?": " Rome.", "When?": "1998"})
    seen: list[tuple[int, int]] = []
    found = evaluate_task(author, task, records, progress=lambda done, total: seen.append((done, total)))
    assert found.texts == (" Ann", " Rome.", "1998")
    assert found.exact_match == pytest.approx(1 / 3)
    assert found.token_f1 == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert (found.version, found.loss, found.number_match) == (3, 0.5, None)
    assert found.perplexity == pytest.approx(math.exp(0.5))
    assert author.versions == {3}, "text is generated at the version that was scored"
    assert seen == [(3, 3), (1, 3), (2, 3), (3, 3)]
    assert {"exact_match", "token_f1"} <= found.to_json().keys()
    assert "number_match" not in found.to_json()


def test_a_task_of_sums() -> None:
    task = Task("{q}", completion=" {a}\n\n", metric="number_match", stop="\n\n", max_tokens=16)
    records = [{"q": "2 + 2", "a": "Count.\n#### 4"}, {"q": "3 + 3", "a": "#### 6"}]
    found = evaluate_task(Author({"2 + 2": "\nIt is 4.0.\n\n5", "3 + 3": "6" * 17}), task, records)
    assert found.texts == ("\nIt is 4.0.", "6" * 16)
    assert (found.number_match, found.exact_match, found.token_f1) == (0.5, None, None)


def test_a_task_of_conversations() -> None:
    task = Task(messages="m", metric="exact_match")
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello\nthere."))]
    found = evaluate_task(Author({"Hi": "hello there"}), task, [{"m": turns}])
    assert (found.texts, found.exact_match) == (("hello there",), 1.0)


def test_nothing_is_generated_where_no_metric_asks_for_it() -> None:
    found = evaluate_task(Author({}), Task("{q}", completion="{a}"), [{"q": "x", "a": "y"}], version=2)
    assert not found.texts
    assert found.perplexity == pytest.approx(math.exp(0.5))


def test_a_record_at_fault_is_named() -> None:
    with pytest.raises(RecordError, match=r"a\.csv:3: field 'a' is missing"):
        evaluate_task(Author({}), Task("{q}", completion="{a}"), [Record({"q": "x"}, "a.csv:3")])


def test_a_prompt_that_leaves_no_room_is_named() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "too long"}]
    with pytest.raises(BadRequest) as caught:
        generate_texts(Author({"a": "", "b": ""}), [*rows, *rows], max_tokens=4)
    assert caught.value.param == "rows[2].max_tokens"
    assert str(caught.value).startswith("rows[2].max_tokens: at most 3 tokens fit")
