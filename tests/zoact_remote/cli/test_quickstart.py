"""``zoact quickstart``."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.support import Server
from tests.zoact_remote.cli.support import HELD_OUT, TASK, ServeScript, figures, is_running, read_json, run, run_json
from zoact_remote import Client, NotFound
from zoact_remote.cli import local_server, quickstart
from zoact_remote.cli.quickstart import ADAPTER
from zoact_remote.locks import lock

ROWS = TASK.rows(HELD_OUT)


def test_quickstart_serves_trains_exports_and_cleans_up(data: str, tiny_model: Path) -> None:
    options = ("--dataset", data, "--model", str(tiny_model), "--engine", "transformers", "--steps", "2")
    made = run_json("quickstart", *options)
    out = Path("runs/quickstart")
    assert (made["adapter"], made["version"], made["engine"]["name"]) == (ADAPTER, 2, "transformers")
    for result in made["results"].values():
        assert 0 <= result["accuracy"] <= 1
        assert np.isfinite(result["loss"])
        assert result["rows"] == 4
    assert made["example"]["prompt"] == ROWS[0]["prompt"]
    choices = ROWS[0]["choices"]
    assert made["example"]["expected"] == choices[ROWS[0]["answer"]]
    for answer in (made["example"]["before"], made["example"]["after"]):
        assert answer["choice"] in choices
        assert 1 / len(choices) <= answer["probability"] <= 1
        assert answer["text"]
    exported = read_json(out / "adapter/zoact.json")
    assert (exported["version"], exported["coefficients_digest"]) == (2, made["digest"])
    assert (out / "adapter/adapter_model.safetensors").is_file()
    assert (out / "report.html").is_file()
    assert (out / "state/journal.sqlite").is_file()
    assert not is_running(made["server"]["pid"])


@pytest.fixture
def _shared_server(
    server: Server, client: Client, serve_script: ServeScript, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The quickstart finds the tests' server on the port that it chose; the process that it starts only waits."""
    serve_script("exec sleep 60")
    monkeypatch.setattr(local_server, "free_port", lambda: urlsplit(server.url).port)
    yield
    with suppress(NotFound):
        client.adapter(ADAPTER).delete()


@pytest.mark.usefixtures("_shared_server")
def test_quickstart_may_leave_its_server(data: str, client: Client) -> None:
    result = run("quickstart", "--dataset", data, "--model", "m", "--steps", "1", "--keep-serving", "--json")
    made = json.loads(result.stdout)
    pid = made["server"]["pid"]
    assert f"kill {pid}" in result.stderr
    assert is_running(pid)
    os.kill(pid, signal.SIGTERM)
    adapter = client.adapter(ADAPTER)
    assert made["results"]["zero_shot"] == figures(adapter, ROWS, version=0)
    assert made["results"]["tuned"] == figures(adapter, ROWS, version=1)


@pytest.mark.parametrize(("file", "kept"), [("journal.sqlite", False), ("notes.txt", True)])
@pytest.mark.usefixtures("_shared_server")
def test_quickstart_deletes_no_state_but_its_own(data: str, file: str, kept: bool) -> None:
    state = Path("out/state")
    state.mkdir(parents=True)
    (state / file).write_text("of before")
    run("quickstart", "--dataset", data, "--model", "m", "--steps", "1", "--out", "out")
    assert (state / file).exists() is kept


@pytest.mark.usefixtures("_shared_server")
def test_quickstart_leaves_the_state_of_a_running_server_alone(data: str) -> None:
    state = Path("out/state")
    state.mkdir(parents=True)
    (state / "journal.sqlite").write_text("of a server that runs")
    command = ("quickstart", "--dataset", data, "--model", "m", "--steps", "1", "--out", "out")
    with lock(state):
        refused = run(*command, code=1).stderr
        assert f"still uses out/state (process {os.getpid()})" in " ".join(refused.split())
        assert (state / "journal.sqlite").read_text() == "of a server that runs"
    run(*command)
    assert not (state / "journal.sqlite").exists()


@pytest.mark.usefixtures("_shared_server")
def test_quickstart_on_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(list[dict[str, Any]]):
        features: ClassVar[dict[str, Any]] = {"sentence": None, "label": SimpleNamespace(names=["bad", "good"])}

    def load_dataset(name: str, config: str | None, split: str) -> Found:
        assert (name, config, split) == ("films", "short", "validation")
        return Found({"sentence": f"film {i}", "label": i % 2} for i in range(12))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(quickstart, "HUB_RECORDS", 10)
    made = run_json("quickstart", "--dataset", "films:short@validation", "--model", "m", "--steps", "1")
    assert made["results"]["tuned"]["rows"] == 2
    film = int(made["example"]["prompt"].removeprefix("film ").removesuffix("\nCategory:"))
    assert made["example"]["expected"] == f" {('bad', 'good')[film % 2]}"


def test_a_data_set_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    refused = run("quickstart", "--dataset", "films", code=1).stderr
    assert "films could not be loaded from the hub: no such thing" in " ".join(refused.split())


def test_a_data_set_of_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'zoact-remote[hub]'" in run("quickstart", "--dataset", "films", code=1).stderr


@pytest.mark.parametrize("records", [[{"text": "a", "label": 0}, {"text": "b", "label": 1}], [{"text": "a"}]])
def test_quickstart_names_the_command_that_has_the_options(records: list[dict[str, Any]]) -> None:
    Path("r.jsonl").write_text("\n".join(map(json.dumps, records)))
    refused = run("quickstart", "--dataset", "r.jsonl", code=1).stderr
    assert "The quickstart has no such options: use zoact train" in " ".join(refused.split())


def test_quickstart_outside_the_repository() -> None:
    assert "give --data or --dataset" in run("quickstart", code=1).stderr
