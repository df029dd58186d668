"""A cache that is bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Array(Protocol):
    """An array of NumPy's or PyTorch's."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        ...


ArrayT = TypeVar("ArrayT", bound=Array)


class Cache(Generic[ArrayT]):
    """Keeps what was made, by key; what has gone unused longest goes first.

    Attributes:
        limit: bytes kept at most.

    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._kept: OrderedDict[Hashable, ArrayT] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], ArrayT]) -> ArrayT:
        """What is kept under a key, made if there is nothing. It must not be changed."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._kept[key] = make()
        self._held += made.nbytes
        while self._held > self.limit:
            self._held -= self._kept.popitem(last=False)[1].nbytes
        return made

    def drop(self, unwanted: Callable[[Hashable], bool]) -> None:
        """Lets go of what is kept under such keys."""
        for key in list(filter(unwanted, self._kept)):
            self._held -= self._kept.pop(key).nbytes

    def clear(self) -> None:
        """Lets go of everything."""
        self._kept.clear()
        self._held = 0
