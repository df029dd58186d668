"""Runs end when held-out rows gain nothing, at the version that did best if that is wanted."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zoact_remote.regression import ROWS, Disk, Killed, Mortal, Regression, trainer
from zoact_remote import EarlyStopping, Evaluation, InvalidValue, Row, Trainer

OPPOSITE: list[Row] = [{**row, "completion": -0.1 * row["completion"]} for row in ROWS[:8]]
"""Held-out rows on which training does harm once it has gone a little way."""
OPTIONS: dict[str, Any] = {"eval_rows": OPPOSITE, "eval_every": 2, "steps": 40}


def stopping(adapter: Regression, disk: Disk | None = None, **settings: Any) -> Trainer:
    callbacks = [EarlyStopping(settings.pop("patience", 3), **settings), *([disk] if disk else [])]
    run = trainer(adapter, callbacks=callbacks, **OPTIONS)
    if disk is not None and disk.state is not None:
        run.load_state_dict(json.loads(disk.state))
    return run


def test_it_stops_after_evaluations_without_a_gain() -> None:
    history = stopping(Regression()).run()
    losses = [evaluation.loss for evaluation in history.evaluations]
    best = int(np.argmin(losses))
    assert len(losses) == best + 4
    assert history.stopped == f"the held-out loss was not below {losses[best]:.4f} in 3 evaluations"
    assert history.kept is None


def test_a_gain_must_be_worth_it() -> None:
    learning = dict(OPTIONS, eval_rows=ROWS)
    history = trainer(Regression(), callbacks=[EarlyStopping(1, min_delta=1e6)], **learning).run()
    assert len(history.steps) == 2
    assert history.baseline is not None
    assert history.stopped == f"the held-out loss was not 1e+06 below {history.baseline.loss:.4f} in 1 evaluations"
    assert trainer(Regression(), callbacks=[EarlyStopping(3, min_delta=0.0)], **learning).run().stopped is None


def test_callbacks_of_a_kind_are_resumed_each_as_it_was() -> None:
    def watched() -> list[EarlyStopping]:
        return [EarlyStopping(None, metric="loss"), EarlyStopping(None, metric="loss", min_delta=1e6)]

    first, second = watched(), watched()
    learning = dict(OPTIONS, eval_rows=ROWS)
    run = trainer(Regression(), callbacks=first, **learning)
    run.run()
    again = trainer(Regression(), callbacks=second, **learning)
    again.load_state_dict(json.loads(json.dumps(run.state_dict())))
    states = [json.loads(json.dumps(callback.state_dict())) for callback in first]
    assert states[0] != states[1], "they must differ for this test"
    assert [json.loads(json.dumps(callback.state_dict())) for callback in second] == states


def test_a_figure_that_is_no_number_is_not_the_best() -> None:
    watch = EarlyStopping(3, metric="loss")
    for version, loss in enumerate([math.nan, 2.0, math.nan, 1.0]):
        watch._see(Evaluation(version, loss, None, None, (), (), tokens=1))
    assert watch.state_dict()["best"][0] == 3


@pytest.mark.parametrize("patience", [3, None])
def test_it_returns_to_the_best(patience: int | None) -> None:
    adapter = Regression()
    history = stopping(adapter, patience=patience, keep_best=True).run()
    best = min(history.evaluations, key=lambda evaluation: evaluation.loss)
    assert (history.kept, history.final) == (best.version, best)
    np.testing.assert_array_equal(adapter.versions[-1], adapter.versions[best.version])
    assert len(adapter.versions) == len(history.steps) + 2
    assert (history.stopped is None) == (patience is None)


def test_the_last_version_is_kept_if_it_is_the_best() -> None:
    adapter = Regression()
    run = trainer(adapter, callbacks=[EarlyStopping(None, keep_best=True)], steps=40, eval_rows=ROWS, schedule=0.01)
    history = run.run()
    assert (history.kept, history.final) == (None, history.evaluations[-1])
    assert "rollback" not in adapter.calls


def test_running_again_changes_nothing() -> None:
    adapter = Regression()
    run = stopping(adapter, patience=None, keep_best=True)
    run.run()
    made = len(adapter.versions)
    run.run()
    assert len(adapter.versions) == made
    resumed = stopping(adapter, patience=None, keep_best=True)
    resumed.load_state_dict(json.loads(json.dumps(run.state_dict())))
    assert resumed.run().kept == run.history.kept
    assert len(adapter.versions) == made


def judged(metric: str, *figures: tuple[float, float], **options: Any) -> tuple[int | None, int]:
    """The version kept, and the steps done, of a run whose evaluations have these figures and losses."""
    left = iter(figures)

    def evaluation(version: int | None) -> Evaluation:
        figure, loss = next(left)
        found = Evaluation(version or 0, loss, None, None, (), (), 1)
        return found if metric == "loss" else replace(found, **{metric: figure})  # type: ignore[arg-type]

    stopping = EarlyStopping(options.pop("patience", None), metric=metric, keep_best=True, **options)
    run = trainer(Regression(), steps=len(figures) - 1, eval_every=1, evaluator=evaluation, callbacks=[stopping])
    history = run.run()
    return history.kept, len(history.steps)


def test_the_metric_decides_in_its_own_direction() -> None:
    figures = [(0.2, 5.0), (0.9, 4.0), (0.4, 1.0), (0.3, 2.0)]
    assert judged("token_f1", *figures)[0] == 1
    assert judged("perplexity", *figures)[0] == 0
    assert judged("perplexity", *figures[1:])[0] is None
    assert judged("loss", *figures)[0] == 2


def test_a_tie_goes_to_the_lower_loss() -> None:
    figures = [(0.0, 5.0), (0.0, 4.0), (0.0, 3.0), (0.0, 3.5), (0.0, 3.0)]
    assert judged("exact_match", *figures) == (2, 4)
    assert judged("exact_match", *figures, patience=1) == (2, 3)


def test_a_gain_is_in_the_unit_of_the_metric() -> None:
    figures = [(0.50, 5.0), (0.51, 4.0), (0.53, 6.0), (0.54, 1.0), (0.54, 0.5)]
    assert judged("accuracy", *figures, min_delta=0.02, patience=1)[1] == 1
    assert judged("accuracy", *figures, min_delta=0.02, patience=2)[1] == 4
    assert judged("accuracy", *figures, min_delta=0.5, patience=3)[1] == 3


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=12),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from([None, 1, 3]),
)
def test_the_best_is_kept_whatever_patience_takes_for_a_gain(
    figures: list[tuple[int, int]], min_delta: float, patience: int | None
) -> None:
    kept, steps = judged("accuracy", *figures, min_delta=min_delta, patience=patience)
    # Of two that are the same, the earlier one.
    best = max(range(steps + 1), key=lambda version: (figures[version][0], -figures[version][1], -version))
    assert kept == (None if best == steps else best)


def test_a_perplexity_beyond_all_numbers_is_the_worst() -> None:
    assert judged("perplexity", (math.inf, 900.0), (math.inf, 800.0), (9.0, 2.0), (math.inf, 800.0))[0] == 2


def test_a_metric_must_be_among_the_figures() -> None:
    with pytest.raises(InvalidValue, match=r"^metric: must be one of perplexity, loss for these rows, got 'accuracy'"):
        trainer(Regression(), eval_rows=ROWS, callbacks=[EarlyStopping(1, metric="accuracy")]).run()


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=10))
def test_a_run_killed_at_any_call_stops_at_the_same_version(deadly: list[tuple[int, bool]]) -> None:
    whole = Regression()
    stopping(whole, Disk(), keep_best=True).run()
    adapter, disk = Mortal(), Disk()
    adapter.deadly = deadly
    for _ in range(len(deadly) + 1):
        with suppress(Killed):
            stopping(adapter, disk, keep_best=True).run()
            break
    np.testing.assert_array_equal(adapter.versions, whole.versions)


@pytest.mark.parametrize(
    "changes", [{"patience": 0}, {"min_delta": -1.0}, {"min_delta": math.nan}, {"metric": "tokens"}]
)
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as caught:
        EarlyStopping(**{"patience": 1, **changes})
    assert caught.value.param in changes
