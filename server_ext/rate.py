"""Calls a minute, by tenant: a token bucket that holds a minute's worth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from server_ext.errors import ApiError


class RateLimit:
    """Counts calls against limits that may differ by tenant and change at any time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """By tenant: calls left, and when that was."""

    def take(self, tenant: str, per_minute: int | None) -> None:
        """Counts a call. Raises ApiError (429) if there have been too many, with the time to wait."""
        if per_minute is None:
            return
        now = self._clock()
        left, then = self._buckets.get(tenant, (float(per_minute), now))
        left = min(float(per_minute), left + (now - then) * per_minute / 60.0)
        if left < 1.0:
            self._buckets[tenant] = (left, now)
            wait = math.ceil((1.0 - left) * 60.0 / per_minute)
            raise ApiError(
                429, "rate_limited", f"more than requests_per_minute ({per_minute}) calls", retry_after=max(1, wait)
            )
        self._buckets[tenant] = (left - 1.0, now)
