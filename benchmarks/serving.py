"""What training costs those who are served meanwhile, and what serving leaves to training.

    python benchmarks/serving.py MODEL [--rate 0.25] [FLAGS OF ZOACT SERVE]

MODEL is a checkpoint's directory; one without weights will do where ``--row-tokens`` makes rows of random tokens and
vLLM is told ``-- --load-format dummy``. Starts ``zoact serve`` with vLLM and puts a steady load on its OpenAI route:
requests that arrive at random (Poisson), whatever has become of those before, with prompts of random tokens and answers
of a fixed length, streamed; every other one is for a tuned adapter by name. Measures the load alone, training alone,
and both together; with ``--alike``, both together once more on a server that treats all requests alike
(``--training-share 1``). The time to a first token counts from the moment at which its request was due. Prints a table
in Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import requests

from zoact_remote import Adam, Adapter, Basis, Client, TwoPoint, Update
from zoact_remote.cli.local_server import serving
from zoact_remote.tasks import BUILTIN, load_jsonl
from zoact_remote.wire import Row

TICKETS = Path(__file__).parent.parent / "examples" / "data" / "tickets.jsonl"
TUNED = 4
"""Adapters that are served by name."""
BATCH = 16
SETTLE_S = 32.0
"""Of everything, not measured: longer than training holds back after the last request."""
TIMEOUT_S = (10.0, 600.0)


@dataclass
class Latencies:
    """Seconds to every first token, and from every token to the next."""

    first: list[float] = field(default_factory=list)
    next: list[float] = field(default_factory=list)

    def cells(self) -> list[str]:
        return [f"{1e3 * np.percentile(times, q):,.0f}" for times in (self.first, self.next) for q in (50, 99)]


@dataclass
class Load:
    """A steady load of streamed completions.

    Attributes:
        url: the server's.
        models: asked for in turn.
        vocabulary: number of token ids.
        rate: arrivals a second.
        prompt: tokens of a prompt.
        output: tokens of an answer.

    """

    url: str
    models: Sequence[str]
    vocabulary: int
    rate: float
    prompt: int
    output: int

    def run(self, seconds: float) -> Latencies:
        """The latencies of what is due within some seconds, after a while that does not count."""
        # The same arrivals and prompts every time.
        generator = np.random.default_rng(0)
        due, models, found = 0.0, itertools.cycle(self.models), Latencies()
        started = time.monotonic()
        with ThreadPoolExecutor(256) as pool:
            asked = []
            while (due := due + generator.exponential(1 / self.rate)) < SETTLE_S + seconds:
                prompt = generator.integers(3, self.vocabulary, self.prompt).tolist()
                time.sleep(max(0.0, started + due - time.monotonic()))
                asked.append((due, pool.submit(self.ask, next(models), prompt)))
            for due, future in asked:
                first, *others = future.result()
                if due > SETTLE_S:
                    found.first.append(first - started - due)
                    found.next += np.diff([first, *others]).tolist()
        return found

    def ask(self, model: str, prompt: list[int]) -> list[float]:
        """When each token of an answer came."""
        body = {"model": model, "prompt": prompt, "max_tokens": self.output, "ignore_eos": True, "stream": True}
        came = []
        with requests.post(f"{self.url}/v1/completions", json=body, stream=True, timeout=TIMEOUT_S) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    came.append(time.monotonic())
        return came


class Trainers:
    """Adapters that train at full tilt, each on a thread of its own, until told to stop."""

    def __init__(self, adapters: Sequence[Adapter], rows: Sequence[Row]) -> None:
        self._rows = rows
        self._stop = threading.Event()
        self._ends: list[float] = []
        self._threads = [threading.Thread(target=self._train, args=[adapter]) for adapter in adapters]
        for thread in self._threads:
            thread.start()

    def rate(self, since: float) -> float:
        """Steps a second from a moment until now."""
        now = time.monotonic()
        return sum(end > since for end in self._ends) / (now - since)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _train(self, adapter: Adapter) -> None:
        estimator, optimizer = TwoPoint(), Adam()
        update: Update | None = None
        seeds = itertools.count()
        for step in itertools.count():
            if self._stop.is_set():
                return
            ask = estimator.ask(lambda: next(seeds))
            batch = [self._rows[(step * BATCH + i) % len(self._rows)] for i in range(BATCH)]
            losses = adapter.losses(batch, ask.probes, update=update)
            update = optimizer.step(estimator.tell(losses), 1e-6, losses.version)
            self._ends.append(time.monotonic())


def random_rows(options: argparse.Namespace) -> list[Row]:
    tokens = np.random.default_rng(0).integers(3, vocabulary(options.model), (8 * BATCH, options.row_tokens))
    return [{"prompt": row[:-1], "completion": row[-1:]} for row in tokens.tolist()]


def vocabulary(model: str) -> int:
    size: int = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    return size


@contextmanager
def training(adapters: Sequence[Adapter], rows: Sequence[Row]) -> Iterator[Trainers]:
    trainers = Trainers(adapters, rows)
    try:
        yield trainers
    finally:
        trainers.stop()


@contextmanager
def server(options: argparse.Namespace, flags: Sequence[str]) -> Iterator[tuple[Load, list[Adapter]]]:
    """A server with its load, and adapters to train."""
    with tempfile.TemporaryDirectory() as name:
        arguments = [options.model, "--state", f"{name}/state", *flags]
        with (
            serving(arguments, Path(name) / "log") as running,
            Client(running.url, timeout=TIMEOUT_S) as client,
        ):
            running.wait_until_ready(client)
            adapters = [new_adapter(client, f"bench/training-{i}") for i in range(options.trainers)]
            models = []
            for number in range(TUNED):
                tuned = new_adapter(client, f"bench/tuned-{number}")
                tuned.update(Update(0, ((number, 0.01),)))
                models += [options.model, tuned.name]
            load = Load(running.url, models, vocabulary(options.model), options.rate, options.prompt, options.output)
            # Kernels and caches are warm from here on.
            for model in models:
                load.ask(model, [3] * options.prompt)
            yield load, adapters


def new_adapter(client: Client, name: str) -> Adapter:
    adapter = client.create_adapter(name, basis=Basis(source="random"))
    adapter.calibrate()
    return adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rate", type=float, default=0.25, help="arrivals a second")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=120, help="of each load; training alone takes half as long")
    parser.add_argument("--trainers", type=int, default=2, help="adapters that train")
    parser.add_argument("--row-tokens", type=int, help="train on rows of so many random tokens in place of tickets")
    parser.add_argument("--alike", action="store_true", help="also on a server that treats all requests alike")
    options, flags = parser.parse_known_args()
    rows = BUILTIN["tickets"].rows(load_jsonl(TICKETS)) if options.row_tokens is None else random_rows(options)
    print(
        f"{options.rate:g} requests a second of {options.prompt} + {options.output} tokens for {options.seconds:g} s; "
        f"{options.trainers} adapters train, {BATCH} rows and one ± pair a step.\n"
    )
    print("| | first token p50, ms | p99 | between tokens p50, ms | p99 | training, steps/s |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with server(options, flags) as (load, adapters):
        show("requests alone", load.run(options.seconds), None)
        with training(adapters, rows) as trainers:
            time.sleep(SETTLE_S)
            since = time.monotonic()
            time.sleep(options.seconds / 2)
            show("training alone", None, trainers.rate(since))
            show("both", *together(load, trainers, options.seconds))
    if options.alike:
        alike = ["--training-share", "1", *flags]
        with server(options, alike) as (load, adapters), training(adapters, rows) as trainers:
            show("both, all requests alike", *together(load, trainers, options.seconds))


def together(load: Load, trainers: Trainers, seconds: float) -> tuple[Latencies, float]:
    """Latencies beside training, and its steps a second meanwhile."""
    since = time.monotonic() + SETTLE_S
    return load.run(seconds), trainers.rate(since)


def show(what: str, latencies: Latencies | None, steps: float | None) -> None:
    cells = [""] * 4 if latencies is None else latencies.cells()
    print(f"| {what} | {' | '.join(cells)} | {'' if steps is None else f'{steps:.2f}'} |", flush=True)


if __name__ == "__main__":
    main()
