"""Runs as TOML files: what is printed is read, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.zoact_remote.cli.support import RECORDS, TASK, read_json, results_of, run, run_json
from zoact_remote import Client, InvalidValue, toml
from zoact_remote.cli.config import SECTIONS, RunConfig, dumps, load
from zoact_remote.cli.data import task_of
from zoact_remote.cli.output import CommandFailed
from zoact_remote.cli.settings import (
    DEFAULTS,
    FULL_RATE_STEPS,
    LEARNING_RATE,
    PROBES,
    WEIGHT_DECAY,
    TrainingSettings,
)
from zoact_remote.estimators.base import ProbeSettings
from zoact_remote.tasks import Task

SHORT = ("--steps", "2", "--batch-size", "2")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "data": TEXT,
        "adapter": TEXT,
        "hold_out": st.floats(0, 0.9),
        "go_on": st.booleans(),
        "log_to": st.lists(st.sampled_from(["tensorboard", "wandb"])).map(tuple),
        "task": st.just({"template": "{q}\n", "labels": {"0": " a", "1": " b"}}) | st.just({"name": "sst2"}),
        "steps": st.integers(1, 10**6),
        "epsilon": st.just("auto") | st.floats(1e-9, 1.0),
        "learning_rate": st.just("auto") | st.floats(0.0, 1.0),
        "estimator": st.sampled_from([*PROBES]),
        "probes": st.integers(1, 9),
        "eval_every": st.integers(1, 9),
        "guard": st.booleans(),
    },
)


@given(values=CONFIGS)
def test_what_is_printed_is_read(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    config = RunConfig().changed(values)
    path.write_text(dumps(config), encoding="utf-8")
    assert load(path) == config


def test_everything_is_explained() -> None:
    lines = dumps(RunConfig()).splitlines()
    assert [line[1:-1] for line in lines if line.startswith("[")] == list(SECTIONS)
    keys = [i for i, line in enumerate(lines) if " =" in line and not line.startswith("# What records")]
    assert len(keys) == len(RunConfig.__dataclass_fields__) - 2 + len(TrainingSettings.__dataclass_fields__)
    assert all(lines[i - 1].startswith("# ") for i in keys)


@pytest.mark.parametrize(
    ("content", "param", "message"),
    [
        ("[method]\nstep = 3", "method.step", "is unknown; [method] may have steps, batch_size"),
        ("[methods]\nsteps = 3", "methods", "is unknown; there are data, task"),
        ("steps = 3", "steps", "is unknown"),
        ("method = 3", "method", "must be a section"),
        ("[method]\nsteps = 2.5", "method.steps", "must be a whole number, got 2.5"),
        ("[method]\nsteps = true", "method.steps", "must be a whole number, got True"),
        ("[method]\nsteps = 0", "method.steps", "must be at least 1"),
        ('[method]\nepsilon = "automatic"', "method.epsilon", "must be a number or 'auto', got 'automatic'"),
        ('[method]\noptimizer = "lion"', "method.optimizer", "must be 'adam' or 'adamw'"),
        ("[data]\nhold_out = 1.0", "data.hold_out", "must be at most 0.9"),
        ('[output]\nlog_to = ["disk"]', "output.log_to", "must be a list of 'tensorboard' or"),
        ("[evaluation]\nkeep_best = 1", "evaluation.keep_best", "must be true or false, got 1"),
        ("[adapter]\nname = 1", "adapter.name", "must be text"),
    ],
)
def test_what_is_wrong_is_named(content: str, param: str, message: str) -> None:
    Path("run.toml").write_text(content)
    error = run_json("train", "--config", "run.toml", code=1)["error"]
    assert error["param"] == f"run.toml: {param}"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"epsilon": "auto", "estimator": "fzoo"}, "epsilon"),
        ({"momentum": 0.9}, "momentum"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum"),
        ({"patience": 3}, "patience"),
        ({"warmup": 400}, "steps"),
        ({"estimator": "fzoo", "probes": 1}, "probes"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"estimator": "leave-one-out", "split": True}, "split"),
        ({"probes": 3, "split": True}, "split"),
        ({"split": True}, "split"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"optimizer": "adamw", "weight_decay": 1000.0}, "weight_decay"),
        ({"min_delta": 0.1}, "min_delta"),
        ({"min_delta": float("nan"), "patience": 1, "eval_every": 1}, "min_delta"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        TrainingSettings(**changes).check()
    assert caught.value.param == param


def test_defaults_are_the_methods_own() -> None:
    for estimator, probes in PROBES.items():
        made = TrainingSettings(estimator=estimator).make_estimator()
        assert isinstance(made, ProbeSettings)
        assert made.probes == probes == type(made)().probes
    assert DEFAULTS.resolved().weight_decay == 0.0
    adamw = TrainingSettings(optimizer="adamw")
    assert adamw.resolved().weight_decay == WEIGHT_DECAY["adamw"] == adamw.make_optimizer().weight_decay  # type: ignore[attr-defined]


@pytest.mark.parametrize("changes", [{"eval_every": 3}, {"eval_every": 3, "patience": 2}, {"keep_best": True}])
def test_settings_that_need_held_out_rows(changes: dict[str, Any]) -> None:
    TrainingSettings().check_unevaluated()
    with pytest.raises(InvalidValue) as caught:
        TrainingSettings(**changes).check_unevaluated()
    assert caught.value.param in changes


def test_the_environments_server_gives_way_to_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run.toml").write_text('[adapter]\nurl = "http://from-file:1"\n')
    monkeypatch.setenv("ZOACT_URL", "http://from-environment:2")
    printed = ("train", "--config", "run.toml", "--print-config")
    assert 'url = "http://from-file:1"' in run(*printed).stdout
    assert 'url = "http://given:3"' in run(*printed, "--url", "http://given:3").stdout
    assert "from-environment" not in run("train", "--print-config").stdout


@given(st.integers(1, 100_000))
def test_long_runs_have_a_lower_rate(steps: int) -> None:
    rate = TrainingSettings(steps=steps).resolved().learning_rate
    assert isinstance(rate, float)
    if steps <= FULL_RATE_STEPS:
        assert rate == LEARNING_RATE
    else:
        walked = steps * rate**2
        assert walked == pytest.approx(FULL_RATE_STEPS * LEARNING_RATE**2, rel=0.1)
    assert TrainingSettings(steps=steps, learning_rate=0.5).resolved().learning_rate == 0.5
    assert TrainingSettings(steps=steps, learning_rate="auto").resolved().learning_rate == "auto"


def test_options_win_over_the_file() -> None:
    Path("run.toml").write_text('[method]\nsteps = 7\nseed = 3\nguard = false\n[task]\nname = "sst2"\n')
    printed = run("train", "--config", "run.toml", "--steps", "9", "--task", "trec", "--print-config").stdout
    Path("printed.toml").write_text(printed)
    found = load("printed.toml")
    assert (found.settings.steps, found.settings.seed, found.settings.guard) == (9, 3, False)
    assert found.task == {"name": "trec"}
    text = toml.load("printed.toml")
    assert text["method"]["epsilon"] == DEFAULTS.epsilon


def test_tasks_from_a_configuration() -> None:
    assert task_of(RECORDS, {}) == TASK
    assert task_of(RECORDS, TASK.to_dict()) == TASK
    assert task_of([], {"name": "sst2", "text_field": "sentence"}).template == "{sentence} It was"
    assert task_of(RECORDS, {"template": "{text}?"}) == Task("{text}?", TASK.labels)
    with pytest.raises(CommandFailed, match="but a name"):
        task_of([], {"name": "sst2", "metric": "accuracy"})
    with pytest.raises(InvalidValue) as caught:
        task_of([], {"labels": {"0": " a", "1": " b"}, "template": "{q}", "lables": {}})
    assert caught.value.param == "task.lables"


def test_a_run_leaves_its_configuration(data: str, name: str, client: Client) -> None:
    options = (*SHORT, "--label", "bug= bug", "--label", "billing= bill", "--template", "{text}\\n")
    first = run_json("train", data, "--adapter", name, *options)
    out = results_of(name)
    kept = load(out / "config.toml")
    assert kept.data == str(Path(data).resolve())
    assert kept.settings.probes == 1
    client.adapter(name).delete()
    again = run_json("train", "--config", str(out / "config.toml"), "--out", "again")
    assert again["digest"] == first["digest"]
    assert read_json(Path("again/result.json"))["settings"] == first["settings"]


def test_data_and_adapter_are_needed() -> None:
    assert "DATA and --adapter" in run("train", code=1).stderr
    json.loads(run("train", "--json", code=1).stdout)
