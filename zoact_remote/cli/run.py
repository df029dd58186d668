"""A training run: what ``zoact train`` and ``zoact quickstart`` have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoact_remote.cli.config import RunConfig, dumps
from zoact_remote.cli.data import subset
from zoact_remote.cli.measure import measured
from zoact_remote.cli.output import CommandFailed, Output
from zoact_remote.cli.progress import Watched, training_bar
from zoact_remote.cli.run_files import CHECKPOINT, CONFIG, METRICS, REPORT, RESULT, TASK, RunFiles
from zoact_remote.cli.settings import TrainingSettings
from zoact_remote.errors import NotFound
from zoact_remote.evaluation import Evaluation, calibrated, evaluate_examples
from zoact_remote.files import write_atomically
from zoact_remote.history import History
from zoact_remote.loggers import Logger, make_logger
from zoact_remote.metrics import OF_TEXT
from zoact_remote.report import changed_answers, write_report
from zoact_remote.training import Trainer, rows_digest

if TYPE_CHECKING:
    from zoact_remote.adapter import Adapter
    from zoact_remote.client import Client
    from zoact_remote.noise import Distribution
    from zoact_remote.tasks import Example, Task
    from zoact_remote.wire import AdapterInfo, BasisResult, Info, Json, Row

ZERO_SHOT, IMPORTED, CALIBRATED = "zero-shot", "imported", "label-calibrated {}"
BEFORE, TUNED = "before this run", "tuned"

BASIS_SETTINGS = ("sites", "positions", "calibration_rows")
"""What an adapter that was imported makes no use of."""


@dataclass(frozen=True)
class Run:
    """A run that is done.

    Attributes:
        adapter: what it trained.
        results: the task's figures, loss and rows of version 0 (the model alone, or with what was imported), of it with
            its bias for labels taken away, of the version that the run began at if that is another one, and tuned.
            Empty without held-out rows.
        result: everything about the run but its steps, fit for JSON; ``result.json`` holds it too.

    """

    adapter: Adapter
    results: dict[str, Json]
    result: Json


def train_adapter(
    client: Client,
    name: str,
    task: Task,
    rows: Sequence[Row],
    held_out: Sequence[Example],
    settings: TrainingSettings,
    directory: Path,
    output: Output,
    *,
    config: RunConfig | None = None,
    go_on: bool = False,
    resume: bool = False,
) -> Run:
    """Create an adapter, take its basis, train it and say what that brought.

    Args:
        client: of the server.
        name: of the adapter.
        task: that the rows were made by, and by whose metric the run is judged; it is written beside the results.
        rows: to train on; the basis is taken from some of them.
        held_out: to evaluate on; may be empty.
        settings: of the run.
        directory: made if it does not exist, for what :mod:`~zoact_remote.cli.run_files` keeps, ``config.toml``,
            ``task.toml``, ``result.json`` and ``report.html``.
        output: where progress is shown.
        config: of the run as a whole, to be written beside the results; it names the loggers, too.
        go_on: train an adapter that has been trained before, from its newest version.
        resume: go on with the run in the directory, which was killed or failed; start it if there is none.

    """
    settings = settings.resolved()
    settings.check()
    if not rows:
        raise CommandFailed("there are no rows to train on")
    if not held_out:
        settings.check_unevaluated()
    if not (go_on or (resume and (directory / CHECKPOINT).is_file())):
        # Before anything of a run that was cut off is forgotten.
        with suppress(NotFound):
            _check_untrained(client.adapter(name))
    # A package that is missing is named before anything is done.
    loggers = [make_logger(kind, name, directory, asdict(settings)) for kind in (config.log_to if config else ())]
    held_out = subset(held_out, settings.eval_rows)
    info = client.info()
    settings.check_limits(info.limits)
    sites = settings.choose_sites(info.sites)
    directory.mkdir(parents=True, exist_ok=True)
    about = {
        "name": name,
        "model": info.model_digest,
        "continue": go_on,
        "settings": asdict(settings),
        "rows": rows_digest(rows),
        "eval_rows": rows_digest(map(asdict, held_out)),
        "task": task.to_dict(),
    }
    with closing(RunFiles(directory, about, resume=resume)) as files:
        write_atomically(directory / TASK, task.to_toml().encode())
        if config is not None:
            write_atomically(directory / CONFIG, dumps(config).encode())
        started = files.started
        adapter = (
            client.adapter(name) if started else _ready_adapter(client, name, rows, settings, sites, output, go_on)
        )
        files.bind(adapter.info)
        # One that was imported has a rank of its own.
        settings = replace(settings, rank=adapter.info.rank)
        settings = measured(adapter, rows, settings, files, output)
        facts = _facts(info, adapter, task, settings, len(rows), len(held_out))
        history, results = _train(adapter, task, rows, held_out, settings, directory, output, files, loggers, facts)
        result = _result(adapter, info, history, settings, results, directory)
        result |= {"metric": task.metric, "measured": files.measured}
        write_atomically(directory / RESULT, _dump(result).encode())
    return Run(adapter, results, result)


def _train(
    adapter: Adapter,
    task: Task,
    rows: Sequence[Row],
    held_out: Sequence[Example],
    settings: TrainingSettings,
    directory: Path,
    output: Output,
    files: RunFiles,
    loggers: Sequence[Logger],
    facts: Mapping[str, object],
) -> tuple[History, dict[str, Json]]:
    """Train, and write the report; the run and its results."""
    assert task.metric is not None
    if held_out and files.start_version and files.version_0 is None:
        with output.waiting("evaluating version 0"):
            files.keep_version_0(evaluate_examples(adapter, task, held_out, version=0))
    with training_bar(output.console, settings.steps, task.metric) as bar:
        watched = Watched(adapter, bar)
        trainer = Trainer(
            watched,
            settings.make_estimator(),
            settings.make_optimizer(),
            settings.make_schedule(),
            rows,
            steps=settings.steps,
            batch_size=settings.batch_size,
            # One run after another on an adapter: with the same probes on the same batches their noise would add up.
            seed=settings.seed + files.start_version,
            eval_every=settings.eval_every,
            evaluator=(
                (lambda version: evaluate_examples(watched, task, held_out, version=version)) if held_out else None
            ),
            callbacks=[files, *settings.make_callbacks(task.metric), *loggers, bar],
        )
        files.restore(trainer)
        if trainer.step:
            output.note(f"resuming after step {trainer.step} of {trainer.steps}")
        try:
            history = trainer.run()
        except BaseException:
            # The curves up to a failure are what explains it.
            _report(directory, adapter.info, facts, trainer.history, files, task, held_out)
            raise
        finally:
            for logger in loggers:
                logger.close()
        bar.doing("trained")
    _report(directory, adapter.info, facts, history, files, task, held_out)
    return history, _results(adapter.info, files, history, task, held_out)


def _ready_adapter(
    client: Client,
    name: str,
    rows: Sequence[Row],
    settings: TrainingSettings,
    sites: Sequence[str] | None,
    output: Output,
    go_on: bool,
) -> Adapter:
    # An adapter at version 0 is what a run that failed early leaves behind: the next run takes it up.
    adapter = _imported(client, name, settings.noise) or client.create_adapter(
        name,
        rank=settings.rank,
        sites=sites,
        noise=settings.noise,
        basis=settings.make_basis(),
        exist_ok=True,
    )
    if not go_on:
        _check_untrained(adapter)
    if adapter.info.state == "new":
        sample = subset(rows, settings.calibration_rows)
        with output.waiting(f"taking the basis from {len(sample)} rows"):
            # A run that was killed meanwhile may have had the server take it, from these very rows.
            basis = adapter.calibrate(sample, exist_ok=True)
        output.note(_about_basis(adapter, basis))
    elif adapter.info.imported_digest is not None:
        output.note(f"{name} was imported: its rank, its layers and its basis stay as they are")
    elif not go_on:
        output.note(f"{name} keeps the basis that was taken for it before")
    return adapter


def _imported(client: Client, name: str, noise: Distribution) -> Adapter | None:
    """The adapter of a name if it was imported: its rank and its basis are what they are, whatever the settings say."""
    try:
        adapter = client.adapter(name)
    except NotFound:
        return None
    if adapter.info.imported_digest is None:
        return None
    if adapter.info.noise != noise:
        raise CommandFailed(
            f"{name} was imported for {adapter.info.noise} probes: give an --optimizer for those, or import it again "
            f"with --noise {noise}"
        )
    return adapter


def _check_untrained(adapter: Adapter) -> None:
    if adapter.info.version:
        raise CommandFailed(
            f"{adapter.name} has been trained already (version {adapter.info.version}): go on with a run that was cut "
            "off with --resume, train it further with --continue, give another name, or delete it with zoact delete "
            f"{adapter.name}"
        )


def _about_basis(adapter: Adapter, basis: BasisResult) -> str:
    kept = f", {np.mean(list(basis.energy.values())):.0%} of the activations' energy kept" if basis.energy else ""
    return (
        f"{adapter.name}: {adapter.info.parameters:,} coefficients in {len(adapter.info.sites)} layers; basis of rank "
        f"{adapter.info.rank} from {basis.positions_seen:,} positions of {basis.rows} rows{kept}"
    )


def _results(
    adapter: AdapterInfo, files: RunFiles, history: History, task: Task, held_out: Sequence[Example]
) -> dict[str, Json]:
    start = files.version_0 or history.baseline
    if start is None:
        return {}
    version_0 = ZERO_SHOT if adapter.imported_digest is None else IMPORTED
    results = {version_0: _figures(start, task)}
    if start.calibrated_accuracy is not None:
        results[CALIBRATED.format(version_0)] = {
            "accuracy": start.calibrated_accuracy,
            "loss": calibrated_loss(start, [example.row["answer"] for example in held_out]),
            "rows": len(held_out),
        }
    if files.version_0 is not None and history.baseline is not None:
        results[BEFORE] = _figures(history.baseline, task)
    if history.final is not None:
        results[TUNED] = _figures(history.final, task)
    return results


def _figures(evaluation: Evaluation, task: Task) -> Json:
    """What a table of results has, without figures of text that were not asked for."""
    shown = ("accuracy", task.metric, *OF_TEXT, "loss", "rows")
    return {name: value for name, value in evaluation.to_json().items() if name in shown}


def calibrated_loss(evaluation: Evaluation, answers: Sequence[int]) -> float:
    """Mean cross-entropy, in nats, of the labels' scores after calibration."""
    scores = calibrated(evaluation.logprobs)
    return float(np.mean(np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(answers)), answers]))


