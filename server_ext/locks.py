"""Many evaluations of an adapter at once, or one change of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ReadWriteLock:
    """An asyncio lock for many readers or one writer; a waiting writer goes before readers that come after it."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._readers = 0
        self._writing = False
        self._writers_waiting = 0

    @asynccontextmanager
    async def read(self) -> AsyncIterator[None]:
        async with self._condition:
            await self._condition.wait_for(lambda: not self._writing and not self._writers_waiting)
            self._readers += 1
        try:
            yield
        finally:
            await self._release_read()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[WriteHold]:
        """Holds the lock alone. ``downgrade()`` on what it gives lets readers in without letting a writer between."""
        async with self._condition:
            self._writers_waiting += 1
            try:
                await self._condition.wait_for(lambda: not self._writing and not self._readers)
            finally:
                self._writers_waiting -= 1
                self._condition.notify_all()
            self._writing = True
        hold = WriteHold(self)
        try:
            yield hold
        finally:
            if hold.downgraded:
                await self._release_read()
            else:
                async with self._condition:
                    self._writing = False
                    self._condition.notify_all()

    async def _release_read(self) -> None:
        async with self._condition:
            self._readers -= 1
            self._condition.notify_all()


class WriteHold:
    """A lock held for writing."""

    def __init__(self, lock: ReadWriteLock) -> None:
        self._lock = lock
        self.downgraded = False

    async def downgrade(self) -> None:
        """Goes on as a reader."""
        async with self._lock._condition:
            self._lock._writing = False
            self._lock._readers += 1
            self.downgraded = True
            self._lock._condition.notify_all()
