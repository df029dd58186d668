"""How well a version does on rows of any number, or on a task's records."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoact_remote import metrics
from zoact_remote.errors import BadRequest, InvalidValue, TooLarge
from zoact_remote.tasks import Example, Task
from zoact_remote.threads import side_by_side
from zoact_remote.wire import Generation, Json, Row, RowScore, Scores

Progress: TypeAlias = Callable[[int, int], None]

_ROW = re.compile(r"^rows\[(\d+)\]")


class Scorer(Protocol):
    """What can be evaluated on rows; an :class:`~zoact_remote.adapter.Adapter` is one."""

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        """Log-likelihoods, row by row."""
        ...


@runtime_checkable
class PlacedScorer(Protocol):
    """A scorer whose scores depend on where a row stands, as those of sampled text do."""

    def scores_from(self, start: int, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        """As :meth:`Scorer.scores`, of rows of which the first is at ``start`` among all that are evaluated."""
        ...


class Generator(Scorer, Protocol):
    """What can be evaluated on a task; an :class:`~zoact_remote.adapter.Adapter` is one."""

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        max_tokens: int = 64,
        stop: str | Sequence[str] = (),
        version: int | None = None,
    ) -> Generation:
        """The likeliest text, token by token."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Figures of a version over an evaluation set; None where one does not fit the rows, or was not asked for.

    Those of choices are nan where any choice's score is, as a model's that has diverged.

    Attributes:
        version: the version evaluated.
        loss: mean of the rows' losses, in nats.
        accuracy: share of the choices rows whose likeliest choice is the answer.
        calibrated_accuracy: the same after each label's mean score is taken away (:func:`calibrated`). It shows how
            much of a gain is more than the removal of a model's bias for a label. None unless all rows have the same
            choices.
        logprobs: each row's summed log-likelihoods in nats, one a choice, one alone for a completion row.
        predictions: each row's likeliest choice; None for a completion row.
        tokens: tokens that went through the model to score the rows.
        macro_f1: of the likeliest choices (:func:`zoact_remote.metrics.macro_f1`). None unless all rows have the same
            choices.
        perplexity: of a token of the rows without choices.
        exact_match: mean over the texts (:func:`zoact_remote.metrics.exact_match`).
        token_f1: mean over the texts (:func:`zoact_remote.metrics.token_f1`).
        number_match: mean over the texts (:func:`zoact_remote.metrics.number_match`).
        texts: what the version generated, row by row.

    """

    version: int
    loss: float
    accuracy: float | None
    calibrated_accuracy: float | None
    logprobs: tuple[tuple[float, ...], ...]
    predictions: tuple[int | None, ...]
    tokens: int
    macro_f1: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    token_f1: float | None = None
    number_match: float | None = None
    texts: tuple[str, ...] = ()

    def figure(self, name: str) -> float:
        """One of the figures in :data:`zoact_remote.metrics.FIGURES`.

        Raises:
            InvalidValue: there is no such figure here.

        """
        value: float | None = getattr(self, name) if name in metrics.FIGURES else None
        if value is None:
            there = [name for name in metrics.FIGURES if getattr(self, name) is not None]
            raise InvalidValue("metric", f"must be one of {', '.join(there)} for these rows, got {name!r}")
        return value

    def to_json(self) -> Json:
        """The figures, without those of single rows, fit for JSON: those that are not finite are None.

        Those of generated text are left out where there is none.
        """
        figures = {
            "version": self.version,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "calibrated_accuracy": self.calibrated_accuracy,
            "macro_f1": self.macro_f1,
            "perplexity": self.perplexity,
            "rows": len(self.logprobs),
            "tokens": self.tokens,
        }
        of_text = {name: getattr(self, name) for name in metrics.OF_TEXT}
        figures |= {name: value for name, value in of_text.items() if value is not None}
        return {name: value if value is None or math.isfinite(value) else None for name, value in figures.items()}


def evaluate(
    adapter: Scorer,
    rows: Sequence[Row],
    *,
    version: int | None = None,
    rows_per_call: int = 64,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a version on rows, a batch a call.

    Args:
        adapter: what to evaluate.
        rows: at least one.
        version: None for the newest at the first call, which the others then keep to; 0 is the base model, or what was
            imported.
        rows_per_call: at most; a batch that is too much for the server is sent in halves.
        progress: called after each batch with the rows done and the rows in all.

    Raises:
        InvalidValue: there are no rows, or ``rows_per_call`` is less than 1.
        BadRequest: a row is at fault; :attr:`~zoact_remote.errors.CallFailed.param` names it by its place in ``rows``.

    """
    if not rows:
        raise InvalidValue("rows", "at least one row is needed")
    if rows_per_call < 1:
        raise InvalidValue("rows_per_call", f"must be at least 1, got {rows_per_call}")
    scores: list[RowScore] = []
    tokens = 0
    for batch in _batches(adapter, rows, version, rows_per_call):
        scores += batch.rows
        tokens += batch.tokens
        version = batch.version
        if progress is not None:
            progress(len(scores), len(rows))
    assert version is not None
    logprobs = tuple(score.logprobs for score in scores)
    # A score may be another figure than a likelihood: it then has none, and the row's choices were not scored.
    choices = [row.get("choices") if values else None for row, values in zip(rows, logprobs, strict=True)]
    predictions = tuple(
        None if given is None else int(np.argmax(values)) for given, values in zip(choices, logprobs, strict=True)
    )
    chosen = [guess for guess in predictions if guess is not None]
    answers = [row["answer"] for row, given in zip(rows, choices, strict=True) if given is not None]
    # Where a score is not a number, no choice is the likeliest.
    broken = any(given is not None and np.isnan(values).any() for given, values in zip(choices, logprobs, strict=True))
    texts = [score for given, score in zip(choices, scores, strict=True) if given is None and score.tokens]
    found = Evaluation(
        version=version,
        loss=float(np.mean([score.loss for score in scores])),
        accuracy=(math.nan if broken else metrics.accuracy(chosen, answers)) if chosen else None,
        calibrated_accuracy=None,
        logprobs=logprobs,
        predictions=predictions,
        tokens=tokens,
        perplexity=(
            metrics.perplexity([score.logprobs[0] for score in texts], [score.tokens[0] for score in texts])
            if texts
            else None
        ),
    )
    if None in choices or any(given != choices[0] for given in choices):
        return found
    if broken:
        return replace(found, calibrated_accuracy=math.nan, macro_f1=math.nan)
    likeliest = calibrated(logprobs).argmax(axis=1).tolist()
    return replace(
        found,
        calibrated_accuracy=metrics.accuracy(likeliest, answers),
        macro_f1=metrics.macro_f1(chosen, answers),
    )


