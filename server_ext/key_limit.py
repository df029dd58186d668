"""A limit on how many different things are in use at once."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager


class KeyLimit:
    """Lets users of keys in, first come, first served, so that no more than a number of keys are in use.

    Args:
        most: different keys, each of which any number may use together.

    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._used: Counter[Hashable] = Counter()
        self._waiting: deque[tuple[Hashable, asyncio.Event]] = deque()

    @asynccontextmanager
    async def use(self, key: Hashable) -> AsyncIterator[None]:
        """Waits until there is room for a key, and uses it."""
        admitted = asyncio.Event()
        self._waiting.append((key, admitted))
        self._admit()
        try:
            await admitted.wait()
            yield
        finally:
            if admitted.is_set():
                self._used[key] -= 1
                self._used += Counter()  # drops those that nobody uses
            else:
                self._waiting.remove((key, admitted))
            self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._waiting[0][0] in self._used or len(self._used) < self._most):
            key, admitted = self._waiting.popleft()
            self._used[key] += 1
            admitted.set()
