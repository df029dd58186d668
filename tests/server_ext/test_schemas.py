"""What is wrong with a call is said once, however often it is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server_ext.schemas import AskLosses

MANY = 2000
ROW = {"prompt": "a", "completion": "b"}
PROBED = {"probes": [{"seed": 1, "epsilon": 0.5}], "rows": [ROW]}


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
