"""Overlapping steps: one step stale, whatever the timing, and otherwise a run like any other."""

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.soak.chaos_proxy import bad_network
from tests.support import CALL_TIMEOUT_S, Servers, new_name
from tests.support import ROWS as TEXTS
from tests.zoact_remote.regression import ROWS, Disk, Killed, Regression, trainer
from zoact_remote import (
    SGD,
    Adam,
    Basis,
    Callback,
    Client,
    ConnectionFailed,
    Guard,
    History,
    InvalidValue,
    Losses,
    PipelinedTrainer,
    Probe,
    Row,
    StaleVersion,
    Trainer,
    TrainingDiverged,
    TwoPoint,
    Update,
    UpdateResult,
)
from zoact_remote.threads import pause

SETTINGS = (
    *("estimator", "optimizer", "schedule", "rows", "steps", "batch_size", "seed"),
    *("eval_rows", "eval_every", "callbacks"),
)


class Remote(Regression):
    """The regression, for several threads, at the end of a line that can be held up.

    Attributes:
        held: calls, by their number, that reach it only when a later call has been refused or answered.
        lost: calls, by their number, that are never answered, having been acted on.
        held_s: seconds after which a held call goes on all the same; None for none. Of two calls that are made at once
            either may be the later one, and wait for the other's answer.
        stale: how often it refused an update.

    """

    def __init__(self, held: Sequence[int] = (), lost: Sequence[int] = (), held_s: float | None = 0.5) -> None:
        super().__init__()
        self.held, self.lost, self.held_s, self.stale = set(held), set(lost), held_s, 0
        self._lock = threading.Lock()
        self._count, self._last = 0, -1
        self._moved = threading.Condition()

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        with self._moved:
            number = self._count
            self._count += 1
            if number in self.held:
                overtaken = self._moved.wait_for(lambda: self._last > number, self.held_s or 60)
                assert overtaken or self.held_s is not None
        try:
            with self._lock:
                found = super().losses(rows, probes, base=base, version=version, update=update)
        except StaleVersion:
            self.stale += 1
            raise
        finally:
            with self._moved:
                self._last = max(self._last, number)
                self._moved.notify_all()
        if number in self.lost:
            raise ConnectionFailed("no answer", sent=True)
        return found

    def update(self, update: Update) -> UpdateResult:
        with self._lock:
            return super().update(update)


def pipelined(adapter: Regression, **changes: Any) -> PipelinedTrainer:
    plain = trainer(adapter, **changes)
    return PipelinedTrainer(adapter, **{name: getattr(plain, name) for name in SETTINGS})


def one_step_stale(steps: int, seed: int = 0) -> list[NDArray[np.float64]]:
    """The versions of a run with one step of staleness, step by step."""
    adapter, plain = Regression(), trainer(Regression(), seed=seed)
    for step in range(steps):
        ask = plain.estimator.ask(plain._draw(step))
        losses = adapter.losses(plain.batch(step), ask.probes, version=max(0, step - 1))
        update = plain.optimizer.step(plain.estimator.tell(losses), 0.03, step)
        adapter.update(Update(step, update.terms, key=str(step)))
    return adapter.versions


@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_every_step_probes_the_version_before(steps: int) -> None:
    adapter = Remote()
    history = pipelined(adapter, steps=steps).run()
    np.testing.assert_array_equal(adapter.versions, one_step_stale(steps))
    assert [record.version for record in history.steps] == [max(0, step - 1) for step in range(steps)]
    assert [record.step for record in history.steps] == list(range(steps))


def test_two_calls_are_under_way_at_once() -> None:
    # Each of these waits for another call to come, which a plain run would not make.
    adapter = Remote(held=range(1, 28, 2), held_s=None)
    pipelined(adapter).run()
    np.testing.assert_array_equal(adapter.versions, one_step_stale(30))


def test_an_update_that_comes_before_its_base_is_sent_again() -> None:
    adapter = Remote(held=[4, 9, 14, 19, 24])
    pipelined(adapter).run()
    assert adapter.stale >= 1
    np.testing.assert_array_equal(adapter.versions, one_step_stale(30))


def test_evaluations_do_not_change_the_run() -> None:
    adapter = Remote()
    history = pipelined(adapter, eval_rows=ROWS, eval_every=4).run()
    np.testing.assert_array_equal(adapter.versions, one_step_stale(30))
    assert [found.version for found in history.evaluations] == [0, *range(4, 30, 4), 30]
    for found in history.evaluations:
        assert found.loss == pytest.approx(adapter.loss(ROWS, adapter.versions[found.version]))


