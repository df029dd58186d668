"""What waits for the disk, beside the event loop: the journal on a thread of its own, files on any."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from io import BufferedRandom
from pathlib import Path
from tempfile import TemporaryFile
from typing import Concatenate, ParamSpec, TypeVar

from server_ext.errors import ApiError, storage_failed
from server_ext.journal import Journal

P = ParamSpec("P")
T = TypeVar("T")

DOUBTFUL = "a change may stand all the same; it can be sent again, and is made once under the same key"
"""What comes of a commit that failed: what it wrote may be in the file, and count after a restart."""
SILENT_S = 60.0
"""Seconds for which whoever sends a body may send nothing of it."""


class JournalThread:
    """A journal in the hands of one thread, so that SQLite sees its statements in order.

    Every commit of every tenant passes here: whatever reads or writes files goes through :func:`in_thread`.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._thread = ThreadPoolExecutor(1, "zoact-journal")

    async def __call__(self, method: Callable[Concatenate[Journal, P], T], *args: P.args, **options: P.kwargs) -> T:
        """What a method of the journal returns. Raises ApiError (503) if the disk failed."""
        call = partial(method, self._journal, *args, **options)
        with _storage(DOUBTFUL):
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def close(self) -> None:
        await self(Journal.close)
        self._thread.shutdown()


async def in_thread(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """What a function that reads or writes files returns.

    Raises:
        ApiError: the disk failed (503).
        FileNotFoundError: as the function does.

    """
    with _storage():
        return await asyncio.to_thread(function, *args, **options)


@asynccontextmanager
async def spooled(chunks: AsyncIterable[bytes], directory: Path) -> AsyncIterator[BufferedRandom]:
    """Bytes in a temporary file of a directory, gone with the context.

    Raises:
        ApiError: the disk failed (503), or no more bytes came for ``SILENT_S`` (408).

    """
    left = aiter(chunks)
    with _storage(), TemporaryFile(dir=directory) as file:
        while (chunk := await _next(left)) is not None:
            await asyncio.to_thread(file.write, chunk)
        await asyncio.to_thread(file.flush)
        yield file


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    try:
        return await asyncio.wait_for(anext(chunks, None), SILENT_S)
    except asyncio.TimeoutError:
        raise ApiError(408, "upload_stalled", f"no more of the body came for {SILENT_S:g} s") from None


@contextmanager
def _storage(outcome: str = "nothing changed") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (sqlite3.OperationalError, OSError) as error:
        raise storage_failed(error, outcome) from error
