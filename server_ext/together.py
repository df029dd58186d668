"""Tasks that begin together, and of which none outlives the others, nor whoever waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from server_ext.errors import ApiError

Gone = Callable[[], Coroutine[Any, Any, None]]
"""Returns once whoever made a call has gone; does not return before."""
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
    cancelled: asyncio.CancelledError | None = None
    for task in tasks:
        task.cancel()
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
