"""A server that a command starts ends with it, whatever happens. Scripts take the server's place: most never answer."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.zoact_remote.cli.support import ServeScript, is_running
from zoact_remote import Client
from zoact_remote.cli import local_server
from zoact_remote.cli.local_server import serving
from zoact_remote.cli.output import CommandFailed


def test_a_server_that_ends_shows_its_log(serve_script: ServeScript) -> None:
    serve_script("echo loading; echo no such model; exit 3")
    with (
        pytest.raises(CommandFailed, match=r"exit code 3; server.log ends:\n  loading\n  no such model"),
        serving(["model"], Path("server.log")) as server,
        Client(server.url) as client,
    ):
        server.wait_until_ready(client)


def test_a_server_is_stopped_whatever_happens(serve_script: ServeScript) -> None:
    serve_script("exec sleep 60")
    servers = []

    def interrupted() -> None:
        with serving(["model"], Path("server.log")) as server:
            servers.append(server)
            assert is_running(server.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not is_running(servers[0].pid)


def test_a_server_that_does_not_listen_is_killed(serve_script: ServeScript, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "STOP_WITHIN_S", 0.2)
    serve_script("trap '' TERM; echo ready; while :; do sleep 0.05; done")
    with serving(["model"], Path("server.log")) as server:
        while "ready" not in server.log.read_text():
            time.sleep(0.01)
    assert not is_running(server.pid)


def test_a_sigterm_stops_the_server(serve_script: ServeScript) -> None:
    serve_script("exec sleep 60")
    before = signal.getsignal(signal.SIGTERM)
    servers = []

    def terminated() -> None:
        with serving(["model"], Path("server.log")) as server:
            servers.append(server)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as stopped:
        terminated()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not is_running(servers[0].pid)
    assert signal.getsignal(signal.SIGTERM) is before
