"""``zoact train --resume``: a run that was cut off ends as if it had not been."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.zoact_remote.cli.support import RECORDS, TASK, read_json, results_of, run, run_json
from zoact_remote import Adapter, Callback, Client, EarlyStopping, Guard, Inconclusive, Trainer
from zoact_remote.cli.app import app
from zoact_remote.cli.output import INTERRUPTED
from zoact_remote.cli.settings import TrainingSettings

OPTIONS = ("--steps", "5", "--batch-size", "2", "--eval-every", "2", "--learning-rate", "0.05")
CALLS = ("calibrate", "losses", "update", "rollback", "scores")


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Cuts the run off at an adapter's calls with these numbers, counted over all runs: before or after the answer."""

    def cut(*numbers: int, answered: bool) -> list[int]:
        made: list[int] = []

        def patch(name: str) -> None:
            call = getattr(Adapter, name)

            def patched(*args: Any, **kwargs: Any) -> Any:
                made.append(len(made) + 1)
                if made[-1] in numbers and not answered:
                    raise KeyboardInterrupt
                answer = call(*args, **kwargs)
                if made[-1] in numbers:
                    raise KeyboardInterrupt
                return answer

            monkeypatch.setattr(Adapter, name, patched)

        for name in CALLS:
            patch(name)
        return made

    return cut


def left(name: str) -> dict[str, Any]:
    """What a run leaves, but for names, times and wall-clock seconds."""
    out = results_of(name)
    result = read_json(out / "result.json")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        assert record.pop("seconds") >= record.pop("server_seconds") > 0
    kept = ("version", "digest", "results", "steps", "tokens", "settings")
    evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    curves = (out / "report.html").read_text().partition("Training loss")[2].partition("Settings")[0]
    return {"metrics": metrics, "evaluations": evaluations, "curves": curves} | {key: result[key] for key in kept}


@pytest.fixture
def undisturbed(data: str, client: Client) -> dict[str, Any]:
    run("train", data, "--adapter", "tests/undisturbed", *OPTIONS)
    found = left("tests/undisturbed")
    client.adapter("tests/undisturbed").delete()
    return found


