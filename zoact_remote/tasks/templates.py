"""Templates: text with a record's fields in braces.

``"{text} It was"`` has the field ``text``; ``{answers.text}`` is the member ``text`` of the field ``answers``; ``{{``
and ``}}`` stand for braces. ``{premise:unstopped}`` puts the field in another form, one of :data:`FORMS`. What a field
holds is text and never a template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from numbers import Number
from string import Formatter
from typing import Any, TypeAlias

import numpy as np

from zoact_remote.errors import InvalidValue
from zoact_remote.tasks.records import RecordError

Values: TypeAlias = Mapping[str, Mapping[str, str]]
"""By field: what its values are called in a prompt."""

FIELD = re.compile(r"[^\W\d][\w -]*(\.[^\W\d][\w -]*)*")


def _uncapitalised(text: str) -> str:
    return text if re.match(r"I\b", text) else text[:1].lower() + text[1:]


FORMS: dict[str, Callable[[str], str]] = {
    "": str,
    "stripped": str.strip,
    "capitalised": lambda text: text[:1].upper() + text[1:],
    "uncapitalised": _uncapitalised,
    "unstopped": lambda text: text.rstrip().removesuffix("."),
}
"""Forms of a field: without white space around it; with a capital at its start, or without one (but for the word I);
without its full stop."""


@dataclass(frozen=True)
class Part:
    """Some text, then a field; no field at a template's end."""

    text: str
    field: str | None
    form: str


@lru_cache(maxsize=256)
def parse(template: str) -> tuple[Part, ...]:
    """A template's parts.

    Raises:
        ValueError: a brace has no partner, a field is not a plain name, or a form is unknown.

    """
    parts = [Part(text, name, form or "") for text, name, form, conversion in _split(template)]
    for part in parts:
        if part.field is not None and not FIELD.fullmatch(part.field):
            raise ValueError(f"fields must be plain names in braces, got {{{part.field}}} in {template!r}")
        if part.form not in FORMS:
            known = ", ".join(form for form in FORMS if form)
            raise ValueError(f"the form of a field must be one of {known}, got {part.form!r} in {template!r}")
    return tuple(parts)


def check(template: Any, param: str) -> None:
    """Raise InvalidValue unless ``template`` is one."""
    if not isinstance(template, str):
        raise InvalidValue(param, f"must be text, got {template!r}")
    try:
        parse(template)
    except ValueError as error:
        raise InvalidValue(param, str(error)) from None


def has_fields(template: str) -> bool:
    """Whether a template says different things of different records."""
    return bool(_fields(template))


def render(template: str, record: Mapping[str, Any], values: Values) -> str:
    """A template with a record's fields filled in.

    Raises:
        RecordError: a field is missing, holds nothing or no text, or has a value that ``values`` does not name.

    """
    return _fill(template, {field: lookup(record, field) for field in _fields(template)}, values)


def render_each(template: str, record: Mapping[str, Any], values: Values) -> list[str]:
    """The texts of a template whose only field may hold a list: one an item.

    Raises:
        RecordError: as :func:`render`, or the list is empty.

    """
    fields = _fields(template)
    items = items_of(lookup(record, fields[0])) if len(fields) == 1 else None
    if items is None:
        return [render(template, record, values)]
    if not items:
        raise RecordError(f"field {fields[0]!r} is an empty list")
    return [_fill(template, {fields[0]: item}, values) for item in items]


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """What a record holds at a field, or at a member of one; a field whose own name has dots goes first.

    Raises:
        RecordError: there is no such field, or it is null.

    """
    value: Any = record
    for name in [path] if path in record else path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            there = ", ".join(map(repr, value)) if isinstance(value, Mapping) else repr(value)
            raise RecordError(f"field {path!r} is missing; there is {shortened(there) or 'nothing'}")
        value = value[name]
    if value is None:
        raise RecordError(f"field {path!r} is null")
    return value


def items_of(value: Any) -> list[Any] | None:
    """The items of a list, a tuple, or an array such as NumPy's and pandas'; None of anything else."""
    listed = isinstance(value, (list, tuple)) or getattr(value, "ndim", None)
    return list(value) if listed else None


def token_ids(value: Any, field: str) -> list[int] | None:
    """The token ids that a value is a list of; None for texts.

    Raises:
        RecordError: it is a list that holds numbers, but not whole ones alone.

    """
    items = items_of(value) or []
    if not any(isinstance(item, (Number, np.bool_)) for item in items):
        return None
    if not all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in items):
        raise RecordError(f"field {field!r} must hold text or token ids alone, not {shortened(repr(value))}")
    return [int(item) for item in items]


def cell(value: Any, field: str) -> str:
    """What a field holds, as text.

    Raises:
        RecordError: it is neither text nor a number nor a date, or not a number (NaN), which pandas has for nothing.

    """
    if not isinstance(value, (str, Number, np.bool_, date)):
        kind = type(value).__name__
        raise RecordError(f"field {field!r} must hold text or a number, not {shortened(repr(value))} ({kind})")
    if value != value:
        raise RecordError(f"field {field!r} is empty (NaN)")
    return text_of(value)


def text_of(value: Any) -> str:
    """Text, a number or a date as text: booleans as JSON has them, whole numbers without a decimal point."""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, (float, np.floating)) and value.is_integer() else str(value)


def _split(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    parts = list(Formatter().parse(template))
    if any(conversion for *_, conversion in parts):
        raise ValueError(f"fields must be plain names in braces, without '!', in {template!r}")
    return parts


def _fields(template: str) -> list[str]:
    return [part.field for part in parse(template) if part.field is not None]


def _fill(template: str, found: Mapping[str, Any], values: Values) -> str:
    return "".join(
        part.text + ("" if part.field is None else FORMS[part.form](_word(found[part.field], part.field, values)))
        for part in parse(template)
    )


def _word(value: Any, field: str, values: Values) -> str:
    text = cell(value, field)
    if field not in values:
        return text
    if text not in values[field]:
        raise RecordError(f"field {field!r} is {shortened(text)!r}, not one of {', '.join(map(repr, values[field]))}")
    return values[field][text]


def shortened(text: str, width: int = 120) -> str:
    """A text, or its beginning."""
    return text if len(text) <= width else text[: width - 3] + "..."
