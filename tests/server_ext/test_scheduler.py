"""Which requests of training wait for another step. What vLLM makes of it: ``test_vllm_lanes.py``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from server_ext.lanes import BACKGROUND, FOREGROUND, PREFIX
from server_ext.scheduler import beyond_share, is_training, to_do


@dataclass(eq=False)
class Request:
    request_id: str
    priority: int
    num_tokens: int
    num_computed_tokens: int


REQUESTS = st.lists(
    st.builds(
        Request,
        st.sampled_from([f"{PREFIX}1", "cmpl-1"]),
        st.sampled_from([FOREGROUND, BACKGROUND]),
        st.integers(1, 12),
        st.integers(0, 14),
    ),
    max_size=12,
)


@given(REQUESTS, REQUESTS, st.integers(1, 20))
def test_a_step_holds_no_more_of_training_than_its_share_and_training_goes_on(
    running: list[Request], waiting: list[Request], cap: int
) -> None:
    held = beyond_share(running, waiting, cap)
    assert all(is_training(request) for request in held), "who is served waits for nobody"
    training = [request for request in waiting if is_training(request)]
    joining = training[: len(training) - len(held)]
    assert joining + held == training, "first come, first served"
    before = sum(map(to_do, filter(is_training, running)))
    alone = not before and sum(map(to_do, joining[:-1])) == 0
    assert not joining or alone or before + sum(map(to_do, joining)) <= cap
    if not before and training:
        assert joining
    if held and before + sum(map(to_do, joining)):
        assert before + sum(map(to_do, joining)) + to_do(held[0]) > cap, "there is room for one more"


def test_training_that_was_hurried_is_not_held() -> None:
    big = [Request(f"{PREFIX}{i}", priority, 100, 0) for i, priority in enumerate((BACKGROUND, FOREGROUND, BACKGROUND))]
    assert beyond_share([], big, 10) == [big[2]]
