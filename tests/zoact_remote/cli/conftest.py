"""Commands run in a directory of their own, against the server that all tests share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Server, Servers, new_name
from tests.zoact_remote.cli.support import RECORDS, ServeScript
from zoact_remote import Client


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("ZOACT_URL", "ZOACT_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def data() -> str:
    """A file of ``RECORDS``."""
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return "data.jsonl"


@pytest.fixture
def server(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server that commands turn to."""
    server = servers("transformers")
    monkeypatch.setenv("ZOACT_URL", server.url)
    return server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def name() -> str:
    return new_name()


@pytest.fixture
def serve_script(monkeypatch: pytest.MonkeyPatch) -> ServeScript:
    def put(script: str) -> None:
        program = Path("program").resolve()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return put
