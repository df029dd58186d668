"""A server that is asked to end: calls under way are answered, later ones refused, and everything is on disk."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server_ext.metrics import OPERATOR
from tests.server_ext.conftest import ENGINES
from tests.server_ext.support import Figures
from tests.support import Process, Server, new_adapter
from zoact_remote import Client, ConnectionFailed, Losses, Probe, Update, UpdateResult, ZoActError
from zoact_remote.cli.local_server import free_port

ROWS = [{"prompt": [5 + i] * 200, "completion": [6]} for i in range(32)]
PROBES = [Probe(seed, 0.01) for seed in range(4)]
WITHIN_S = 120


@dataclass
class Call:
    started: float
    ended: float
    outcome: Any


class Caller(threading.Thread):
    """Makes calls one after another, until one fails."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.started = time.monotonic()
        self._make = make
        self.start()

    def run(self) -> None:
        outcome: Any = None
        while not isinstance(outcome, ZoActError):
            self.started = time.monotonic()
            try:
                outcome = self._make(len(self.calls))
            except ZoActError as error:
                outcome = error
            self.calls.append(Call(self.started, time.monotonic(), outcome))


def under_way(server: Server, caller: Caller, deadline: float) -> float:
    """When a call began that the server is at work on, and has been for a short while at most."""
    while time.monotonic() < deadline:
        begun = caller.started
        there = Figures.of(server)("zoact_calls_under_way", tenant=OPERATOR) == 2  # both callers' then
        if there and caller.started == begun and time.monotonic() - begun < 0.3:
            return begun
    raise TimeoutError


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_is_asked_to_end(tiny_model: Path, tmp_path: Path, engine: str) -> None:
    server = Server(tiny_model, engine, tmp_path).start()
    try:
        with server.client() as client, server.client() as other:
            adapter, idle = new_adapter(client), new_adapter(client)
            idle.update(Update(0, ((1, 0.1),)))
            beside = other.adapter(adapter.name)
            updates = Caller(lambda number: adapter.update(Update(number, ((number, 0.01),))))
            losses = Caller(lambda _: beside.losses(ROWS, PROBES))
            deadline = time.monotonic() + WITHIN_S
            while len(updates.calls) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            begun = under_way(server, losses, deadline)
            asked = time.monotonic()
            server.stop()
            for caller in (updates, losses):
                caller.join(60)
        (last,) = (call for call in losses.calls if call.started == begun)
        assert last.ended > asked
        assert isinstance(last.outcome, Losses)
        for caller, kind in ((updates, UpdateResult), (losses, Losses)):
            assert all(isinstance(call.outcome, kind) for call in caller.calls[:-1])
            refused = caller.calls[-1].outcome
            assert isinstance(refused, ConnectionFailed) or (refused.status, refused.code) == (503, "draining")
        acknowledged = [call.outcome for call in updates.calls[:-1]]
        before = server.log.read_text()
        assert '"drained"' in before
        assert "calls cut off" not in before

        server.start()
        with server.client() as client:
            found = client.adapter(adapter.name)
            assert [e.digest for e in found.journal()][: len(acknowledged)] == [r.digest for r in acknowledged]
            assert found.info.version in (len(acknowledged), len(acknowledged) + 1)
            # There was nothing to replay: the newest version of everything was in a snapshot.
            versions = {(path.parent.name, int(path.stem)) for path in server.state.glob("snapshots/*/*.safetensors")}
            assert {found.info.version, 1} <= {version for _, version in versions}
            assert len({key for key, _ in versions}) == 2
    finally:
        server.kill()


SERVE = """
import sys
from pathlib import Path
from server_ext import app
from server_ext.tenants import Tenants

app.DRAIN_S = 1.0
model, directory, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
app.serve(model, "127.0.0.1", port, directory / "state", "float32", Tenants(directory / "tenants.sqlite"))
"""


def test_a_server_ends_although_a_caller_stalls(tiny_model: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    arguments = ["-c", SERVE, str(tiny_model), str(tmp_path), str(port)]
    process = Process(arguments, port, log, ready="/zoact/v1/health/ready")
    head = "POST /zoact/v1/adapters/acme/a/import HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as stalled, Client(process.url) as client:
            stalled.sendall(head.encode() + bytes(1000))
            new_adapter(client).update(Update(0, ((1, 0.1),)))
            asked = time.monotonic()
            process.stop()
            assert time.monotonic() - asked < 20
    finally:
        process.kill()
    assert '"drained"' in log.read_text()
    assert list((tmp_path / "state").glob("snapshots/*/1.safetensors"))
