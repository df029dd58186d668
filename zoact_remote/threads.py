"""Calls made side by side: a server puts into one batch what reaches it together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

AT_ONCE = 32
"""Calls under way at once."""


def side_by_side(function: Callable[[T], U], items: Iterable[T]) -> Generator[U, None, None]:
    """What a function makes of items, in their order; it is called from several threads.

    The first failure, in the items' order, ends it: calls that have not begun are left out, and those under way are
    waited for.
    """
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
