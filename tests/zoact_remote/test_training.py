"""The loop against an adapter that keeps the protocol's promises: a small regression in memory."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zoact_remote.regression import ROWS, TARGET, Disk, Killed, Mortal, Regression, trainer
from zoact_remote import (
    SGD,
    Adam,
    BadRequest,
    Callback,
    ConnectionFailed,
    Estimator,
    Evaluation,
    ForwardDifference,
    GaussianAdam,
    Guard,
    History,
    InvalidValue,
    Losses,
    Optimizer,
    PipelinedTrainer,
    Row,
    StaleVersion,
    StepRecord,
    Trainer,
    TrainingDiverged,
    TwoPoint,
    Update,
    cosine,
    evaluate,
    linear,
)
from zoact_remote.wire import ProbeLoss


@pytest.mark.parametrize(
    ("noise", "estimator", "optimizer", "rate"),
    [
        ("rademacher", TwoPoint(0.25), SGD(), 0.02),
        ("rademacher", TwoPoint(0.25, probes=2), SGD(momentum=0.9), 0.005),
        ("rademacher", TwoPoint(0.25), Adam(), 0.05),
        ("rademacher", ForwardDifference(2.0**-10, probes=4), Adam(), 0.05),
        ("gaussian", TwoPoint(0.25), GaussianAdam(window=16), 0.05),
    ],
)
def test_it_learns(noise: str, estimator: Estimator, optimizer: Optimizer, rate: float) -> None:
    adapter = Regression(noise)
    run = trainer(
        adapter, estimator=estimator, optimizer=optimizer, schedule=linear(rate, 600), steps=600, eval_rows=ROWS
    )
    before, after = run.run().evaluations
    assert after.loss < 0.02 * before.loss
    np.testing.assert_allclose(adapter.versions[-1], TARGET, atol=0.25)


def test_two_runs_are_the_same_to_the_bit() -> None:
    first, second, other = Regression(), Regression(), Regression()
    trainer(first).run()
    trainer(second).run()
    trainer(other, seed=1).run()
    np.testing.assert_array_equal(first.versions, second.versions)
    assert not np.array_equal(first.versions[-1], other.versions[-1])


def test_a_step_is_one_call() -> None:
    adapter = Regression()
    history = trainer(adapter, steps=5).run()
    assert adapter.calls == ["losses"] * 5 + ["update"]
    assert len(adapter.versions) == 6
    assert [record.version for record in history.steps] == [0, 1, 2, 3, 4]


def test_it_starts_from_the_newest_version() -> None:
    adapter = Regression()
    trainer(adapter, steps=3).run()
    history = trainer(adapter, steps=2).run()
    assert [record.version for record in history.steps] == [3, 4]


@pytest.mark.parametrize("cut", [1, 7, 29])
@pytest.mark.parametrize("make", [lambda: SGD(0.9), lambda: Adam(), lambda: Adam(truncation=0.5)])
def test_a_restored_run_goes_on_to_the_bit(make: Callable[[], Optimizer], cut: int) -> None:
    whole, halves = Regression(), Regression()
    straight = trainer(whole, optimizer=make()).run()
    first = trainer(halves, optimizer=make(), callbacks=[lambda run, record: stop_after(run, record, cut)])
    saved: list[str] = []
    first.callbacks = [*first.callbacks, lambda run, record: saved.append(json.dumps(run.state_dict()))]
    assert first.run().stopped == "enough"
    second = trainer(halves, optimizer=make())
    second.load_state_dict(json.loads(saved[-1]))
    resumed = second.run()
    np.testing.assert_array_equal(whole.versions, halves.versions)
    assert [r.terms for r in resumed.steps] == [r.terms for r in straight.steps[cut:]]
    assert resumed.steps[0].step == cut


def test_an_early_state_catches_up_without_updating_twice() -> None:
    adapter, saved = Regression(), list[str]()
    run = trainer(adapter, callbacks=[lambda run, record: saved.append(json.dumps(run.state_dict()))])
    run.run()
    versions = [c.copy() for c in adapter.versions]
    again = trainer(adapter)
    again.load_state_dict(json.loads(saved[10]))
    again.run()
    np.testing.assert_array_equal(adapter.versions, versions)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12))
def test_a_run_killed_at_any_call_ends_where_an_undisturbed_one_does(deadly: list[tuple[int, bool]]) -> None:
    short: dict[str, Any] = {"steps": 9, "eval_rows": ROWS[:4], "eval_every": 4}
    whole, whole_disk = Regression(), Disk()
    trainer(whole, callbacks=[whole_disk], **short).run()

    adapter, disk = Mortal(), Disk()
    adapter.deadly = deadly
    for _ in range(len(deadly) + 1):
        run = trainer(adapter, callbacks=[disk], **short)
        if disk.state is not None:
            run.load_state_dict(json.loads(disk.state))
        with suppress(Killed):
            run.run()
            break
    else:
        raise AssertionError("it was killed more often than was asked for")
    np.testing.assert_array_equal(adapter.versions, whole.versions)
    assert disk.finished.keys() == whole_disk.finished.keys()
    for step, record in disk.finished.items():
        undisturbed = whole_disk.finished[step]
        assert (record.terms, record.loss, record.version) == (undisturbed.terms, undisturbed.loss, undisturbed.version)
        assert record.evaluation == undisturbed.evaluation


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=8))
def test_no_key_is_used_for_two_updates_by_a_server_that_rounds_differently_each_time(
    deadly: list[tuple[int, bool]],
) -> None:
    """The regression asserts that what comes under a known key is the update that it knows."""
    adapter, disk = Mortal(), Disk()
    adapter.deadly = deadly
    exact = adapter.loss
    adapter.loss = lambda rows, c: exact(rows, c) * (1 + 1e-6 * len(adapter.calls))  # type: ignore[method-assign]
    for _ in range(len(deadly) + 1):
        run = trainer(adapter, callbacks=[disk], steps=9, eval_rows=ROWS[:4], eval_every=4)
        if disk.state is not None:
            run.load_state_dict(json.loads(disk.state))
        with suppress(Killed):
            run.run()
    assert len(adapter.versions) == 10


def test_a_run_is_evaluated_as_it_is_told() -> None:
    asked: list[int | None] = []
    adapter = Regression()

    def evaluator(version: int | None) -> Evaluation:
        asked.append(version)
        return evaluate(adapter, ROWS[:4], version=version)

    by_rows = trainer(Regression(), eval_rows=ROWS[:4], eval_every=2, steps=5).run()
    assert trainer(adapter, evaluator=evaluator, eval_every=2, steps=5).run().evaluations == by_rows.evaluations
    assert asked == [None, 2, 4, 5]
    with pytest.raises(InvalidValue, match="evaluator"):
        trainer(adapter, evaluator=evaluator, eval_rows=ROWS)


def test_an_update_leaves_after_the_checkpoint_that_holds_it() -> None:
    adapter, kept = Regression(), set[str]()

    class Keep(Callback):
        def on_checkpoint(self, trainer: Trainer) -> None:
            assert adapter.keys.keys() <= kept
            kept.add(trainer.state_dict()["pending"]["key"])

        def on_end(self, trainer: Trainer, history: History) -> None:
            assert adapter.keys.keys() == kept

    trainer(adapter, eval_rows=ROWS[:4], eval_every=2, steps=5, callbacks=[Keep()]).run()
    assert len(kept) == 5


def test_hooks_are_called_in_order() -> None:
    calls: list[str] = []

    class Note(Callback):
        def before_step(self, trainer: Trainer) -> None:
            calls.append(f"before {trainer.step}")

        def on_loss(self, trainer: Trainer, loss: float) -> None:
            calls.append(f"loss {trainer.step}")

        def on_checkpoint(self, trainer: Trainer) -> None:
            calls.append(f"checkpoint {trainer.step}")

        def on_eval(self, trainer: Trainer, evaluation: Evaluation) -> None:
            calls.append(f"eval {evaluation.version}")

        def after_step(self, trainer: Trainer, record: StepRecord) -> None:
            calls.append(f"after {record.step}")

        def on_end(self, trainer: Trainer, history: History) -> None:
            calls.append(f"end {len(history.steps)}")

    trainer(Regression(), steps=3, eval_rows=ROWS[:4], eval_every=2, callbacks=[Note()]).run()
    assert calls == [
        *("eval 0", "before 0", "loss 0", "checkpoint 1", "after 0"),
        *("before 1", "loss 1", "checkpoint 2", "eval 2", "after 1"),
        *("before 2", "loss 2", "checkpoint 3", "eval 3", "after 2", "end 3"),
    ]


def test_an_evaluation_that_failed_is_made_up_for() -> None:
    steady, shaky, disk = Regression(), Mortal(), Disk()
    options: dict[str, Any] = {"steps": 4, "eval_rows": ROWS[:4], "eval_every": 2}
    straight = trainer(steady, **options).run()
    # One call each: the baseline, two steps, their update, and then the evaluation.
    shaky.deadly = [(5, False)]
    run = trainer(shaky, callbacks=[disk], **options)
    with pytest.raises(Killed):
        run.run()
    assert disk.finished.keys() == {0}
    assert [e.version for e in run.run().evaluations] == [e.version for e in straight.evaluations]
    assert disk.finished.keys() == {0, 1, 2, 3}


def test_a_state_is_a_few_kilobytes_and_its_size_does_not_grow() -> None:
    sizes: list[int] = []
    trainer(Regression(), steps=400, callbacks=[lambda run, _: sizes.append(len(json.dumps(run.state_dict())))]).run()
    assert max(sizes) < 12_000
    assert max(sizes[300:]) < 1.05 * max(sizes[100:200])


def stop_after(run: Trainer, record: StepRecord, steps: int) -> None:
    if record.step + 1 == steps:
        run.stop("enough")


def test_a_step_that_failed_can_be_done_again() -> None:
    steady, shaky = Regression(), Regression()
    trainer(steady).run()
    shaky.fail = {4, 5, 20}
    run = trainer(shaky)
    for _ in shaky.fail:
        with pytest.raises(ConnectionFailed):
            run.run()
    run.run()
    np.testing.assert_array_equal(steady.versions, shaky.versions)


class Fails(Callback):
    """Fails at a step, once, at one of its hooks; it notes the steps whose end it has seen."""

    def __init__(self, hook: str = "", step: int = 3) -> None:
        self.hook, self.step = hook, step
        self.seen: list[int] = []

    def _fail(self, hook: str, step: int) -> None:
        if (hook, step) == (self.hook, self.step):
            self.hook = ""
            raise ZeroDivisionError

    def on_loss(self, trainer: Trainer, loss: float) -> None:
        self._fail("on_loss", trainer.step)

    def on_checkpoint(self, trainer: Trainer) -> None:
        self._fail("on_checkpoint", trainer.step - 1)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.seen.append(record.step)
        self._fail("after_step", record.step)


@pytest.mark.parametrize("hook", ["on_loss", "on_checkpoint", "after_step"])
@pytest.mark.parametrize("step", [0, 3, 29])
def test_a_callback_that_fails_changes_nothing(hook: str, step: int) -> None:
    steady, shaky, before, fails, behind = Regression(), Regression(), Fails(), Fails(hook, step), Fails()
    undisturbed, guard = Guard(), Guard()
    straight = trainer(steady, callbacks=[undisturbed]).run()
    run = trainer(shaky, callbacks=[guard, before, fails, behind])
    with pytest.raises(ZeroDivisionError):
        run.run()
    history = run.run()
    np.testing.assert_array_equal(shaky.versions, steady.versions)
    assert guard.state_dict() == undisturbed.state_dict()
    assert [record.loss for record in history.steps] == [record.loss for record in straight.steps]
    assert before.seen == fails.seen == behind.seen == [*range(30)]


def test_an_update_whose_checkpoint_failed_waits_for_one() -> None:
    adapter, kept, fails = Regression(), list[str](), Fails("on_checkpoint")

    class Keep(Callback):
        def on_checkpoint(self, trainer: Trainer) -> None:
            assert adapter.keys.keys() <= set(kept)
            kept.append(trainer.state_dict()["pending"]["key"])

    run = trainer(adapter, steps=6, callbacks=[fails, Keep()])
    with pytest.raises(ZeroDivisionError):
        run.run()
    run.run()
    assert [*adapter.keys] == kept


def test_a_step_that_was_interrupted_is_done_again() -> None:
    class Interrupted(Adam):
        def step(self, *args: Any) -> Update:
            made = super().step(*args)
            if self._steps == 4 and not interrupts:
                interrupts.append(4)
                raise KeyboardInterrupt
            return made

    steady, shaky, interrupts = Regression(), Regression(), list[int]()
    trainer(steady).run()
    run = trainer(shaky, optimizer=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        run.run()
    run.run()
    np.testing.assert_array_equal(shaky.versions, steady.versions)


class Refuses(Regression):
    """Takes no batch with a certain row, which it names by its place there."""

    def losses(self, rows: Sequence[Row], *args: Any, **kwargs: Any) -> Losses:
        for i, row in enumerate(rows):
            if row is ROWS[23]:
                raise BadRequest(f"rows[{i}].prompt: is too long", status=400, param=f"rows[{i}].prompt")
        return super().losses(rows, *args, **kwargs)


@pytest.mark.parametrize("kind", [Trainer, PipelinedTrainer])
def test_a_row_at_fault_is_named_by_its_place_in_all(kind: type[Trainer]) -> None:
    run = kind(Refuses(), TwoPoint(0.25), Adam(), 0.03, ROWS, steps=30, batch_size=3)
    with pytest.raises(BadRequest, match=r"^rows\[23\].prompt: is too long") as caught:
        run.run()
    assert caught.value.param == "rows[23].prompt"
    assert run.batch(run.step).index(ROWS[23]) != 23


def test_evaluations() -> None:
    adapter = Regression()
    history = trainer(adapter, steps=5, eval_rows=ROWS[:4], eval_every=2).run()
    assert history.baseline is not None
    assert [evaluation.version for evaluation in history.evaluations] == [0, 2, 4, 5]
    assert [record.step for record in history.steps if record.evaluation] == [1, 3, 4]
    json.dumps(history.to_json(), allow_nan=False)


def test_records() -> None:
    history = trainer(Regression(), steps=2, estimator=TwoPoint(0.25, probes=3)).run()
    record = history.steps[1]
    assert (record.step, record.learning_rate, record.epsilon, record.tokens) == (1, 0.03, 0.25, 8)
    assert len(record.terms) == 3
    assert record.seconds > 0
    assert record.to_json()["evaluation"] is None


def test_every_epoch_takes_every_row_once_in_a_new_order() -> None:
    run = trainer(Regression(), batch_size=7)
    rows = [tuple(row["prompt"]) for step in range(40) for row in run.batch(step)]
    epochs = [rows[start : start + len(ROWS)] for start in range(0, len(rows), len(ROWS))]
    everything = sorted(tuple(row["prompt"]) for row in ROWS)
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert len(trainer(Regression(), rows=ROWS[:3], batch_size=7).batch(0)) == 7


def test_seeds_are_64_bits_wide_and_new() -> None:
    history = trainer(Regression(), estimator=TwoPoint(0.25, probes=4)).run()
    seeds = [seed for record in history.steps for seed, _ in record.terms]
    assert len(set(seeds)) == len(seeds) == 120
    assert max(seeds) > 2**62


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", [TwoPoint(0.25), ForwardDifference(0.25)])
def test_divergence_makes_no_update(bad: float, estimator: Estimator) -> None:
    adapter = Regression()
    run = trainer(adapter, estimator=estimator, callbacks=[lambda run, record: stop_after(run, record, 3)])
    run.run()
    adapter.loss = lambda rows, c: bad  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match=r"step 3: the loss .* at version 3"):
        run.run()
    run.flush()
    assert len(adapter.versions) == 4
    assert run.step == 3


def test_a_side_without_a_loss_is_divergence() -> None:
    class OneSided(Regression):
        def losses(self, *args: Any, **kwargs: Any) -> Losses:
            found = super().losses(*args, **kwargs)
            lost = tuple(ProbeLoss(x.seed, x.epsilon, x.plus, None) for x in found.losses)
            return Losses(found.version, lost, None, 0)

    with pytest.raises(TrainingDiverged, match="is None"):
        trainer(OneSided()).run()


def test_another_writer_is_noticed() -> None:
    adapter = Regression()
    interfere: list[Callable[[Trainer, StepRecord], None]] = [
        lambda run, record: None if record.step else adapter.versions.append(adapter.versions[-1])
    ]
    with pytest.raises(StaleVersion):
        trainer(adapter, callbacks=interfere).run()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 9}, "batch_size"),
        ({"rows": ROWS[1:] + ROWS[:1]}, "rows"),
        ({"optimizer": SGD()}, "kind"),
        ({"estimator": ForwardDifference(0.25)}, "estimator"),
        ({"estimator": TwoPoint(0.125)}, "estimator.epsilon"),
        ({"estimator": TwoPoint(0.25, probes=2)}, "estimator.probes"),
        ({"schedule": 0.02}, "schedule"),
        ({"schedule": cosine(0.03, 30)}, "schedule"),
        ({"schedule": linear(0.03, 60)}, "schedule"),
        ({"callbacks": [Guard()]}, "callbacks"),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 15, 30])
def test_a_state_of_another_run_is_refused(changes: dict[str, Any], param: str, cut: int) -> None:
    run = trainer(Regression(), schedule=linear(0.03, 30))
    run.callbacks = [lambda run, record: stop_after(run, record, cut)]
    if cut:
        run.run()
    state = json.loads(json.dumps(run.state_dict()))
    other = trainer(Regression(), **({"schedule": linear(0.03, 30)} | changes))
    before = other.state_dict()
    with pytest.raises(InvalidValue) as caught:
        other.load_state_dict(state)
    assert caught.value.param == param
    assert other.state_dict() == before


def test_a_run_at_a_constant_rate_may_be_made_longer() -> None:
    short, long = Regression(), Regression()
    trainer(long).run()
    run = trainer(short, steps=10)
    run.run()
    longer = trainer(short)
    longer.load_state_dict(json.loads(json.dumps(run.state_dict())))
    longer.run()
    np.testing.assert_array_equal(short.versions, long.versions)


DIGEST = """
from zoact_remote.training import rows_digest
import numpy as np
words, ids = {"a", "b", "c"}, np.arange(2000)
print(rows_digest([{"prompt": "?", "words": words, "sets": {frozenset(words), frozenset("x")}, "check": len.__call__}]))
print(rows_digest([{"prompt": ids}]), rows_digest([{"prompt": ids.tolist()}]), rows_digest([{"prompt": ids + 1}]))
"""


def test_rows_may_hold_what_json_cannot() -> None:
    """A state may be restored in another process, where sets have other orders and objects other addresses."""
    rows: list[Row] = [{**row, "allowed": {1, 2}} for row in ROWS]
    state = json.loads(json.dumps(trainer(Regression(), rows=rows).state_dict()))
    trainer(Regression(), rows=[{**row, "allowed": {2, 1}} for row in ROWS]).load_state_dict(state)
    with pytest.raises(InvalidValue, match=r"^rows: "):
        trainer(Regression(), rows=[{**row, "allowed": {1, 3}} for row in ROWS]).load_state_dict(state)
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGEST], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
    _, of_array, of_list, of_others = found.pop().split()
    assert of_array == of_list != of_others


@pytest.mark.parametrize("changes", [{"rows": []}, {"steps": 0}, {"batch_size": 0}, {"eval_every": 0}])
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as caught:
        trainer(Regression(), **changes)
    assert caught.value.param in changes