def attempt(*arguments: str) -> int:
    """The exit code of a run that may be cut off."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code


@pytest.mark.parametrize(("first", "answered"), [(1, True), (2, False), (3, True)])
def test_a_run_cut_off_again_and_again_ends_as_if_it_had_not_been(
    data: str, name: str, client: Client, undisturbed: dict[str, Any], cut_off: Any, first: int, answered: bool
) -> None:
    # Undisturbed it makes 13 calls: for the basis, four evaluations, five steps, and three updates that are waited for.
    # An attempt gets two calls further at the least, an update and the evaluation that waits for it.
    cut_off(*range(first, 100, 3), answered=answered)
    train = ("train", data, "--adapter", name, *OPTIONS, "--resume")
    attempts = 1
    while attempt(*train) == INTERRUPTED:
        attempts += 1
    assert attempts > 4
    assert left(name) == undisturbed
    assert client.adapter(name).info.version == 5


def test_a_run_that_is_done_stays_as_it_is(
    data: str, name: str, client: Client, undisturbed: dict[str, Any], cut_off: Any
) -> None:
    train = ("train", data, "--adapter", name, *OPTIONS)
    run(*train)
    (results_of(name) / "result.json").unlink()
    made = cut_off(answered=False)
    run(*train, "--resume")
    assert left(name) == undisturbed
    assert len(made) == 1, "the last update, sent again without effect"


def test_lines_that_the_checkpoint_does_not_cover_are_dropped(
    data: str, name: str, client: Client, undisturbed: dict[str, Any], cut_off: Any
) -> None:
    cut_off(7, answered=False)
    train = ("train", data, "--adapter", name, *OPTIONS)
    assert attempt(*train) == INTERRUPTED
    out = results_of(name)
    for file, torn in (("metrics.jsonl", '{"step": 4}\n{"step": 5, "ver'), ("evaluations.jsonl", '{"step": 5}\n{"st')):
        with (out / file).open("a") as lines:
            lines.write(torn)
    (out / "checkpoint.json.partial").write_text("{")
    run(*train, "--resume")
    assert left(name) == undisturbed


@pytest.mark.parametrize(("further", "advice"), [((), "with --resume"), (("--continue",), "go on with it by --resume")])
def test_a_run_that_was_cut_off_is_not_forgotten_by_accident(
    data: str, name: str, undisturbed: dict[str, Any], cut_off: Any, further: tuple[str, ...], advice: str
) -> None:
    cut_off(7, answered=False)
    train = ("train", data, "--adapter", name, *OPTIONS)
    assert attempt(*train) == INTERRUPTED
    refused = run(*train, *further, code=1)  # and with it the error and its frames, which hold nothing
    assert advice in refused.stderr
    run(*train, "--resume")
    assert left(name) == undisturbed


def test_training_further_is_resumed_too(data: str, name: str, client: Client, cut_off: Any) -> None:
    first = ("train", data, "--adapter", name, *OPTIONS)
    run(*first)
    before = left(name)
    # The second and third calls are evaluations: of the model alone, and of version 5.
    cut_off(1, 3, 5, 7, 9, answered=True)
    while attempt(*first, "--continue", "--resume", "--out", "further") == INTERRUPTED:
        pass
    results = read_json(Path("further/result.json"))["results"]
    assert results["zero_shot"] == before["results"]["zero_shot"]
    evaluations = [json.loads(line) for line in Path("further/evaluations.jsonl").read_text().splitlines()]
    assert [(found["step"], found["version"]) for found in evaluations] == [
        *((None, 0), (0, 5), (2, 7), (4, 9), (5, 10)),
    ]
    assert client.adapter(name).info.version == 10


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (("--no-guard",), "settings.guard"),
        (("--learning-rate", "0.01"), "settings.learning_rate"),
        (("--steps", "6"), "settings.steps"),
        (("--hold-out", "0.3"), "rows"),
        (("--eval", "other.jsonl", "--hold-out", "0"), "rows"),
        (("--template", "{text}!"), "rows"),
        (("--continue",), "continue"),
        (("--task", "macro.toml"), "task.metric"),
    ],
)
def test_another_run_is_not_resumed(
    data: str, name: str, client: Client, cut_off: Any, changes: tuple[str, ...], field: str
) -> None:
    Path("other.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    Path("macro.toml").write_text(TASK.to_toml().replace("accuracy", "macro_f1"))
    cut_off(5, answered=True)
    train = ("train", data, "--adapter", name, *OPTIONS)
    assert attempt(*train) == INTERRUPTED
    checkpoint = results_of(name) / "checkpoint.json"
    before = checkpoint.read_bytes(), client.adapter(name).info
    error = run_json(*train, *changes, "--resume", code=1)["error"]
    assert (error["type"], error["param"]) == ("InvalidValue", field)
    assert (checkpoint.read_bytes(), client.adapter(name).info) == before


def test_another_adapter_of_the_same_name_is_not_trained_on(data: str, name: str, client: Client, cut_off: Any) -> None:
    cut_off(5, answered=True)
    train = ("train", data, "--adapter", name, *OPTIONS)
    assert attempt(*train) == INTERRUPTED
    client.adapter(name).delete()
    assert run_json(*train, "--resume", code=1)["error"]["type"] == "NotFound"
    client.create_adapter(name).calibrate(TASK.rows(RECORDS[:2]))
    assert run_json(*train, "--resume", code=1)["error"]["param"] == "adapter.created"
    assert client.adapter(name).info.version == 0


def test_a_run_that_is_not_resumed_forgets_the_one_before(data: str, name: str, client: Client) -> None:
    train = ("train", data, "--adapter", name, *OPTIONS)
    run(*train)
    run(*train, "--continue", "--seed", "3")
    metrics = [json.loads(line) for line in (results_of(name) / "metrics.jsonl").read_text().splitlines()]
    assert [record["version"] for record in metrics] == list(range(5, 10))


def test_a_run_of_another_model_is_not_forgotten(data: str, name: str, client: Client, cut_off: Any) -> None:
    cut_off(7, answered=False)
    train = ("train", data, "--adapter", name, *OPTIONS)
    assert attempt(*train) == INTERRUPTED
    path = results_of(name) / "checkpoint.json"
    saved = json.loads(path.read_bytes())
    path.write_text(json.dumps({**saved, "model": "sha256:other"}))
    # Here nobody has trained an adapter of that name; on the other model's server somebody has.
    client.adapter(name).delete()
    assert "holds a run of another model" in run(*train, code=1).stderr
    assert json.loads(path.read_bytes())["model"] == "sha256:other"


def test_a_run_of_another_adapter_is_not_forgotten(data: str, name: str, client: Client) -> None:
    run("train", data, "--adapter", name, *OPTIONS, "--out", "results")
    before = Path("results/checkpoint.json").read_bytes()
    refused = run("train", data, "--adapter", f"{name}-b", *OPTIONS, "--out", "results", code=1).stderr
    assert f"results holds a run of {name}: give another directory with --out" in refused
    assert Path("results/checkpoint.json").read_bytes() == before
    assert f"{name}-b" not in [adapter.name for adapter in client.adapters()]


def test_a_directory_is_enough(data: str, name: str, undisturbed: dict[str, Any], cut_off: Any) -> None:
    cut_off(5, 8, answered=True)
    assert attempt("train", data, "--adapter", name, *OPTIONS) == INTERRUPTED
    out = str(results_of(name))
    assert "has its own config.toml" in run("train", out, "--resume", "--config", "x.toml", code=1).stderr
    assert run_json("train", out, "--resume", "--steps", "6", code=1)["error"]["param"] == "settings.steps"
    assert attempt("train", out, "--resume") == INTERRUPTED
    run("train", out, "--resume")
    assert left(name) == undisturbed


class Nervous(Guard):
    """A guard that takes two steps' losses for a divergence."""

    def on_loss(self, trainer: Trainer, loss: float) -> None:
        super().on_loss(trainer, math.inf if trainer.step in (3, 6) else loss)


