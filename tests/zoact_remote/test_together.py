"""Runs side by side: the same as one after the other."""

import threading
import time
from concurrent import futures
from typing import Any

import pytest

from tests.support import ROWS as TEXTS
from tests.support import Servers, new_adapter
from tests.zoact_remote.regression import Regression, trainer
from zoact_remote import Adam, Basis, Callback, InvalidValue, StepRecord, Trainer, TwoPoint, train_together
from zoact_remote.threads import pause


def test_every_run_is_what_it_would_be_alone() -> None:
    alone, together = [Regression() for _ in range(3)], [Regression() for _ in range(3)]
    for i, adapter in enumerate(alone):
        trainer(adapter, seed=i).run()
    runs = train_together([trainer(adapter, seed=i) for i, adapter in enumerate(together)])
    assert [len(run.result().steps) for run in runs] == [30, 30, 30]
    assert [a.versions[-1].tolist() for a in together] == [a.versions[-1].tolist() for a in alone]


def test_a_failure_leaves_the_others_alone() -> None:
    def fail(run: Trainer, record: StepRecord) -> None:
        raise ZeroDivisionError

    good, bad, other = (trainer(Regression(), callbacks=callbacks) for callbacks in ([], [fail], []))
    runs = train_together([good, bad, other])
    assert isinstance(runs[1].exception(), ZeroDivisionError)
    assert len(runs[0].result().steps) == len(runs[2].result().steps) == 30
    assert bad.step == 1


def test_nothing_to_do() -> None:
    assert train_together([]) == []


def test_what_runs_may_not_share() -> None:
    run = trainer(Regression())
    with pytest.raises(InvalidValue, match=r"^trainers\[1\]: is the same object as trainers\[0\]"):
        train_together([run, run])
    for part in ("adapter", "optimizer"):
        other = trainer(Regression())
        setattr(other, part, getattr(run, part))
        with pytest.raises(InvalidValue, match=rf"^trainers\[1\].{part}: .* trainers\[0\].{part};"):
            train_together([run, other])
    assert run.step == 0


class Ends(Callback):
    """Says when a run is under way, and sees how it ends."""

    def __init__(self) -> None:
        self.begun = threading.Barrier(3)
        self.ended: list[str | None] = []

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == 3 and trainer.steps > 4:
            self.begun.wait(60)

    def on_end(self, trainer: Trainer, history: Any) -> None:
        self.ended.append(history.stopped)


def test_an_interrupt_stops_every_run_after_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Ends()

    def wait(runs: Any, timeout: float | None = None) -> Any:
        if timeout is None:  # the wait that Ctrl-C cuts short
            callback.begun.wait(60)
            futures.wait(runs[2:])
            raise KeyboardInterrupt
        return futures.wait(runs, timeout)

    monkeypatch.setattr("zoact_remote.together.wait", wait)
    adapters = [Regression(), Regression()]
    runs = [trainer(adapter, steps=10**6, callbacks=[callback]) for adapter in adapters]
    done = trainer(Regression(), steps=2)
    with pytest.raises(KeyboardInterrupt):
        train_together([*runs, done])
    assert callback.ended == ["interrupted"] * 2
    assert (done.step, done.history.stopped) == (2, None)
    for run, adapter in zip(runs, adapters, strict=True):
        assert 4 <= run.step == len(adapter.versions) - 1 < 10**6


def test_a_second_interrupt_waits_for_no_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(runs: Any, timeout: float | None = None) -> Any:
        raise KeyboardInterrupt

    class Away(Regression):
        def losses(self, *args: Any, **kwargs: Any) -> Any:
            pause(60)

    monkeypatch.setattr("zoact_remote.together.wait", wait)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_together([trainer(Away()), trainer(Away())])
    assert time.monotonic() - started < 30


def test_on_a_real_server(servers: Servers) -> None:
    def runs() -> list[Trainer]:
        return [
            Trainer(
                new_adapter(client, rank=rank, basis=Basis(positions="both"), rows=TEXTS),
                TwoPoint(2.0**-6),
                Adam(),
                0.01,
                TEXTS,
                steps=5,
                batch_size=2,
                seed=rank,
            )
            for rank in (1, 2, 3)
        ]

    def digests(trainers: list[Trainer]) -> list[str]:
        return [run.adapter.refresh().digest for run in trainers]  # type: ignore[attr-defined]

    with servers("transformers").client() as client:
        one_by_one, together = runs(), runs()
        for run in one_by_one:
            run.run()
        for done in train_together(together):
            done.result()
        assert digests(together) == digests(one_by_one)
        assert len(set(digests(together))) == 3
