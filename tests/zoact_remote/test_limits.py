"""A run that a server would refuse half-way is refused before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zoact_remote.regression import LIMITS, ROWS, Regression, trainer
from zoact_remote import (
    FZOO,
    SGD,
    Adam,
    GaussianAdam,
    InvalidValue,
    LeaveOneOut,
    Limits,
    Optimizer,
    Rewarded,
    TwoPoint,
    Update,
    UpdateResult,
    find_learning_rate,
)
from zoact_remote.limits import check_limits

ROOMY = replace(LIMITS, max_probes=256)


class Strict(Regression):
    """It has a server's limits, and asserts that they are kept."""

    limit = 90
    """Terms of an update."""

    def limits(self) -> Limits:
        return replace(LIMITS, max_terms=self.limit)

    def _apply(self, update: Update) -> UpdateResult:
        assert len(update.terms) <= self.limit
        assert update.normaliser is None or len(update.normaliser.terms) <= self.limit
        return super()._apply(update)


@pytest.mark.parametrize(
    ("optimizer", "most"), [(Adam(), 93), (SGD(), 256), (SGD(momentum=0.9), 93), (GaussianAdam(), 64)]
)
def test_the_most_probes_of_an_optimiser(optimizer: Optimizer, most: int) -> None:
    check_limits(ROOMY, TwoPoint(probes=most), optimizer, 1000)
    with pytest.raises(InvalidValue, match=r"^probes: .* (max_terms \(4096\): take|max_probes \(256\))") as caught:
        check_limits(ROOMY, FZOO(probes=most + 1), optimizer, 1000)
    assert most == 256 or f"take {most} at most" in str(caught.value)


def test_a_memory_without_end_fits_a_run_that_ends() -> None:
    forever = Adam(truncation=0.0)
    check_limits(ROOMY, TwoPoint(), forever, 4096)
    with pytest.raises(InvalidValue, match=r"^optimizer: Adam\(.*truncation=0.0\) comes to updates of 4097 terms"):
        check_limits(ROOMY, TwoPoint(), forever, 4097)
    check_limits(ROOMY, TwoPoint(probes=4), forever, 1024)
    with pytest.raises(InvalidValue, match=r"^probes: 4 a step .* 4100 terms, .* take 3 at most"):
        check_limits(ROOMY, TwoPoint(probes=4), forever, 1025)


@settings(max_examples=30)
@given(
    probes=st.integers(2, 70),
    steps=st.integers(1, 40),
    optimizer=st.sampled_from([lambda: Adam(), lambda: SGD(0.5), lambda: Adam(truncation=0.0), lambda: GaussianAdam()]),
)
def test_a_run_that_begins_is_not_refused(probes: int, steps: int, optimizer: Callable[[], Optimizer]) -> None:
    adapter = Strict("gaussian" if isinstance(optimizer(), GaussianAdam) else "rademacher")
    run = trainer(adapter, estimator=LeaveOneOut(0.25, probes), optimizer=optimizer(), steps=steps, schedule=1e-4)
    try:
        run.run()
    except InvalidValue:
        assert adapter.calls == []
        assert optimizer().most_terms(probes, steps) > 90 or probes > 64
    else:
        assert len(adapter.versions) == steps + 1


def test_a_run_that_was_cut_off_counts_what_it_remembers() -> None:
    adapter = Strict()
    run = trainer(adapter, optimizer=Adam(truncation=0.0), steps=60)
    run.callbacks = [lambda run, record: run.stop("enough") if record.step == 49 else None]
    run.run()
    state = run.state_dict()
    longer = trainer(adapter, optimizer=Adam(truncation=0.0), steps=91)
    longer.load_state_dict(state)
    with pytest.raises(InvalidValue, match="of 91 terms"):
        longer.run()
    whole = trainer(adapter, optimizer=Adam(truncation=0.0), steps=90)
    whole.load_state_dict(state)
    whole.run()
    assert len(adapter.versions) == 91


def test_rates_are_looked_for_within_the_limits() -> None:
    adapter = Strict()
    with pytest.raises(InvalidValue, match=r"^probes: 3 a step .* of 120 terms"):
        find_learning_rate(adapter, TwoPoint(0.25, probes=3), Adam(), ROWS, steps=40)
    assert adapter.calls == []


def test_rewards_take_any_number_of_probes() -> None:
    class Writer(Strict):
        generate = refresh = None

    judged = Rewarded(Writer(), lambda row, text: 0.0)  # type: ignore[arg-type]
    check_limits(judged.limits(), TwoPoint(probes=90), SGD(), 10)
    with pytest.raises(InvalidValue, match="take 90 at most"):
        check_limits(judged.limits(), TwoPoint(probes=91), SGD(), 10)
