"""Tasks that begin together, and of which none outlives the others, nor whoever waits for them.

And calls that run to their end, whatever becomes of their callers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from server_ext.errors import ApiError

Gone = Callable[[], Coroutine[Any, Any, None]]
"""Returns once whoever made a call has gone; does not return before."""
P = ParamSpec("P")
T = TypeVar("T")


async def together(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """The results of all. If one fails, or the caller is cancelled, the others are cancelled and have ended on return.

    As ``asyncio.TaskGroup``, which Python 3.10 lacks, but for the exception, which is the first one itself.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await end(tasks)


async def unless(gone: Gone | None, work: Coroutine[Any, Any, T]) -> T:
    """The result of work; None stands for those who stay.

    Raises:
        ApiError: whoever wanted it has gone (499). The work was cancelled, and has ended.

    """
    if gone is None:
        return await work
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            leaving.result()
            raise ApiError(499, "client_gone", "whoever made the call has gone")
    finally:
        await end([working, leaving])
    return working.result()


async def end(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancels what is not done yet, and waits until it is, even if the caller is cancelled meanwhile."""
    for task in tasks:
        task.cancel()
    await _ended(tasks)


def to_its_end(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A function that, once called, runs to its end. A caller who is cancelled meanwhile is so when it has ended."""

    @wraps(function)
    async def whole(*args: P.args, **options: P.kwargs) -> T:
        task = asyncio.ensure_future(function(*args, **options))
        await _ended([task])
        return task.result()

    return whole


async def _ended(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Waits until all are done, even if the caller is cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
