"""How well a version does on rows of any number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoact_remote.errors import InvalidValue
from zoact_remote.wire import Json, Row, Scores


class Scorer(Protocol):
    """What can be evaluated; an :class:`~zoact_remote.adapter.Adapter` is one."""

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        """Log-likelihoods, row by row."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Scores of a version over an evaluation set.

    Attributes:
        version: the version evaluated.
        loss: mean of the rows' losses, in nats.
        accuracy: share of the choices rows whose likeliest choice is the answer; None if there are none.
        calibrated_accuracy: the same after each label's mean score is taken away (:func:`calibrated`). It shows how
            much of a gain is more than the removal of a model's bias for a label. None unless all rows have the same
            choices.
        logprobs: each row's summed log-likelihoods in nats, one a choice, one alone for a completion row.
        predictions: each row's likeliest choice; None for a completion row.
        tokens: tokens that went through the model.

    """

    version: int
    loss: float
    accuracy: float | None
    calibrated_accuracy: float | None
    logprobs: tuple[tuple[float, ...], ...]
    predictions: tuple[int | None, ...]
    tokens: int

    def to_json(self) -> Json:
        """The figures, without those of single rows."""
        return {
            "version": self.version,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "calibrated_accuracy": self.calibrated_accuracy,
            "rows": len(self.logprobs),
            "tokens": self.tokens,
        }


def evaluate(
    adapter: Scorer,
    rows: Sequence[Row],
    *,
    version: int | None = None,
    rows_per_call: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a version on rows, a batch a call.

    Args:
        adapter: what to evaluate.
        rows: at least one.
        version: None for the newest at the first call, which the others then keep to; 0 is the base model.
        rows_per_call: at most the server's :attr:`~zoact_remote.wire.Limits.max_rows`.
        progress: called after each batch with the rows done and the rows in all.

    """
    if not rows:
        raise InvalidValue("rows", "at least one row is needed")
    if rows_per_call < 1:
        raise InvalidValue("rows_per_call", f"must be at least 1, got {rows_per_call}")
    batches: list[Scores] = []
    for start in range(0, len(rows), rows_per_call):
        batches.append(adapter.scores(rows[start : start + rows_per_call], version=version))
        version = batches[0].version
        if progress is not None:
            progress(min(start + rows_per_call, len(rows)), len(rows))
    scores = [score for batch in batches for score in batch.rows]
    logprobs = tuple(score.logprobs for score in scores)
    predictions = tuple(
        int(np.argmax(values)) if "choices" in row else None for row, values in zip(rows, logprobs, strict=True)
    )
    hits = [guess == row["answer"] for row, guess in zip(rows, predictions, strict=True) if guess is not None]
    alike = all("choices" in row and row["choices"] == rows[0].get("choices") for row in rows)
    answers = np.array([row["answer"] for row in rows]) if alike else None
    return Evaluation(
        version=batches[0].version,
        loss=float(np.mean([score.loss for score in scores])),
        accuracy=float(np.mean(hits)) if hits else None,
        calibrated_accuracy=(
            None if answers is None else float(np.mean(calibrated(logprobs).argmax(axis=1) == answers))
        ),
        logprobs=logprobs,
        predictions=predictions,
        tokens=sum(batch.tokens for batch in batches),
    )


def calibrated(logprobs: ArrayLike) -> NDArray[np.float64]:
    """Log-probabilities of labels with each label's mean over the rows taken away.

    Rows are first normalised (log-softmax), so that rows whose labels are all likely do not outweigh the others.
    A label that the model favours whatever the input so loses its head start. It needs no answers.

    Args:
        logprobs: ``[rows, labels]``, in nats.

    Returns:
        float64 ``[rows, labels]``; each column's mean is 0.

    """
    scores: NDArray[np.float64] = np.array(logprobs, dtype=np.float64)
    scores -= np.logaddexp.reduce(scores, axis=1, keepdims=True)
    scores -= scores.mean(axis=0, keepdims=True)
    return scores
