"""A server that is asked to end: calls under way are answered, later ones refused, and everything is on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.server_ext.conftest import ENGINES
from tests.support import Server, new_adapter
from zoact_remote import ConnectionFailed, Losses, Probe, Update, UpdateResult, ZoActError

ROWS = [{"prompt": [5 + i] * 200, "completion": [6]} for i in range(32)]
PROBES = [Probe(seed, 0.01) for seed in range(4)]
SETTLED_S = 0.1
"""A call that was sent this long ago has reached the server."""


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
            while len(updates.calls) < 5 or not SETTLED_S < time.monotonic() - losses.started < 2 * SETTLED_S:
                time.sleep(0.01)
            asked = time.monotonic()
            server.stop()
            for caller in (updates, losses):
                caller.join(60)
        assert any(call.started < asked - SETTLED_S and call.ended > asked for call in losses.calls)
        for caller, kind in ((updates, UpdateResult), (losses, Losses)):
            for call in caller.calls:
                if call.started < asked - SETTLED_S:
                    assert isinstance(call.outcome, kind)
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