def evaluate_task(
    adapter: Generator,
    task: Task,
    records: Iterable[Mapping[str, Any]],
    *,
    version: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a version on a task's records and, if the task is judged by it, on the text that it generates.

    Args:
        adapter: what to evaluate.
        task: what the records mean.
        records: at least one.
        version: None for the newest; 0 is the base model, or what was imported.
        progress: called now and then with the rows done and the rows in all; twice over where text is generated.

    Raises:
        RecordError: a record does not fit the task.
        BadRequest: as :func:`evaluate`.

    """
    return evaluate_examples(adapter, task, task.examples(records), version=version, progress=progress)


def evaluate_examples(
    adapter: Generator,
    task: Task,
    examples: Sequence[Example],
    *,
    version: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """As :func:`evaluate_task`, of what the records became."""
    rows = [example.row for example in examples]
    found = evaluate(adapter, rows, version=version, progress=progress)
    if task.metric not in metrics.OF_TEXT:
        return found
    assert task.max_tokens is not None
    texts = generate_texts(
        adapter,
        rows,
        max_tokens=task.max_tokens,
        stop=task.stop or (),
        version=found.version,
        progress=progress,
    )
    # SQuAD's two figures go together; of worked solutions to sums, only the number says anything.
    names = ("number_match",) if task.metric == "number_match" else ("exact_match", "token_f1")
    figures: dict[str, Any] = {
        name: float(np.mean([metrics.OF_TEXT[name](t, e.references) for t, e in zip(texts, examples, strict=True)]))
        for name in names
    }
    return replace(found, texts=texts, **figures)


def generate_texts(
    adapter: Generator,
    rows: Sequence[Row],
    *,
    max_tokens: int,
    stop: str | Sequence[str] = (),
    version: int | None = None,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """What a version answers to rows: the likeliest text, token by token.

    Args:
        adapter: what to ask.
        rows: of a prompt or of messages; the answers in them are not shown to the model.
        max_tokens: most tokens to generate.
        stop: texts end before any of these strings.
        version: None for the newest; 0 is the base model, or what was imported.
        progress: called after each text with the texts done and the texts in all.

    Raises:
        BadRequest: a row is at fault, which :attr:`~zoact_remote.errors.CallFailed.param` names.

    """

    def ask(i: int) -> str:
        row = rows[i]
        asked = {"messages": row["messages"][:-1]} if "messages" in row else {"prompt": row["prompt"]}
        with renamed(f"rows[{i}].{{}}".format):
            return adapter.generate(**asked, max_tokens=max_tokens, stop=stop, version=version).text

    texts: list[str] = []
    # Closed at once if the progress raises: what has not begun is left out.
    with closing(side_by_side(ask, range(len(rows)))) as written:
        for text in written:
            texts.append(text)
            if progress is not None:
                progress(len(texts), len(rows))
    return tuple(texts)


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


def _batches(adapter: Scorer, rows: Sequence[Row], version: int | None, rows_per_call: int) -> Iterator[Scores]:
    """The rows' scores, in order, in as few calls as the server's limits allow."""
    start = 0
    while start < len(rows):
        batch = rows[start : start + rows_per_call]
        try:
            with rows_at(range(start, len(rows))):
                if isinstance(adapter, PlacedScorer):
                    scores = adapter.scores_from(start, batch, version=version)
                else:
                    scores = adapter.scores(batch, version=version)
        except TooLarge as error:
            # Whether rows are too much together, by number, tokens or bytes, is known to the server alone.
            if error.param not in (None, "rows") or len(batch) == 1:
                raise
            rows_per_call = math.ceil(len(batch) / 2)
            continue
        version = scores.version
        start += len(batch)
        yield scores


def rows_at(places: Sequence[int]) -> AbstractContextManager[None]:
    """Have a row at fault in a call named by its place among all rows, where ``places`` holds those of the call's."""
    return renamed(lambda param: _ROW.sub(lambda found: f"rows[{places[int(found[1])]}]", param))


@contextmanager
def renamed(rename: Callable[[str], str]) -> Iterator[None]:
    """Give the parameter of a failure in a call the name that it has for the caller."""
    try:
        yield
    except (BadRequest, InvalidValue) as error:
        if error.param is not None:
            old, error.param = error.param, rename(error.param)
            error.message = error.message.replace(f"{old}: ", f"{error.param}: ", 1)
        raise
