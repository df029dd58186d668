"""Fair sharing: whoever asks for much waits for it, not those beside it.

Weighted fair queueing (Demers, Keshav and Shenker, 1989), with tokens for bytes and tenants for flows. Work is cut into
pieces; a piece is tagged with the virtual time at which its tenant's share would have come to it, and the smallest tag
goes first. A tenant that was idle starts at the present virtual time: nobody saves up.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairQueue:
    """Lets pieces of work pass, so that no more than a capacity is under way and tenants share it alike.

    Args:
        capacity: cost that may be under way at once. A piece that costs more passes alone.

    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._under_way = 0
        self._now = 0.0
        self._finish: dict[str, float] = {}
        self._waiting: list[tuple[float, int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    @asynccontextmanager
    async def turn(self, tenant: str, cost: int) -> AsyncIterator[None]:
        """Waits for the turn of a piece of work of one tenant, and holds its share of the capacity."""
        start = max(self._now, self._finish.get(tenant, 0.0))
        self._finish[tenant] = start + cost
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (start, next(self._order), cost, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            # It may have been admitted in the same moment.
            if turn.done() and not turn.cancelled():
                self._leave(cost)
            raise
        try:
            yield
        finally:
            self._leave(cost)

    def _admit(self) -> None:
        while self._waiting:
            start, _, cost, turn = self._waiting[0]
            if turn.cancelled():
                heapq.heappop(self._waiting)
                continue
            if self._under_way and self._under_way + cost > self._capacity:
                return
            heapq.heappop(self._waiting)
            self._now = max(self._now, start)
            self._under_way += cost
            turn.set_result(None)

    def _leave(self, cost: int) -> None:
        self._under_way -= cost
        self._admit()
        if not self._waiting and not self._under_way:
            # Nothing is owed to anybody, so the tags may begin again.
            self._now = 0.0
            self._finish.clear()
