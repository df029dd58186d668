"""What a step costs over a slow link: an update as a call of its own, one round trip a step, overlapping steps.

    python benchmarks/latency.py MODEL

MODEL is a checkpoint's directory. Serves it from plain PyTorch here, behind a proxy that keeps back every byte, each
way, for half the round trip. Prints a table in Markdown: the median over rounds of the mean over a run's steps.
Each round runs every way of training in turn, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import queue
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from zoact_remote import (
    Adam,
    Adapter,
    Basis,
    Client,
    Losses,
    PipelinedTrainer,
    Probe,
    Row,
    Trainer,
    TwoPoint,
    Update,
    UpdateResult,
)
from zoact_remote.cli.local_server import LocalServer
from zoact_remote.tasks import BUILTIN, load_jsonl
from zoact_remote.wire import Limits, Scores

TICKETS = Path(__file__).parent.parent / "examples" / "data" / "tickets.jsonl"
WARM_UP = 3


class SlowLink:
    """A proxy that delivers everything late, and otherwise as it came.

    Args:
        target: the server's URL.
        delay_s: of every byte, each way.

    """

    def __init__(self, target: str, delay_s: float) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 80)
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(self._target)
            for ends in ((near, far), (far, near)):
                late: queue.Queue[tuple[float, bytes]] = queue.Queue()
                ends[1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._read, args=[ends[0], late], daemon=True).start()
                threading.Thread(target=self._write, args=[ends[1], late], daemon=True).start()

    def _read(self, source: socket.socket, late: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"begin"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            late.put((time.monotonic() + self._delay_s, data))

    def _write(self, sink: socket.socket, late: queue.Queue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due, data = late.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)


class TwoCalls:
    """An adapter whose updates do not travel with losses."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        if update is not None:
            version = self.update(update).version
        return self._adapter.losses(rows, probes, base=base, version=version)

    def update(self, update: Update) -> UpdateResult:
        return self._adapter.update(update)

    def rollback(self, version: int, *, base_version: int | None = None, key: str | None = None) -> UpdateResult:
        return self._adapter.rollback(version, base_version=base_version, key=key)

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        return self._adapter.scores(rows, version=version)

    def limits(self) -> Limits:
        return self._adapter.limits()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--round-trip", type=float, default=0.1, metavar="SECONDS")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=23, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = BUILTIN["tickets"].rows(load_jsonl(TICKETS))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        server = LocalServer(
            [options.model, "--engine", "transformers", "--state", str(directory / "state")], directory / "log"
        )
        try:
            link = SlowLink(server.url, options.round_trip / 2)
            with Client(server.url) as near, Client(link.url) as far:
                server.wait_until_ready(near)
                ways = (
                    ("no link: one call a step", near, Trainer, False),
                    ("update as a call of its own", far, Trainer, True),
                    ("update with the next losses", far, Trainer, False),
                    ("the same, steps overlapping", far, PipelinedTrainer, False),
                )
                seconds: dict[str, list[float]] = {way: [] for way, *_ in ways}
                for number in range(options.rounds):
                    for place, (way, client, trainer, apart) in enumerate(ways):
                        adapter = client.create_adapter(f"bench/latency-{number}-{place}", basis=Basis(source="random"))
                        adapter.calibrate()
                        run = trainer(
                            TwoCalls(adapter) if apart else adapter,
                            TwoPoint(),
                            Adam(),
                            1e-3,
                            rows,
                            steps=options.steps,
                            batch_size=options.batch_size,
                        )
                        # Overlapping calls are answered in pairs: only their mean says how long a step takes.
                        steps = run.run().steps[WARM_UP:]
                        seconds[way].append(statistics.mean(record.seconds for record in steps))
        finally:
            server.stop()
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    one_call = medians["update with the next losses"]
    print(f"{options.batch_size} rows a step, one ± pair; a round trip of {1e3 * options.round_trip:g} ms\n")
    print("| way | seconds a step | of one round trip a step |\n| --- | --- | --- |")
    for way, median in medians.items():
        print(f"| {way} | {median:.3f} | {median / one_call:.2f} |")


if __name__ == "__main__":
    main()
