"""``zoact runs``."""

import json
import os
from pathlib import Path

import pytest

from tests.zoact_remote.cli.support import results_of, run, run_json
from zoact_remote import Client
from zoact_remote.locks import lock

SHORT = ("--steps", "4", "--batch-size", "2", "--eval-every", "2")


def test_runs_are_listed(data: str, name: str, client: Client) -> None:
    made = run_json("train", data, "--adapter", name, *SHORT)
    out = results_of(name)
    (found,) = run_json("runs")["runs"]
    evaluations = [json.loads(line)["accuracy"] for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert (found["name"], found["adapter"], found["task"]) == (out.name, name, "labels")
    assert (found["state"], found["steps"], found["of"]) == ("done", 4, 4)
    assert found["metric"] == made["metric"] == "accuracy"
    assert found["before"] == made["results"]["zero_shot"]["accuracy"]
    assert found["after"] == made["results"]["tuned"]["accuracy"]
    assert found["best"] == max(evaluations)
    assert found["seconds"] == pytest.approx(made["seconds"])
    shown = run("runs").stdout
    assert out.name in shown
    assert "4/4" in shown


def test_runs_under_way_and_cut_off(data: str, name: str, client: Client) -> None:
    run("train", data, "--adapter", name, *SHORT)
    out = results_of(name)
    (out / "result.json").unlink()
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "torn')
    assert run_json("runs")["runs"][0]["state"] == "cut off"
    with lock(out):
        (found,) = run_json("runs")["runs"]
        assert (found["state"], found["steps"]) == ("running", 4)
        refused = run("train", data, "--adapter", name, *SHORT, "--resume", code=1).stderr
        assert f"a run is under way in {out} (process {os.getpid()})" in " ".join(refused.split())
    assert run_json("runs")["runs"][0]["state"] == "cut off"


@pytest.mark.parametrize("damage", ["{}", "[]", '{"name": "a'])
def test_a_damaged_run_does_not_hide_the_others(data: str, name: str, client: Client, damage: str) -> None:
    run("train", data, "--adapter", name, *SHORT)
    other = Path("runs/a-damaged")
    other.mkdir()
    (other / "checkpoint.json").write_text(damage)
    states = {found["name"]: found["state"] for found in run_json("runs")["runs"]}
    assert states == {other.name: "unreadable", results_of(name).name: "done"}
    assert "unreadable" in run("runs").stdout


def test_no_runs() -> None:
    assert "no directory runs" in run("runs", code=1).stderr
    Path("elsewhere").mkdir()
    assert "no runs in elsewhere" in run("runs", "elsewhere").stdout
