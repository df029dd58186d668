"""Calls a minute, by tenant: a token bucket that holds a minute's worth."""

from __future__ import annotations

import time
from collections.abc import Callable

from server_ext.errors import ApiError

SECOND = 1_000_000_000
CALL = 60 * SECOND
"""What a call costs, in the unit that a nanosecond brings ``requests_per_minute`` of. Whole numbers, so that whoever
waits as told is let in, to the nanosecond."""


class RateLimit:
    """Counts calls against limits that may differ by tenant and change at any time."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[int, int]] = {}
        """By tenant: what is left, and when that was."""

    def take(self, tenant: str, per_minute: int | None) -> None:
        """Counts a call. Raises ApiError (429) if there have been too many, with the time to wait."""
        if per_minute is None:
            return
        now = self._clock()
        full = per_minute * CALL
        left, then = self._buckets.get(tenant, (full, now))
        left = min(full, left + (now - then) * per_minute)
        if left < CALL:
            self._buckets[tenant] = (left, now)
            seconds = -(-(CALL - left) // (per_minute * SECOND))
            raise ApiError(
                429, "rate_limited", f"more than requests_per_minute ({per_minute}) calls", retry_after=seconds
            )
        self._buckets[tenant] = (left - CALL, now)
