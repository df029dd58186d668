"""Calls whose callers have gone, over a real socket, on an engine that takes as long as the tests want."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn

from server_ext.app import create_app
from server_ext.engines.transformers import TransformersEngine
from server_ext.tenants import Tenants
from tests.support import CALL_TIMEOUT_S
from zoact_remote import Adapter, Basis, Client
from zoact_remote.cli.local_server import free_port

WITHIN_S = 30
ROW = {"prompt": [0, 5, 6], "completion": [7]}
PROBE = {"seed": 1, "epsilon": 0.1}
CALLS: dict[str, dict[str, Any]] = {
    "scores": {"rows": [ROW], "probe": PROBE},
    "generate": {"prompt": [0, 5, 6], "max_tokens": 2, "version": 0},
    "losses": {"rows": [ROW], "probes": [PROBE], "version": 0},
}
UPDATE = {"base_version": 0, "terms": [[1, 0.5]], "key": "first"}


@dataclass
class Brake:
    """Holds up what the engine evaluates, and sees how it ends."""

    may_go_on: threading.Event = field(default_factory=threading.Event)
    under_way: int = 0
    given_up: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def on(self, method: Any) -> Any:
        async def held_up(*args: Any) -> Any:
            self.under_way += 1
            try:
                while not self.may_go_on.is_set():
                    await asyncio.sleep(0.01)
                found = await method(*args)
                self.ended.set()
                return found
            except asyncio.CancelledError:
                self.given_up.set()
                raise
            finally:
                self.under_way -= 1

        return held_up


@pytest.fixture
def brake() -> Brake:
    return Brake()


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path, brake: Brake) -> Iterator[Adapter]:
    engine: Any = TransformersEngine(str(tiny_model))
    engine.score, engine.generate = brake.on(engine.score), brake.on(engine.generate)
    port = free_port()
    app = create_app(engine, tmp_path / "state", Tenants(tmp_path / "tenants.sqlite"))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{port}", timeout=CALL_TIMEOUT_S, retries=20) as client:
            adapter = client.create_adapter("acme/a", rank=1, basis=Basis(source="random"))
            adapter.calibrate([])
            yield adapter
    finally:
        brake.may_go_on.set()
        server.should_exit = True
        thread.join(60)


def leave(adapter: Adapter, call: str, body: dict[str, Any], brake: Brake, points: int) -> None:
    """Makes a call, and goes when the engine is at work on all of it."""
    connection = HTTPConnection(urlsplit(adapter._transport.url).netloc, timeout=WITHIN_S)
    with closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/zoact/v1/adapters/{adapter.name}/{call}", json.dumps(body), headers)
        deadline = time.monotonic() + WITHIN_S
        while brake.under_way < points:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("call", CALLS)
def test_what_nobody_waits_for_is_given_up(adapter: Adapter, brake: Brake, call: str) -> None:
    leave(adapter, call, CALLS[call], brake, 2 if call == "losses" else 1)
    assert brake.given_up.wait(WITHIN_S)
    assert adapter.refresh().version == 0
    assert brake.under_way == 0
    # All that it held is free again.
    brake.may_go_on.set()
    assert adapter.scores([ROW]).version == 0
    adapter.delete()


def test_a_call_that_changes_an_adapter_runs_to_its_end(adapter: Adapter, brake: Brake) -> None:
    leave(adapter, "losses", {"rows": [ROW], "probes": [PROBE], "update": UPDATE}, brake, 2)
    assert adapter.refresh().version == 1
    assert brake.under_way == 2, "both sides of the probe"
    brake.may_go_on.set()
    assert brake.ended.wait(WITHIN_S)
    assert not brake.given_up.is_set()
