"""Loggers against the calls that their services document."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.zoact_remote.regression import ROWS, Regression, trainer
from zoact_remote import InvalidValue
from zoact_remote.callbacks import Callback
from zoact_remote.loggers import figures, make_logger


class Recorded:
    """Stands for an object of a service: notes the calls that it gets, and answers each with itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Recorded:
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def logged(logger: Callback, steps: int = 3) -> str:
    """Train with a logger; the run's id."""
    run = trainer(Regression(), steps=steps, eval_rows=ROWS[:4], callbacks=[logger])
    run.run()
    return run.run_id


@pytest.mark.parametrize("module", ["torch.utils.tensorboard", "tensorboardX"])
def test_tensorboard(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writer = Recorded()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(SummaryWriter=writer.open))
    logged(make_logger("tensorboard", "acme/films", tmp_path, {}))
    ((where, about),) = writer.named("open")
    assert where == (str(tmp_path / "tensorboard"),)
    assert about == {"purge_step": 0, "filename_suffix": about["filename_suffix"]}
    scalars = [args for args, _ in writer.named("add_scalar")]
    assert [step for tag, _, step in scalars if tag == "train/loss"] == [0, 1, 2]
    assert [step for tag, _, step in scalars if tag == "eval/loss"] == [2]
    assert all(isinstance(value, float) for _, value, _ in scalars)
    assert len(writer.named("close")) == 1


def events(directory: Path) -> Iterator[Any]:
    """The events in a directory's files, oldest first. A record is its length, a checksum, an event and a checksum."""
    for file in sorted(directory.iterdir()):
        content, start = file.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            yield Event.FromString(content[start + 12 : start + 12 + length])
            start += length + 16


def test_tensorboard_files(tmp_path: Path) -> None:
    run = trainer(Regression(), steps=3, callbacks=[make_logger("tensorboard", "acme/films", tmp_path, {})])
    history = run.run()
    found = list(events(tmp_path / "tensorboard"))
    scalars = [(value.tag, event.step, value.simple_value) for event in found for value in event.summary.value]
    for record in history.steps:
        logged = {tag: value for tag, step, value in scalars if step == record.step}
        assert logged == pytest.approx(figures(record), rel=1e-6)

    run.steps = 5
    run.run()
    begun = [event.step for event in events(tmp_path / "tensorboard") if event.session_log.status == SessionLog.START]
    assert begun == [0, 3], "a run that goes on hides what was logged from there on, and leaves what was before"


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_id = logged(make_logger("wandb", "acme/films", tmp_path, {"rank": 4}))
    ((_, about),) = wandb.named("init")
    assert (about["id"], about["resume"], about["config"]) == (run_id, "allow", {"rank": 4})
    assert about["reinit"] == "create_new", "no other trainer's"
    assert [kwargs["step"] for _, kwargs in wandb.named("log")] == [0, 1, 2]
    assert len(wandb.named("finish")) == 1


def test_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trackio = Recorded()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    run_id = logged(make_logger("trackio", "acme/films", tmp_path, {"rank": 4}))
    ((_, about),) = trackio.named("init")
    assert about["name"] == f"acme/films-{run_id[:8]}"
    figures = [args[0] for args, _ in trackio.named("log")]
    assert [record["train/version"] for record in figures] == [0.0, 1.0, 2.0]
    assert len(trackio.named("finish")) == 1


@pytest.mark.parametrize(
    ("kind", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("torch.utils.tensorboard", "tensorboardX", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidValue, match=f"log_to: .*pip install {package}"):
        make_logger(kind, "acme/films", tmp_path, {})


def test_an_unknown_logger(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="must be one of tensorboard, wandb, trackio"):
        make_logger("disk", "acme/films", tmp_path, {})
