"""``zoact train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoact_remote.cli import options
from zoact_remote.cli.output import reporting, results_table
from zoact_remote.cli.settings import (
    DEFAULTS,
    EstimatorName,
    OptimizerName,
    PositionsName,
    ScheduleName,
    TrainingSettings,
)

_METHOD = "Method"


def _method(text: str, least: int | None = None) -> Any:
    return typer.Option(help=text, min=least, rich_help_panel=_METHOD)


def train(
    data: options.Data,
    adapter: options.AdapterName,
    task: options.TaskName = None,
    template: options.Template = None,
    label: options.Labels = None,
    completion: options.Completion = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    eval_data: Annotated[
        str | None,
        typer.Option("--eval", help="Records to evaluate on.", metavar="FILE|NAME", rich_help_panel="Data"),
    ] = None,
    hold_out: Annotated[
        float,
        typer.Option(
            help="Share at the end of DATA to evaluate on, where there is no --eval.",
            min=0,
            max=0.9,
            rich_help_panel="Data",
        ),
    ] = 0.2,
    rank: Annotated[int, _method("Columns of each coefficient matrix.", 1)] = DEFAULTS.rank,
    positions: Annotated[PositionsName, _method("Activations that the basis is taken from.")] = DEFAULTS.positions,
    calibration_rows: Annotated[
        int, _method("Training rows that the basis is taken from.", 1)
    ] = DEFAULTS.calibration_rows,
    steps: Annotated[int, _method("Steps.", 1)] = DEFAULTS.steps,
    batch_size: Annotated[int, _method("Rows a step.", 1)] = DEFAULTS.batch_size,
    estimator: Annotated[EstimatorName, _method("How losses become a gradient.")] = DEFAULTS.estimator,
    probes: Annotated[int, _method("Directions a step.", 1)] = DEFAULTS.probes,
    epsilon: Annotated[float, _method("Distance of a probe, best a power of two.")] = DEFAULTS.epsilon,
    optimizer: Annotated[OptimizerName, _method("What is made of the gradient.")] = DEFAULTS.optimizer,
    learning_rate: Annotated[float, _method("At the first step.")] = DEFAULTS.learning_rate,
    schedule: Annotated[ScheduleName, _method("How the learning rate goes on.")] = DEFAULTS.schedule,
    eval_every: Annotated[
        int | None, _method("Steps between evaluations; only the first and last if not given.", 1)
    ] = DEFAULTS.eval_every,
    eval_rows: Annotated[int, _method("Rows evaluated at most.", 1)] = DEFAULTS.eval_rows,
    seed: Annotated[int, _method("Of the data's order and the probes.", 0)] = DEFAULTS.seed,
    go_on: Annotated[bool, typer.Option("--continue", help="Train an adapter that has been trained before.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in the results' directory, which was cut off; start it if none is there.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where results go; runs/TENANT-NAME if not given.", metavar="DIRECTORY")
    ] = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Train an adapter on records, and say what it brought.

    zoact train films.jsonl --adapter acme/films --template '{text} It was' --label '0= bad' --label '1= good'
    """
    with reporting(as_json) as output:
        from zoact_remote.cli.data import make_task, split
        from zoact_remote.cli.run import train_adapter
        from zoact_remote.tasks import load_records

        settings = TrainingSettings(
            rank=rank,
            positions=positions,
            calibration_rows=calibration_rows,
            steps=steps,
            batch_size=batch_size,
            estimator=estimator,
            probes=probes,
            epsilon=epsilon,
            optimizer=optimizer,
            learning_rate=learning_rate,
            schedule=schedule,
            eval_every=eval_every,
            eval_rows=eval_rows,
            seed=seed,
        )
        records = load_records(data)
        made = make_task(
            records,
            task=task,
            template=template,
            labels=label,
            completion=completion,
            text_field=text_field,
            label_field=label_field,
        )
        # Records are split and not rows, so that no conversation has turns on both sides.
        parts = split(records, hold_out) if eval_data is None else (records, load_records(eval_data))
        training, held_out = map(made.rows, parts)
        directory = out or Path("runs", adapter.replace("/", "-"))
        with options.connect(url, api_key) as client:
            run = train_adapter(
                client, adapter, made, training, held_out, settings, directory, output, go_on=go_on, resume=resume
            )
        shown = [results_table(run.results)] if run.results else []
        output.result(
            run.result,
            *shown,
            f"{adapter} is at version {run.result['version']}. Report: {run.result['files']['report']}",
        )
