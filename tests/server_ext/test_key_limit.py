"""No more than a number of keys in use, and everybody gets one in the end."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from server_ext.key_limit import KeyLimit

STEPS = st.lists(
    st.tuples(st.just("come"), st.integers(0, 4)) | st.tuples(st.sampled_from(["go", "cancel"]), st.integers(0, 50)),
    max_size=40,
)


@given(st.integers(1, 3), STEPS)
def test_no_more_keys_than_that_are_in_use_and_nobody_waits_for_ever(most: int, steps: list[tuple[str, int]]) -> None:
    async def go() -> None:
        limit = KeyLimit(most)
        using: list[tuple[int, asyncio.Event]] = []
        tasks: list[asyncio.Task[None]] = []
        order: list[int] = []

        async def use(number: int, key: int) -> None:
            async with limit.use(key):
                order.append(number)
                used = (key, asyncio.Event())
                using.append(used)
                try:
                    await used[1].wait()
                finally:
                    using.remove(used)

        async def settle() -> None:
            for _ in range(8):
                await asyncio.sleep(0)
            keys = {key for key, _ in using}
            assert len(keys) <= most
            assert using or all(task.done() for task in tasks), "somebody waits though nothing is in use"

        for step, number in steps:
            open_ = [task for task in tasks if not task.done()]
            if step == "come":
                tasks.append(asyncio.create_task(use(len(tasks), number)))
            elif step == "go" and using:
                using[number % len(using)][1].set()
            elif step == "cancel" and open_:
                open_[number % len(open_)].cancel()
            await settle()
        while using:
            using[0][1].set()
            await settle()
        assert all(task.done() for task in tasks)
        assert order == sorted(order), "first come, first served"
        assert vars(limit) == vars(KeyLimit(most))

    asyncio.run(go())
