"""Two lanes, with the tests in vLLM's place, and time that passes only when they say so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ext.lanes import AHEAD, BACKGROUND, FOREGROUND, Lanes, Turn

QUIET_S, PATIENCE_S = 10.0, 5.0
TOKENS = st.integers(1, 12)
CAPS = st.integers(1, 20)


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time stands still."""

    now = 0.0

    def time(self) -> float:
        return self.now


@dataclass(eq=False)
class Request:
    """A request of training."""

    tokens: int
    end: asyncio.Event = field(default_factory=asyncio.Event)
    turns: list[int] = field(default_factory=list)
    turn: Turn | None = None
    task: asyncio.Task[str] | None = None
    under_way: bool = False
    answered: bool = False

    @property
    def done(self) -> bool:
        return self.task is not None and self.task.done()


class Road:
    """The lanes, and everybody on them."""

    def __init__(self, cap: int | None) -> None:
        self.cap = cap
        self.lanes = Lanes(cap, QUIET_S, PATIENCE_S)
        self.requests: list[Request] = []
        self.begun: list[Request] = []
        self.served: list[ExitStack] = []

    def those_under_way(self) -> list[Request]:
        return [request for request in self.requests if request.under_way]

    def those_waiting(self) -> list[Request]:
        return [request for request in self.requests if not request.under_way and not request.done]

    async def submit(self, tokens: int) -> Request:
        request = Request(tokens)

        async def ask(turn: Turn) -> str:
            assert turn.tokens == tokens
            if not request.turns:
                self._check_cap(request)
                self.begun.append(request)
            request.turns.append(turn.priority)
            request.turn = turn
            request.under_way = True
            try:
                await request.end.wait()
                return "answer"
            finally:
                request.under_way = False

        request.task = asyncio.create_task(self.lanes.background(tokens, ask))
        self.requests.append(request)
        await self.settle()
        return request

    def _check_cap(self, request: Request) -> None:
        others = self.those_under_way()
        if self.lanes.busy and others and self.cap is not None:
            taken = sum(1 if other.answered else other.tokens for other in others)
            assert taken + request.tokens <= AHEAD * self.cap

    async def serve(self) -> None:
        stack = ExitStack()
        stack.enter_context(self.lanes.foreground())
        self.served.append(stack)
        await self.settle()

    async def leave(self) -> None:
        self.served.pop().close()
        await self.settle()

    async def answer(self, request: Request) -> None:
        """Something of its answer comes."""
        assert request.turn is not None
        request.answered = True
        self.lanes.answered(request.turn)
        await self.settle()

    async def finish(self, request: Request) -> None:
        request.end.set()
        await self.settle()

    async def cancel(self, request: Request) -> None:
        assert request.task is not None
        request.task.cancel()
        await self.settle()

    async def wait(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Clock)
        loop.now += seconds
        await self.settle()

    async def settle(self) -> None:
        for _ in range(12):
            await asyncio.sleep(0)
        waiting = self.those_waiting()
        assert not waiting or self.lanes.busy, "training waits though nobody is in its way"
        assert not waiting or self.those_under_way(), "training has come to a stop"


def run(cap: int | None, scene: Callable[[Road], Coroutine[Any, Any, None]]) -> None:
    """Plays a scene on a road."""

    async def play() -> None:
        road = Road(cap)
        await scene(road)
        while road.served:
            await road.leave()

    loop = Clock()
    try:
        loop.run_until_complete(play())
    finally:
        loop.close()


STEPS = st.lists(
    st.tuples(st.just("submit"), TOKENS)
    | st.tuples(st.sampled_from(["finish", "cancel"]), st.integers(0, 50))
    | st.tuples(st.sampled_from(["serve", "leave"]), st.just(0))
    | st.tuples(st.just("wait"), st.integers(1, 12)),
    max_size=40,
)


@given(CAPS, STEPS)
def test_the_cap_holds_while_there_is_foreground_and_training_goes_on(cap: int, steps: list[tuple[str, int]]) -> None:
    async def go(road: Road) -> None:
        cancelled = []
        for step, number in steps:
            there = road.those_under_way() if step == "finish" else [r for r in road.requests if not r.done]
            if step == "submit":
                await road.submit(number)
            elif step == "serve":
                await road.serve()
            elif step == "leave" and road.served:
                await road.leave()
            elif step == "wait":
                await road.wait(number)
            elif there and step == "finish":
                await road.finish(there[number % len(there)])
            elif there and step == "cancel":
                cancelled.append(there[number % len(there)])
                await road.cancel(cancelled[-1])
        while under_way := road.those_under_way():
            await road.finish(under_way[0])
        assert all(request.done for request in road.requests)
        assert [r for r in road.requests if r in road.begun] == road.begun, "first come, first served"
        assert {r for r in road.requests if r not in road.begun} <= set(cancelled)
        while road.served:
            await road.leave()
        await road.wait(QUIET_S)
        # As if nobody had ever been there.
        assert {**vars(road.lanes)} == {**vars(Lanes(cap, QUIET_S, PATIENCE_S))}

    run(cap, go)


