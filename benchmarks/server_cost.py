"""What the extension costs a vLLM server on the CPU: memory by rank and slots, and where a step's time goes.

    python benchmarks/server_cost.py MODEL

MODEL is a checkpoint's directory, such as the one that the quickstart prepares. Prints two tables in Markdown. The
baseline of memory is vLLM without LoRA and without the extension, after the same requests; that of time is the same
number of sequences through the base model on the same server.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests

from zoact_remote import Adam, Client, Estimate, TwoPoint
from zoact_remote.cli.local_server import LocalServer, free_port
from zoact_remote.cli.vllm_command import vllm_command
from zoact_remote.tasks import BUILTIN, load_jsonl
from zoact_remote.wire import Row

TICKETS = Path(__file__).parent.parent / "examples" / "data" / "tickets.jsonl"
FLAGS = ["--max-model-len", "2048"]
SLOTS = ((8, 8), (64, 8))
"""(largest rank, slots); a step is timed at the first."""
STEPS, TIMED_STEPS, WARM_UP = 3, 12, 3
WINDOW = 44
BATCH = 16
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint")
    model = parser.parse_args().model
    rows = BUILTIN["tickets"].rows(load_jsonl(TICKETS))
    with tempfile.TemporaryDirectory() as directory:
        with plain_vllm(model, Path(directory)) as (url, process):
            warm_plain(url, rows)
            plain = memory(process)
        print("| largest rank | slots | memory, MiB | over plain vLLM, MiB |\n| --- | --- | --- | --- |", flush=True)
        print(f"| plain vLLM, no LoRA | | {plain:,.0f} | |", flush=True)
        for rank, slots in SLOTS:
            arguments = [model, "--engine", "vllm", "--max-rank", str(rank), "--slots", str(slots)]
            state = Path(directory) / f"{rank}-{slots}"
            with extended(arguments, state) as (client, process):
                timed = (rank, slots) == SLOTS[0]
                times = steps(client, rows, TIMED_STEPS if timed else STEPS)
                print(f"| {rank} | {slots} | {memory(process):,.0f} | {memory(process) - plain:,.0f} |", flush=True)
            if timed:
                table = times
    print(f"\nA step: one ± pair, {BATCH} rows, rank 4, Adam ({WINDOW} terms an update), slots 8 of rank 8.\n")
    print("| part | median, ms | of the baseline |\n| --- | --- | --- |")
    baseline = statistics.median(table["baseline"])
    for part, values in table.items():
        median = statistics.median(values)
        print(f"| {part} | {median * 1e3:,.0f} | {median / baseline:.2f} |")


@contextmanager
def plain_vllm(model: str, directory: Path) -> Iterator[tuple[str, psutil.Process]]:
    """vLLM as it is, with the flags that ``zoact serve`` gives it but for LoRA and the extension."""
    port = free_port()
    ours = vllm_command(
        model, host="127.0.0.1", port=port, state=directory, dtype=None, max_rank=8, slots=2, training_share=1,
        api_key=None, keys=None, extra=FLAGS, on_cpu=True, environment=os.environ, plugins=[],
    )  # fmt: skip
    lora = next(i for i, argument in enumerate(ours.arguments) if argument == "--enable-lora")
    command = [*ours.arguments[:lora], "--enforce-eager", *FLAGS]
    environment = os.environ | {k: v for k, v in ours.environment.items() if k.startswith("VLLM_CPU")}
    with (directory / "plain.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None:
                sys.exit((directory / "plain.log").read_text())
            try:
                if requests.get(f"{url}/health", timeout=2).ok:
                    break
            except requests.RequestException:
                time.sleep(1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def extended(arguments: list[str], state: Path) -> Iterator[tuple[Client, psutil.Process]]:
    state.mkdir()
    server = LocalServer([*arguments, "--state", str(state), "--", *FLAGS], state / "log")
    try:
        with Client(server.url) as client:
            server.wait_until_ready(client)
            yield client, psutil.Process(server.pid)
    finally:
        server.stop()


def warm_plain(url: str, rows: Sequence[Row]) -> None:
    """The same sequences that a server with the extension sees."""
    for step in range(STEPS):
        prompts = [row["prompt"] for row in batch(rows, step)] * 2
        body = {"prompt": prompts, "max_tokens": 1, "temperature": 0}
        requests.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status()


def steps(client: Client, rows: Sequence[Row], count: int) -> dict[str, list[float]]:
    """Seconds by part of training steps as the Trainer makes them, and of the baseline between them."""
    adapter = client.create_adapter("bench/cost")
    adapter.calibrate(rows[:64])
    estimator, optimizer = TwoPoint(), Adam()
    times: dict[str, list[float]] = {
        name: [] for name in ("baseline", "forward", "update", "request and client", "whole step")
    }
    # Updates of full length from the first step on: as many past probes as Adam's window holds.
    for seed in range(WINDOW):
        optimizer.step(Estimate(((seed, 1.0),), 0.0), 1e-6, 0)
    update, seeds = None, itertools.count(WINDOW)
    for step in range(count):
        started = time.perf_counter()
        ask = estimator.ask(lambda: next(seeds))
        losses = adapter.losses(batch(rows, step), ask.probes, update=update)
        update = optimizer.step(estimator.tell(losses), 1e-6, losses.version)
        whole = time.perf_counter() - started
        # Twice the rows at the base model: as many sequences as the pair's two sides.
        base = adapter.losses(batch(rows, step) * 2, [], base=True, version=0).timing.forward_s
        timing = losses.timing
        if step >= WARM_UP:
            for name, value in zip(
                times, (base, timing.forward_s, timing.update_s, whole - timing.total_s, whole), strict=True
            ):
                times[name].append(value)
    return times


def batch(rows: Sequence[Row], step: int) -> list[Row]:
    return [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]


def memory(process: psutil.Process) -> float:
    """MiB that a process and its children hold, shared pages counted once (proportional set size)."""
    family = [process, *process.children(recursive=True)]
    return float(sum(member.memory_full_info().pss for member in family)) / MIB


if __name__ == "__main__":
    main()
