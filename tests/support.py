"""Real servers in processes of their own, and adapters on them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from zoact_remote import Adapter, Basis, Client, Update
from zoact_remote.cli.local_server import READY_WITHIN_S, free_port
from zoact_remote.cli.vllm_command import key_environment
from zoact_remote.noise import Distribution

CALL_TIMEOUT_S = (5.0, 90.0)
STOP_WITHIN_S = 90.0
SLOTS = 4
"""Adapters and probes that vLLM takes into one batch: few, so that tests can ask for more."""
KEY = "sesame"
"""The key of the fixture ``server_with_key``."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
"""One thread a process: the models are too small for two, which on a busy machine wait for each other."""

ROWS: list[dict[str, Any]] = [
    {"prompt": "What a joy to watch. It was", "choices": [" terrible", " great"], "answer": 1},
    {"prompt": "The second half was dull. It was", "choices": [" bad", " good", " a waste of time"], "answer": 0},
    {"prompt": "The parcel never came.", "completion": " Please send my money back."},
    {"prompt": [0, 40, 41, 42], "choices": [[50], [51], [52]], "answer": 2},
    {"prompt": [0, 300, 7, 8, 9], "completion": [10, 11]},
]
"""Rows of every kind: text and ids, completions and choices, one token and several, choices that begin alike."""


class Process:
    """A Python program that serves HTTP, in a process group of its own.

    Args:
        arguments: of Python.
        port: the port that they tell it to listen on.
        log: file that its output is appended to.
        environment: variables beside those that the tests run with, of which those that steer servers are left out.
        ready: path that answers once it serves.

    """

    def __init__(
        self,
        arguments: Sequence[str],
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
        ready: str = "/health",
    ) -> None:
        self._ready = ready
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        before = {name: value for name, value in os.environ.items() if not name.startswith(("ZOACT_", "VLLM_PLUGINS"))}
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [sys.executable, *arguments],
                env={**before, **ENVIRONMENT, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Ends it as a power cut would: no handler runs."""
        # vLLM's engine is a process of its own in the group, which is ours alone.
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(30)

    def stop(self) -> None:
        """Asks it to end, as an operator does, and waits until it has."""
        self._popen.terminate()
        self._popen.wait(STOP_WITHIN_S)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while self._popen.poll() is None and time.monotonic() < deadline:
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}{self._ready}", timeout=2).ok:
                    return
            time.sleep(0.2)
        end = "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])
        raise RuntimeError(f"the server did not come up:\n{end}")


class Server:
    """``zoact serve`` on a free port, with its state in a directory of its own. ``flags`` are vLLM's."""

    def __init__(
        self,
        model: Path,
        engine: str,
        directory: Path,
        api_key: str | None = None,
        keys: Path | None = None,
        environment: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self._flags = flags
        self._model = model
        self._directory = directory
        self._environment = {**(environment or {}), **key_environment(api_key, keys)}
        # It comes back where it was, so that whoever knew its address still does.
        self._port = free_port()
        self._process: Process | None = None

    @property
    def url(self) -> str:
        assert self._process is not None
        return self._process.url

    @property
    def state(self) -> Path:
        """Where its adapters and their journal are."""
        return self._directory / "state"

    @property
    def log(self) -> Path:
        """What it has written to its output."""
        return self._directory / "server.log"

    def start(self) -> Server:
        """Starts, and waits until every adapter is back."""
        arguments = ["-m", "zoact_remote.cli", "serve", str(self._model), "--engine", self.engine]
        arguments += ["--port", str(self._port), "--state", str(self.state)]
        if self.engine == "vllm":
            arguments += ["--slots", str(SLOTS), "--", *self._flags]
        self._process = Process(arguments, self._port, self.log, self._environment, "/zoact/v1/health/ready")
        return self

    def kill(self) -> None:
        """Ends the server as a power cut would; it can be started again."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def stop(self) -> None:
        """Asks the server to end and waits until it has; it can be started again."""
        assert self._process is not None
        self._process.stop()
        self._process = None

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"timeout": CALL_TIMEOUT_S, "retries": 0, "patience": 0.0, **options})


class Servers:
    """Servers by engine, each started when first asked for."""

    def __init__(self, model: Path, directory: Callable[[str], Path]) -> None:
        self._model = model
        self._directory = directory
        self._running: dict[str, Server] = {}

    def __call__(self, engine: str) -> Server:
        if engine not in self._running:
            self._running[engine] = Server(self._model, engine, self._directory(engine)).start()
        return self._running[engine]

    def kill(self) -> None:
        for server in self._running.values():
            server.kill()


_numbers = itertools.count()


def new_name() -> str:
    """A name of an adapter that no other test uses."""
    return f"tests/adapter-{next(_numbers)}"


def new_adapter(
    client: Client,
    *,
    rank: int = 3,
    sites: Sequence[str] | None = None,
    noise: Distribution = "rademacher",
    basis: Basis | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
) -> Adapter:
    """A calibrated adapter of a name that no other test uses; its basis is random unless told otherwise."""
    adapter = client.create_adapter(
        new_name(), rank=rank, sites=sites, noise=noise, basis=basis or Basis(source="random")
    )
    adapter.calibrate(rows)
    return adapter


def trained_adapter(client: Client, *, updates: int = 1, size: float = 0.1, seed: int = 0, **options: Any) -> Adapter:
    """An adapter some updates away from the base model, far enough that it shows in its scores.

    The same whatever ran before; adapters that are to differ take seeds that lie apart.
    """
    adapter = new_adapter(client, **options)
    for version in range(updates):
        adapter.update(Update(version, ((seed + version, size),)))
    return adapter
