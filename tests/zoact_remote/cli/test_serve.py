"""``zoact serve``, up to the point where the server takes over."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import KEY, Server
from tests.zoact_remote.cli.support import run
from zoact_remote.cli import serve
from zoact_remote.cli.local_server import free_port


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


def test_serve_hands_on_the_share_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ZOACT_TRAINING_SHARE=0.125 " in run("serve", "model", "--training-share", "0.125", "--print").stdout
    monkeypatch.setenv("ZOACT_TRAINING_SHARE", "0.5")
    assert "ZOACT_TRAINING_SHARE=0.5 " in run("serve", "model", "--print").stdout


@pytest.mark.parametrize("share", ["0", "-1", "1.5", "nan"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    error = run("serve", "model", "--training-share", share, "--print", code=1).stderr
    assert "--training-share" in error
    assert "above 0 and at most 1" in error


def test_a_state_directory_in_use_is_refused_in_a_line(tiny_model: Path, server: Server) -> None:
    arguments = ("serve", str(tiny_model), "--engine", "transformers", "--state", str(server.state))
    refused = run(*arguments, "--port", str(free_port()), code=1).stderr
    assert f"error: another server uses {server.state} (process" in refused


def test_a_port_in_use_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = ("serve", "no-such-model", "--engine", "transformers", "--state", str(tmp_path), "--port", port)
        assert f"error: cannot listen at 127.0.0.1:{port}: " in run(*arguments, code=1).stderr


@pytest.mark.parametrize(("engine", "extra"), [("vllm", "vllm"), ("transformers", "server")])
def test_missing_packages_are_named(engine: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert f"pip install 'zoact-remote[{extra}]'" in run("serve", "model", "--engine", engine, code=1).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--host", "0.0.0.0"),
        ("--host", "gpu-7.example"),
        ("--engine", "transformers", "--host", "::"),
        ("--host", "0.0.0.0", "--api-key", ""),
        ("--print", "--", "--host=10.0.0.1"),
    ],
)
def test_without_keys_serve_keeps_to_loopback(arguments: tuple[str, ...]) -> None:
    assert "give --api-key or --keys" in run("serve", "model", *arguments, code=1).stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert f"--host {host}" in run("serve", "model", "--host", host, "--print").stdout


def test_an_empty_key_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOACT_API_KEY", "")
    assert "VLLM_API_KEY" not in run("serve", "model", "--print").stdout
    assert "give --api-key or --keys" in run("serve", "model", "--host", "0.0.0.0", code=1).stderr


def test_a_keys_file_without_any_key_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("operators = []")
    monkeypatch.setenv("ZOACT_KEYS", str(file))
    where = ("--host", "0.0.0.0", "--state", str(tmp_path / "state"))
    error = run("serve", "model", "--engine", "transformers", *where, code=1).stderr
    assert "there is no key" in " ".join(error.split())


def test_with_a_key_serve_listens_anywhere() -> None:
    assert "--host 0.0.0.0" in run("serve", "model", "--host", "0.0.0.0", "--api-key", KEY, "--print").stdout
