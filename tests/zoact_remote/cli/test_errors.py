"""Expected failures are one line, or JSON, and exit code 1; bugs are neither."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import responses

from tests.support import new_adapter
from tests.zoact_remote.cli.support import run, run_json
from tests.zoact_remote.test_client import INFO
from zoact_remote import Client
from zoact_remote.cli.local_server import free_port
from zoact_remote.cli.output import CommandFailed, describe
from zoact_remote.errors import BadRequest, InvalidValue, TrainingDiverged
from zoact_remote.tasks import RecordError

URL = "http://server:8000"


def test_a_refused_call_is_one_line(data: str, name: str, client: Client) -> None:
    refused = run("train", data, "--adapter", name, "--rank", "65", code=1).stderr
    message = "error: rank: must be at most the width of the narrowest input, 64"
    assert re.fullmatch(rf"{message} \(request [0-9a-z-]+\)\n", refused)

    missing = run("eval", data, "--adapter", name, code=1).stderr.splitlines()[-1]
    assert re.fullmatch(rf"error: there is no adapter '{name}' \(request [0-9a-z-]+\)", missing)

    client.create_adapter("tests/uncalibrated")
    early = run("eval", data, "--adapter", "tests/uncalibrated", code=1).stderr.splitlines()[-1]
    message = "error: 'tests/uncalibrated' has no basis yet: POST rows to its /basis first"
    assert re.fullmatch(rf"{message} \(at adapter, request [0-9a-z-]+\)", early)


def test_a_row_at_fault_is_named(client: Client) -> None:
    adapter = new_adapter(client)
    records = [{"text": text, "label": label} for text, label in (("short", "bug"), ("long " * 300, "billing"))]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    error = run_json("eval", "data.jsonl", "--adapter", adapter.name, code=1)["error"]
    assert (error["type"], error["code"], error["param"]) == ("TooLarge", "context_length_exceeded", "rows[1].prompt")


@pytest.mark.usefixtures("server")
def test_errors_as_json(name: str) -> None:
    error = run_json("export", name, "there", code=1)["error"]
    assert re.fullmatch("[0-9a-z-]+", error.pop("request_id"))
    assert error == {
        "message": f"there is no adapter '{name}'",
        "type": "NotFound",
        "code": "adapter_not_found",
        "param": "adapter",
        "status": 404,
    }


def test_a_missing_server_is_named_at_once() -> None:
    started = time.monotonic()
    url = f"http://127.0.0.1:{free_port()}"
    assert f"no server answers at {url}" in run("adapters", "--url", url, code=1).stderr
    assert time.monotonic() - started < 5
    assert run("adapters", "--url", "ftp://x", code=2)


def test_a_server_that_is_starting_is_not_waited_for() -> None:
    error = {"message": "the server is still starting", "type": "server_error", "param": None, "code": "not_ready"}
    with responses.RequestsMock() as server:
        server.get(f"{URL}/zoact/v1/info", status=503, json={"error": error}, headers={"x-request-id": "r1"})
        result = run("adapters", "--url", URL, code=1)
    assert result.stderr == "error: the server is still starting (request r1)\n"


def test_a_server_that_has_too_much_to_do_is_there_and_the_call_itself_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoact_remote.transport.BACKOFF", lambda state: 0.0)
    error = {"message": "too many calls", "type": "invalid_request_error", "param": None, "code": "rate_limited"}
    with responses.RequestsMock() as server:
        info = server.get(f"{URL}/zoact/v1/info", status=429, json={"error": error}, headers={"x-request-id": "r1"})
        server.get(f"{URL}/zoact/v1/adapters", status=429, json={"error": error}, headers={"x-request-id": "r2"})
        server.get(f"{URL}/zoact/v1/adapters", json={"adapters": []})
        result = run("adapters", "--url", URL)
    assert info.call_count == 1
    assert result.stdout == "no adapters\n"


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_what_is_waited_for_is_shown(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    monkeypatch.setattr("zoact_remote.transport.BACKOFF", lambda state: 0.0)
    with responses.RequestsMock() as server:
        server.get(f"{URL}/zoact/v1/info", json=INFO)
        server.get(f"{URL}/zoact/v1/adapters", status=502)
        server.get(f"{URL}/zoact/v1/adapters", json={"adapters": []})
        result = run("adapters", "--url", URL, *flags)
    assert re.fullmatch(
        r"GET /adapters: 502 Bad Gateway \(502, request zoact-\w+\); trying again in 0.0 s\n", result.stderr
    )
    assert result.stdout == ('{\n  "adapters": []\n}\n' if flags else "no adapters\n")


def test_a_missing_file_is_named() -> None:
    result = run("train", "none.jsonl", "--adapter", "a/b", code=1)
    assert result.stderr == "error: none.jsonl: No such file or directory\n"


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (InvalidValue("epsilon", "too small"), {"message": "epsilon: too small", "param": "epsilon"}),
        (BadRequest("wrong", param="rows[3].prompt"), {"message": "wrong", "param": "rows[3].prompt"}),
        (FileNotFoundError(2, "No such file", "x"), {"message": "x: No such file"}),
        (RecordError("data.jsonl:3: not JSON"), {"message": "data.jsonl:3: not JSON"}),
        (TrainingDiverged("step 1: the loss is nan"), {"type": "TrainingDiverged"}),
        (CommandFailed("give --data"), {"message": "give --data"}),
    ],
)
def test_expected_errors_are_described(error: Exception, described: dict[str, Any]) -> None:
    found = describe(error)
    assert found is not None
    assert described.items() <= found.items()


def test_bugs_are_not_hidden() -> None:
    assert describe(ValueError("a bug")) is None
