"""``zoact train``: what it does to the adapter, what it writes and what it says."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.support import new_adapter
from tests.zoact_remote.cli.support import HELD_OUT, RECORDS, TASK, figures, read_json, results_of, run, run_json
from zoact_remote import Client, evaluate_task
from zoact_remote.cli.data import split
from zoact_remote.tasks import Task

SHORT = ("--steps", "2", "--batch-size", "2")
ROWS = TASK.rows(HELD_OUT)


def test_train_writes_what_the_server_scores(data: str, name: str, client: Client) -> None:
    options = ("--steps", "4", "--batch-size", "2", "--eval-every", "2", "--learning-rate", "0.05")
    shown = run("train", data, "--adapter", name, *options).stdout
    adapter, out = client.adapter(name), results_of(name)

    made = read_json(out / "result.json")
    assert (made["adapter"], made["version"], made["digest"]) == (name, 4, adapter.info.digest)
    results = made["results"]
    assert list(results) == ["zero_shot", "label_calibrated_zero_shot", "tuned"]
    assert results["zero_shot"] == figures(adapter, ROWS, version=0)
    assert results["tuned"] == figures(adapter, ROWS, version=4)
    assert abs(results["tuned"]["loss"] - results["zero_shot"]["loss"]) > 1e-3, "training must matter for this test"
    assert math.isfinite(results["label_calibrated_zero_shot"]["loss"])
    for label, result in zip(("zero-shot", "label-calibrated zero-shot", "tuned"), results.values(), strict=True):
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(label))
        assert f"{result['accuracy']:.1%}" in line
        assert f"{result['loss']:.3f}" in line

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["version"]) for record in metrics] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert all(math.isfinite(record["loss"]) for record in metrics)
    halfway = metrics[1]["evaluation"]
    assert {field: halfway[field] for field in results["tuned"]} == figures(adapter, ROWS, version=2)
    newest = list(adapter.journal())[-1].update
    assert {seed for seed, _ in newest.terms} == {seed for record in metrics for seed, _ in record["terms"]}
    assert Task.from_file(out / "task.toml") == TASK
    assert "</html>" in (out / "report.html").read_text()


def test_train_acts_on_the_layers_asked_for(data: str, name: str, client: Client) -> None:
    run("train", data, "--adapter", name, *SHORT, "--sites", "upper-mlp")
    kinds = ("gate_proj", "up_proj", "down_proj")
    assert sorted(client.adapter(name).info.sites) == sorted(f"model.layers.1.mlp.{kind}" for kind in kinds)


def test_directions_share_the_rows_of_a_step(data: str, name: str, client: Client) -> None:
    run("train", data, "--adapter", name, *SHORT, "--probes", "2", "--split", "--learning-rate", "auto")
    metrics = [json.loads(line) for line in (results_of(name) / "metrics.jsonl").read_text().splitlines()]
    assert [len(record["terms"]) for record in metrics] == [2, 2]
    rows = TASK.rows(RECORDS[: -len(HELD_OUT)])
    tokens = client.adapter(name).scores(rows, version=0).tokens / len(rows)
    assert all(record["tokens"] < 2 * 2 * 1.5 * tokens for record in metrics), "two sides of two rows, not of four"


@pytest.mark.usefixtures("server")
def test_train_with_json_writes_json_alone(data: str, name: str) -> None:
    result = run("train", data, "--adapter", name, *SHORT, "--out", "elsewhere", "--json")
    assert json.loads(result.stdout) == read_json(Path("elsewhere/result.json"))
    assert "taking the basis from 16 rows" in result.stderr


def test_train_completions(data: str, name: str, client: Client) -> None:
    arguments = ("--template", "{text}", "--completion", " {label}", *SHORT)
    results = run_json("train", data, "--adapter", name, *arguments)["results"]
    rows = Task("{text}", completion=" {label}").rows(HELD_OUT)
    assert list(results) == ["zero_shot", "tuned"]
    assert results["zero_shot"] == figures(client.adapter(name), rows, version=0)
    assert results["zero_shot"]["accuracy"] is None


def test_train_by_the_metric_of_a_task(name: str, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["The parcel", "What a joy", "I cannot", "The second"]
    untrained = new_adapter(client)
    texts = [untrained.generate(prompt, max_tokens=4, version=0).text for prompt in prompts]
    # What is learnt leads away from what the model wrote at first, which is right, too, but for the last.
    answers = [["Please send my money back", text] for text in texts[:3]] + [["Please send my money back"]]
    lines = [{"q": prompt, "answers": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("task.toml").write_text(
        'template = "{q}"\ncompletion = " {answers}"\nmetric = "exact_match"\nmax_tokens = 4\nstop = ""\n'
    )
    options = ("--task", "task.toml", "--eval", "data.jsonl", "--steps", "8", "--learning-rate", "0.3", "--keep-best")
    made = run_json("train", "data.jsonl", "--adapter", name, *options, "--eval-every", "4")
    out = results_of(name)

    assert made["metric"] == "exact_match"
    (zero_shot, tuned), start = made["results"].values(), evaluate_task(untrained, Task.from_file("task.toml"), lines)
    assert zero_shot["exact_match"] == start.exact_match == 0.75
    assert zero_shot["token_f1"] == start.token_f1
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    halfway, last = metrics[3]["evaluation"], metrics[7]["evaluation"]
    assert max(halfway["exact_match"], last["exact_match"]) < 0.75, "training must do harm for this test"
    assert (made["kept"], tuned["exact_match"]) == (0, 0.75)

    (listed,) = run_json("runs")["runs"]
    assert [listed[key] for key in ("metric", "before", "after", "best")] == ["exact_match", 0.75, 0.75, 0.75]
    monkeypatch.setenv("COLUMNS", "160")
    assert "exact match" in run("runs").stdout
    page = (out / "report.html").read_text()
    assert "<h2>Evaluation exact match</h2>" in page
    assert "<strong>75.0%</strong>" in page
    untrained.delete()


def test_train_shows_the_metric_of_a_task(data: str, name: str, client: Client) -> None:
    Path("task.toml").write_text(TASK.to_toml().replace("accuracy", "macro_f1"))
    shown = run("train", data, "--adapter", name, *SHORT, "--task", "task.toml").stdout
    found = read_json(results_of(name) / "result.json")["results"]["tuned"]
    (line,) = (line for line in shown.splitlines() if line.strip().startswith("tuned"))
    assert "macro f1" in shown
    assert line.split()[-3:] == [f"{found['macro_f1']:.1%}", f"{found['loss']:.3f}", "4"]


def test_train_on_conversations(name: str, client: Client) -> None:
    def record(i: int) -> dict[str, Any]:
        turns = [("user", f"{i}?"), ("assistant", f"{i}."), ("user", "Sure?"), ("assistant", "Yes.")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    records = [record(i) for i in range(5)]
    Path("chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    made = run_json("train", "chat.jsonl", "--adapter", name, *SHORT)
    rows = Task(messages="messages").rows(split(records, 0.2)[1])
    assert len(rows) == 2, "a record is held out with all of its turns"
    assert made["results"]["tuned"] == figures(client.adapter(name), rows, version=2)
    again = run_json("eval", "chat.jsonl", "--adapter", name, "--task", made["files"]["task"])
    assert again["rows"] == 10


def test_train_on_one_file_and_evaluate_on_another(data: str, name: str, client: Client) -> None:
    Path("eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:6]))
    made = run_json("train", data, "--adapter", name, *SHORT, "--eval", "eval.jsonl")
    assert made["results"]["tuned"] == figures(client.adapter(name), TASK.rows(RECORDS[:6]), version=2)


def test_train_without_evaluation(data: str, name: str, client: Client) -> None:
    result = run("train", data, "--adapter", name, *SHORT, "--hold-out", "0")
    assert f"{name} is at version 2" in result.stdout
    assert "no records are held out" in result.stderr
    assert client.adapter(name).info.version == 2
    assert read_json(results_of(name) / "result.json")["results"] == {}


def test_an_adapter_is_not_trained_twice_by_accident(data: str, name: str, client: Client) -> None:
    train = ("train", data, "--adapter", name, *SHORT)
    run(*train)
    assert "--continue" in run(*train, code=1).stderr
    assert client.adapter(name).info.version == 2
    made = run_json(*train, "--continue")
    assert made["version"] == 4
    assert made["results"]["zero_shot"] == figures(client.adapter(name), ROWS, version=0)
    assert made["results"]["before_this_run"] == figures(client.adapter(name), ROWS, version=2)
    (listed,) = run_json("runs")["runs"]
    assert listed["before"] == made["results"]["before_this_run"]["accuracy"]
    # Adam's terms name the probes of all steps of a run.
    last = {entry.version: {seed for seed, _ in entry.update.terms} for entry in client.adapter(name).journal()}
    assert last[2]
    assert not last[2] & last[4]


def test_a_run_that_fails_leaves_its_curves(
    data: str, name: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=writer))
    # A step so long that the server refuses the update, which travels with the second step's losses.
    far = ("--optimizer", "sgd", "--learning-rate", "1e9", "--log-to", "tensorboard")
    result = run("train", data, "--adapter", name, "--steps", "5", *far, code=1)
    assert "error: update.terms: coefficients could come to" in result.stderr
    assert [call.args[2] for call in writer().add_scalar.call_args_list if call.args[0] == "train/loss"] == [0]
    writer().close.assert_called_once_with()
    out = results_of(name)
    assert "1 step ·" in (out / "report.html").read_text()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (out / "result.json").exists()
    assert client.adapter(name).info.version == 0


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("measured", [(), ("--learning-rate", "auto", "--epsilon", "auto")])
def test_train_is_refused_before_it_begins_if_an_update_would_be_too_long(
    data: str, name: str, client: Client, measured: tuple[str, ...]
) -> None:
    error = run_json("train", data, "--adapter", name, "--probes", "94", *measured, code=1)["error"]
    assert error["param"] == "probes"
    assert "4136 terms, beyond the server's max_terms (4096): take 93 at most" in error["message"]
    assert name not in [adapter.name for adapter in client.adapters()]
    assert not results_of(name).exists()
