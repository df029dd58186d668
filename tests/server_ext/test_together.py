"""Tasks that begin and end together."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ext.errors import ApiError
from server_ext.together import end, to_its_end, together, unless


class Crew:
    """Tasks of which each takes some steps to clear up behind it."""

    def __init__(self) -> None:
        self.at_work = 0

    async def work(self, steps: int, clearing: int, fails: bool = False) -> int:
        self.at_work += 1
        try:
            for _ in range(steps):
                await asyncio.sleep(0)
            if fails:
                raise ValueError(f"after {steps}")
            return steps
        finally:
            try:
                for _ in range(clearing):
                    await asyncio.sleep(0)
            finally:
                self.at_work -= 1


STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6)


@given(STEPS)
def test_results_come_in_the_order_of_the_tasks(steps: list[tuple[int, int]]) -> None:
    crew = Crew()
    found = asyncio.run(together(*(crew.work(*each) for each in steps)))
    assert (found, crew.at_work) == ([taken for taken, _ in steps], 0)


def test_none_at_all() -> None:
    assert asyncio.run(together()) == []


@given(STEPS, st.integers(0, 5), st.integers(0, 6))
def test_none_outlives_one_that_fails(steps: list[tuple[int, int]], failing: int, place: int) -> None:
    async def go() -> None:
        crew = Crew()
        work = [crew.work(*each) for each in steps]
        work.insert(place % (len(steps) + 1), crew.work(failing, 0, fails=True))
        with pytest.raises(ValueError, match=f"after {failing}"):
            await together(*work)
        assert crew.at_work == 0

    asyncio.run(go())


@given(STEPS, st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans())
def test_none_outlives_a_caller_who_is_cancelled(
    steps: list[tuple[int, int]], cancelled_after: list[int], one_fails: bool
) -> None:
    """However often: a caller that clears up is not torn away from it, and is told in the end."""

    async def go() -> None:
        crew = Crew()
        work = [crew.work(20 + taken, clearing) for taken, clearing in steps]
        caller = asyncio.create_task(together(*work, *([crew.work(1, 0, fails=True)] if one_fails else [])))
        await asyncio.sleep(0)
        for pause in cancelled_after:
            for _ in range(pause):
                await asyncio.sleep(0)
            caller.cancel()
        await asyncio.wait([caller])
        assert crew.at_work == 0
        assert caller.cancelled() or isinstance(caller.exception(), ValueError)

    asyncio.run(go())


def test_a_caller_cancelled_while_it_ends_others_is_told() -> None:
    async def go() -> None:
        crew = Crew()
        task = asyncio.create_task(crew.work(9, 9))
        await asyncio.sleep(0)
        ending = asyncio.create_task(end([task]))
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.wait([ending])
        assert ending.cancelled()
        assert crew.at_work == 0

    asyncio.run(go())


@given(st.integers(0, 9), st.lists(st.integers(0, 4), max_size=3), st.booleans())
def test_what_runs_to_its_end_does_so_whoever_is_cancelled(steps: int, cancelled_after: list[int], fails: bool) -> None:
    async def go() -> None:
        crew = Crew()
        caller = asyncio.create_task(to_its_end(crew.work)(20 + steps, 0, fails))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for pause in cancelled_after:
            for _ in range(pause):
                await asyncio.sleep(0)
            caller.cancel()
            assert crew.at_work == 1
        (found,) = await asyncio.gather(caller, return_exceptions=True)
        assert crew.at_work == 0
        if cancelled_after:
            assert isinstance(found, asyncio.CancelledError)
        else:
            assert isinstance(found, ValueError) if fails else found == 20 + steps

    asyncio.run(go())


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 5), st.booleans())
def test_work_goes_on_unless_whoever_wants_it_has_gone(steps: int, leaving: int, clearing: int, fails: bool) -> None:
    async def go() -> None:
        crew = Crew()

        async def gone() -> None:
            await crew.work(leaving, 0)

        (found,) = await asyncio.gather(unless(gone, crew.work(steps, clearing, fails)), return_exceptions=True)
        assert crew.at_work == 0
        if isinstance(found, ApiError):
            assert (found.status, found.code) == (499, "client_gone")
            assert leaving <= steps + clearing
        else:
            assert isinstance(found, ValueError) if fails else found == steps
            # That somebody has gone is seen a turn of the loop later.
            assert leaving + 2 >= steps + clearing

    asyncio.run(go())


def test_work_for_those_who_stay() -> None:
    assert asyncio.run(unless(None, Crew().work(3, 0))) == 3
