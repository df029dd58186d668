"""What many adapters cost a server: memory, the start after a crash, and the time of an update.

    python benchmarks/many_adapters.py MODEL

MODEL is a checkpoint's directory. The server runs the Transformers engine on the CPU, over loopback. Prints two tables
in Markdown: by the number of adapters, and by the length of one adapter's history. Adapters have rank 4 on all sites
and random bases, which take as much room as others. Memory is the proportional set size. The start is timed after
SIGKILL, from the start of the process until every adapter is back; each has some updates to replay from its journal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from server_cost import WINDOW, memory

from zoact_remote import Adapter, Basis, Client, Update
from zoact_remote.cli.local_server import LocalServer

ADAPTERS = (1, 100, 1000)
ENTRIES = (10, 1000, 10000)
REPLAYED = 1
"""Updates of every adapter that stand in the journal and in no snapshot."""
TIMED = 21


class Measured:
    """A server that is killed and started again."""

    def __init__(self, model: str, directory: Path) -> None:
        self._arguments = [model, "--engine", "transformers", "--state", str(directory / "state")]
        self._log = directory / "log"
        self._server: LocalServer | None = None

    def start(self) -> Client:
        """Returns a client once every adapter is back."""
        started = time.perf_counter()
        self._server = LocalServer(self._arguments, self._log)
        client = Client(self._server.url, timeout=(5.0, 3600.0))
        self._server.wait_until_ready(client)
        self.start_s = time.perf_counter() - started
        (ready,) = (line for line in self._log.read_text().splitlines() if '"event": "ready"' in line)
        self.restore_s = float(json.loads(ready)["seconds"])
        return client

    def kill(self) -> None:
        if self._server is not None:
            os.kill(self._server.pid, signal.SIGKILL)
            psutil.Process(self._server.pid).wait(60)
            self._server = None

    def memory(self) -> float:
        assert self._server is not None
        return memory(psutil.Process(self._server.pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint")
    parser.add_argument("--adapters", type=int, nargs="+", default=ADAPTERS)
    parser.add_argument("--entries", type=int, nargs="*", default=ENTRIES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = Measured(arguments.model, Path(directory))
        try:
            by_adapters(server, arguments.adapters)
            if arguments.entries:
                by_entries(server, arguments.entries)
        finally:
            server.kill()


def by_adapters(server: Measured, counts: Sequence[int]) -> None:
    client = server.start()
    print(
        "| adapters | memory, MiB | update, ms | start after a crash, s | of which adapters, s |\n"
        f"| --- | --- | --- | --- | --- |\n| 0 | {server.memory():,.0f} | | {server.start_s:.1f} | |",
        flush=True,
    )
    there = 0
    for count in counts:
        for number in range(there, count):
            adapter = new_adapter(client, f"bench/{number}")
        there = count
        update_s = time_of_update(adapter)
        held = server.memory()
        client.close()
        server.kill()
        client = server.start()
        adapter = client.adapter(adapter.name)
        print(
            f"| {count:,} | {held:,.0f} | {update_s * 1e3:.0f} | {server.start_s:.1f} | {server.restore_s:.1f} |",
            flush=True,
        )
    print(f"\nTo replay: {REPLAYED} updates of one term an adapter, and {TIMED} of {WINDOW} terms for each row above.")
    client.close()
    server.kill()


def by_entries(server: Measured, lengths: Sequence[int]) -> None:
    print("\n| entries of its history | update, ms |\n| --- | --- |", flush=True)
    with server.start() as client:
        adapter = client.create_adapter("bench/long", basis=Basis(source="random"))
        adapter.calibrate()
        for length in lengths:
            for version in range(adapter.refresh().version, length):
                adapter.update(Update(version, ((version, 1e-4),)))
            print(f"| {length:,} | {time_of_update(adapter) * 1e3:.0f} |", flush=True)


def new_adapter(client: Client, name: str) -> Adapter:
    adapter = client.create_adapter(name, basis=Basis(source="random"))
    adapter.calibrate()
    for version in range(REPLAYED):
        adapter.update(Update(version, ((version, 1e-3),)))
    return adapter


def time_of_update(adapter: Adapter) -> float:
    """Median seconds of an update, request and answer included."""
    times = []
    first = adapter.refresh().version
    for version in range(first, first + TIMED):
        update = Update(version, tuple((seed, 1e-6) for seed in range(version, version + WINDOW)))
        started = time.perf_counter()
        adapter.update(update)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
