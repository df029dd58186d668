"""Archives on their way in and out: how many there are at a time, and when nothing is left of them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message

from server_ext.engines.transformers import TransformersEngine
from server_ext.errors import ApiError
from server_ext.export import write_export
from server_ext.gate import Gate
from server_ext.routes import router
from server_ext.schemas import TenantLimits
from server_ext.service import EXPORTS_ON_DISK
from server_ext.tenants import Caller, Tenants
from tests.server_ext.support import OPERATOR
from tests.server_ext.test_registry import Stage


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(str(tiny_model))


@pytest.fixture
def stage(engine: TransformersEngine, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(engine, tmp_path / "state")
    yield stage
    stage.stop()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("caller", "name", "status", "code"),
    [
        (OPERATOR, "acme/a", 409, "adapter_exists"),
        (Caller("acme", TenantLimits(max_adapters=1)), "acme/b", 403, "limit_exceeded"),
    ],
)
def test_an_upload_that_cannot_become_an_adapter_is_not_read(
    stage: Stage, caller: Caller, name: str, status: int, code: str
) -> None:
    stage.bring("acme/a")

    async def body() -> AsyncIterator[bytes]:
        pytest.fail("it was read")
        yield b""

    with pytest.raises(ApiError) as refused:
        stage.run(stage.service.import_adapter(caller, name, body(), "rademacher"))
    assert (refused.value.status, refused.value.code) == (status, code)


def test_of_a_tenants_uploads_one_is_taken_at_a_time(stage: Stage) -> None:
    begun: list[str] = []

    async def upload(name: str, end: asyncio.Event) -> None:
        async def body() -> AsyncIterator[bytes]:
            begun.append(name)
            await end.wait()
            yield stage._archive(0)

        await stage.service.import_adapter(OPERATOR, name, body(), "rademacher")

    async def crowd() -> None:
        ends = {name: asyncio.Event() for name in ("acme/a", "acme/b", "acme/c", "umbra/a")}
        tasks = {name: asyncio.create_task(upload(name, end)) for name, end in ends.items()}
        await settle()
        assert begun == ["acme/a", "umbra/a"]
        tasks["acme/b"].cancel()
        tasks["acme/a"].cancel()
        await settle()
        assert begun == ["acme/a", "umbra/a", "acme/c"]
        for end in ends.values():
            end.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    stage.run(crowd())
    assert {adapter.row.name for adapter in stage.registry.all()} == {"acme/c", "umbra/a"}
    assert not stage.service._uploads


def test_few_exports_are_on_disk_and_one_is_in_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*(f"acme/a{i}" for i in range(EXPORTS_ON_DISK + 2)), "umbra/a"]
    for name in names:
        stage.bring(name)
    lock, writing, most = threading.Lock(), 0, 0

    def watch(*args: Any) -> None:
        nonlocal writing, most
        with lock:
            writing += 1
            most = max(most, writing)
        write_export(*args)
        with lock:
            writing -= 1

    monkeypatch.setattr("server_ext.service.write_export", watch)
    written: list[str] = []

    async def export(name: str, read: asyncio.Event) -> None:
        async with stage.service.export(name, None, "float32") as file:
            assert Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).parent == stage.directory
            written.append(name)
            await read.wait()

    async def crowd() -> None:
        reads = {name: asyncio.Event() for name in names}
        tasks = [asyncio.create_task(export(name, read)) for name, read in reads.items()]
        while len(written) < EXPORTS_ON_DISK + 1:
            await asyncio.sleep(0.01)
        await settle()
        assert sorted(written) == sorted([*names[:EXPORTS_ON_DISK], "umbra/a"])
        for read in reads.values():
            read.set()
        await asyncio.gather(*tasks)

    files = sorted(stage.directory.rglob("*"))
    stage.run(crowd())
    assert (len(written), most) == (len(names), 1)
    assert sorted(stage.directory.rglob("*")) == files
    assert not stage.service._exports


@pytest.mark.parametrize("leaves", [False, True])
def test_an_export_is_under_way_until_it_has_been_read(stage: Stage, tmp_path: Path, leaves: bool) -> None:
    stage.bring("acme/a")
    exported = stage.run(stage.export_later("acme/a"))
    gate = Gate(stage.service, Tenants(tmp_path / "tenants.sqlite"))
    app = FastAPI()
    app.state.zoact = gate
    app.include_router(router)
    path = "/zoact/v1/adapters/acme/a/export"
    scope: dict[str, Any] = {"type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "headers": []}
    scope |= {"method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http"}

    async def ask() -> list[Message]:
        await gate.restore()
        sent: list[Message] = []
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def receive() -> Message:
            await go_on.wait()
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            begun.set()
            await go_on.wait()
            if leaves:
                await asyncio.Event().wait()

        answering = asyncio.create_task(app(scope, receive, send))
        await begun.wait()
        assert sum(gate._calls.values()) == 1
        assert not gate._idle.is_set()
        assert len(open_files()) == 1
        go_on.set()
        await answering
        assert gate._idle.is_set()
        assert not open_files()
        return sent

    def open_files() -> list[str]:
        """Of the state directory, those without a name."""
        found = []
        for descriptor in Path("/proc/self/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except FileNotFoundError:
                continue
            if target.startswith(f"{stage.directory}/#") or ("(deleted)" in target and str(stage.directory) in target):
                found.append(target)
        return found

    start, *parts = stage.run(ask())
    gate.tenants.close()
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/x-tar"
    assert headers[b"content-length"] == str(len(exported)).encode()
    assert headers[b"x-request-id"]
    if not leaves:
        assert b"".join(part["body"] for part in parts) == exported
