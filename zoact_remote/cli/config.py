"""A run as one TOML file.

Sections are ``data``, ``task``, ``adapter``, ``method``, ``evaluation`` and ``output``. A task is written as in a file
for ``--task``, or is a ``name``: that of such a file, or of a built-in task.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from zoact_remote import toml
from zoact_remote.cli.settings import DEFAULTS, LoggerName, TrainingSettings, setting
from zoact_remote.errors import InvalidValue

if TYPE_CHECKING:
    from zoact_remote.tasks import Task

TASK = "task"
SECTIONS = {
    "data": "Records: a file (.jsonl, .csv, .tsv or .parquet), or a data set on the hub, such as ag_news@test.",
    TASK: "What records mean: a built-in task or a file, by its name, or a task's own settings. If nothing is here, "
    "records of text and label, of messages, of prompt and completion, or of prompt, choices and answer are taken as "
    "they are.",
    "adapter": "What is trained.",
    "method": "How it is trained.",
    "evaluation": "How held-out rows are used.",
    "output": "Where results go.",
}
WIDTH = 100


@dataclass(frozen=True)
class RunConfig:
    """A run: its data, its adapter, what it leaves, and its settings."""

    data: str | None = setting(None, "data", "Records to train on.", key="train")
    eval_data: str | None = setting(None, "data", "Records to evaluate on.", key="eval")
    hold_out: float = setting(
        0.2,
        "data",
        "Share of the training records to evaluate on instead, where there are no others.",
        least=0,
        most=0.9,
    )
    task: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = setting(None, "adapter", "Its name, such as acme/triage.", key="name")
    url: str | None = setting(None, "adapter", "Of its server; $ZOACT_URL or http://127.0.0.1:8000 if not given.")
    go_on: bool = setting(False, "adapter", "Train an adapter that has been trained before.", key="continue")
    out: str | None = setting(
        None,
        "output",
        "The results' directory, where an earlier run of the adapter gives way; runs/TENANT-NAME if not given.",
        key="directory",
    )
    log_to: tuple[LoggerName, ...] = setting(
        (), "output", "Services that also get every step's figures, where their package is installed."
    )
    settings: TrainingSettings = DEFAULTS

    def changed(self, values: Mapping[str, Any]) -> RunConfig:
        """The run with other values of some fields, its own and its settings'; None stands for no other value."""
        given = {name: value for name, value in values.items() if value is not None}
        own = {name: given.pop(name) for name in list(given) if name in _names(RunConfig)}
        return replace(self, **own, settings=replace(self.settings, **given))

    def resolved(self, task: Task) -> RunConfig:
        """The run with its task and settings in full, and with files by paths that hold from any directory."""
        paths = [
            str(Path(path).resolve()) if path is not None and Path(path).is_file() else path
            for path in (self.data, self.eval_data)
        ]
        return replace(self, data=paths[0], eval_data=paths[1], task=task.to_dict(), settings=self.settings.resolved())


def load(path: str | os.PathLike[str]) -> RunConfig:
    """The run that a file describes.

    Raises:
        InvalidValue: the file is not TOML, or a key is unknown or its value wrong; the parameter names both.
        OSError: it cannot be opened.

    """
    values: dict[str, Any] = {}
    for section, table in toml.load(path).items():
        if section not in SECTIONS:
            raise InvalidValue(f"{os.fspath(path)}: {section}", f"is unknown; there are {', '.join(SECTIONS)}")
        if not isinstance(table, Mapping):
            raise InvalidValue(f"{os.fspath(path)}: {section}", f"must be a section, [{section}]")
        if section == TASK:
            values[TASK] = table
            continue
        known = dict(_fields(section))
        for key, value in table.items():
            param = f"{os.fspath(path)}: {section}.{key}"
            if key not in known:
                raise InvalidValue(param, f"is unknown; [{section}] may have {', '.join(known)}")
            values[known[key].name] = _checked(value, known[key], param)
    return RunConfig().changed(values)


def dumps(config: RunConfig) -> str:
    """The run as a file that :func:`load` reads, every key with its meaning."""
    return "\n".join(_lines(config)) + "\n"


def _lines(config: RunConfig) -> Iterator[str]:
    # Imported here, as the commands' options need none of it.
    from zoact_remote.tasks import Task

    for section, text in SECTIONS.items():
        yield from _comment(text)
        if section == TASK:
            yield from _comment(f"Settings: name, text_field, {', '.join(_names(Task))}.")
            yield toml.dumps({TASK: config.task}).strip("\n")
        else:
            yield f"[{section}]"
        for key, found in _fields(section):
            yield from _comment(found.metadata["text"])
            own = found.name in _names(RunConfig)
            value = getattr(config if own else config.settings, found.name)
            yield f"# {key} =" if value is None else toml.dumps({key: value}).strip("\n")
        yield ""


def _comment(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")


def _names(kind: type[RunConfig | TrainingSettings | Task]) -> list[str]:
    return [found.name for found in fields(kind)]


def _fields(section: str) -> Iterator[tuple[str, Field[Any]]]:
    """The keys of a section, and the fields that they stand for."""
    for found in (*fields(RunConfig), *fields(TrainingSettings)):
        if found.metadata.get("section") == section:
            yield found.metadata["key"] or found.name, found


def _checked(value: Any, found: Field[Any], param: str) -> Any:
    hints = get_type_hints(RunConfig) | get_type_hints(TrainingSettings)
    hint = hints[found.name]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    bounds = found.metadata["least"], found.metadata["most"]
    for kind in kinds:
        if get_origin(kind) is tuple and isinstance(value, list):
            choices = get_args(get_args(kind)[0])
            if all(item in choices for item in value):
                return tuple(value)
        elif get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _bounded(float(value), *bounds, param)
        elif kind in (int, str, bool) and type(value) is kind:
            return _bounded(value, *bounds, param)
    raise InvalidValue(param, f"must be {' or '.join(filter(None, map(_said, kinds)))}, got {value!r}")


def _bounded(value: Any, least: float | None, most: float | None, param: str) -> Any:
    if least is not None and not value >= least:
        raise InvalidValue(param, f"must be at least {least}, got {value!r}")
    if most is not None and not value <= most:
        raise InvalidValue(param, f"must be at most {most}, got {value!r}")
    return value


def _said(kind: Any) -> str:
    """A type in words; empty for None, which TOML has not."""
    if get_origin(kind) is tuple:
        return f"a list of {_said(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return {float: "a number", int: "a whole number", str: "text", bool: "true or false"}.get(kind, "")
