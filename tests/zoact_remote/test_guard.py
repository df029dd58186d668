"""The guard fires where a run diverges, and nowhere else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support import Servers, new_adapter
from tests.zoact_remote.regression import Disk, Killed, Mortal, Regression, trainer
from zoact_remote import SGD, Adam, Basis, Guard, InvalidValue, Row, Trainer, TrainingDiverged, TwoPoint, constant


class Run(SimpleNamespace):
    """As much of a trainer as a guard knows, whose versions each have the loss that it is told."""

    def __init__(self) -> None:
        super().__init__(version=0, probed=0, step=0, rate_scale=1.0, returns=[])

    def return_to(self, version: int) -> None:
        self.returns.append((self.step, version))

    def hear(self, guard: Guard, losses: Any) -> Run:
        for loss in losses:
            guard.on_loss(self, float(loss))  # type: ignore[arg-type]
            self.version += 1
            self.probed = self.version
            self.step += 1
        return self


SHAPES: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "gaussian": lambda rng, n: rng.normal(0.6, 0.15, n),
    "heavy-tailed": lambda rng, n: rng.lognormal(-1.0, 1.5, n),
    "nearly solved": lambda rng, n: np.where(rng.random(n) < 0.9, 0.0, rng.exponential(2.0, n)),
    "of few values": lambda rng, n: rng.integers(0, 3, n) / 2,
}


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), fall=st.floats(0.0, 1.0), rate=st.floats(1e-3, 1e-1))
def test_healthy_runs_are_left_alone(shape: str, seed: int, fall: float, rate: float) -> None:
    rng = np.random.default_rng(seed)
    trend = 1.0 - fall + fall * np.exp(-rate * np.arange(2000))
    # Losses wander, too: a walk whose steps average out over some dozens.
    walk = np.convolve(rng.normal(0.0, 0.02, 2000), 0.97 ** np.arange(100))[:2000]
    losses = SHAPES[shape](rng, 2000) * trend * np.exp(walk)
    assert Run().hear(Guard(), losses).returns == []


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    onset=st.integers(40, 300),
    growth=st.floats(0.05, 1.0),
    noise=st.floats(0.0, 0.2),
)
def test_divergence_is_seen_soon_and_taken_back_to_before_it(
    seed: int, onset: int, growth: float, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    steps = np.arange(onset + 400)
    level = 0.6 * np.exp(np.minimum(growth * np.maximum(steps - onset, 0), 3.0))
    run, guard = Run(), Guard(patience=8, window=40)
    for loss in level * np.exp(noise * rng.normal(size=len(level))):
        run.hear(guard, [loss])
        if run.returns:
            break
    ((fired, home),) = run.returns
    # When the level has left the noise of a reference behind, but for single losses.
    grown = math.ceil(8 * noise / growth)
    assert onset < fired <= onset + grown + 3 * guard.patience
    assert home <= onset + grown
    assert run.rate_scale == 0.5


def test_the_reference_is_the_best_stretch_however_slowly_the_loss_rises() -> None:
    losses = [*np.linspace(2.0, 1.0, 100), *np.linspace(1.0, 3.0, 2000)]
    run, guard = Run(), Guard(window=10, patience=5)
    for loss in losses:
        run.hear(guard, [loss])
        if run.returns:
            break
    ((fired, home),) = run.returns
    assert abs(home - 100) <= 10
    assert fired < 300


def test_a_loss_that_is_not_finite_goes_back_at_once() -> None:
    run = Run().hear(Guard(), [1.0] * 30 + [math.nan])
    assert run.returns == [(30, 29)]
    run = Run().hear(Guard(), [1.0, 1.0, math.inf])
    assert run.returns == [(2, 0)], "before there is a reference, to the first version"


def test_what_was_never_finite_did_not_diverge() -> None:
    run = Run().hear(Guard(), [math.nan])
    assert run.returns == []
    run = Run().hear(Guard(), [1.0] * 30 + [math.nan, math.nan])
    assert run.returns == [(30, 29)], "the second is of the version returned to"


def test_it_gives_up() -> None:
    run, guard = Run(), Guard(patience=2, window=2, limit=2)
    with pytest.raises(TrainingDiverged, match=r"taken back 2 times and its learning rate is 0.25"):
        run.hear(guard, [1.0, 1.0, *[9.0] * 20])
    assert [home for _, home in run.returns] == [1, 4]


@pytest.mark.parametrize("changes", [{"patience": 1}, {"window": 9}, {"factor": 1.0}, {"limit": -1}])
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as caught:
        Guard(**changes)
    assert caught.value.param in changes


HOT: dict[str, Any] = {"optimizer": SGD, "schedule": 0.25, "steps": 80}
"""Twice the rate at which the regression's loss still falls."""


