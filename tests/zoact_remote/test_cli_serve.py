"""The commands that start a server."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.zoact_remote.cli_support import KEY, fake_server, run, write_data
from zoact_remote.cli import local_server, serve
from zoact_remote.cli.output import CommandFailed
from zoact_remote.cli.vllm_command import lora_rank, vllm_command


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data() -> str:
    return write_data()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_server() as url:
        monkeypatch.setenv("ZOACT_URL", url)
        monkeypatch.setenv("ZOACT_API_KEY", KEY)
        yield


# Serving -------------------------------------------------------------------------------------------------------------


def command(*extra: str, **changes: Any) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The flags with their values, and the variables, of a vLLM command."""
    options: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 8000,
        "state": Path("state"),
        "dtype": None,
        "max_rank": 8,
        "slots": 8,
        "api_key": None,
        "on_cpu": False,
        "environment": {},
        "plugins": (),
    }
    made = vllm_command("model", extra=extra, **options | changes)
    assert made.arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags: dict[str, list[str]] = {}
    for argument in made.arguments[3:]:
        if argument.startswith("--"):
            assert argument not in flags
            flags[argument] = []
        else:
            flags[list(flags)[-1]].append(argument)
    return flags, made.environment


def test_vllm_on_a_gpu() -> None:
    flags, environment = command()
    assert flags["--dtype"] == ["auto"]
    assert flags["--max-lora-rank"] == ["16"]
    assert (flags["--max-loras"], flags["--max-cpu-loras"]) == (["8"], ["16"])
    assert flags["--worker-extension-cls"] == ["server_ext.worker.ZoActWorker"]
    assert "lm_head" not in flags["--lora-target-modules"]
    assert "--enforce-eager" not in flags
    assert environment == {"VLLM_PLUGINS": "zoact", "ZOACT_STATE": str(Path("state").resolve())}


def test_vllm_on_the_cpu() -> None:
    flags, environment = command(on_cpu=True)
    assert flags["--dtype"] == ["float32"]
    assert flags["--max-lora-rank"] == ["8"]
    assert "--enforce-eager" in flags
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command(on_cpu=True, environment={"VLLM_CPU_KVCACHE_SPACE": "8"})[1]


def test_flags_of_the_user_win() -> None:
    flags, _ = command("--dtype=bfloat16", "--max_loras", "3", "--no-enforce-eager", on_cpu=True)
    assert "--dtype" not in flags
    assert "--max-loras" not in flags
    assert "--enforce-eager" not in flags
    assert flags["--max-lora-rank"] == ["16"]
    assert flags["--max-cpu-loras"] == ["6"]


@pytest.mark.parametrize(
    ("before", "plugins", "after"),
    [
        (None, (), "zoact"),
        (None, ("other",), "other,zoact"),
        ("a,b", ("other",), "a,b,zoact"),
        ("a,zoact", (), "a,zoact"),
        ("", ("other",), "zoact"),
    ],
)
def test_other_plugins_stay(before: str | None, plugins: tuple[str, ...], after: str) -> None:
    environment = {} if before is None else {"VLLM_PLUGINS": before}
    assert command(environment=environment, plugins=plugins)[1]["VLLM_PLUGINS"] == after


def test_the_key_is_no_flag() -> None:
    flags, environment = command(api_key=KEY)
    assert KEY not in [value for values in flags.values() for value in values]
    assert environment["VLLM_API_KEY"] == KEY


@pytest.mark.parametrize(
    ("rank", "dtype", "slot"),
    [(1, "float32", 1), (2, "float32", 8), (4, "auto", 8), (5, "auto", 16), (160, "half", 320)],
)
def test_lora_ranks(rank: int, dtype: str, slot: int) -> None:
    assert lora_rank(rank, dtype) == slot


def test_a_rank_too_large() -> None:
    with pytest.raises(CommandFailed, match="at most 256"):
        lora_rank(257, "auto")


def test_serve_prints(monkeypatch: pytest.MonkeyPatch) -> None:
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


# A server of our own -------------------------------------------------------------------------------------------------


