"""Calls made side by side: a server puts into one batch what reaches it together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

AT_ONCE = 32
"""Calls under way at once."""


class _Thread(threading.local):
    left: tuple[threading.Event, ...] = ()
    """Whether the pool that the thread belongs to is being left, and those that this one was opened from."""


_here = _Thread()
_leaving = threading.Condition()


@contextmanager
def pool(workers: int, name: str = "") -> Iterator[ThreadPoolExecutor]:
    """Threads for as long as the context lasts.

    When it is left, calls that have not begun are left out, and those under way are waited for. They no longer
    :func:`pause`, since nobody is there for what they would bring: a server that is gone holds up nothing.
    """
    left = threading.Event()
    belongs_to = (*_here.left, left)

    def enter() -> None:
        _here.left = belongs_to

    with ThreadPoolExecutor(workers, name, enter) as threads:
        try:
            yield threads
        finally:
            with _leaving:
                left.set()
                _leaving.notify_all()
            threads.shutdown(wait=False, cancel_futures=True)


def pause(seconds: float) -> None:
    """Wait for some seconds.

    Raises:
        CancelledError: the :func:`pool` that the thread belongs to is being left, or one that this was opened from.

    """
    with _leaving:
        if _leaving.wait_for(lambda: any(left.is_set() for left in _here.left), seconds):
            raise CancelledError


def side_by_side(function: Callable[[T], U], items: Iterable[T]) -> Generator[U, None, None]:
    """What a function makes of items, in their order; it is called from several threads.

    The first failure, in the items' order, ends it, as a :func:`pool` is left.
    """
    with pool(AT_ONCE) as threads:
        yield from threads.map(function, items)