@pytest.fixture
def _nervous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go back twice, and at their end to the best evaluation."""

    def watch(_: TrainingSettings, metric: str) -> list[Callback]:
        return [Nervous(window=2, patience=2), EarlyStopping(None, metric=metric, keep_best=True)]

    monkeypatch.setattr(TrainingSettings, "make_callbacks", watch)


@pytest.mark.usefixtures("_nervous")
@pytest.mark.parametrize(("first", "answered"), [(1, False), (2, True), (3, False)])
def test_a_run_that_went_back_is_resumed_too(
    data: str, name: str, client: Client, cut_off: Any, first: int, answered: bool
) -> None:
    options = ("--steps", "8", "--batch-size", "2", "--eval-every", "3", "--learning-rate", "0.5")
    run("train", data, "--adapter", "tests/whole", *options)
    whole = left("tests/whole")
    client.adapter("tests/whole").delete()
    assert [step["step"] for step in whole["metrics"] if step["returned_to"] is not None] == [3, 6]
    cut_off(*range(first, 200, 3), answered=answered)
    while attempt("train", data, "--adapter", name, *options, "--resume") == INTERRUPTED:
        pass
    assert left(name) == whole
    assert not client.adapter(name).audit().failures


@pytest.mark.parametrize("numbers", [(1,), (4,), (9,), (12, 20), (60,)])
def test_what_was_measured_is_measured_once(
    data: str, name: str, client: Client, cut_off: Any, numbers: tuple[int, ...]
) -> None:
    measured = ("--steps", "3", "--batch-size", "2", "--epsilon", "auto", "--learning-rate", "auto")
    whole = run_json("train", data, "--adapter", "tests/measured", *measured)
    client.adapter("tests/measured").delete()
    cut_off(*numbers, answered=True)
    while attempt("train", data, "--adapter", name, *measured, "--resume") == INTERRUPTED:
        pass
    made = read_json(results_of(name) / "result.json")
    for part in ("digest", "results", "measured", "settings"):
        assert made[part] == whole[part]
    assert made["settings"]["epsilon"] == made["measured"]["epsilon"]
    assert made["settings"]["learning_rate"] == made["measured"]["learning_rate"]
    first = json.loads((results_of(name) / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["epsilon"], first["learning_rate"]) == (
        *(made["measured"]["epsilon"], made["measured"]["learning_rate"]),
    )


def test_a_search_that_was_cut_off_is_not_trained_on(data: str, name: str, client: Client, cut_off: Any) -> None:
    train = ("train", data, "--adapter", name, "--steps", "3", "--batch-size", "2", "--learning-rate", "auto")
    cut_off(12, answered=True)
    assert attempt(*train) == INTERRUPTED
    checkpoint = read_json(results_of(name) / "checkpoint.json")
    assert (checkpoint["measured"], checkpoint["trainer"]) == ({}, None)
    assert client.adapter(name).info.version
    assert "go on with it by --resume" in run(*train, "--continue", code=1).stderr
    assert read_json(results_of(name) / "checkpoint.json") == checkpoint
    run(*train, "--resume")


def test_a_search_that_came_to_nothing_leaves_the_adapter_to_other_runs(
    data: str, name: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(adapter: Adapter, *_: Any, **__: Any) -> Any:
        adapter.rollback(0)
        raise Inconclusive("no learning rate lowered the loss")

    monkeypatch.setattr("zoact_remote.cli.measure.find_learning_rate", search)
    train = ("train", data, "--adapter", name, "--steps", "3", "--batch-size", "2")
    assert "give --epsilon and --learning-rate as numbers and --continue" in " ".join(
        run(*train, "--learning-rate", "auto", code=1).stderr.split()
    )
    run(*train, "--learning-rate", "0.01", "--continue")
    assert client.adapter(name).info.version == 4