@given(CAPS, st.lists(TOKENS, min_size=1, max_size=12), st.integers(0, 12))
def test_whatever_foreground_takes_training_gets_through(cap: int, requests: list[int], begun: int) -> None:
    """VLLM, full of foreground, ends nothing of a lower priority."""

    async def go(road: Road) -> None:
        for number, tokens in enumerate(requests):
            if number == begun:
                await road.serve()
            await road.submit(tokens)
        if not road.served:
            await road.serve()
        for _ in requests:
            await road.wait(PATIENCE_S)
            (hurried,) = (r for r in road.those_under_way() if r.turns[-1] == FOREGROUND)
            assert hurried.turns == [BACKGROUND, FOREGROUND]
            await road.finish(hurried)
        assert all(request.task is not None and request.task.result() == "answer" for request in road.requests)

    run(cap, go)


def test_nobody_is_hurried_while_training_makes_progress() -> None:
    async def go(road: Road) -> None:
        await road.serve()
        for _ in range(5):
            await road.submit(1)
        for request in road.requests:
            await road.wait(PATIENCE_S - 1)
            # More of it does not put off the alarm, nor set it off.
            await road.serve()
            await road.finish(request)
        assert [request.turns for request in road.requests] == [[BACKGROUND]] * 5

    run(1, go)


def test_nobody_is_hurried_who_gets_on_or_is_alone() -> None:
    async def go(road: Road) -> None:
        writing = await road.submit(1)
        stuck = await road.submit(1)
        await road.wait(10 * PATIENCE_S)
        assert (writing.turns, stuck.turns) == ([BACKGROUND], [BACKGROUND])
        await road.serve()
        for _ in range(3):
            await road.answer(writing)
            await road.wait(PATIENCE_S)
        assert (writing.turns, stuck.turns) == ([BACKGROUND], [BACKGROUND, FOREGROUND])
        # VLLM puts it off for foreground that takes all of the cache.
        await road.wait(PATIENCE_S)
        assert writing.turns == [BACKGROUND, FOREGROUND]
        await road.finish(writing)
        await road.finish(stuck)

    run(4, go)


def test_texts_that_are_being_written_leave_room_for_losses() -> None:
    async def go(road: Road) -> None:
        await road.serve()
        texts = [await road.submit(10) for _ in range(AHEAD)]
        losses = await road.submit(10)
        assert road.those_waiting() == [losses]
        for text in texts:
            await road.answer(text)
        assert road.those_waiting() == []
        for request in (losses, *texts):
            await road.finish(request)

    run(10, go)


def test_the_cap_holds_for_a_while_after_the_last_request() -> None:
    async def go(road: Road) -> None:
        first = await road.submit(AHEAD)
        await road.serve()
        second = await road.submit(1)
        await road.leave()
        await road.wait(QUIET_S - 1)
        await road.serve()
        await road.leave()
        await road.wait(QUIET_S - 1)
        assert road.those_waiting() == [second]
        await road.wait(1)
        assert road.those_under_way() == [first, second]
        for request in (first, second):
            await road.finish(request)

    run(1, go)


@given(st.lists(TOKENS, max_size=8))
def test_without_a_cap_all_are_alike(requests: list[int]) -> None:
    async def go(road: Road) -> None:
        await road.serve()
        for tokens in requests:
            await road.submit(tokens)
        await road.wait(PATIENCE_S)
        assert [request.turns for request in road.those_under_way()] == [[FOREGROUND]] * len(requests)
        for request in road.requests:
            await road.finish(request)

    run(None, go)


@pytest.mark.parametrize("served", [False, True])
def test_what_goes_wrong_is_the_callers(served: bool) -> None:
    async def go(road: Road) -> None:
        if served:
            await road.serve()

        async def fail(turn: Turn) -> str:
            raise ValueError("no such thing")

        with pytest.raises(ValueError, match="no such thing"):
            await road.lanes.background(1, fail)
        request = await road.submit(1)
        assert request.under_way
        await road.finish(request)

    run(1, go)


def test_who_is_cancelled_goes_on_once_vllm_has_let_go() -> None:
    async def go(road: Road) -> None:
        let_go = asyncio.Event()

        async def ask(turn: Turn) -> str:
            try:
                await asyncio.Event().wait()
                return "answer"
            finally:
                await asyncio.sleep(0)
                let_go.set()

        asking = asyncio.create_task(road.lanes.background(1, ask))
        await road.settle()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert let_go.is_set()

    run(1, go)
