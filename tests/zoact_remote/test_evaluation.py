"""Accuracies with and without label calibration."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from zoact_remote import InvalidValue, Row, Scores, evaluate
from zoact_remote.evaluation import calibrated
from zoact_remote.wire import RowScore


class Table:
    """Answers with log-likelihoods written into the rows."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int | None]] = []

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        self.calls.append((len(rows), version))
        scored = [
            RowScore(tuple(row["logprobs"]), (1,) * len(row["logprobs"]), -row["logprobs"][row.get("answer", 0)])
            for row in rows
        ]
        return Scores(7 if version is None else version, tuple(scored), 0.0, 10)


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


def test_completions_have_no_accuracy() -> None:
    found = evaluate(Table(), [{"prompt": "2 + 2 =", "completion": " 4", "logprobs": [-0.5]}])
    assert (found.accuracy, found.calibrated_accuracy, found.predictions) == (None, None, (None,))
    assert found.loss == 0.5


def test_choices_that_differ_by_row_are_not_calibrated() -> None:
    found = evaluate(Table(), [choice(0, -1.0, -2.0), choice(1, -1.0, -2.0, -3.0, words=(" a", " b", " c"))])
    assert found.accuracy == 0.5
    assert found.calibrated_accuracy is None


def test_arguments_are_checked() -> None:
    with pytest.raises(InvalidValue, match="rows"):
        evaluate(Table(), [])
    with pytest.raises(InvalidValue, match="rows_per_call"):
        evaluate(Table(), [choice(0, -1.0, -2.0)], rows_per_call=0)
