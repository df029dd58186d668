"""kill -9 of ``zoact train`` at random moments: resumed, it ends where a run that was never killed does.

    python -m tests.soak.client_kills --kills 50

Serves a tiny model on the Transformers engine, trains on it once undisturbed, and then with runs that are killed and
resumed until all kills are spent. Every run must end at the undisturbed run's digest, with the same steps, each listed
once, and the same evaluations; and the server's journal must pass an audit. A table says where the kills hit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import Server
from tests.tiny_model import make_tiny_model
from zoact_remote import Client, NotFound

STEPS, EVAL_EVERY = 16, 5
"""A short run, so that many of the kills hit a run that begins."""
OPTIONS = ["--steps", str(STEPS), "--batch-size", "2", "--eval-every", str(EVAL_EVERY), "--learning-rate", "0.05"]
RECORDS = [{"text": f"ticket {i}", "label": ("billing", "bug")[i % 2]} for i in range(40)]
FINISH_WITHIN_S = 600.0


@dataclass
class Training:
    """``zoact train`` as a process of its own, again and again.

    Attributes:
        server: URL of the server.
        name: of the adapter.
        directory: for the data and the run's files.

    """

    server: str
    name: str
    directory: Path
    _command: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.directory / self.name.replace("/", "-")
        data = self.directory / "data.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        train = ["train", str(data), "--adapter", self.name, "--url", self.server, "--out", str(self.out), "--resume"]
        self._command = [sys.executable, "-m", "zoact_remote.cli", *train, *OPTIONS]

    def finish(self) -> None:
        """Let it run to its end."""
        done = subprocess.run(self._command, capture_output=True, text=True, timeout=FINISH_WITHIN_S, check=False)
        assert done.returncode == 0, done.stderr

    def kill_after(self, seconds: float, *, under_way: bool) -> str | None:
        """Start it, and kill it after a time; where it was, or None if it was done before.

        Args:
            seconds: the time.
            under_way: whether it begins only when a checkpoint is written: Python takes longer to start than a run
                takes for many steps.

        """
        log = self.directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)
        try:
            before = self._written()
            while under_way and process.poll() is None and self._written() == before:
                time.sleep(0.002)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        finally:
            process.kill()
            code = process.wait()
        assert code in (0, -9), log.read_text()
        return None if code == 0 else self._place()

    def left(self) -> dict[str, Any]:
        """What it must have left, whoever was killed on the way: all but times."""
        result = json.loads((self.out / "result.json").read_text())
        metrics = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        timeless = [{k: v for k, v in record.items() if "seconds" not in k} for record in metrics]
        evaluations = (self.out / "evaluations.jsonl").read_text()
        kept = {key: result[key] for key in ("version", "digest", "results", "steps", "tokens")}
        return {**kept, "metrics": timeless, "evaluations": evaluations}

    def _written(self) -> int:
        """When the checkpoint was last written."""
        try:
            return os.stat(self.out / "checkpoint.json").st_mtime_ns
        except FileNotFoundError:
            return 0

    def _place(self) -> str:
        checkpoint = self.out / "checkpoint.json"
        if not checkpoint.exists():
            return "before the first checkpoint"
        state = json.loads(checkpoint.read_text())["trainer"]
        if state is not None:
            evaluated = state["step"] % EVAL_EVERY == 0 or state["step"] == STEPS
            return "in an evaluation or the step after" if evaluated else "in a step"
        with Client(self.server) as client:
            try:
                adapter = client.adapter(self.name)
            except NotFound:
                return "before the adapter"
        return "before the basis" if adapter.info.state == "new" else "before the first step"


def undisturbed(server: str, directory: Path) -> dict[str, Any]:
    """What a run leaves that nobody kills."""
    training = Training(server, "soak/undisturbed", directory)
    training.finish()
    return training.left()


def killed(server: str, directory: Path, expected: dict[str, Any], kills: int, seed: int) -> tuple[Counter[str], int]:
    """Train with a number of kills, in as many runs as they take, and compare each.

    Returns:
        Where the kills hit, and the number of runs.

    """
    rng = random.Random(seed)
    places: Counter[str] = Counter()
    runs = 0
    while places.total() < kills:
        training = Training(server, f"soak/killed-{seed}-{runs}", directory)
        runs += 1
        place: str | None = ""
        while place is not None and places.total() < kills:
            under_way = rng.random() < 0.7
            seconds = rng.expovariate(1 / 0.15) if under_way else rng.uniform(0, 3)
            place = training.kill_after(seconds, under_way=under_way)
            places.update([place] if place else [])
        training.finish()
        assert training.left() == expected
        with Client(server) as client:
            found = client.adapter(training.name).audit()
        assert not found.failures, found.failures
        assert found.digest == expected["digest"]
    return places, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        server = Server(make_tiny_model(directory / "model"), "transformers", directory).start()
        try:
            expected = undisturbed(server.url, directory)
            places, runs = killed(server.url, directory, expected, options.kills, options.seed)
        finally:
            server.kill()
    print("| killed | times |\n| --- | --- |")
    for place, times in places.most_common():
        print(f"| {place} | {times} |")
    print(f"\n{places.total()} kills in {runs} runs of {STEPS} steps, each of which ended at {expected['digest']}")


if __name__ == "__main__":
    main()
