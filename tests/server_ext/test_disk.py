"""What waits for the disk."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ext import disk
from server_ext.disk import spooled
from server_ext.errors import ApiError


async def read(chunks: list[bytes], directory: Path) -> bytes:
    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async with spooled(body(), directory) as file:
        assert not list(directory.iterdir()), "it must be gone with the process too"
        file.seek(0)
        return file.read()


@given(chunks=st.lists(st.binary(max_size=300)), repeats=st.sampled_from([1, 100]))
def test_what_is_spooled_is_what_was_sent(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], repeats: int
) -> None:
    directory = tmp_path_factory.mktemp("spool")
    chunks = chunks * repeats
    assert asyncio.run(read(chunks, directory)) == b"".join(chunks)


@pytest.mark.parametrize("length", [100, 1 << 20])
def test_a_full_disk_is_said(tmp_path: Path, length: int) -> None:
    """Where it shows at once, and where it shows only as the file is closed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(ApiError) as refused:
            asyncio.run(read([bytes(length)], tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (refused.value.status, refused.value.code) == (503, "storage_failed")


def test_who_sends_nothing_for_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SILENT_S", 0.1)

    async def body() -> AsyncIterator[bytes]:
        yield b"a beginning"
        await asyncio.sleep(30)

    async def spool() -> None:
        async with spooled(body(), tmp_path):
            pass

    with pytest.raises(ApiError, match=r"no more of the body came for 0.1 s") as refused:
        asyncio.run(spool())
    assert (refused.value.status, refused.value.code) == (408, "upload_stalled")
