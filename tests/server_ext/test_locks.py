"""Readers and writers of an adapter, in any order, cancelled at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ext.locks import ReadWriteLock

WITHIN_S = 10.0


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, WITHIN_S))


async def turns(count: int = 10) -> None:
    """Lets every other task go as far as it can."""
    for _ in range(count):
        await asyncio.sleep(0)


class Watch:
    """Who holds a lock, and in which order they came to."""

    def __init__(self) -> None:
        self.lock = ReadWriteLock()
        self.readers = 0
        self.writers = 0
        self.log: list[str] = []

    def check(self) -> None:
        assert self.writers <= 1
        assert not (self.writers and self.readers)

    async def read(self, name: str = "", pauses: int = 1) -> None:
        async with self.lock.read():
            self.log.append(name)
            self.readers += 1
            try:
                await self._stay(pauses)
            finally:
                self.readers -= 1

    async def write(self, name: str = "", pauses: int = 1, downgrade: bool = False) -> None:
        async with self.lock.write() as hold:
            self.log.append(name)
            self.writers += 1
            try:
                await self._stay(pauses)
            finally:
                self.writers -= 1
            if downgrade:
                await hold.downgrade()
                self.log.append(f"{name} reads")
                self.readers += 1
                try:
                    await self._stay(pauses)
                finally:
                    self.readers -= 1

    async def _stay(self, pauses: int) -> None:
        for _ in range(pauses):
            self.check()
            await asyncio.sleep(0)
        self.check()


KINDS = st.sampled_from(["read", "write", "downgrade"])
PLAN = st.lists(st.tuples(KINDS, st.integers(0, 5), st.integers(0, 5), st.none() | st.integers(0, 12)), max_size=9)


@given(PLAN)
def test_writers_are_alone_and_nobody_waits_for_ever(plan: list[tuple[str, int, int, int | None]]) -> None:
    """Each of a plan's tasks starts after some turns, stays for some, and may be cancelled after some."""

    async def check() -> None:
        watch = Watch()

        async def use(kind: str, start: int, pauses: int) -> None:
            await turns(start)
            if kind == "read":
                await watch.read(pauses=pauses)
            else:
                await watch.write(pauses=pauses, downgrade=kind == "downgrade")

        async def cancelled_after(task: asyncio.Task[None], wait: int) -> None:
            await turns(wait)
            task.cancel()

        tasks = [(asyncio.create_task(use(kind, start, pauses)), cancel) for kind, start, pauses, cancel in plan]
        await asyncio.gather(*(cancelled_after(task, wait) for task, wait in tasks if wait is not None))
        outcomes = await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
        for outcome, (_, wait) in zip(outcomes, tasks, strict=True):
            assert outcome is None or (wait is not None and isinstance(outcome, asyncio.CancelledError)), outcome
        # The lock is free again.
        await watch.write()
        await watch.read()

    run(check())


def test_readers_share() -> None:
    async def check() -> None:
        watch = Watch()
        async with watch.lock.read():
            await watch.read("second")
        assert watch.log == ["second"]

    run(check())


def test_a_waiting_writer_goes_before_later_readers() -> None:
    async def check() -> None:
        watch = Watch()
        async with watch.lock.read():
            tasks = [asyncio.create_task(watch.write("writer"))]
            await turns()
            tasks.append(asyncio.create_task(watch.read("later")))
            await turns()
            assert watch.log == []
        await asyncio.gather(*tasks)
        assert watch.log == ["writer", "later"]

    run(check())


def test_a_cancelled_writer_does_not_keep_readers_waiting() -> None:
    async def check() -> None:
        watch = Watch()
        async with watch.lock.read():
            writer = asyncio.create_task(watch.write("writer"))
            await turns()
            reader = asyncio.create_task(watch.read("reader"))
            await turns()
            writer.cancel()
            await turns()
            assert watch.log == ["reader"]
            await reader

    run(check())


def test_no_writer_comes_between_a_write_and_the_reading_after_it() -> None:
    async def check() -> None:
        watch = Watch()
        async with watch.lock.write() as hold:
            tasks = [asyncio.create_task(watch.write("other"))]
            await turns()
            tasks.append(asyncio.create_task(watch.read("reader")))
            await turns()
            await hold.downgrade()
            await turns()
            assert watch.log == [], "the other writer waits, and new readers wait behind it"
            watch.log.append("done")
        await asyncio.gather(*tasks)
        assert watch.log == ["done", "other", "reader"]

    run(check())


def test_readers_come_in_after_a_downgrade() -> None:
    async def check() -> None:
        watch = Watch()
        async with watch.lock.write() as hold:
            reader = asyncio.create_task(watch.read("reader"))
            await turns()
            assert watch.log == []
            await hold.downgrade()
            await reader
        assert watch.log == ["reader"]

    run(check())


@pytest.mark.parametrize("downgrade", [False, True])
def test_a_writer_that_fails_lets_go(downgrade: bool) -> None:
    async def check() -> None:
        watch = Watch()

        async def fail() -> None:
            async with watch.lock.write() as hold:
                if downgrade:
                    await hold.downgrade()
                raise RuntimeError("disk full")

        with pytest.raises(RuntimeError, match="disk full"):
            await fail()
        await watch.write("next")
        assert watch.log == ["next"]

    run(check())
