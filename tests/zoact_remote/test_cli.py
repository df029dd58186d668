"""The commands that talk to a server."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.zoact_remote.cli_support import KEY, fake_server, run, write_data
from zoact_remote.cli.data import make_task, split, spread
from zoact_remote.cli.local_server import free_port
from zoact_remote.cli.output import CommandFailed, describe
from zoact_remote.cli.settings import DEFAULTS, TrainingSettings
from zoact_remote.errors import BadRequest, InvalidValue
from zoact_remote.optimizers import SGD, Adam


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


# Starting up ---------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from zoact_remote.cli import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('numpy', 'requests', 'torch', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("command", ["serve", "train", "eval", "export", "adapters", "quickstart"])
def test_every_command_has_help(command: str) -> None:
    assert "Usage" in run(command, "--help").output


def test_version() -> None:
    assert run("--version").stdout.strip()


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
def test_train_writes_results(data: str) -> None:
    result = run("train", data, "--adapter", "acme/triage", "--steps", "4", "--batch-size", "2", "--eval-every", "2")
    assert "zero-shot" in result.stdout
    assert "100.0% ± 0.0" in result.stdout
    out = Path("runs/acme-triage")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [0, 1, 2, 3]
    assert metrics[1]["evaluation"]["version"] == 2
    assert "</html>" in (out / "report.html").read_text()
    made = json.loads((out / "result.json").read_text())
    assert made["version"] == 4
    assert made["results"]["zero_shot"] == {"accuracy": 0.5, "loss": pytest.approx(1.55), "rows": 4}
    assert made["results"]["tuned"]["accuracy"] == 1.0
    assert json.loads((out / "task.json").read_text())["labels"] == {"billing": " billing", "bug": " bug"}


@pytest.mark.usefixtures("server")
def test_train_with_json_writes_json_alone(data: str) -> None:
    result = run("train", data, "--adapter", "acme/triage", "--steps", "2", "--out", "elsewhere", "--json")
    assert json.loads(result.stdout)["adapter"] == "acme/triage"
    assert "basis" in result.stderr
    assert Path("elsewhere/result.json").is_file()


@pytest.mark.usefixtures("server")
def test_train_completions(data: str) -> None:
    arguments = ("--template", "{text}", "--completion", " {label}", "--steps", "2", "--json")
    results = json.loads(run("train", data, "--adapter", "acme/c", *arguments).stdout)["results"]
    assert results["zero_shot"] == {"accuracy": None, "loss": 2.0, "rows": 4}
    assert "label_calibrated_zero_shot" not in results


@pytest.mark.usefixtures("server")
def test_train_without_evaluation(data: str) -> None:
    result = run("train", data, "--adapter", "acme/triage", "--steps", "2", "--hold-out", "0")
    assert "acme/triage is at version 2" in result.stdout


@pytest.mark.usefixtures("server")
def test_an_adapter_is_not_trained_twice_by_accident(data: str) -> None:
    train = ("train", data, "--adapter", "acme/triage", "--steps", "2")
    run(*train)
    assert "--continue" in run(*train, code=1).stderr
    made = json.loads(run(*train, "--continue", "--json").stdout)
    assert made["version"] == 4
    assert made["results"]["zero_shot"]["accuracy"] == 0.5


def test_a_run_that_fails_leaves_its_curves(data: str) -> None:
    def losses(probe: dict[str, Any], version: int) -> dict[str, Any]:
        return {**probe, "plus": None if version else 1.0, "minus": 0.9}

    with fake_server(losses) as url:
        arguments = ("--adapter", "acme/triage", "--steps", "5", "--url", url, "--api-key", KEY)
        assert "error: step 1" in run("train", data, *arguments, code=1).stderr
    assert "1 step ·" in Path("runs/acme-triage/report.html").read_text()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
def test_errors_are_one_line(data: str) -> None:
    result = run("train", data, "--adapter", "acme/triage", "--rank", "65", code=1)
    assert result.stderr == "error: rank: must be at most 64 on this server (request r1)\n"
    result = run("eval", data, "--adapter", "acme/none", code=1)
    assert result.stderr.endswith("error: there is no adapter 'acme/none' (request r1)\n")


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (InvalidValue("epsilon", "too small"), {"message": "epsilon: too small", "param": "epsilon"}),
        (BadRequest("wrong", param="rows[3].prompt"), {"message": "wrong", "param": "rows[3].prompt"}),
        (FileNotFoundError(2, "No such file", "x"), {"message": "x: No such file"}),
    ],
)
def test_expected_errors_are_described(error: Exception, described: dict[str, str]) -> None:
    found = describe(error)
    assert found is not None
    assert described.items() <= found.items()


def test_bugs_are_not_hidden() -> None:
    assert describe(ValueError("a bug")) is None


@pytest.mark.usefixtures("server")
def test_errors_as_json() -> None:
    result = run("export", "acme/none", "there", "--json", code=1)
    assert json.loads(result.stdout)["error"] == {
        "message": "there is no adapter 'acme/none'",
        "type": "NotFound",
        "code": "adapter_not_found",
        "param": "adapter",
        "status": 404,
        "request_id": "r1",
    }


@pytest.mark.usefixtures("server")
def test_the_api_key_is_sent() -> None:
    assert "no adapters" in run("adapters").stdout
    assert "a valid API key is needed" in run("adapters", "--api-key", "wrong", code=1).stderr


def test_a_missing_server_is_named_at_once() -> None:
    started = time.monotonic()
    url = f"http://127.0.0.1:{free_port()}"
    assert f"no server answers at {url}" in run("adapters", "--url", url, code=1).stderr
    assert time.monotonic() - started < 5
    assert run("adapters", "--url", "ftp://x", code=2)


def test_a_missing_file_is_named() -> None:
    assert (
        run("train", "none.jsonl", "--adapter", "a/b", code=1).stderr
        == "error: none.jsonl: No such file or directory\n"
    )


# Other commands ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
def test_eval_export_list_and_delete(data: str) -> None:
    run("train", data, "--adapter", "acme/triage", "--steps", "4")
    task = ("--task", "runs/acme-triage/task.json")
    found = json.loads(run("eval", data, "--adapter", "acme/triage", *task, "--json").stdout)
    assert (found["version"], found["accuracy"], found["rows"]) == (4, 1.0, 20)
    result = run("eval", data, "--adapter", "acme/triage", "--version", "0", "--rows", "6")
    assert "acme/triage@0" in result.stdout
    made = json.loads(run("export", "acme/triage", "peft", "--json").stdout)
    assert made == {"adapter": "acme/triage", "version": 4, "dtype": "float32", "directory": "peft"}
    assert Path("peft/adapter_model.safetensors").is_file()
    listed = json.loads(run("adapters", "--json").stdout)["adapters"]
    assert [(adapter["name"], adapter["version"]) for adapter in listed] == [("acme/triage", 4)]
    assert "acme/triage" in run("adapters").stdout
    assert "deleted" in run("adapters", "--delete", "acme/triage").stdout
    assert json.loads(run("adapters", "--json").stdout) == {"adapters": []}


# Data ----------------------------------------------------------------------------------------------------------------


def test_tasks_from_options() -> None:
    records = [{"body": "x", "kind": "a"}, {"body": "y", "kind": "b"}]
    task = make_task(records, text_field="body", label_field="kind")
    assert task.rows(records)[1] == {"prompt": "y\nCategory:", "choices": [" a", " b"], "answer": 1}
    task = make_task([], template="{text}\\nIt was", labels=["0= bad", "1= good = fine"])
    assert task.to_dict()["labels"] == {"0": " bad", "1": " good = fine"}
    assert task.template == "{text}\nIt was"
    assert make_task([], task="sst2").template == "{text} It was"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sst2", "template": "x"}, "leave out"),
        ({"task": "none"}, "neither a file"),
        ({"labels": ["a"]}, "LABEL=WORD"),
        ({"labels": ["a=b"], "completion": "x"}, "either"),
        ({"label_field": "none"}, "--label-field"),
        ({}, "not words"),
    ],
)
def test_tasks_that_cannot_be_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandFailed, match=message):
        make_task([{"text": "x", "label": 0}, {"text": "y", "label": 1}], **arguments)


def test_rows_are_split_and_spread() -> None:
    assert split(list(range(10)), 0.2) == (list(range(8)), [8, 9])
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], 4) == [1, 2]


def test_settings_make_the_method() -> None:
    assert isinstance(DEFAULTS.make_optimizer(), Adam)
    momentum = TrainingSettings(optimizer="momentum").make_optimizer()
    assert isinstance(momentum, SGD)
    assert momentum.momentum == 0.9
    assert TrainingSettings(schedule="constant").make_schedule()(399) == DEFAULTS.learning_rate
    assert TrainingSettings(schedule="cosine").make_schedule()(399) < 1e-3 * DEFAULTS.learning_rate
    assert TrainingSettings(estimator="forward-difference", probes=3).make_estimator().ask(lambda: 1).base
