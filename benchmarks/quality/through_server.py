"""One run through a server, as ``zoact train`` makes it: a process of its own, started by ``run.py``.

It goes on where it was cut off, as long as the server has its adapter.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import plan

from zoact_remote import Client, TrainingDiverged, evaluate
from zoact_remote.cli.output import Output
from zoact_remote.cli.run import CALIBRATED, TUNED, ZERO_SHOT, train_adapter
from zoact_remote.cli.run_files import CHECKPOINT, METRICS
from zoact_remote.errors import NotFound
from zoact_remote.evaluation import Evaluation
from zoact_remote.tasks import BUILTIN

LAST_STEPS = 60
"""About as many as see each of the training rows once."""


def main() -> None:
    url, data, directory, what, is_trial = sys.argv[1:]
    run = plan.Run(**json.loads(what))
    with Client(url) as client:
        print(json.dumps(train(client, run, Path(data), Path(directory), json.loads(is_trial))))


def train(client: Client, run: plan.Run, data: Path, directory: Path, is_trial: bool) -> dict[str, Any]:
    settings = plan.settings_of(plan.select([run.method])[run.method], run)
    training, choice, held_out = plan.data_of(run.task, data)
    name = f"quality/{run.name}"
    if not (directory / CHECKPOINT).is_file():
        with suppress(NotFound):
            client.adapter(name).delete()
    reached = None
    with suppress(TrainingDiverged):
        found = train_adapter(
            client, name, BUILTIN[run.task], training, held_out, settings, directory, Output(True), resume=True
        ).results
        reached = {
            "zero_shot": found[ZERO_SHOT]["accuracy"],
            "label_calibrated": found[CALIBRATED.format(ZERO_SHOT)]["accuracy"],
            "accuracy": found[TUNED]["accuracy"],
            "loss": found[TUNED]["loss"],
        }
    adapter, diverged = client.adapter(name), reached is None
    if reached is None:
        rows = [example.row for example in held_out]
        reached = figures(evaluate(adapter, rows, version=0), evaluate(adapter, rows))
    steps = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    last = [step["loss"] for step in steps[-LAST_STEPS:]]
    result = {
        "passes": plan.calibration_passes(settings) + len(steps) * plan.passes_a_step(settings),
        **reached,
        "choice_accuracy": evaluate(adapter, choice).accuracy if is_trial else None,
        "returns": sum(step["returned_to"] is not None for step in steps),
        "diverged": diverged,
        "training_loss": statistics.fmean(last) if None not in last else None,
        "training_seconds": sum(step["seconds"] for step in steps),
        "finished": time.time(),
    }
    adapter.delete()
    return result


def figures(start: Evaluation, tuned: Evaluation) -> dict[str, Any]:
    return {
        "zero_shot": start.accuracy,
        "label_calibrated": start.calibrated_accuracy,
        "accuracy": tuned.accuracy,
        "loss": tuned.loss,
    }


if __name__ == "__main__":
    main()
