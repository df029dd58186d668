r"""A task: a prompt and what should follow it, as a few declarative lines.

It can be written in Python, or as a TOML file beside the data. A task has one of four kinds of answers::

    template = "{text} It was"              # labels: a word for each
    [labels]
    0 = " terrible"
    1 = " great"

    template = "Question: {question}\nAnswer:"
    choices = " {options}"                  # choices: a field's list; the label tells which is right
    label_field = "answer"

    template = "Question: {question}\nAnswer:"
    completion = " {answer}\n"              # a completion: text
    metric = "exact_match"

    messages = "messages"                   # conversations, whose assistant turns are learnt
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from zoact_remote import toml
from zoact_remote.errors import InvalidValue
from zoact_remote.metrics import OF_TEXT
from zoact_remote.tasks.records import RecordError
from zoact_remote.tasks.templates import (
    Values,
    cell,
    check,
    has_fields,
    items_of,
    lookup,
    render,
    render_each,
    shortened,
    text_of,
    token_ids,
)
from zoact_remote.wire import Json

T = TypeVar("T", bound="str | list[int]")
Metric = Literal["accuracy", "macro_f1", "exact_match", "token_f1", "number_match", "perplexity"]
Turns = Literal["all", "last"]

_COMMON = ("template", "values", "metric")
_GENERATION = ("max_tokens", "stop")
KINDS: dict[str, tuple[str, ...]] = {
    "labels": ("labels", "label_field", *_COMMON),
    "choices": ("choices", "choice_labels", "label_field", *_COMMON),
    "completion": ("completion", *_COMMON, *_GENERATION),
    "messages": ("messages", "turns", "metric", *_GENERATION),
}
"""Kinds of answers, and the settings that each has."""
METRICS: dict[str, tuple[str, ...]] = {
    "labels": ("accuracy", "macro_f1"),
    "choices": ("accuracy",),
    "completion": ("perplexity", *OF_TEXT),
    "messages": ("perplexity", *OF_TEXT),
}
"""The metrics that fit each kind, the one taken if none is named first."""
DEFAULTS: dict[str, Any] = {"label_field": "label", "turns": "all", "max_tokens": 64}
MOST_CUT = 0.1
"""Share of the answers that the stop may cut short; of GSM8K's it does 6 in 8,792."""


