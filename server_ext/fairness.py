"""Fair sharing: whoever asks for much waits for it, not those beside it.

Start-time fair queueing (Goyal, Vin and Cheng, 1996), with tokens for bytes and tenants, all of one weight, for flows.
Work is cut into pieces. A tenant's next piece is tagged with the virtual time at which the one before it would have
ended, had the tenant had a line of its own, and the smallest tag goes first; virtual time is the tag of whoever went
last. A tenant that was idle starts at the present virtual time: nobody saves up.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class _Piece:
    number: int
    cost: int
    turn: asyncio.Future[None]


class FairQueue:
    """Lets pieces of work pass, so that no more than a capacity is under way and tenants share it alike.

    Args:
        capacity: cost that may be under way at once. A piece that costs more passes alone.

    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._under_way = 0
        self._now = 0
        self._finish: dict[str, int] = {}
        self._waiting: dict[str, deque[_Piece]] = {}
        self._order = itertools.count()

    @asynccontextmanager
    async def turn(self, tenant: str, cost: int) -> AsyncIterator[None]:
        """Waits for the turn of a piece of work of one tenant, and holds its share of the capacity.

        A piece is charged for when its turn comes: one that is cancelled before costs its tenant nothing.
        """
        piece = _Piece(next(self._order), cost, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(piece)
        self._admit()
        try:
            await piece.turn
        except asyncio.CancelledError:
            # It may have been admitted in the same moment.
            if piece.turn.cancelled():
                self._admit()
            else:
                self._leave(cost)
            raise
        try:
            yield
        finally:
            self._leave(cost)

    def _start(self, tenant: str) -> int:
        """The tag of a tenant's next piece. While that waits, virtual time does not pass it, so the tag stays."""
        return max(self._now, self._finish.get(tenant, 0))

    def _admit(self) -> None:
        while self._waiting:
            tenant = min(self._waiting, key=lambda name: (self._start(name), self._waiting[name][0].number))
            queue = self._waiting[tenant]
            piece = queue[0]
            if not piece.turn.cancelled():
                if self._under_way and self._under_way + piece.cost > self._capacity:
                    return
                self._now = self._start(tenant)
                self._finish[tenant] = self._now + piece.cost
                self._under_way += piece.cost
                piece.turn.set_result(None)
            queue.popleft()
            if not queue:
                del self._waiting[tenant]

    def _leave(self, cost: int) -> None:
        self._under_way -= cost
        self._admit()
        if not self._waiting and not self._under_way:
            # Nothing is owed to anybody, so the tags may begin again.
            self._now = 0
            self._finish.clear()
