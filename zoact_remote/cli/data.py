"""Records and tasks from the command line's options."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zoact_remote.cli.output import CommandFailed

if TYPE_CHECKING:
    from zoact_remote.tasks import Task

T = TypeVar("T")

TEMPLATE = "{text}\nCategory:"
MOST_LABELS = 64
"""Above this, a field of many values was surely not meant as a label."""


def make_task(
    records: Sequence[Mapping[str, Any]],
    *,
    task: str | None = None,
    template: str | None = None,
    labels: Sequence[str] | None = None,
    completion: str | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
) -> Task:
    """The task that the options describe, or else the records' fields.

    Records of ``messages`` are conversations, and those of ``prompt`` and ``completion``, or of ``prompt``, ``choices``
    and ``answer``, are these, in text or token ids; any other records have a label, which is its own word.

    Args:
        records: say what is meant where no option does.
        task: a built-in task's name, or a TOML file. It has its own ``template``, ``labels`` and ``completion``.
        template: the prompt's.
        labels: each ``label=word``.
        completion: the completion's template, in place of labels.
        text_field: takes the place of ``text`` in the template.
        label_field: the field that holds the label.

    """
    from zoact_remote.tasks import Task

    if task is not None:
        if template or labels or completion:
            raise CommandFailed(
                "--task brings its own template and labels: leave out --template, --label, --completion"
            )
        made = _named_task(task)
    else:
        if labels and completion:
            raise CommandFailed("a task has either labels or a completion: leave out --label or --completion")
        prompt = _unescape(template or TEMPLATE)
        fields = set(records[0]) if records and not (template or label_field) else set()
        if completion:
            made = Task(prompt, completion=_unescape(completion))
        elif labels:
            made = Task(prompt, dict(map(_label_word, labels)))
        elif "messages" in fields:
            made = Task(messages="messages")
        elif {"prompt", "completion"} <= fields:
            made = Task("{prompt}", completion="{completion}")
        elif {"prompt", "choices", "answer"} <= fields:
            made = Task("{prompt}", choices="{choices}", label_field="answer")
        else:
            made = Task(prompt, _labels_in(records, label_field or "label"))
    return _with_fields(made, text_field, label_field)


def task_table(
    task: str | None,
    template: str | None,
    labels: Sequence[str] | None,
    completion: str | None,
    text_field: str | None,
    label_field: str | None,
) -> dict[str, Any]:
    """The options of :func:`make_task` as a configuration's ``[task]``, without those that were not given."""
    given = {
        "name": task,
        "template": template and _unescape(template),
        "labels": dict(map(_label_word, labels)) if labels else None,
        "completion": completion and _unescape(completion),
        "text_field": text_field,
        "label_field": label_field,
    }
    return {name: value for name, value in given.items() if value is not None}


def task_of(records: Sequence[Mapping[str, Any]], table: Mapping[str, Any]) -> Task:
    """The task that a configuration's ``[task]`` describes, or else the records' fields.

    Raises:
        InvalidValue: a setting is unknown or wrong.
        CommandFailed: the settings do not go together.

    """
    from zoact_remote.errors import InvalidValue
    from zoact_remote.tasks import Task
    from zoact_remote.tasks.task import KINDS

    settings = dict(table)
    name, text_field, label_field = (settings.pop(key, None) for key in ("name", "text_field", "label_field"))
    if name is not None or not any(kind in settings for kind in KINDS):
        template = settings.pop("template", None)
        if settings:
            beside = "a name" if name else f"neither a name nor {', '.join(KINDS)}"
            raise CommandFailed(f"[task] has {', '.join(settings)}, but {beside}")
        return make_task(records, task=name, template=template, text_field=text_field, label_field=label_field)
    if "labels" in settings or "completion" in settings:
        settings.setdefault("template", TEMPLATE)
    try:
        return _with_fields(Task.from_dict(settings), text_field, label_field)
    except InvalidValue as error:
        raise InvalidValue(f"task.{error.param}", error.message) from None


def _with_fields(task: Task, text_field: str | None, label_field: str | None) -> Task:
    if text_field is not None:
        if "{text}" not in (task.template or ""):
            raise CommandFailed(f"--text-field {text_field}: the prompt {task.template!r} has no {{text}} to stand for")
        task = replace(task, template=str(task.template).replace("{text}", f"{{{text_field}}}"))
    return task if label_field is None else replace(task, label_field=label_field)


def subset(rows: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the rows: always the same ones, in their order."""
    return [rows[i] for i in _chosen(len(rows), most)]


def split(rows: Sequence[T], held_out: float) -> tuple[list[T], list[T]]:
    """The rows, and a share of them that is held out of training: always the same ones, in their order."""
    if not 0 <= held_out <= 1:
        raise CommandFailed(f"--hold-out: must be a share from 0 to 1, got {held_out}")
    chosen = _chosen(len(rows), round(len(rows) * held_out))
    rest = set(range(len(rows))).difference(chosen)
    return [rows[i] for i in sorted(rest)], [rows[i] for i in chosen]


def _chosen(count: int, most: int) -> list[int]:
    """Numbers from anywhere: a file may be in order of label, or its labels take turns."""
    return sorted(random.Random(0).sample(range(count), min(count, most)))


def _named_task(name: str) -> Task:
    from zoact_remote.tasks import BUILTIN, Task

    if name in BUILTIN:
        return BUILTIN[name]
    if not Path(name).is_file():
        raise CommandFailed(f"--task {name}: neither a file nor one of {', '.join(BUILTIN)}")
    return Task.from_file(name)


def _label_word(option: str) -> tuple[str | int, str]:
    label, equals, word = option.partition("=")
    if not (equals and label and word):
        raise CommandFailed(f"--label {option!r}: must be LABEL=WORD, such as 'billing= billing'")
    return label, _unescape(word)


def _labels_in(records: Sequence[Mapping[str, Any]], field: str) -> dict[str | int, str]:
    """Each label in the records as its own word, with the space before it that most tokenisers take as its part."""
    from zoact_remote.tasks.records import RecordError
    from zoact_remote.tasks.templates import cell, lookup

    found: dict[Any, str] = {}
    for record in records:
        with suppress(RecordError):
            label = lookup(record, field)
            found[label] = cell(label, field)
    if not found:
        raise CommandFailed(
            f"no record has text or a number in {field!r}: name the label's field with --label-field, or give --task"
        )
    if not all(isinstance(label, str) for label in found):
        shown = ", ".join(sorted(found.values())[:4])
        raise CommandFailed(
            f"the labels {shown} are not words: give each a word, --label '0= terrible' --label '1= great'"
        )
    if len(found) > MOST_LABELS:
        raise CommandFailed(
            f"{field!r} has {len(found)} values, too many for labels; to complete text, give --completion"
        )
    # A word is a template, and braces in a label are none of its.
    return {label: f" {label.replace('{', '{{').replace('}', '}}')}" for label in sorted(found)}


def _unescape(text: str) -> str:
    # Shells pass \n on as it is typed.
    return text.replace("\\n", "\n")
