"""A server of our own on this machine, for as long as it is needed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from zoact_remote.cli.output import CommandFailed
from zoact_remote.client import Client
from zoact_remote.errors import CallFailed
from zoact_remote.transport import is_passing

LOOPBACK = "127.0.0.1"
READY_WITHIN_S = 600.0
STOP_WITHIN_S = 30.0
LOG_LINES = 25


class LocalServer:
    """A running ``zoact serve``.

    Attributes:
        pid: its process, which is the server itself.
        url: where it listens.
        log: what it writes.

    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self.log = log
        command = [sys.executable, "-m", "zoact_remote.cli", "serve", *arguments, "--port", str(port)]
        with open(log, "wb") as file:
            # In a session of its own: a Ctrl-C in the terminal is ours alone, and we stop the server in our own time.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pid = self._process.pid
        self._kept = False

    def wait_until_ready(self, client: Client, timeout: float = READY_WITHIN_S) -> None:
        """Wait until the server answers.

        Raises:
            CommandFailed: it ended, or took longer than ``timeout`` seconds; the message has the end of its log.

        """
        deadline = time.monotonic() + timeout
        while True:
            if self._process.poll() is not None:
                raise CommandFailed(f"the server ended with exit code {self._process.returncode}{last_lines(self.log)}")
            try:
                client.wait_until_ready(timeout=1.0)
                return
            except CallFailed as error:
                if not is_passing(error):
                    raise
                if time.monotonic() > deadline:
                    raise CommandFailed(
                        f"the server was not ready after {timeout:.0f} s{last_lines(self.log)}"
                    ) from None
            time.sleep(0.2)

    def leave_running(self) -> None:
        """Let the server outlive us: :meth:`stop` does nothing from here on."""
        self._kept = True

    def stop(self) -> None:
        """Ask the server to end, and end it if it does not."""
        if not self._kept and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                # The whole group, which is its session: vLLM's engine runs in processes of its own.
                os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()


@contextmanager
def serving(arguments: Sequence[str], log: Path) -> Iterator[LocalServer]:
    """A server that is stopped when the context ends, however it ends, SIGTERM and SIGHUP included.

    Args:
        arguments: of ``zoact serve``, without the port.
        log: file for what it writes.

    """
    before = {number: signal.signal(number, _raise_exit) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        server = LocalServer(arguments, log)
        try:
            yield server
        finally:
            server.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_logged(command: Sequence[str], log: Path, what: str) -> None:
    """Run a command to its end, or end it if we are interrupted.

    Raises:
        CommandFailed: it failed; the message has the end of its log.

    """
    with open(log, "wb") as file:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise CommandFailed(f"{what} failed with exit code {done.returncode}{last_lines(log)}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def last_lines(log: Path, count: int = LOG_LINES) -> str:
    """The end of a log, to put behind a message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    return "\n  ".join([f"; {log} ends:", *lines])


def _raise_exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