@pytest.mark.parametrize("lost", [[0], [1], [5], [5, 6, 7], [29]])
def test_it_goes_on_after_a_failure(lost: list[int]) -> None:
    adapter = Remote(lost=lost)
    run = pipelined(adapter)
    failures = 0
    while run.step < run.steps:
        try:
            run.run()
        except ConnectionFailed:
            failures += 1
    assert failures >= 1
    np.testing.assert_array_equal(adapter.versions, one_step_stale(30))


class Watch(Callback):
    """Fails at a step's loss, once, or asks for a version that was."""

    def __init__(
        self, fail_at: int | None = None, returns: Mapping[int, int] | None = None, end_at: int | None = None
    ) -> None:
        self.fail_at, self.returns, self.end_at = fail_at, returns or {}, end_at

    def on_loss(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == self.fail_at:
            self.fail_at = None
            raise ZeroDivisionError
        if trainer.step in self.returns:
            trainer.return_to(self.returns[trainer.step])

    def on_end(self, trainer: Trainer, history: History) -> None:
        if self.end_at is not None:
            trainer.return_to(self.end_at)


@pytest.mark.parametrize("step", [0, 1, 2, 7, 29])
def test_a_step_that_a_callback_broke_off_is_done_again(step: int) -> None:
    adapter = Remote()
    run = pipelined(adapter, callbacks=[Watch(fail_at=step)])
    with pytest.raises(ZeroDivisionError):
        run.run()
    run.run()
    np.testing.assert_array_equal(adapter.versions, one_step_stale(30))


def test_an_interrupt_waits_for_no_server_that_is_gone() -> None:
    class Away(Remote):
        def losses(self, *args: Any, **kwargs: Any) -> Losses:
            if len(self.calls) == 5 and not back:
                pause(60)
            return super().losses(*args, **kwargs)

    def interrupt(run: Trainer, record: Any) -> None:
        if record.step == 4 and not back:
            raise KeyboardInterrupt

    adapter, back, started = Away(), list[bool](), time.monotonic()
    run = pipelined(adapter, callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert time.monotonic() - started < 30
    back.append(True)
    run.run()
    np.testing.assert_array_equal(adapter.versions, one_step_stale(30))


def test_it_returns_to_a_version_at_the_end() -> None:
    adapter = Remote()
    pipelined(adapter, callbacks=[Watch(end_at=20)]).run()
    np.testing.assert_array_equal(adapter.versions[:-1], one_step_stale(30))
    np.testing.assert_array_equal(adapter.versions[-1], adapter.versions[20])


@pytest.mark.parametrize("held", [(), (4, 10, 12)])
def test_it_starts_anew_at_a_version_that_it_returns_to(held: Sequence[int]) -> None:
    adapter = Remote(held=held)
    history = pipelined(adapter, steps=12, callbacks=[Watch(returns={0: 0, 5: 2, 6: 4, 11: 3})]).run()
    assert [record.version for record in history.steps] == [0, 1, 1, 2, 3, 4, 6, 7, 7, 8, 9, 10]
    assert [record.returned_to for record in history.steps if record.returned_to is not None] == [0, 2, 4, 3]
    for made, version in {1: 0, 6: 2, 7: 4, 12: 3}.items():
        np.testing.assert_array_equal(adapter.versions[made], adapter.versions[version])
    for record in history.steps:
        ((seed, _),) = record.terms
        batch, c, step = trainer(adapter).batch(record.step), adapter.versions[record.version], 0.25 * adapter.z(seed)
        assert record.loss == pytest.approx((adapter.loss(batch, c + step) + adapter.loss(batch, c - step)) / 2)
    assert len(adapter.versions) == 13


def guarded(adapter: Regression, *callbacks: Any) -> PipelinedTrainer:
    """A run at a rate that is too high for it."""
    guard = Guard(window=10, patience=5)
    return pipelined(adapter, optimizer=SGD(), schedule=0.25, steps=200, callbacks=[guard, *callbacks])


def test_a_loss_that_is_not_finite_is_of_the_version_that_was_probed() -> None:
    class Breaks(Remote):
        def losses(self, *args: Any, **kwargs: Any) -> Losses:
            found = super().losses(*args, **kwargs)
            if found.version != 3:
                return found
            return replace(found, losses=tuple(replace(loss, plus=math.nan) for loss in found.losses))

    with pytest.raises(TrainingDiverged, match=r"step 4: the loss .* is nan, at version 3\."):
        pipelined(Breaks()).run()


def test_a_guarded_run_that_would_diverge_learns() -> None:
    adapter = Remote()
    history = guarded(adapter).run()
    assert adapter.loss(ROWS, adapter.versions[-1]) < 0.1 * adapter.loss(ROWS, adapter.versions[0])
    probed: set[int] = set()
    for record in history.steps:
        assert record.returned_to is None or record.returned_to in probed
        probed.add(record.version)
    assert any(record.returned_to is not None for record in history.steps)


@settings(max_examples=10)
@given(st.sets(st.integers(1, 199), max_size=6))
def test_a_guarded_run_may_be_killed_at_any_checkpoint(deadly: set[int]) -> None:
    class Reaper(Disk):
        def on_checkpoint(self, trainer: Trainer) -> None:
            super().on_checkpoint(trainer)
            if trainer.step in left:
                left.remove(trainer.step)
                raise Killed

    whole, adapter, disk, left = Remote(), Remote(), Reaper(), set(deadly)
    guarded(whole, Disk()).run()
    for _ in range(len(deadly) + 1):
        run = guarded(adapter, disk)
        if disk.state is not None:
            run.load_state_dict(json.loads(disk.state))
        with suppress(Killed):
            run.run()
    np.testing.assert_array_equal(adapter.versions, whole.versions)


def test_someone_else_is_noticed() -> None:
    def meddle(run: Trainer, record: Any) -> None:
        if record.step == 4:
            run.flush()
            adapter.update(Update(len(adapter.versions) - 1, ((1, 0.5),), key="other"))

    adapter = Remote()
    with pytest.raises(StaleVersion):
        pipelined(adapter, callbacks=[meddle]).run()


@pytest.mark.parametrize("cut", [1, 2, 3, 17, 29])
def test_a_resumed_run_goes_on_to_the_bit(cut: int) -> None:
    adapter, saved = Remote(), list[str]()

    def keep(run: Trainer, record: Any) -> None:
        saved.append(json.dumps(run.state_dict()))
        if run.step == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipelined(adapter, callbacks=[keep]).run()
    run = pipelined(adapter)
    run.load_state_dict(json.loads(saved[-1]))
    run.run()
    np.testing.assert_array_equal(adapter.versions, one_step_stale(30))


def test_a_state_of_the_other_kind_is_refused() -> None:
    plain, overlapping = trainer(Regression()), pipelined(Remote())
    with pytest.raises(InvalidValue, match=r"^kind: was plain in the saved state, is pipelined here"):
        overlapping.load_state_dict(plain.state_dict())
    with pytest.raises(InvalidValue, match=r"^kind: was pipelined in the saved state, is plain here"):
        plain.load_state_dict(overlapping.state_dict())


def test_a_real_server_and_a_bad_network(servers: Servers) -> None:
    def trained(client: Client) -> str | None:
        adapter = client.create_adapter(new_name(), rank=2, basis=Basis(positions="both"), exist_ok=True)
        adapter.calibrate(TEXTS, exist_ok=True)
        PipelinedTrainer(
            adapter, TwoPoint(), Adam(), 0.01, TEXTS, steps=12, batch_size=2, eval_rows=TEXTS[:2], eval_every=5
        ).run()
        return adapter.refresh().digest

    server = servers("transformers")
    with server.client() as client:
        digest = trained(client)
        adapter = client.create_adapter(new_name(), rank=2, basis=Basis(positions="both"))
        adapter.calibrate(TEXTS)
        plain = Trainer(adapter, TwoPoint(), Adam(), 0.01, TEXTS, steps=12, batch_size=2)
        for step in range(12):
            ask = plain.estimator.ask(plain._draw(step))
            losses = adapter.losses(plain.batch(step), ask.probes, version=max(0, step - 1))
            adapter.update(plain.optimizer.step(plain.estimator.tell(losses), 0.01, step))
        assert adapter.refresh().digest == digest
    with (
        bad_network(server.url, seed=1) as network,
        Client(network.url, timeout=CALL_TIMEOUT_S) as client,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(client._transport, "_sleep", lambda seconds: None)
        assert trained(client) == digest
