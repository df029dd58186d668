"""Values on the wire: checks, and JSON there and back."""

import json
import math
from datetime import datetime, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_ext import schemas
from zoact_remote import (
    Basis,
    ChatRow,
    ChoicesRow,
    CompletionRow,
    InvalidValue,
    Losses,
    Normaliser,
    Probe,
    Row,
    Side,
    Update,
)
from zoact_remote.wire import JournalEntry, Limits

SEEDS = st.integers(0, 2**64 - 1)
SCALARS = st.floats(allow_nan=False, allow_infinity=False)
TERMS = st.lists(st.tuples(SEEDS, SCALARS), max_size=4)
WEIGHTS = st.lists(st.tuples(SEEDS, st.floats(0, 1e6)), max_size=4)
NORMALISERS = st.builds(Normaliser, WEIGHTS, st.floats(0, 1e6), st.floats(1e-12, 1.0))
UPDATES = st.builds(
    Update,
    base_version=st.integers(0, 2**40),
    terms=TERMS,
    decay=st.floats(0, 1),
    normaliser=st.none() | NORMALISERS,
    key=st.none() | st.text(min_size=1, max_size=128),
)


@settings(max_examples=50)
@given(UPDATES)
def test_update_survives_json_exactly(update: Update) -> None:
    assert Update.from_json(json.loads(json.dumps(update.to_json()))) == update


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: Probe(-1, 0.1), "seed"),
        (lambda: Probe(2**64, 0.1), "seed"),
        (lambda: Probe(1.5, 0.1), "seed"),  # type: ignore[arg-type]
        (lambda: Probe(1, 0.0), "epsilon"),
        (lambda: Probe(1, -0.1), "epsilon"),
        (lambda: Probe(1, math.nan), "epsilon"),
        (lambda: Probe(1, math.inf), "epsilon"),
        (lambda: Probe(1, 0.1, "minus"), "sides"),  # type: ignore[arg-type]
        (lambda: Probe(1, 0.1, part=(2, 2)), "part"),
        (lambda: Probe(1, 0.1, part=(-1, 2)), "part"),
        (lambda: Probe(1, 0.1, part=(0, 1, 2)), "part"),  # type: ignore[arg-type]
        (lambda: Probe(1, 0.1, part=(0.5, 2)), "part"),  # type: ignore[arg-type]
        (lambda: Probe(1, "auto"), "epsilon"),  # type: ignore[arg-type]
        (lambda: Probe(1, 0.1, part=(0, 3)).rows_of(4), "part"),
        (lambda: Probe(1, 0.1, part=(0, 1)).rows_of(0), "part"),
        (lambda: Side(1, 0.1, 0), "sign"),  # type: ignore[arg-type]
        (lambda: Update(-1, ()), "base_version"),
        (lambda: Update(0, ((1, 0.5), (2, math.nan))), "terms[1][1]"),
        (lambda: Update(0, ((2**64, 0.5),)), "terms[0][0]"),
        (lambda: Update(0, (), decay=1.5), "decay"),
        (lambda: Update(0, (), decay=-0.5), "decay"),
        (lambda: Update(0, (), key=""), "key"),
        (lambda: Normaliser(((1, -0.5),), 0.0, 1e-8), "terms[0][1]"),
        (lambda: Normaliser((), -1.0, 1e-8), "offset"),
        (lambda: Normaliser((), 1.0, 0.0), "epsilon"),
        (lambda: Basis(source="weights"), "source"),  # type: ignore[arg-type]
        (lambda: Basis(passes=3), "passes"),  # type: ignore[arg-type]
        (lambda: Basis(oversampling=-1), "oversampling"),
    ],
)
def test_wrong_values_are_named(make: object, param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make()  # type: ignore[operator]
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param}: ")


@given(st.integers(1, 20), st.integers(1, 20))
def test_parts_hold_every_row_once(parts: int, length: int) -> None:
    probes = [Probe(1, 0.1, part=(i, parts)) for i in range(parts)]
    shares = [probe.rows_of(parts * length) for probe in probes]
    assert [i for share in shares for i in share] == list(range(parts * length))
    assert {len(share) for share in shares} == {length}
    assert Probe(1, 0.1).rows_of(length) == range(length)
    assert "part" not in Probe(1, 0.1).to_json()
    from_numpy = Probe(1, 0.1, part=[np.int64(0), 2])  # type: ignore[arg-type]
    assert from_numpy == Probe(1, 0.1, part=(0, 2))
    assert json.dumps(from_numpy.to_json()["part"]) == "[0, 2]"
    assert hash(from_numpy)
    for probe in probes:
        assert schemas.Probe(**probe.to_json()).to_wire() == probe


def test_numpy_scalars_become_plain_ones() -> None:
    update = Update(np.int64(3), [(np.uint64(2**64 - 1), np.float32(0.5))])  # type: ignore[arg-type]
    assert json.dumps(update.to_json()["terms"]) == "[[18446744073709551615, 0.5]]"


def test_losses_that_are_not_finite() -> None:
    answer = {
        "version": 1,
        "losses": [{"seed": 1, "epsilon": 0.5, "plus": None, "minus": None}],
        "base": None,
        "tokens": 3,
        "later": "members that this version does not know",
    }
    losses = Losses.from_json(answer)
    assert math.isnan(losses.losses[0].plus)
    assert losses.losses[0].minus is None
    assert losses.base is None
    assert losses.timing.total_s == 0.0


@pytest.mark.parametrize("time", ["2026-11-22T01:02:03Z", "2026-11-22T01:02:03+00:00"])
def test_journal_entry(time: str) -> None:
    update = Update(4, ((7, 0.25),), key="k")
    about = {"version": 5, "digest_before": "sha256:1", "digest": "sha256:0", "rollback_to": None, "time": time}
    entry = JournalEntry.from_json(update.to_json() | about)
    assert entry.update == update
    assert entry.time == datetime(2026, 11, 22, 1, 2, 3, tzinfo=timezone.utc)
    assert entry.rollback_to is None


def test_journal_entry_of_a_rollback() -> None:
    answer = Update(4, ()).to_json() | {"version": 5, "digest": "b", "digest_before": "a", "rollback_to": 2}
    entry = JournalEntry.from_json(answer | {"time": "2026-11-22T01:02:03Z"})
    assert (entry.version, entry.rollback_to, entry.digest_before, entry.digest) == (5, 2, "a", "b")


def test_limits_of_tenants_may_be_missing() -> None:
    names = ("max_rank", "max_probes", "max_rows", "max_row_tokens", "max_call_tokens", "max_terms", "max_choices")
    old = dict.fromkeys(names, 8)
    assert Limits.from_json(old).max_adapters is None
    limits = Limits.from_json(old | {"max_adapters": 3, "requests_per_minute": None, "of a later version": 1})
    assert (limits.max_adapters, limits.requests_per_minute, limits.max_rows) == (3, None, 8)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (CompletionRow(prompt="2 + 2 =", completion=[4]), schemas.CompletionRow),
        (ChoicesRow(prompt=[1, 2], choices=[" no", [3]], answer=1), schemas.ChoicesRow),
        (ChatRow(messages=[{"role": "assistant", "content": "4"}] * 2), schemas.ChatRow),
    ],
)
def test_rows_are_declared_as_the_server_takes_them(row: Row, form: type[schemas.Message]) -> None:
    assert form.model_validate(row).model_dump() == row
    assert row.keys() == form.model_fields.keys()
