"""``zoact top``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest

from tests.support import KEY, ROWS, Server, new_adapter
from tests.zoact_remote.cli.support import run, run_json
from zoact_remote import Adapter, Client, Probe, Update
from zoact_remote.cli import top

Pause = Callable[[Callable[[], None]], None]


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Pause:
    """Has something done between two looks, a short while after the first."""

    def put(action: Callable[[], None]) -> None:
        def sleep(seconds: float) -> None:
            assert seconds == 1.0
            action()

        monkeypatch.setattr(top, "sleep", sleep)

    return put


@pytest.fixture
def adapter(client: Client) -> Adapter:
    return new_adapter(client)


def test_what_happens_between_two_looks(adapter: Adapter, pause: Pause) -> None:
    tokens = []

    def train() -> None:
        for version in range(3):
            tokens.append(adapter.losses(ROWS, [Probe(1, 0.1), Probe(2, 0.1)]).tokens)
            adapter.update(Update(version, ((version, 0.1),)))

    pause(train)
    look = run_json("top", "--once")
    (mine,) = (found for found in look["adapters"] if found["name"] == adapter.name)
    assert (mine["version"], mine["state"]) == (3, "ready")
    assert mine["updates_per_second"] * look["seconds"] == pytest.approx(3)
    (tenant,) = (found for found in look["tenants"] if found["name"] == "tests")
    for name, number in (("updates", 3), ("probes", 6), ("tokens", sum(tokens))):
        assert tenant[f"{name}_per_second"] * look["seconds"] == pytest.approx(number)
    assert 0 < tenant["losses_p50_seconds"] <= tenant["losses_p95_seconds"]
    assert look["server"]["calls_per_second"] * look["seconds"] >= 6
    assert look["server"]["slots"] == 0
    assert look["server"]["requests_running"] is None


def test_it_is_shown(adapter: Adapter, pause: Pause) -> None:
    pause(lambda: None)
    shown = run("top", "--once").stdout
    assert adapter.name in shown
    assert "calls/s" in shown
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["tests"])
    assert line.split()[1:] == ["0.0", "0.0", "0", "-", "-", "0"]
    # Nobody looks at what is no terminal.
    assert "--once or --json" in run("top", code=1).stderr


def test_a_tenants_key_shows_its_own(server_with_key: Server, pause: Pause) -> None:
    pause(lambda: None)
    with server_with_key.client(api_key=KEY) as operator:
        keys = {name: operator.tenants.add(name) for name in ("watched", "unwatched")}
        adapters = [operator.create_adapter(f"{name}/a") for name in keys]
        try:
            where = ("top", "--once", "--url", server_with_key.url, "--api-key")
            look = run_json(*where, keys["watched"])
            assert (look["server"], look["tenants"]) == (None, None)
            assert [(found["name"], found["state"]) for found in look["adapters"]] == [("watched/a", "new")]
            shown = run(*where, keys["watched"]).stdout
            assert "watched/a" in shown
            assert "unwatched" not in shown
            assert "probes/s" not in shown
            assert {found["name"] for found in run_json(*where, KEY)["tenants"]} >= {"watched", "unwatched"}
        finally:
            for adapter in adapters:
                adapter.delete()
            for name in keys:
                operator.tenants.remove(name)


def test_json_goes_on_until_it_is_interrupted(adapter: Adapter, pause: Pause, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([*range(3)])

    def twice_more() -> None:
        if next(looks) == 2:
            raise KeyboardInterrupt

    pause(twice_more)
    lines = [json.loads(line) for line in run("top", "--json").stdout.splitlines()]
    assert len(lines) == 2
    assert lines[0]["seconds"] < lines[1]["seconds"]


def test_a_server_that_goes_is_waited_for(server: Server, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client.with_options(retries=0)
    monkeypatch.setattr(top, "sleep", lambda seconds: None)
    looks = top._looks(client, 1.0)
    assert "error" not in next(looks)
    monkeypatch.setattr(client._transport, "url", "http://127.0.0.1:1")
    assert next(looks)["error"]["type"] == "ConnectionFailed"
    monkeypatch.setattr(client._transport, "url", server.url)
    assert next(looks)["seconds"] > 0


def test_ctrl_c_ends_the_live_view(server: Server, adapter: Adapter) -> None:
    terminal, inside = os.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-m", "zoact_remote.cli", "top", "--interval", "0.1"],
        stdin=inside,
        stdout=inside,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "500"},
        # Tests that run in a shell's background have been told to ignore it, and would pass that on.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    os.close(inside)
    try:
        seen = b""
        while adapter.name.encode() not in seen:
            seen += os.read(terminal, 1 << 16)
        watching.send_signal(signal.SIGINT)
        # The terminal is read to its end: whoever writes to one that is full waits.
        try:
            while os.read(terminal, 1 << 16):
                pass
        except OSError:
            pass
        _, errors = watching.communicate(timeout=30)
        assert (watching.returncode, errors) == (0, b"")
    finally:
        watching.kill()
        os.close(terminal)
