"""Whether measuring epsilon and the learning rate pays: held-out loss after the same number of forward passes.

    python benchmarks/automatic.py MODEL DIRECTORY

DIRECTORY holds SST-2 as train.jsonl and dev.jsonl with the fields text and label (0 or 1). Every choice has as many
passes of a row through the model as the default takes for its steps; what is measured first is taken off them, and the
schedule is shortened to what is left. The server is the Transformers engine, on loopback. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoact_remote import (
    Adam,
    Adapter,
    Client,
    Inconclusive,
    Losses,
    Probe,
    Row,
    Trainer,
    TwoPoint,
    Update,
    UpdateResult,
    choose_epsilon,
    evaluate,
    find_learning_rate,
    linear,
    load_jsonl,
    tasks,
)
from zoact_remote.cli.data import subset
from zoact_remote.cli.local_server import LocalServer
from zoact_remote.cli.measure import BATCHES
from zoact_remote.cli.settings import DEFAULTS, LEARNING_RATE
from zoact_remote.wire import Limits

CHOICES = {"default": (False, False), "epsilon": (True, False), "learning rate": (False, True), "both": (True, True)}
"""What is measured, by name: epsilon, and the learning rate."""
TO_TRAIN_ON = 1000


@dataclass
class Counted:
    """An adapter that is measured, and the passes of a row through the model that this takes."""

    adapter: Adapter
    passes: int = 0

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        self.passes += len(rows) * (sum(len(probe.signs) for probe in probes) + base)
        return self.adapter.losses(rows, probes, base=base, version=version, update=update)

    def rollback(self, version: int) -> UpdateResult:
        return self.adapter.rollback(version)

    def limits(self) -> Limits:
        return self.adapter.limits()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="of the default choice (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200, help="held-out rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=["default", "both"], metavar="CHOICE")
    options = parser.parse_args()
    parts = [load_jsonl(options.directory / f"{part}.jsonl") for part in ("train", "dev")]
    task = tasks.BUILTIN["sst2"]
    training, held_out = task.rows(parts[0][:TO_TRAIN_ON]), task.rows(subset(parts[1], options.rows))
    with tempfile.TemporaryDirectory() as name:
        arguments = [options.model, "--engine", "transformers", "--state", f"{name}/state"]
        server = LocalServer(arguments, Path(name, "log"))
        try:
            with Client(server.url) as client:
                server.wait_until_ready(client)
                print(
                    "| measured | epsilon | learning rate | passes to measure | steps left | held-out loss | accuracy |"
                )
                print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
                for number, choice in enumerate(options.choices):
                    adapter = client.create_adapter(f"bench/choice-{number}", rank=DEFAULTS.rank)
                    adapter.calibrate(subset(training, DEFAULTS.calibration_rows))
                    cells = trained(adapter, training, held_out, *CHOICES[choice], options)
                    print(f"| {choice} | {' | '.join(cells)} |", flush=True)
        finally:
            server.stop()


def trained(
    adapter: Adapter,
    training: Sequence[Row],
    held_out: Sequence[Row],
    with_epsilon: bool,
    with_rate: bool,
    options: argparse.Namespace,
) -> list[str]:
    """Measures, trains with what is left of the passes, and evaluates; the cells of the choice's row."""
    batch, counted = options.batch_size, Counted(adapter)
    epsilon, rate = float(DEFAULTS.epsilon), LEARNING_RATE
    try:
        if with_epsilon:
            epsilon = choose_epsilon(counted, subset(training, batch)).epsilon
        if with_rate:
            rows = subset(training, BATCHES * batch)
            rate = find_learning_rate(counted, TwoPoint(epsilon), Adam(), rows, seed=options.seed).learning_rate
    except Inconclusive as error:
        return [str(error)]
    steps = options.steps - math.ceil(counted.passes / (2 * batch))
    if steps < 1:
        return [f"{epsilon:g}", f"{rate:.2g}", f"{counted.passes:,}", "none", "", ""]
    schedule = linear(rate, steps)
    Trainer(
        adapter, TwoPoint(epsilon), Adam(), schedule, training, steps=steps, batch_size=batch, seed=options.seed
    ).run()
    found = evaluate(adapter, held_out)
    scores, answers = np.array(found.logprobs), [row["answer"] for row in held_out]
    losses = np.logaddexp.reduce(scores, axis=1) - scores[range(len(answers)), answers]
    deviation = float(losses.std()) / math.sqrt(len(losses))
    figures = [f"{epsilon:g}", f"{rate:.2g}", f"{counted.passes:,}", f"{steps:,}"]
    return [*figures, f"{found.loss:.4f} ± {deviation:.4f}", f"{found.accuracy:.3f}"]


if __name__ == "__main__":
    main()