def hot(adapter: Regression, *callbacks: Any, **changes: Any) -> Trainer:
    return trainer(adapter, **HOT | {"optimizer": SGD(), "callbacks": callbacks} | changes)


def test_a_run_that_would_diverge_learns() -> None:
    lost, saved = Regression(), Regression()
    with suppress(TrainingDiverged):
        hot(lost, steps=400).run()
    run = hot(saved, Guard(window=10, patience=5), steps=400)
    history = run.run()
    first, last = saved.versions[0], saved.versions[-1]
    assert not saved.loss(run.rows, last) > 0.1 * saved.loss(run.rows, first)
    assert not lost.loss(run.rows, lost.versions[-1]) < 10 * lost.loss(run.rows, first)
    returns = [record for record in history.steps if record.returned_to is not None]
    assert run.rate_scale == 0.5 ** len(returns) < 1
    for record in returns:
        assert record.learning_rate == 0.0
        np.testing.assert_array_equal(saved.versions[record.version + 1], saved.versions[record.returned_to or 0])
    assert [record.version for record in history.steps] == list(range(400)), (
        "a step makes one version, this way or that"
    )


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 130), st.booleans()), max_size=12))
def test_a_run_that_is_taken_back_may_be_killed_at_any_call(deadly: list[tuple[int, bool]]) -> None:
    def run(adapter: Regression, disk: Disk) -> None:
        made = hot(adapter, Guard(window=6, patience=3), disk, eval_rows=made_rows, eval_every=7)
        if disk.state is not None:
            made.load_state_dict(json.loads(disk.state))
        made.run()

    made_rows = trainer(Regression()).rows[:4]
    whole, whole_disk = Regression(), Disk()
    run(whole, whole_disk)
    assert "rollback" in whole.calls
    adapter, disk = Mortal(), Disk()
    adapter.deadly = deadly
    for _ in range(len(deadly) + 1):
        with suppress(Killed):
            run(adapter, disk)
            break
    np.testing.assert_array_equal(adapter.versions, whole.versions)
    for step, record in disk.finished.items():
        undisturbed = whole_disk.finished[step]
        assert (record.loss, record.version, record.returned_to) == (
            *(undisturbed.loss, undisturbed.version, undisturbed.returned_to),
        )


def test_a_state_without_the_guard_is_refused() -> None:
    state = hot(Regression(), Guard()).state_dict()
    with pytest.raises(InvalidValue, match="callbacks"):
        hot(Regression()).load_state_dict(state)


def test_a_model_that_a_rate_destroys_is_saved(servers: Servers) -> None:
    # A warm-up that goes too far: the loss falls to 0.3 nats at first, and then rises beyond that of a blind guess.
    schedule = constant(0.5, warmup=100)
    rows: list[Row] = [
        {"prompt": [0, 40 + 3 * i, 41 + i, 60 + 5 * i], "choices": [[50], [51], [52]], "answer": i % 3}
        for i in range(6)
    ]
    with servers("transformers").client() as client:

        def trained(*guard: Guard) -> Trainer:
            adapter = new_adapter(client, rank=4, basis=Basis(source="random"))
            run = Trainer(
                adapter, TwoPoint(), Adam(), schedule, rows, steps=160, batch_size=6, eval_rows=rows, callbacks=guard
            )
            run.run()
            assert not adapter.audit().failures
            return run

        lost, saved = trained(), trained(Guard(window=20, patience=5))
    lost_at, saved_at = (run.history.evaluations[-1].loss for run in (lost, saved))
    assert lost_at > 2 * min(record.loss for record in lost.history.steps), "the rate must be too high for this test"
    assert saved_at < 0.5 * lost_at
    assert saved.rate_scale < 1
