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

ROWS = [{"prompt": [5 + i] * 200, "completion": [seed] * 4} for i in range(8) for seed in range(8)]
PROBES = [Probe(seed, 0.01) for seed in range(4)]
SETTLED_S = 0.1
"""A call that was sent this long ago has reached the server."""


@dataclass
class Call:
    started: float
    ended: float
    outcome: Any


def over_and_over(make: Callable[[int], Any]) -> tuple[threading.Thread, list[Call]]:
    """Makes calls one after another on a thread, until one fails."""
    calls: list[Call] = []

    def work() -> None:
        while not calls or not isinstance(calls[-1].outcome, ZoActError):
            started = time.monotonic()
            outcome: Any
            try:
                outcome = make(len(calls))
            except ZoActError as error:
                outcome = error
            calls.append(Call(started, time.monotonic(), outcome))

    thread = threading.Thread(target=work)
    thread.start()
    return thread, calls


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_is_asked_to_end(tiny_model: Path, tmp_path: Path, engine: str) -> None:
    server = Server(tiny_model, engine, tmp_path).start()
    try:
        with server.client() as client, server.client() as other:
            adapter, idle = new_adapter(client), new_adapter(client)
            idle.update(Update(0, ((1, 0.1),)))
            beside = other.adapter(adapter.name)
            threads = [
                over_and_over(lambda number: adapter.update(Update(number, ((number, 0.01),)))),
                over_and_over(lambda _: beside.losses(ROWS, PROBES)),
            ]
            time.sleep(1)
            asked = time.monotonic()
            server.stop()
            for thread, _ in threads:
                thread.join(60)
        updates, losses = (calls for _, calls in threads)
        assert any(call.started < asked - SETTLED_S and call.ended > asked for call in losses), "none was under way"
        for call in (*updates, *losses):
            if call.started < asked - SETTLED_S:
                assert isinstance(call.outcome, (UpdateResult, Losses)), call.outcome
        for calls in (updates, losses):
            refused = calls[-1].outcome
            assert isinstance(refused, ConnectionFailed) or (refused.status, refused.code) == (503, "draining")
        acknowledged = [call.outcome for call in updates[:-1]]
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