def _facts(
    info: Info, adapter: Adapter, task: Task, settings: TrainingSettings, rows: int, eval_rows: int
) -> dict[str, object]:
    """The report's table of settings."""
    about: dict[str, object] = {
        "model": info.model,
        "engine": f"{info.engine} {info.engine_version}, {info.dtype}",
        "adapter": adapter.name,
        "trained coefficients": f"{adapter.info.parameters:,}",
    }
    for setting, value in task.to_dict().items():
        table = isinstance(value, Mapping)
        about[setting] = ", ".join(f"{name}: {word!r}" for name, word in value.items()) if table else repr(value)
    about |= {"training rows": f"{rows:,}", "rows evaluated": f"{eval_rows:,}"}
    given = asdict(settings)
    if adapter.info.imported_digest is not None:
        about["imported"] = adapter.info.imported_digest
        for setting in BASIS_SETTINGS:
            del given[setting]
    return about | {name.replace("_", " "): value for name, value in given.items()}


def _report(
    directory: Path,
    adapter: AdapterInfo,
    facts: Mapping[str, object],
    history: History,
    files: RunFiles,
    task: Task,
    held_out: Sequence[Example],
) -> None:
    assert task.metric is not None
    write_report(
        directory / REPORT,
        title=adapter.name,
        settings=facts,
        history=history,
        results=_results(adapter, files, history, task, held_out),
        metric=task.metric,
        changes=changed_answers(
            [example.row for example in held_out], files.version_0 or history.baseline, history.final
        ),
    )


def _result(
    adapter: Adapter,
    info: Info,
    history: History,
    settings: TrainingSettings,
    results: dict[str, Json],
    directory: Path,
) -> Json:
    now = adapter.refresh()
    steps = history.steps
    return {
        "adapter": now.name,
        "version": now.version,
        "digest": now.digest,
        "parameters": now.parameters,
        "model": info.model,
        "engine": {"name": info.engine, "version": info.engine_version, "dtype": info.dtype},
        "results": {name.replace("-", "_").replace(" ", "_"): figures for name, figures in results.items()},
        "steps": len(steps),
        "tokens": sum(record.tokens for record in steps),
        "seconds": math.fsum(record.seconds for record in steps),
        "stopped": history.stopped,
        "kept": history.kept,
        "returns": [
            {"step": record.step, "to": record.returned_to} for record in steps if record.returned_to is not None
        ],
        "settings": asdict(settings),
        "files": {
            name: str(directory / file) for name, file in (("metrics", METRICS), ("task", TASK), ("report", REPORT))
        },
    }


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
