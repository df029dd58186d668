"""What is wrong with a call is said once, however often it is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server_ext.schemas import (
    LARGEST_LIMIT,
    MOST_ITEMS,
    AskLosses,
    AskScores,
    Calibrate,
    CreateAdapter,
    Message,
    Rollback,
)

MANY = 2000
MANY_DIGITS = int("9" * 4300)
"""No longer a number can be written out."""
ROW = {"prompt": "a", "completion": "b"}
PROBED: dict[str, Any] = {"probes": [{"seed": 1, "epsilon": 0.5}], "rows": [ROW]}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [{}] * MANY},
        {"rows": [{**ROW, "prompt": [[]] * MANY}]},
        {"rows": [{"prompt": "a", "choices": [[]] * 100, "answer": 0}, *[{}] * MANY]},
        {"rows": [{**ROW, **{f"k{i}": 1 for i in range(MANY)}}]},
        {"rows": [{"messages": [{}] * MANY}]},
        {"probes": [{}] * MANY},
        {"update": {"base_version": 0, "terms": [[1, 2, 3]] * MANY}},
        {"update": {"base_version": 0, "terms": [], "normaliser": {"terms": [[]] * MANY, "epsilon": 1}}},
        {f"k{i}": 1 for i in range(MANY)},
    ],
)
def test_a_body_of_mistakes_is_not_described_in_full(changes: dict[str, Any]) -> None:
    AskLosses.model_validate(PROBED)
    with pytest.raises(ValidationError) as caught:
        AskLosses.model_validate(PROBED | changes)
    assert len(caught.value.errors()) < 5


@pytest.mark.parametrize(
    ("call", "body", "field"),
    [
        (AskLosses, PROBED | {"version": MANY_DIGITS}, ("version",)),
        (AskLosses, PROBED | {"update": {"base_version": MANY_DIGITS, "terms": []}}, ("update", "base_version")),
        (Rollback, {"base_version": 1, "to_version": MANY_DIGITS}, ("to_version",)),
    ],
)
def test_versions_have_an_end(call: type[Message], body: dict[str, Any], field: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match=f"less than or equal to {LARGEST_LIMIT}") as wrong:
        call.model_validate(body)
    (error,) = wrong.value.errors(include_input=False)
    assert (error["type"], error["loc"]) == ("less_than_equal", field)


@pytest.mark.parametrize(
    ("call", "body", "field"),
    [
        (AskLosses, PROBED | {"probes": PROBED["probes"] * (MOST_ITEMS + 1)}, "probes"),
        (AskLosses, PROBED | {"rows": [ROW] * (MOST_ITEMS + 1)}, "rows"),
        (AskScores, {"rows": [ROW] * (MOST_ITEMS + 1)}, "rows"),
        (Calibrate, {"rows": [ROW] * (MOST_ITEMS + 1)}, "rows"),
        (CreateAdapter, {"name": "acme/a", "sites": ["q_proj"] * (MOST_ITEMS + 1)}, "sites"),
    ],
)
def test_lists_have_an_end(call: type[Message], body: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as wrong:
        call.model_validate(body)
    (error,) = wrong.value.errors(include_input=False)
    assert (error["type"], error["loc"]) == ("too_long", (field,))