@dataclass(frozen=True)
class Example:
    """What a record becomes.

    Attributes:
        row: as the wire has it (:mod:`zoact_remote.wire`).
        references: texts that are right to generate; empty for choices and for token ids.

    """

    row: Json
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    r"""A prompt and its answers: ``labels``, ``choices``, a ``completion`` or ``messages``, one of the four.

    Templates have a record's fields in braces (:mod:`zoact_remote.tasks.templates`). What a kind of answers has no use
    for must be left out. Where the templates are ``{prompt}`` and ``{completion}`` or ``{choices}`` alone, records are
    rows as the wire has them, and may hold lists of token ids in the place of texts.

    Attributes:
        template: the prompt, such as ``"{text} It was"``. It should not end in a space: the space belongs to the word
            that follows. Every kind but messages needs one.
        labels: label (as records hold it: a string, a number or a boolean) to the template of its word, such as
            ``{0: " terrible", 1: " great"}`` or ``{1: " {option1}", 2: " {option2}"}``. Several labels may share a
            word. The order is that of the choices.
        completion: template of the completion, such as ``" {answer}"``. Where its only field holds a list, the first
            item is learnt and any is right.
        label_field: the record's field that holds the label; ``label`` if None.
        choices: template of a choice, whose only field holds a list: one choice an item.
        choice_labels: what the record's label calls the choices, such as ``["A", "B", "C", "D"]``, or the field that
            holds these; positions from 0 if None.
        messages: field that holds a conversation, a list of ``{"role": ..., "content": ...}``.
        turns: of the assistant to learn: ``all`` (as if None), each in a row of its own, or ``last``.
        values: by field, what its values are called in templates: ``{"question": {"cause": "because", "effect":
            "so"}}``.
        metric: by what the task is judged. ``accuracy`` (as if None) or ``macro_f1`` for labels, ``accuracy`` for
            choices; for text ``perplexity`` (as if None), or ``exact_match``, ``token_f1`` or ``number_match`` of what
            the model generates (:mod:`zoact_remote.metrics`).
        max_tokens: most tokens to generate; 64 if None.
        stop: generated text ends before it, and so must what is right; empty for nowhere. If None, a new line for a
            completion and nowhere for messages.

    Raises:
        InvalidValue: a setting is wrong, missing, or not of this kind.

    """

    template: str | None = None
    labels: Mapping[str | int, str] | None = None
    completion: str | None = None
    label_field: str | None = None
    choices: str | None = None
    choice_labels: str | Sequence[str] | None = None
    messages: str | None = None
    turns: Turns | None = None
    values: Values = field(default_factory=dict)
    metric: Metric | None = None
    max_tokens: int | None = None
    stop: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise InvalidValue("task", f"needs one of {', '.join(KINDS)}; got {' and '.join(given) or 'none'}")
        (kind,) = given
        for name in self.__dataclass_fields__:
            if name not in KINDS[kind] and getattr(self, name) not in (None, {}):
                raise InvalidValue(name, f"is not for a task with {kind}, which has {', '.join(KINDS[kind])}")
        # All that follows from the kind is written down here, so that every task says in full what it does.
        defaults = DEFAULTS | {"metric": METRICS[kind][0], "stop": "" if kind == "messages" else "\n"}
        for name, default in defaults.items():
            if name in KINDS[kind] and getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if kind != "messages":
            check(self.template, "template")
        self._check()
        if self.labels is not None and not any(map(has_fields, (str(self.template), *self.labels.values()))):
            raise InvalidValue("template", f"needs a field in braces, such as {{text}}; got {self.template!r}")
        if self.metric not in METRICS[kind]:
            raise InvalidValue("metric", f"must be one of {', '.join(METRICS[kind])} here, got {self.metric!r}")
        if self.metric == "macro_f1" and any(map(has_fields, (self.labels or {}).values())):
            raise InvalidValue("metric", "macro_f1 is taken over words, which must hold no fields then")

    def _check(self) -> None:
        for name in ("completion", "choices"):
            if getattr(self, name) is not None:
                check(getattr(self, name), name)
        for name in ("label_field", "messages"):
            _check_field(getattr(self, name), name)
        if self.labels is not None:
            object.__setattr__(self, "labels", _words(self.labels))
        if self.choice_labels is not None:
            object.__setattr__(self, "choice_labels", _names(self.choice_labels))
        object.__setattr__(self, "values", _values(self.values))
        if self.turns is not None and self.turns not in get_args(Turns):
            raise InvalidValue("turns", f"must be one of {', '.join(get_args(Turns))}, got {self.turns!r}")
        count = self.max_tokens
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise InvalidValue("max_tokens", f"must be a whole number of at least 1, got {count!r}")
        if self.stop is not None and not isinstance(self.stop, str):
            raise InvalidValue("stop", f"must be text, got {self.stop!r}")

    @property
    def kind(self) -> str:
        """Of answers; one of :data:`KINDS`."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def rows(self, records: Iterable[Mapping[str, Any]]) -> list[Json]:
        """The rows of records: one each, but one a turn of conversations.

        Raises:
            RecordError: as :meth:`examples`.

        """
        return [example.row for _, example in self._placed(records)]

    def examples(self, records: Iterable[Mapping[str, Any]]) -> list[Example]:
        """The rows of records, with the texts that would be right.

        Raises:
            RecordError: a field is missing or wrong, or the label is not one of the task's; or where generated text is
                judged, the task's stop would cut more right answers than a few. The message begins with the record's
                place, its number from 0 where it has none.

        """
        found = list(self._placed(records))
        cut = [place for place, example in found if self._is_cut(example)]
        if len(cut) > MOST_CUT * len(found):
            raise RecordError(
                f"{cut[0]}: generated text ends at the stop {self.stop!r}, before this answer and {len(cut)} of "
                f"{len(found)} in all are right: give the task another stop, or '' for nowhere"
            )
        return [example for _, example in found]

    def to_dict(self) -> Json:
        """The task's settings, in plain values; :meth:`from_dict` reads them."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name in KINDS[self.kind]}
        return {name: value for name, value in found.items() if value is not None and value != {}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        """A task from its settings.

        Raises:
            InvalidValue: a setting is missing, unknown or wrong.

        """
        for name in data:
            if name not in cls.__dataclass_fields__:
                raise InvalidValue(name, f"is unknown; a task may have {', '.join(cls.__dataclass_fields__)}")
        return cls(**data)

    def to_toml(self) -> str:
        """The task as the text of a file that :meth:`from_file` reads."""
        return toml.dumps(self.to_dict())

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Task:
        """A task from a TOML file.

        Raises:
            InvalidValue: the file is not TOML, or a setting is missing, unknown or wrong; the parameter names the file
                and the setting.

        """
        data = toml.load(path)
        try:
            return cls.from_dict(data)
        except InvalidValue as error:
            raise InvalidValue(f"{os.fspath(path)}: {error.param}", error.message) from None

    def _placed(self, records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Example]]:
        """What each record becomes, and the record's place."""
        for i, record in enumerate(records):
            place = getattr(record, "place", f"record {i}")
            try:
                for example in self._examples(record):
                    yield place, example
            except RecordError as error:
                raise RecordError(f"{place}: {error}") from None

    def _is_cut(self, example: Example) -> bool:
        """Whether what is learnt would be worth less if it were generated, for ending at the stop."""
        if self.metric not in OF_TEXT or not self.stop:
            return False
        row, worth = example.row, OF_TEXT[self.metric]
        text = row["completion"] if "completion" in row else row["messages"][-1]["content"]
        return worth(text.partition(self.stop)[0], example.references) < worth(text, example.references)

    def _examples(self, record: Mapping[str, Any]) -> list[Example]:
        if self.messages is not None:
            return self._turns(lookup(record, self.messages))
        prompt = self._ids(record, "prompt") or render(self.template or "", record, self.values)
        if self.completion is not None:
            if ids := self._ids(record, "completion"):
                if self.metric in OF_TEXT:
                    raise RecordError(f"field 'completion' holds token ids, and {self.metric} compares texts")
                return [Example({"prompt": prompt, "completion": ids})]
            texts = [_filled(text, "completion") for text in render_each(self.completion, record, self.values)]
            references = tuple(dict.fromkeys(text.strip() for text in texts))
            return [Example({"prompt": prompt, "completion": texts[0]}, references)]
        choices, names = self._choices(record)
        label = cell(lookup(record, self.label_field or ""), self.label_field or "")
        if label not in names:
            raise RecordError(
                f"field {self.label_field!r} is {shortened(label)!r}, not one of {', '.join(map(repr, names))}"
            )
        return [Example({"prompt": prompt, "choices": choices, "answer": names[label]})]

    @property
    def _as_wire(self) -> bool:
        """Whether records are rows as the wire has them."""
        return self.template == "{prompt}" and (self.completion == "{completion}" or self.choices == "{choices}")

    def _ids(self, record: Mapping[str, Any], name: str) -> list[int] | None:
        """The token ids in a field of a record that is a row already; None for texts."""
        return token_ids(lookup(record, name), name) if self._as_wire else None

    def _listed(self, record: Mapping[str, Any]) -> Sequence[str | list[int]]:
        """The choices of a record that holds a list of them."""
        assert self.choices is not None
        if not self._as_wire:
            return render_each(self.choices, record, self.values)
        choices = lookup(record, "choices")
        if self._ids(record, "choices"):
            raise RecordError(f"field 'choices' must hold a text or token ids for each, not {shortened(repr(choices))}")
        return [
            token_ids(item, "choices") or render(self.choices, {"choices": item}, self.values)
            for item in items_of(choices) or [choices]
        ]

    def _choices(self, record: Mapping[str, Any]) -> tuple[Sequence[str | list[int]], dict[str, int]]:
        """A record's choices, and which of them each label means."""
        choices: Sequence[str | list[int]]
        if self.labels is not None:
            words = list(dict.fromkeys(self.labels.values()))
            choices = [render(word, record, self.values) for word in words]
            names = {str(label): words.index(word) for label, word in self.labels.items()}
        else:
            choices = self._listed(record)
            labels = self.choice_labels
            found: Any = lookup(record, labels) if isinstance(labels, str) else labels or [*range(len(choices))]
            known = items_of(found) or []
            if len(known) < len(choices):
                raise RecordError(f"there are {len(choices)} choices, but their labels are {found!r}")
            names = {text_of(label): i for i, label in enumerate(known[: len(choices)])}
        if len(choices) < 2:
            raise RecordError(f"there must be two choices or more, not {choices}")
        return [_filled(choice, "choice") for choice in choices], names

    def _turns(self, found: Any) -> list[Example]:
        """A conversation up to each of the assistant's turns, or up to the last one."""
        messages = items_of(found)
        if messages is None:
            raise RecordError(f"field {self.messages!r} must hold a list of messages, not {shortened(repr(found))}")
        for i, message in enumerate(messages):
            place = f"{self.messages}[{i}]"
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise RecordError(f"field {place!r} must have role and content alone, not {shortened(repr(message))}")
            if not all(isinstance(value, str) for value in message.values()):
                raise RecordError(f"field {place!r} must hold text alone, not {shortened(repr(message))}")
        ends = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        if not ends:
            raise RecordError(f"field {self.messages!r} has no turn of the assistant that answers anything")
        taken = ends[-1:] if self.turns == "last" else ends
        return [Example({"messages": messages[: i + 1]}, (messages[i]["content"].strip(),)) for i in taken]


