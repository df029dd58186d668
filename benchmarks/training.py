"""Training through a real vLLM server on the CPU: accuracy before and after, and the time it takes.

    python benchmarks/training.py MODEL --tickets --sst2 DIRECTORY

MODEL is SmolLM2-135M-Instruct's directory, as the quickstart prepares it. DIRECTORY holds SST-2 as train.jsonl and
dev.jsonl with the fields text and label (0 or 1). Runs `zoact train` as a user would, and prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoact_remote import Client
from zoact_remote.cli.local_server import LocalServer
from zoact_remote.tasks import Record, load_jsonl

TICKETS = Path(__file__).parent.parent / "examples" / "data" / "tickets.jsonl"
TICKETS_TO_TRAIN_ON = 384
SST2_TO_TRAIN_ON = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tickets", action="store_true", help="train on the quickstart's support tickets")
    parser.add_argument("--sst2", type=Path, metavar="DIRECTORY", help="train on SST-2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        runs: dict[str, list[str]] = {}
        if options.tickets:
            records = load_jsonl(TICKETS)
            files = split(directory, "tickets", records[:TICKETS_TO_TRAIN_ON], records[TICKETS_TO_TRAIN_ON:])
            quickstart = ["--positions", "prompt", "--learning-rate", "3e-3", "--steps", "200"]
            runs["support tickets, 4 classes"] = [*files, "--task", "tickets", *quickstart]
        if options.sst2:
            training, held_out = (load_jsonl(options.sst2 / f"{part}.jsonl") for part in ("train", "dev"))
            files = split(directory, "sst2", training[:SST2_TO_TRAIN_ON], held_out[:400])
            runs["SST-2"] = [*files, "--task", "sst2", "--steps", "400", "--eval-every", "100"]
        server = LocalServer([options.model, "--state", str(directory / "state")], directory / "log")
        try:
            with Client(server.url) as client:
                server.wait_until_ready(client)
                info = client.info()
            print(f"{info.engine} {info.engine_version}, {info.dtype}\n")
            print("| task | steps of 16 rows | zero-shot | label-calibrated | tuned | training, min | s a step |")
            print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
            for number, (task, arguments) in enumerate(runs.items()):
                arguments += ["--adapter", f"bench/run-{number}", "--out", str(directory / f"run-{number}")]
                print(row(task, train(server.url, arguments)), flush=True)
        finally:
            server.stop()


def split(directory: Path, name: str, training: Sequence[Record], held_out: Sequence[Record]) -> list[str]:
    """Writes two files and returns the arguments that name them."""
    paths = [directory / f"{name}-{part}.jsonl" for part in ("train", "eval")]
    for path, records in zip(paths, (training, held_out), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(paths[0]), "--eval", str(paths[1])]


def train(url: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "zoact_remote.cli", "train", *arguments, "--url", url, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def row(task: str, result: dict[str, Any]) -> str:
    results, steps, seconds = result["results"], result["steps"], result["seconds"]
    accuracies = [results[name]["accuracy"] for name in ("zero_shot", "label_calibrated_zero_shot", "tuned")]
    cells = [task, str(steps), *(f"{a:.3f}" for a in accuracies), f"{seconds / 60:.1f}", f"{seconds / steps:.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
