"""``zoact serve``, up to the point where the server takes over."""

import os
import sys
from typing import Any

import pytest

from tests.support import KEY
from tests.zoact_remote.cli.support import run
from zoact_remote.cli import serve


def test_serve_prints_its_command_without_the_key() -> None:
    printed = run("serve", "model", "--api-key", KEY, "--print", "--", "--max-model-len", "64").stdout
    assert printed.rstrip().endswith("--max-model-len 64")
    assert KEY not in printed


def test_serve_becomes_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[Any] = []
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execvpe", lambda *arguments: became.extend(arguments))
    run("serve", "model")
    program, arguments, environment = became
    assert program == arguments[0] == sys.executable
    assert environment["PATH"] == os.environ["PATH"]
    assert "zoact" in environment["VLLM_PLUGINS"]


@pytest.mark.parametrize(("engine", "extra"), [("vllm", "vllm"), ("transformers", "server")])
def test_missing_packages_are_named(engine: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert f"pip install 'zoact-remote[{extra}]'" in run("serve", "model", "--engine", engine, code=1).stderr