def program(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a shell script in the place of ``zoact serve``."""
    file = Path("program").resolve()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(local_server.sys, "executable", str(file))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_that_ends_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "echo loading; echo no such model; exit 3")
    with (
        pytest.raises(CommandFailed, match=r"exit code 3; server.log ends:\n  loading\n  no such model"),
        local_server.serving(["model"], Path("server.log")) as server,
        local_server.Client(server.url) as client,
    ):
        server.wait_until_ready(client)


def test_a_server_is_stopped_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "exec sleep 60")
    servers = []

    def interrupted() -> None:
        with local_server.serving(["model"], Path("server.log")) as server:
            servers.append(server)
            assert alive(server.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not alive(servers[0].pid)


def test_a_server_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "STOP_WITHIN_S", 0.2)
    program(monkeypatch, "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    with local_server.serving(["model"], Path("server.log")) as server:
        while "ready" not in server.log.read_text():
            time.sleep(0.01)
    assert not alive(server.pid)


def test_a_sigterm_stops_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "exec sleep 60")
    before = signal.getsignal(signal.SIGTERM)
    servers = []

    def terminated() -> None:
        with local_server.serving(["model"], Path("server.log")) as server:
            servers.append(server)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as stopped:
        terminated()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not alive(servers[0].pid)
    assert signal.getsignal(signal.SIGTERM) is before


# Quickstart ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_server_started(server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's server is the fake one; the process it starts only waits."""
    program(monkeypatch, "exec sleep 60")
    start = local_server.LocalServer.__init__

    def started(self: local_server.LocalServer, arguments: list[str], log: Path) -> None:
        start(self, arguments, log)
        self.url = os.environ["ZOACT_URL"]

    monkeypatch.setattr(local_server.LocalServer, "__init__", started)


@pytest.mark.usefixtures("no_server_started")
def test_quickstart(data: str) -> None:
    arguments = ("--dataset", data, "--model", "m", "--engine", "transformers", "--steps", "4", "--json")
    made = json.loads(run("quickstart", *arguments).stdout)
    assert made["results"]["zero_shot"]["accuracy"] == 0.5
    assert made["results"]["tuned"]["accuracy"] == 1.0
    assert made["generation"]["expected"] == " billing"
    assert Path("runs/quickstart/adapter/adapter_config.json").is_file()
    assert Path("runs/quickstart/report.html").is_file()
    assert not alive(made["server"]["pid"])


@pytest.mark.usefixtures("no_server_started")
def test_quickstart_may_leave_its_server(data: str) -> None:
    result = run("quickstart", "--dataset", data, "--model", "m", "--engine", "vllm", "--keep-serving", "--json")
    pid = json.loads(result.stdout)["server"]["pid"]
    assert f"kill {pid}" in result.stderr
    os.kill(pid, signal.SIGTERM)


@pytest.mark.usefixtures("no_server_started")
def test_quickstart_deletes_no_state_but_its_own(data: str) -> None:
    kept = Path("out/state/notes.txt")
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    run("quickstart", "--dataset", data, "--model", "m", "--engine", "vllm", "--steps", "1", "--out", "out")
    assert kept.read_text() == "mine"


@pytest.mark.usefixtures("no_server_started")
def test_quickstart_on_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(list[dict[str, Any]]):
        features: ClassVar[dict[str, Any]] = {"sentence": None, "label": SimpleNamespace(names=["bad", "good"])}

        def shuffle(self, seed: int) -> "Found":
            return self

        def select(self, places: range) -> "Found":
            return Found(self[i] for i in places)

    records = Found({"sentence": f"film {i}", "label": i % 2} for i in range(10))
    hub = SimpleNamespace(load_dataset=lambda name, split: records)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    made = json.loads(run("quickstart", "--dataset", "films", "--model", "m", "--steps", "1", "--json").stdout)
    assert made["generation"]["prompt"] == "film 8\nCategory:"
    assert made["generation"]["expected"] == " bad"


def test_a_data_set_of_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'zoact-remote[hub]'" in run("quickstart", "--dataset", "films", code=1).stderr


def test_quickstart_outside_the_repository() -> None:
    assert "give --data or --dataset" in run("quickstart", code=1).stderr
