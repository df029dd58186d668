"""Two lanes into vLLM: what people wait for goes first, and training takes what is left.

vLLM's scheduler fills every step from those who wait, by priority. So a foreground request that comes waits for the
step under way, and shares the next one with whatever of training the scheduler has been given. Priority alone therefore
does not keep that short: as long as there is foreground, a step holds no more than a cap of training's tokens, which
the scheduler sees to (``server_ext.scheduler``). What it can take from is no more than a few steps' worth, so that
slots and the key-value cache are the foreground's.

Nor does priority alone keep training going: where foreground takes every slot or every token, what goes behind it would
wait for ever. So when nothing of training has ended for a while, the oldest request goes on in the foreground's lane.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from server_ext.together import end
from zoact_remote.extension import SHARE_VARIABLE, default_share

T = TypeVar("T")

FOREGROUND, BACKGROUND = 0, 1
"""Priorities of vLLM's: the lower goes first."""
PREFIX = "zoact-"
"""Of the names that training's requests have in vLLM."""
AHEAD = 4
"""Caps of training that may be under way: those of the steps that vLLM is at, and of those that it makes up next."""
QUIET_S = 30.0
"""After the last foreground request, before training has the machine to itself again."""
PATIENCE_S = 5.0


def training_share(environment: Mapping[str, str], *, on_cpu: bool) -> float:
    """The share of a step that the environment leaves to training. Raises ValueError if it is none."""
    text = environment.get(SHARE_VARIABLE)
    try:
        share = default_share(on_cpu) if text is None else float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"{SHARE_VARIABLE} must be above 0 and at most 1, not {text!r}")
    return share


def training_cap(share: float, step: int) -> int | None:
    """The most tokens of training that a step of so many may hold while there is foreground; None for no difference."""
    return None if share == 1 else max(1, int(share * step))


@dataclass(eq=False)
class Turn:
    """One request of training on its way through.

    Attributes:
        tokens: the most that it adds to a step: its prompt's, and once it is at its answer, one.
        priority: to give vLLM.
        moving: whether vLLM has shown since the last alarm that it works at it.

    """

    tokens: int
    priority: int
    moving: bool = False
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[Any] | None = None
    hurried: bool = False


class Lanes:
    """Who is on the way into one engine. Used on one event loop.

    Args:
        cap: see :func:`training_cap`. ``AHEAD`` times as much may be under way; a request that has more passes alone.
        quiet_s: seconds after the last foreground request during which the cap still holds.
        patience_s: seconds in which nothing of training ends, before one request is moved to the foreground's lane.

    """

    def __init__(self, cap: int | None, quiet_s: float = QUIET_S, patience_s: float = PATIENCE_S) -> None:
        self._cap = cap
        self._quiet_s = quiet_s
        self._patience_s = patience_s
        self._foreground = 0
        self._waiting: deque[Turn] = deque()
        self._under_way: dict[Turn, None] = {}
        self._calming: asyncio.TimerHandle | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether the cap holds: there is a foreground request, or was one a short while ago."""
        return self._cap is not None and (self._foreground > 0 or self._calming is not None)

    @property
    def most(self) -> int | None:
        """The most tokens that a request of training had better have, so that it need not pass alone; None for any."""
        return self._cap if self.busy else None

    @contextmanager
    def foreground(self) -> Iterator[None]:
        """A foreground request, from before it reaches vLLM to the end of its answer."""
        loop = asyncio.get_running_loop()
        self._foreground += 1
        if self._calming is not None:
            self._calming.cancel()
            self._calming = None
        self._watch()
        try:
            yield
        finally:
            self._foreground -= 1
            if not self._foreground:
                self._calming = loop.call_later(self._quiet_s, self._calm)

    async def background(self, tokens: int, ask: Callable[[Turn], Coroutine[Any, Any, T]]) -> T:
        """Waits for the turn of a request of training, and asks.

        Args:
            tokens: the most that it adds to a step of the scheduler.
            ask: gives it to vLLM at the turn's priority; called again, at another one, if it has to change lanes.

        """
        turn = Turn(tokens, FOREGROUND if self._cap is None else BACKGROUND)
        self._waiting.append(turn)
        self._admit()
        try:
            await turn.admitted.wait()
            turn.task = asyncio.create_task(ask(turn))
            try:
                await asyncio.wait([turn.task])
            finally:
                await end([turn.task])
            if turn.hurried and turn.task.cancelled():
                turn.tokens = tokens
                return await ask(turn)
            return turn.task.result()
        finally:
            if turn.admitted.is_set():
                del self._under_way[turn]
                self._stop_watching()
            else:
                self._waiting.remove(turn)
            self._admit()

    def answered(self, turn: Turn) -> None:
        """Notes that something of a request's answer has come: its prompt takes no more room in a step."""
        turn.moving = True
        if turn.tokens > 1:
            turn.tokens = 1
            self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0]):
            turn = self._waiting.popleft()
            self._under_way[turn] = None
            turn.admitted.set()
        self._watch()

    def _fits(self, turn: Turn) -> bool:
        if self._cap is None or not self.busy or not self._under_way:
            return True
        return turn.tokens + sum(each.tokens for each in self._under_way) <= AHEAD * self._cap

    def _calm(self) -> None:
        self._calming = None
        self._stop_watching()
        self._admit()

    def _watch(self) -> None:
        """Sets the alarm that goes off when training has made no progress."""
        if self._alarm is None and self.busy and self._under_way:
            self._alarm = asyncio.get_running_loop().call_later(self._patience_s, self._hurry)

    def _stop_watching(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _hurry(self) -> None:
        """Moves the oldest request that vLLM does not work at to the foreground's lane.

        A text that vLLM has put off for want of cache is among those, and is written anew.
        """
        self._alarm = None
        for turn in self._under_way:
            if turn.task is not None and not (turn.moving or turn.hurried):
                turn.priority, turn.hurried = FOREGROUND, True
                turn.task.cancel()
                break
        for turn in self._under_way:
            turn.moving = False
        self._watch()
