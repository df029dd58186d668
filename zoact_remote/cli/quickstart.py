"""``zoact quickstart``: from nothing to a tuned adapter on this machine."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoact_remote.cli import options
from zoact_remote.cli.output import CommandFailed, Output, reporting, results_table
from zoact_remote.cli.settings import QUICKSTART, TrainingSettings
from zoact_remote.locks import InUse, lock

if TYPE_CHECKING:
    from zoact_remote.adapter import Adapter
    from zoact_remote.cli.local_server import LocalServer
    from zoact_remote.tasks import Example, Task
    from zoact_remote.wire import Json, Row

TICKETS = Path("examples/data/tickets.jsonl")
TICKETS_TO_TRAIN_ON = 384
"""The file's first lines; the rest is held out, as the file's README says."""
HELD_OUT = 0.2
HUB_RECORDS = 2000
TEXT_FIELD, OTHER_TEXT_FIELD = "text", "sentence"
"""Where data sets keep their text, by preference."""
MODEL = "smollm2-135m"
JOURNAL = "journal.sqlite"
"""Tells a server's state from a directory of someone else's."""
ADAPTER = "quickstart/demo"


def quickstart(
    data: Annotated[Path, typer.Option(help="The support tickets to train on.", metavar="FILE")] = TICKETS,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Train on this in place of the tickets: a file with text and label, or 2,000 records of a "
            "classification data set on the hub, NAME[:CONFIG][@SPLIT] (needs 'datasets'). A fifth is held out.",
            metavar="FILE|NAME",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A directory, or a name on the hub. If not given, SmolLM2-135M-Instruct, kept in ~/.cache/zoact "
            "($ZOACT_CACHE).",
        ),
    ] = None,
    engine: Annotated[
        options.Engine | None, typer.Option(help="vllm if it is installed, else transformers, if not given.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = QUICKSTART.steps,
    out: Annotated[Path, typer.Option(help="Where everything goes.", metavar="DIRECTORY")] = Path("runs/quickstart"),
    keep_serving: Annotated[bool, typer.Option("--keep-serving", help="Leave the server running.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Serve a small model, train an adapter on support tickets, and show what it learned."""
    with reporting(as_json) as output:
        from zoact_remote.cli.local_server import serving
        from zoact_remote.cli.serve import has_vllm

        task, rows, held_out = _load(data, dataset)
        out.mkdir(parents=True, exist_ok=True)
        state = out / "state"
        _forget(state)
        path = model or _prepared_model(out, output)
        engine = engine or ("vllm" if has_vllm() else "transformers")
        settings = replace(QUICKSTART, steps=steps)
        arguments = [path, "--engine", engine, "--state", str(state)]
        with serving(arguments, out / "server.log") as server:
            result = _demonstrate(server, engine, task, rows, held_out, settings, out, output)
            if keep_serving:
                server.leave_running()
                output.note(f"the server still runs at {server.url}; stop it with: kill {server.pid}")
        shown = result.pop("shown")
        output.result(result, *shown)


def _demonstrate(
    server: LocalServer,
    engine: str,
    task: Task,
    rows: Sequence[Row],
    held_out: Sequence[Example],
    settings: TrainingSettings,
    out: Path,
    output: Output,
) -> Json:
    """Train, export and generate; the result with, under ``shown``, what a human is to see of it."""
    from zoact_remote.cli.run import train_adapter
    from zoact_remote.client import Client

    with Client(server.url) as client:
        with output.waiting(f"starting the {engine} server; its log is {server.log}"):
            server.wait_until_ready(client)
        run = train_adapter(client, ADAPTER, task, rows, held_out, settings, out, output)
        exported = run.adapter.export(out / "adapter")
        example = held_out[0].row
        prompt, answer = example["prompt"], example["choices"][example["answer"]]
        before, after = (_answer(run.adapter, example, at) for at in (0, None))
    return run.result | {
        "export": str(exported),
        "example": {"prompt": prompt, "expected": answer, "before": before, "after": after},
        "server": {"url": server.url, "pid": server.pid, "log": str(server.log)},
        "shown": [
            results_table(run.results),
            f"A held-out prompt   {prompt!r}\n  expected          {answer!r}\n  version 0         {_said(before)}\n"
            f"  version {run.result['version']:<10}{_said(after)}\n",
            f"Report              {run.result['files']['report']}\nPEFT adapter        {exported}",
        ],
    }


def _answer(adapter: Adapter, row: Row, version: int | None) -> Json:
    """What a version makes of a row: its choice, that one's probability among all, and what it writes by itself."""
    (scored,) = adapter.scores([row], version=version).rows
    choice, likeliest = max(enumerate(scored.logprobs), key=lambda pair: pair[1])
    return {
        "choice": row["choices"][choice],
        "probability": 1.0 / math.fsum(math.exp(logprob - likeliest) for logprob in scored.logprobs),
        "text": adapter.generate(row["prompt"], max_tokens=3, version=version).text,
    }


def _said(answer: Json) -> str:
    return f"chooses {answer['choice']!r} ({answer['probability']:.0%}); left to itself it writes {answer['text']!r}"


def _load(data: Path, dataset: str | None) -> tuple[Task, Sequence[Row], Sequence[Example]]:
    """The task, the rows to train on and what is held out."""
    from zoact_remote.cli.data import make_task, split, subset
    from zoact_remote.tasks import BUILTIN, load_records

    task = cut = None
    if dataset is None:
        if not data.is_file():
            raise CommandFailed(f"{data} is not there: run this in the repository, or give --data or --dataset")
        records = load_records(data)
        if TICKETS.is_file() and data.samefile(TICKETS):
            task, cut = BUILTIN["tickets"], TICKETS_TO_TRAIN_ON
    else:
        records = load_records(dataset)
        if not Path(dataset).is_file():
            records = subset(records, HUB_RECORDS)
    if task is None:
        other = TEXT_FIELD not in records[0] and OTHER_TEXT_FIELD in records[0]
        try:
            task = make_task(records, text_field=OTHER_TEXT_FIELD if other else None)
        except CommandFailed as error:
            raise CommandFailed(f"{error}. The quickstart has no such options: use zoact train") from None
    if task.labels is None:
        raise CommandFailed(f"{dataset or data} has no text and label, which the quickstart shows: use zoact train")
    training, held_out = (records[:cut], records[cut:]) if cut is not None else split(records, HELD_OUT)
    if not training or not held_out:
        raise CommandFailed(
            f"{dataset or data} has {len(records)} records, too few to train on some and hold out others"
        )
    return task, task.rows(training), task.examples(held_out)


def _forget(state: Path) -> None:
    """Remove what an earlier quickstart left, whose adapter may belong to another model.

    Raises:
        CommandFailed: its server still runs.

    """
    if not (state / JOURNAL).is_file():
        return
    try:
        with lock(state):
            shutil.rmtree(state)
    except InUse as error:
        raise CommandFailed(
            f"the server of an earlier quickstart still uses {state} ({error}): stop it, or give another directory "
            "with --out"
        ) from None


def _prepared_model(out: Path, output: Output) -> str:
    """Directory of the quickstart's model, which is made the first time."""
    from zoact_remote.cli.local_server import run_logged

    directory = Path(os.environ.get("ZOACT_CACHE") or Path.home() / ".cache" / "zoact") / MODEL
    if not (directory / "config.json").is_file():
        with output.waiting(f"preparing the model in {directory}, once; this takes a minute or two"):
            command = [sys.executable, "-m", "server_ext.quickstart_model", str(directory)]
            run_logged(command, out / "model.log", "preparing the model")
    return str(directory)
