"""Calls a minute, by a clock that the tests turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ext.errors import ApiError
from server_ext.rate import SECOND, RateLimit

WAITS = st.lists(st.integers(0, 90 * SECOND), max_size=60)
LIMITS = st.integers(1, 10)


class Clock:
    def __init__(self) -> None:
        self.now = 1000 * SECOND

    def __call__(self) -> int:
        return self.now


def taken(rate: RateLimit, tenant: str, per_minute: int | None) -> bool:
    try:
        rate.take(tenant, per_minute)
    except ApiError as error:
        if error.status != 429:
            raise
        return False
    return True


@given(WAITS, LIMITS)
def test_no_stretch_of_time_sees_more_than_its_share(waits: list[int], limit: int) -> None:
    clock = Clock()
    rate = RateLimit(clock)
    times = []
    for wait in waits:
        clock.now += wait
        if taken(rate, "acme", limit):
            times.append(clock.now)
    for i, first in enumerate(times):
        for j, last in enumerate(times[i:]):
            # A minute's worth that was saved up, and what came in meanwhile.
            assert (j + 1 - limit) * 60 * SECOND <= (last - first) * limit


@given(WAITS, LIMITS)
def test_whoever_waits_as_told_is_let_in(waits: list[int], limit: int) -> None:
    clock = Clock()
    rate = RateLimit(clock)
    for wait in waits:
        clock.now += wait
        if taken(rate, "acme", limit):
            continue
        with pytest.raises(ApiError, match=rf"requests_per_minute \({limit}\)") as refused:
            rate.take("acme", limit)
        assert (refused.value.status, refused.value.code) == (429, "rate_limited")
        asked = refused.value.retry_after
        assert asked is not None
        assert 1 <= asked <= 60
        clock.now += asked * SECOND
        assert taken(rate, "acme", limit)


def test_a_minutes_worth_may_come_at_once() -> None:
    clock = Clock()
    rate = RateLimit(clock)
    for _ in range(3):
        assert [taken(rate, "acme", 5) for _ in range(7)] == [True] * 5 + [False] * 2
        clock.now += 3600 * SECOND


def test_tenants_do_not_count_for_each_other() -> None:
    rate = RateLimit(Clock())
    assert [taken(rate, tenant, 1) for tenant in ("acme", "acme", "umbra", "umbra")] == [True, False, True, False]


def test_a_change_of_the_limit_holds_at_once() -> None:
    clock = Clock()
    rate = RateLimit(clock)
    assert taken(rate, "acme", 100)
    assert [taken(rate, "acme", 2) for _ in range(3)] == [True, True, False]
    assert all(taken(rate, "acme", None) for _ in range(100))
    clock.now += SECOND
    assert taken(rate, "acme", 60)


def test_refused_calls_do_not_count() -> None:
    clock = Clock()
    rate = RateLimit(clock)
    assert taken(rate, "acme", 1)
    for _ in range(59):
        clock.now += SECOND
        assert not taken(rate, "acme", 1)
    clock.now += SECOND
    assert taken(rate, "acme", 1)


@pytest.mark.parametrize("limit", [1, 7, 6000])
def test_a_clock_that_stands_still_gives_nothing_back(limit: int) -> None:
    rate = RateLimit(Clock())
    assert sum(taken(rate, "acme", limit) for _ in range(limit + 10)) == limit
