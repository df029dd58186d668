"""The files of a run, and what a resumed run takes from them.

``checkpoint.json``
    What the run is of, what was measured for it, and the trainer's state: written before anything is asked of the
    server, and then after every step, before the step's update leaves. It is replaced in one piece and is on disk
    before the run goes on.
``metrics.jsonl``
    A line a step.
``evaluations.jsonl``
    A line an evaluation, with the scores of every row: by the number of steps before it, ``null`` for that of the
    model alone.

``lock``
    Locked while a run is under way (:mod:`zoact_remote.locks`).

Metrics and evaluations are cut back to what the checkpoint covers when a run is resumed, so that nothing is listed
twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from zoact_remote.callbacks import Callback
from zoact_remote.cli.output import CommandFailed
from zoact_remote.errors import InvalidValue
from zoact_remote.evaluation import Evaluation
from zoact_remote.files import write_atomically
from zoact_remote.history import StepRecord
from zoact_remote.locks import InUse, lock
from zoact_remote.training import Trainer

if TYPE_CHECKING:
    from zoact_remote.wire import AdapterInfo, Json

FORMAT = 5
CHECKPOINT, METRICS, EVALUATIONS, RESULT = "checkpoint.json", "metrics.jsonl", "evaluations.jsonl", "result.json"
CONFIG, TASK, REPORT = "config.toml", "task.toml", "report.html"


class RunFiles(Callback):
    """Keeps a run's files: a callback for its trainer.

    Args:
        directory: there already.
        about: what the run is of, fit for JSON. A run is resumed only if all of it is as it was.
        resume: go on from the checkpoint, if there is one; else whatever run of this adapter was here before is
            forgotten.

    Raises:
        InvalidValue: the checkpoint is of something else; the field that differs is named.
        CommandFailed: a run is under way there; or it is not to be resumed, and the run there is another adapter's, or
            was cut off and this one would train the same adapter further.

    """

    def __init__(self, directory: Path, about: Mapping[str, Any], *, resume: bool) -> None:
        # Whatever is wrong, the directory is let go of at once: whoever catches the error may keep this frame alive.
        with ExitStack() as opened:
            try:
                opened.enter_context(lock(directory))
            except InUse as error:
                raise CommandFailed(
                    f"a run is under way in {directory} ({error}): wait for it, or give another directory with --out"
                ) from None
            self._checkpoint = directory / CHECKPOINT
            about = {"format": FORMAT, **about}
            found = json.loads(self._checkpoint.read_bytes()) if self._checkpoint.is_file() else None
            if resume and found is not None:
                self._saved: Json = found
                _check(self._saved, json.loads(json.dumps(about)))
            else:
                if found is not None:
                    _check_replaceable(directory, found, about)
                # The checkpoint goes first: without it, what is left of the others does not count.
                for name in (CHECKPOINT, METRICS, EVALUATIONS, RESULT):
                    (directory / name).unlink(missing_ok=True)
                self._saved = {**about, "adapter": None, "measured": None, "trainer": None}
                self._write()
            state = self._saved["trainer"]
            # The step done last is still to be finished; its line comes after that.
            steps, last = (0, 0) if state is None else (state["unfinished"]["step"], state["step"])
            self._metrics, metrics = _reopen(directory / METRICS, lambda line: line["step"] < steps)
            opened.enter_context(self._metrics)
            self._evaluations, evaluations = _reopen(directory / EVALUATIONS, lambda line: (line["step"] or 0) <= last)
            opened.enter_context(self._evaluations)
            self._found = {line.pop("step"): _evaluation(line) for line in evaluations}
            self._records = [StepRecord.from_json(line) for line in metrics]
            self._opened = opened.pop_all()

    @property
    def started(self) -> bool:
        """Whether the run has a step behind it, or was measuring."""
        return _is_started(self._saved)

    @property
    def measured(self) -> Json | None:
        """What was measured before the first step; empty if that was begun but not ended, None if it was not begun."""
        found: Json | None = self._saved["measured"]
        return found

    @property
    def start_version(self) -> int:
        """The adapter's version before the first step."""
        version: int = self._saved["adapter"]["version"]
        return version

    def bind(self, adapter: AdapterInfo) -> None:
        """Say which adapter is trained.

        Raises:
            InvalidValue: it is not the one that the run has trained so far, but another of the same name.

        """
        identity = {"created": adapter.created.isoformat(), "basis_digest": adapter.basis_digest}
        if self.started:
            _check(self._saved["adapter"], identity, "adapter.")
        else:
            self._saved["adapter"] = {**identity, "version": adapter.version}

    def restore(self, trainer: Trainer) -> None:
        """Bring a trainer, and its history, to where the run was.

        Raises:
            InvalidValue: the trainer is not set up as the one was whose state was saved.

        """
        if self._saved["trainer"] is not None:
            trainer.load_state_dict(self._saved["trainer"])
        history = trainer.history
        history.baseline = self._found.get(0)
        steps = [*self._records, *history.steps]
        history.steps = [replace(record, evaluation=self._found.get(record.step + 1)) for record in steps]

    @property
    def version_0(self) -> Evaluation | None:
        """The evaluation of version 0, of a run that begins at a later one; None if there is none yet."""
        return self._found.get(None)

    def keep_version_0(self, evaluation: Evaluation) -> None:
        """Keep the evaluation of version 0, of a run that begins at a later one."""
        self._found[None] = evaluation
        self._note(None, evaluation)

    def keep_measured(self, found: Json | None) -> None:
        """Keep what was measured: empty when it is about to be begun, None when it came to nothing."""
        self._saved["measured"] = found
        self._write()

    def on_checkpoint(self, trainer: Trainer) -> None:
        """Keep the trainer's state."""
        self._saved["trainer"] = trainer.state_dict()
        self._write()

    def on_eval(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """Note an evaluation."""
        self._note(trainer.step, evaluation)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Note a step."""
        _append(self._metrics, record.to_json())

    def close(self) -> None:
        self._opened.close()

    def _note(self, step: int | None, evaluation: Evaluation) -> None:
        _append(self._evaluations, {"step": step, **asdict(evaluation)})
        # The steps to come build on it, and it is not made again.
        os.fsync(self._evaluations.fileno())

    def _write(self) -> None:
        write_atomically(self._checkpoint, json.dumps(self._saved).encode())


def _check_replaceable(directory: Path, found: Json, about: Mapping[str, Any]) -> None:
    """Raises CommandFailed where a run would take the place of one that somebody may still want."""
    elsewhere = "give another directory with --out"
    if found["name"] != about["name"]:
        raise CommandFailed(f"{directory} holds a run of {found['name']}: {elsewhere}")
    if not _is_started(found) or (directory / RESULT).is_file():
        return
    # A run of the same model that begins at version 0 needs no such care: the adapter that was trained there is gone.
    if about["continue"]:
        raise CommandFailed(f"{directory} holds a run that was cut off: go on with it by --resume, or {elsewhere}")
    if found["model"] != about["model"]:
        raise CommandFailed(f"{directory} holds a run of another model, which was cut off: {elsewhere}")


def _is_started(saved: Json) -> bool:
    return saved["trainer"] is not None or saved["measured"] is not None


def _check(saved: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> None:
    for name, value in here.items():
        was = saved.get(name)
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            _check(was, value, f"{path}{name}.")
        elif was != value:
            raise InvalidValue(path + name, f"was {was!r} in the run to be resumed, is {value!r} here")


def _append(file: IO[str], line: Json) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _reopen(path: Path, covered: Callable[[Json], bool]) -> tuple[IO[str], list[Json]]:
    """A file of JSON lines, cut back to its first lines that are covered, to append to; and those lines."""
    lines, end = [], 0
    for text in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break  # the writer was killed in the middle of it
        if not (text.endswith(b"\n") and covered(line)):
            break
        lines.append(line)
        end += len(text)
    file = path.open("a", encoding="utf-8")
    file.truncate(end)
    return file, lines


def _evaluation(line: Mapping[str, Any]) -> Evaluation:
    return Evaluation(**{name: _frozen(value) for name, value in line.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