def _words(labels: Any) -> dict[str, str]:
    """Label to word, with labels as text: JSON and TOML have no other keys."""
    words = {text_of(label): word for label, word in _table(labels, "labels").items()}
    for label, word in words.items():
        check(word, f"labels.{label}")
    if len(words) != len(labels) or len(set(words.values())) < 2:
        raise InvalidValue("labels", f"needs at least two different labels and words, got {dict(labels)}")
    return words


def _values(values: Any) -> dict[str, dict[str, str]]:
    """Words by field and value, with values as text."""
    found = {}
    for name, words in _table(values, "values").items():
        _check_field(name, "values")
        found[name] = {text_of(value): word for value, word in _table(words, f"values.{name}").items()}
        for value, word in found[name].items():
            if not isinstance(word, str):
                raise InvalidValue(f"values.{name}.{value}", f"must be text, got {word!r}")
    return found


def _table(value: Any, param: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InvalidValue(param, f"must be a table, got {value!r}")
    return value


def _names(choice_labels: Any) -> str | tuple[str, ...]:
    """A field's name, or the labels themselves as text."""
    if isinstance(choice_labels, str):
        _check_field(choice_labels, "choice_labels")
        return choice_labels
    if not isinstance(choice_labels, Sequence) or not all(isinstance(item, (str, int)) for item in choice_labels):
        raise InvalidValue("choice_labels", f"must be a list of texts or a field's name, got {choice_labels!r}")
    names = tuple(map(text_of, choice_labels))
    if len(set(names)) != len(names):
        raise InvalidValue("choice_labels", f"must differ, got {choice_labels!r}")
    return names


def _check_field(value: Any, param: str) -> None:
    if value is not None and not (isinstance(value, str) and value and not {"{", "}"} & set(value)):
        raise InvalidValue(param, f"must be a field's name, without braces, got {value!r}")


def _filled(text: T, what: str) -> T:
    if isinstance(text, str) and not text.strip():
        raise RecordError(f"the {what} is empty")
    return text
