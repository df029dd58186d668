r"""Tasks: how records of data become rows.

A task is declarative, so that it can live in a JSON file beside the data::

    {"template": "{text}\nCategory:", "labels": {"billing": " billing", "outage": " outage"}}
    {"template": "Question: {question}\nAnswer:", "completion": " {answer}"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from zoact_remote.errors import InvalidValue
from zoact_remote.wire import Json


class RecordError(ValueError):
    """A record that does not fit its task, or a line that holds no record."""


@dataclass(frozen=True)
class Task:
    """A prompt, and either label words to choose from or a completion.

    Attributes:
        template: the prompt, with the record's fields in braces, such as ``"{text} It was"``. ``{{`` and ``}}`` stand
            for braces. It should not end in a space: the space belongs to the word that follows.
        labels: label (as records hold it, a string or an integer) to label word, such as ``{"0": " terrible"}``. The
            order is that of the choices.
        completion: template of the completion, such as ``" {answer}"``. Give this or ``labels``.
        label_field: the record's field that holds the label.

    """

    template: str
    labels: Mapping[str | int, str] | None = None
    completion: str | None = None
    label_field: str = "label"

    def __post_init__(self) -> None:
        if (self.labels is None) == (self.completion is None):
            raise InvalidValue("labels", "a task has either labels or a completion")
        _fields(self.template, "template")
        if self.completion is not None:
            _fields(self.completion, "completion")
        if self.labels is not None:
            words = {_label(label): word for label, word in self.labels.items()}
            if len(words) != len(self.labels) or len(words) < 2 or len(set(words.values())) != len(words):
                raise InvalidValue("labels", f"needs at least two different labels and words, got {dict(self.labels)}")
            object.__setattr__(self, "labels", words)

    def row(self, record: Mapping[str, Any]) -> Json:
        """The row of a record.

        Raises:
            RecordError: a field is missing, or the label is not one of the task's.

        """
        prompt = _render(self.template, record)
        if self.labels is None:
            return {"prompt": prompt, "completion": _render(self.completion or "", record)}
        label = _label(_field(record, self.label_field))
        names = list(self.labels)
        if label not in names:
            raise RecordError(
                f"{self.label_field!r} is {label!r}, not one of {', '.join(map(repr, names))}: {_shown(record)}"
            )
        return {"prompt": prompt, "choices": list(self.labels.values()), "answer": names.index(label)}

    def rows(self, records: Iterable[Mapping[str, Any]]) -> list[Json]:
        """The rows of records.

        Raises:
            RecordError: as :meth:`row`, with the record's number, from 0.

        """
        return [self._placed(record, f"record {i}") for i, record in enumerate(records)]

    def load_rows(self, path: str | os.PathLike[str]) -> list[Json]:
        """The rows of a JSON Lines file's records.

        Raises:
            RecordError: as :meth:`row`, with the file and line.

        """
        return [self._placed(record, place) for place, record in _read_jsonl(path)]

    def to_dict(self) -> Json:
        """The task as JSON; :meth:`from_dict` reads it."""
        made = {"template": self.template, "label_field": self.label_field}
        return made | ({"completion": self.completion} if self.labels is None else {"labels": dict(self.labels)})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        """A task from JSON.

        Raises:
            InvalidValue: a member is missing, unknown or wrong.

        """
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown or "template" not in data:
            known = ", ".join(cls.__dataclass_fields__)
            raise InvalidValue("task", f"needs 'template', and may have only {known}; got {', '.join(data)}")
        return cls(**data)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Task:
        """A task from a JSON file."""
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def _placed(self, record: Mapping[str, Any], place: str) -> Json:
        try:
            return self.row(record)
        except RecordError as error:
            raise RecordError(f"{place}: {error}") from None


def load_jsonl(path: str | os.PathLike[str]) -> list[Json]:
    """The records of a JSON Lines file. Blank lines are passed over.

    Raises:
        RecordError: a line is not a JSON object; the message names file and line.

    """
    return [record for _, record in _read_jsonl(path)]


def _read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[str, Json]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{os.fspath(path)}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecordError(f"{place}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise RecordError(f"{place}: not a JSON object, but {type(record).__name__}")
            yield place, record


def _fields(template: str, param: str) -> None:
    """Raise InvalidValue unless every field is a plain name: no index, attribute, conversion or format."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InvalidValue(param, f"{error}: {template!r}") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise InvalidValue(param, f"fields must be plain names in braces, got {{{name}}} in {template!r}")


def _render(template: str, record: Mapping[str, Any]) -> str:
    return "".join(
        literal + ("" if name is None else str(_field(record, name)))
        for literal, name, _, _ in Formatter().parse(template)
    )


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise RecordError(f"field {name!r} is missing: {_shown(record)}")
    return record[name]


def _label(value: Any) -> str:
    # JSON has no integer keys, so labels are compared as text; booleans as JSON writes them.
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(record: Mapping[str, Any], width: int = 120) -> str:
    text = json.dumps(dict(record), ensure_ascii=False, default=str)
    return text if len(text) <= width else text[: width - 3] + "..."


BUILTIN: dict[str, Task] = {
    # MeZO's prompt and words (Malladi et al., arXiv 2305.17333, appendix).
    "sst2": Task("{text} It was", {0: " terrible", 1: " great"}),
    # LM-BFF's prompt and words (Gao et al., arXiv 2012.15723), which MeZO uses for subj.
    "subj": Task("{text} This is", {0: " subjective", 1: " objective"}),
    # After Zhao et al., "Calibrate before use", arXiv 2102.09690; words that common tokenisers keep whole.
    "trec": Task(
        "Question: {text}\nAnswer type:",
        {0: " abbreviation", 1: " entity", 2: " description", 3: " human", 4: " location", 5: " number"},
    ),
    # examples/data/tickets.jsonl, the quickstart's.
    "tickets": Task(
        "Customer: {text}\nThis is about",
        {"billing": " billing", "bug": " bugs", "account": " accounts", "shipping": " shipping"},
    ),
    "agnews": Task("Article: {title}. {text}\nTopic:", {0: " world", 1: " sports", 2: " business", 3: " technology"}),
}
"""Tasks for well-known data sets, by name. Records are as the sets' usual JSON Lines files hold them."""
