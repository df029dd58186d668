"""``zoact train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from zoact_remote.cli import options
from zoact_remote.cli.config import RunConfig
from zoact_remote.cli.output import CommandFailed, Output, reporting, results_table
from zoact_remote.cli.settings import (
    DEFAULTS,
    EstimatorName,
    LoggerName,
    OptimizerName,
    PositionsName,
    ScheduleName,
    SitesName,
    TrainingSettings,
)

_FIELDS = RunConfig.__dataclass_fields__ | TrainingSettings.__dataclass_fields__
_PANELS = {"data": "Data", "adapter": "Method", "method": "Method", "evaluation": "Evaluation", "output": "Output"}


def _option(name: str, *flags: str, **changes: Any) -> Any:
    """An option for a field of the configuration."""
    about = _FIELDS[name].metadata
    limits = {"min": about["least"], "max": about["most"]}
    return typer.Option(*flags, help=about["text"], rich_help_panel=_PANELS[about["section"]], **limits | changes)


_NUMBER_OR_AUTO: dict[str, Any] = {"metavar": "NUMBER|auto"}


def train(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Records: a file (.jsonl, .csv, .tsv or .parquet), or a data set on the hub, such as ag_news@test. "
            "With --resume, a run's directory.",
            metavar="FILE|NAME",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Its name, such as acme/triage.", metavar="TENANT/NAME", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A file that describes the run; options given beside it win.", metavar="FILE"),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the run as such a file, every key explained, and exit.")
    ] = False,
    task: options.TaskName = None,
    template: options.Template = None,
    label: options.Labels = None,
    completion: options.Completion = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    eval_data: Annotated[str | None, _option("eval_data", "--eval", metavar="FILE|NAME")] = None,
    hold_out: Annotated[float, _option("hold_out")] = RunConfig.hold_out,
    rank: Annotated[int, _option("rank")] = DEFAULTS.rank,
    sites: Annotated[SitesName, _option("sites")] = DEFAULTS.sites,
    positions: Annotated[PositionsName, _option("positions")] = DEFAULTS.positions,
    calibration_rows: Annotated[int, _option("calibration_rows")] = DEFAULTS.calibration_rows,
    steps: Annotated[int, _option("steps")] = DEFAULTS.steps,
    batch_size: Annotated[int, _option("batch_size")] = DEFAULTS.batch_size,
    estimator: Annotated[EstimatorName, _option("estimator")] = DEFAULTS.estimator,
    probes: Annotated[int | None, _option("probes")] = None,
    split: Annotated[bool, _option("split", "--split")] = DEFAULTS.split,
    epsilon: Annotated[str, _option("epsilon", **_NUMBER_OR_AUTO)] = str(DEFAULTS.epsilon),
    optimizer: Annotated[OptimizerName, _option("optimizer")] = DEFAULTS.optimizer,
    momentum: Annotated[float, _option("momentum")] = DEFAULTS.momentum,
    weight_decay: Annotated[float | None, _option("weight_decay")] = None,
    learning_rate: Annotated[str | None, _option("learning_rate", **_NUMBER_OR_AUTO)] = None,
    schedule: Annotated[ScheduleName, _option("schedule")] = DEFAULTS.schedule,
    warmup: Annotated[int, _option("warmup")] = DEFAULTS.warmup,
    guard: Annotated[bool, _option("guard", "--guard/--no-guard")] = DEFAULTS.guard,
    seed: Annotated[int, _option("seed")] = DEFAULTS.seed,
    eval_every: Annotated[int | None, _option("eval_every")] = None,
    eval_rows: Annotated[int, _option("eval_rows")] = DEFAULTS.eval_rows,
    patience: Annotated[int | None, _option("patience")] = None,
    min_delta: Annotated[float, _option("min_delta")] = DEFAULTS.min_delta,
    keep_best: Annotated[bool, _option("keep_best", "--keep-best")] = DEFAULTS.keep_best,
    go_on: Annotated[bool, typer.Option("--continue", help="Train an adapter that has been trained before.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in the results' directory, which was cut off; start it if none is there.",
        ),
    ] = False,
    out: Annotated[str | None, _option("out", metavar="DIRECTORY")] = None,
    log_to: Annotated[
        list[str] | None, _option("log_to", show_default=False, metavar="|".join(get_args(LoggerName)))
    ] = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Train an adapter on records, and say what it brought.

    zoact train films.jsonl --adapter acme/films --template '{text} It was' --label '0= bad' --label '1= good'

    zoact train --config run.toml

    zoact train runs/acme-films --resume
    """
    given = {name: value for name, value in locals().items() if name in _FIELDS and _is_given(context, name)}
    given.pop("task", None)  # made of several options
    with reporting(as_json) as output:
        from zoact_remote.cli.config import dumps, load
        from zoact_remote.cli.data import task_table
        from zoact_remote.cli.run_files import CONFIG

        given |= {name: _number_or_auto(name, given[name]) for name in ("epsilon", "learning_rate") if name in given}
        given["log_to"] = tuple(log_to) if log_to else None
        if resume and data is not None and Path(data).is_dir():
            if config is not None:
                raise CommandFailed(f"{data} has its own {CONFIG}: leave out --config")
            config = Path(data, CONFIG)
            given |= {"data": None, "out": data}
        run = (load(config) if config is not None else RunConfig()).changed(given)
        table = task_table(task, template, label, completion, text_field, label_field)
        replaced = table.keys() - {"text_field", "label_field"}
        # The parts of a task belong together: options for them take the place of the file's task.
        run = run.changed({"task": table if replaced else {**run.task, **table}})
        if print_config:
            print(dumps(run), end="")
            return
        _train(run, api_key, output, resume=resume)


def _train(config: RunConfig, api_key: str | None, output: Output, *, resume: bool) -> None:
    from zoact_remote.cli.data import split, task_of
    from zoact_remote.cli.run import train_adapter
    from zoact_remote.tasks import load_records

    if config.data is None or config.adapter is None:
        raise CommandFailed(
            "say what to train and on what: DATA and --adapter, or --config with data.train and adapter.name"
        )
    config.settings.check()
    records = load_records(config.data)
    made = task_of(records, config.task)
    # Records are split and not rows, so that no conversation has turns on both sides.
    parts = split(records, config.hold_out) if config.eval_data is None else (records, load_records(config.eval_data))
    training, held_out = made.rows(parts[0]), made.examples(parts[1])
    if not held_out:
        output.note("no records are held out: what the run brings is not evaluated")
    directory = Path(config.out or Path("runs", config.adapter.replace("/", "-")))
    with options.connect(config.url, api_key) as client:
        run = train_adapter(
            client,
            config.adapter,
            made,
            training,
            held_out,
            config.settings,
            directory,
            output,
            config=config.resolved(made),
            go_on=config.go_on,
            resume=resume,
        )
    shown = [results_table(run.results)] if run.results else []
    output.result(
        run.result,
        *shown,
        f"{config.adapter} is at version {run.result['version']}. Report: {run.result['files']['report']}",
    )


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line. The environment has its say where nothing else has."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _number_or_auto(name: str, text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"must be a number or auto, got {text!r}", param_hint=f"--{name.replace('_', '-')}"
        ) from None
