"""The registry on a real engine against a list of arrays, through any sequence of changes, stops and crashes."""

from __future__ import annotations

import asyncio
import gc
import shutil
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from server_ext.adapters import OLD_VERSIONS_KEPT, VERSIONS_READ_AT_ONCE, Adapter
from server_ext.engines.transformers import TransformersEngine
from server_ext.errors import ApiError
from server_ext.importing import read_lora
from server_ext.journal import Journal
from server_ext.registry import Registry
from server_ext.room import Room
from server_ext.schemas import AskScores, BasisSpec, Calibrate, CompletionRow, CreateAdapter
from server_ext.service import Service
from server_ext.state_files import StateFiles
from server_ext.store import BUFFERS_OF_UPDATE
from tests.loras import lora_archive, random_halves
from tests.server_ext.support import OPERATOR
from tests.strategies import SEEDS
from zoact_remote import Update
from zoact_remote.digest import coefficients_digest
from zoact_remote.layout import Layout, select_sites
from zoact_remote.replay import apply_update
from zoact_remote.wire import Change, Rollback

T = TypeVar("T")

NAMES = ("acme/a", "umbra/a")
SITES = ("k_proj", "o_proj")
EVERY = 3
"""Changes from one snapshot to the next: few, so that short histories have several."""


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(str(tiny_model))


class Broken(Exception):
    """What a failing engine raises: there is nothing in its words."""


class Stage:
    """A service on an engine, which may be stopped, killed and started again."""

    def __init__(self, engine: TransformersEngine, directory: Path) -> None:
        self.directory = directory
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        self.start()

    @property
    def registry(self) -> Registry:
        return self.service.registry

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    def start(self) -> None:
        async def start() -> None:
            self.service = Service(self._engine, self.directory, snapshot_every=EVERY)
            await self.registry.restore()

        self.run(start())

    def stop(self) -> None:
        self.run(self.registry.close())

    def kill(self) -> None:
        """Goes on with the files as they are: what a process that dies leaves behind."""
        # Snapshots are written on a thread, and hypothesis wants to see the same twice.
        self.run(self._settle())
        copy = Path(tempfile.mkdtemp(dir=self.directory.parent))
        # The shared memory file is an index of the log beside it, which SQLite builds anew.
        shutil.copytree(self.directory, copy, ignore=shutil.ignore_patterns("*-shm"), dirs_exist_ok=True)
        self.stop()
        self.directory = copy

    @contextmanager
    def failing(self, method: str, done: bool, version: int | None = None) -> Iterator[None]:
        """Has a method of the engine fail, of one version alone if given, before or after what it does is done."""
        stock = getattr(self._engine, method)

        async def fail(*args: Any) -> Any:
            if version is not None and args[1] != version:
                return await stock(*args)
            if done:
                await stock(*args)
            raise Broken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self._engine, method, fail)
            yield

    async def _settle(self) -> None:
        await asyncio.gather(*self.registry._snapshot_tasks)

    def bring(self, name: str, seed: int = 0) -> tuple[Layout, list[NDArray[np.float32]]]:
        """Imports an adapter; where it acts, and what it begins with."""
        self.run(self.bring_later(name, seed))
        found = read_lora(BytesIO(self._archive(seed)), self._engine.sites, 2, "")
        return found.layout, [found.flat]

    async def bring_later(self, name: str, seed: int = 0) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield self._archive(seed)

        await self.service.import_adapter(OPERATOR, name, body(), "rademacher")

    async def export_later(self, name: str) -> bytes:
        async with self.service.export(name, None, "float32") as file:
            file.seek(0)
            return file.read()

    def _archive(self, seed: int) -> bytes:
        return lora_archive(random_halves(select_sites(self._engine.sites, SITES), 2, seed))

    def change(self, name: str, change: Change) -> tuple[int, str, bool]:
        async def make() -> tuple[int, str, bool]:
            async with self.registry.changing(name) as adapter:
                result = await self.registry.change(adapter, change)
            return result.version, result.digest, result.applied

        return self.run(make())

    def read(self, name: str, version: int) -> NDArray[np.float32]:
        return self.run(self.read_later(name, version))

    async def read_later(self, name: str, version: int) -> NDArray[np.float32]:
        async with self.registry.at(await self.registry.calibrated(name), version) as point:
            return await self._engine.read(point.key, point.version)


@dataclass
class History:
    """What an adapter must be: its coefficients by version, and the version that each key led to."""

    layout: Layout
    flats: list[NDArray[np.float32]]
    keys: dict[str, tuple[Change, int]] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        return len(self.flats) - 1

    def digest(self, version: int) -> str:
        return coefficients_digest(self.flats[version], self.layout)

    def after(self, change: Change) -> NDArray[np.float32]:
        if isinstance(change, Rollback):
            return self.flats[change.to_version]
        return apply_update(self.flats[-1], self.layout, "rademacher", change)


CHANGES = st.builds(
    Update,
    st.just(0),
    st.lists(st.tuples(SEEDS, st.floats(-1, 1)), max_size=3).map(tuple),
    st.sampled_from([0.0, 0.25]),
) | st.builds(Rollback, st.just(0), st.integers(0, 12))


class RegistryMachine(RuleBasedStateMachine):
    """Calls the registry and the list alike."""

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="zoact-registry-"))
        self.stage = Stage(engine, self.root / "state")
        self.adapters: dict[str, History | None] = {}
        """By name; None before calibration."""

    def teardown(self) -> None:
        self.stage.stop()
        shutil.rmtree(self.root)

    @initialize()
    def begin(self) -> None:
        for name in NAMES:
            self.create(name)
            self.calibrate(name)

    @rule(name=st.sampled_from(NAMES))
    def create(self, name: str) -> None:
        ask = CreateAdapter(name=name, rank=2, sites=list(SITES), basis=BasisSpec(source="random"))
        if name in self.adapters:
            with pytest.raises(ApiError, match="exists already"):
                self.stage.run(self.stage.service.create(OPERATOR, ask))
            return
        self.stage.run(self.stage.service.create(OPERATOR, ask))
        self.adapters[name] = None

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 3))
    def bring(self, name: str, seed: int) -> None:
        if name in self.adapters:
            with pytest.raises(ApiError, match="exists already"):
                self.stage.bring(name, seed)
            return
        self.adapters[name] = History(*self.stage.bring(name, seed))

    @rule(name=st.sampled_from(NAMES))
    def calibrate(self, name: str) -> None:
        calibration = self.stage.service.calibrate(OPERATOR, name, Calibrate())
        if name not in self.adapters or self.adapters[name] is not None:
            with pytest.raises(ApiError, match=r"there is no adapter|has been taken"):
                self.stage.run(calibration)
            return
        self.stage.run(calibration)
        layout = self.stage.registry.adapter(name).layout
        self.adapters[name] = History(layout, [np.zeros(layout.size, np.float32)])

    @rule(
        name=st.sampled_from(NAMES),
        change=CHANGES,
        key=st.none() | st.sampled_from("xyz"),
        lag=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def change(self, name: str, change: Change, key: str | None, lag: int) -> None:
        history = self.adapters.get(name)
        if history is None:
            with pytest.raises(ApiError, match=r"there is no adapter|no basis yet"):
                self.stage.change(name, change)
            return
        change = replace(change, base_version=max(0, history.newest + lag), key=key)
        if key in history.keys:
            written, version = history.keys[key]
            if written == change:
                assert self.stage.change(name, change) == (version, history.digest(version), False)
            else:
                with pytest.raises(ApiError, match="another change was sent under this key"):
                    self.stage.change(name, change)
        elif change.base_version != history.newest:
            with pytest.raises(ApiError, match="nothing changed") as stale:
                self.stage.change(name, change)
            assert stale.value.extra == {"current_version": history.newest}
        elif isinstance(change, Rollback) and change.to_version > history.newest:
            with pytest.raises(ApiError, match="no version"):
                self.stage.change(name, change)
        else:
            self.make(name, history, change)

    def make(self, name: str, history: History, change: Change) -> None:
        history.flats.append(history.after(change))
        version = history.newest
        if change.key is not None:
            history.keys[change.key] = (change, version)
        assert self.stage.change(name, change) == (version, history.digest(version), True)

    @precondition(lambda self: any(self.adapters.values()))
    @rule(data=st.data(), changes=st.lists(CHANGES, min_size=1, max_size=6), key=st.none() | st.sampled_from("xyz"))
    def train(self, data: st.DataObject, changes: list[Change], key: str | None) -> None:
        """A run of changes, the last of which is sent twice if it has a key."""
        name, history = data.draw(st.sampled_from([(n, h) for n, h in self.adapters.items() if h is not None]))
        for change in changes:
            change = replace(change, base_version=history.newest)
            if isinstance(change, Rollback):
                change = replace(change, to_version=min(change.to_version, history.newest))
            self.make(name, history, change)
        if key is not None and key not in history.keys:
            last = replace(changes[-1], base_version=history.newest, key=key)
            if isinstance(last, Rollback):
                last = replace(last, to_version=min(last.to_version, history.newest))
            self.make(name, history, last)
            assert self.stage.change(name, last) == (history.newest, history.digest(history.newest), False)

    @precondition(lambda self: any(self.adapters.values()))
    @rule(data=st.data(), change=CHANGES, keyed=st.booleans(), done=st.booleans(), again=st.booleans())
    def change_while_the_engine_fails(
        self, data: st.DataObject, change: Change, keyed: bool, done: bool, again: bool
    ) -> None:
        name, history = data.draw(st.sampled_from([(n, h) for n, h in self.adapters.items() if h is not None]))
        key = f"unused-{history.newest}" if keyed else None
        change = replace(change, base_version=history.newest, key=key)
        if isinstance(change, Rollback):
            change = replace(change, to_version=min(change.to_version, history.newest))
        history.flats.append(history.after(change))
        made = (history.newest, history.digest(history.newest), False)
        if key is not None:
            history.keys[key] = (change, history.newest)
        with self.stage.failing("hold", done, version=history.newest), pytest.raises(Broken):
            self.stage.change(name, change)
        if again:
            with self.stage.failing("put", done), pytest.raises(ApiError) as failed:
                self.stage.read(name, 0)
            assert (failed.value.status, failed.value.code) == (500, "adapter_failed")
            assert self.stage.registry.adapter(name).info().state == "failed"
        if key is not None:
            assert self.stage.change(name, change) == made
        else:
            np.testing.assert_array_equal(self.stage.read(name, history.newest), history.flats[-1])

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def read_any_version(self, name: str, data: st.DataObject) -> None:
        history = self.adapters.get(name)
        if history is not None:
            version = data.draw(st.integers(0, history.newest))
            np.testing.assert_array_equal(self.stage.read(name, version), history.flats[version])

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        if name in self.adapters:
            self.stage.run(self.stage.service.delete(name))
            del self.adapters[name]

    @rule()
    def restart(self) -> None:
        self.stage.stop()
        self.stage.start()

    @rule()
    def crash(self) -> None:
        self.stage.kill()
        self.stage.start()

    @rule(number=st.integers(0, 20), place=st.integers(0, 10_000), cut=st.booleans())
    def crash_and_damage_a_snapshot(self, number: int, place: int, cut: bool) -> None:
        self.stage.kill()
        # One that was cut off before its first byte cannot be damaged further.
        found = sorted(p for p in self.stage.directory.glob("snapshots/*/*.safetensors") if p.stat().st_size)
        if found:
            path = found[number % len(found)]
            content = bytearray(path.read_bytes())
            place %= len(content)
            content[place] ^= 0x10
            path.write_bytes(content[:place] if cut else content)
        self.stage.start()

    @invariant()
    def is_as_it_was_told(self) -> None:
        found = {adapter.row.name: adapter for adapter in self.stage.registry.all()}
        assert found.keys() == self.adapters.keys()
        for name, history in self.adapters.items():
            info = found[name].info()
            if history is None:
                assert (info.state, info.version, info.digest) == ("new", 0, None)
            else:
                newest = history.newest
                assert (info.state, info.version, info.digest) == ("ready", newest, history.digest(newest))


def test_the_registry_is_a_list_of_arrays(engine: TransformersEngine) -> None:
    often = settings(max_examples=30, stateful_step_count=30)
    make: Any = partial(RegistryMachine, engine)
    run_state_machine_as_test(make, settings=often)


@pytest.fixture
def stage(engine: TransformersEngine, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(engine, tmp_path / "state")
    yield stage
    stage.stop()


def make_adapter(stage: Stage, name: str) -> None:
    ask = CreateAdapter(name=name, rank=2, sites=list(SITES), basis=BasisSpec(source="random"))
    stage.run(stage.service.create(OPERATOR, ask))
    stage.run(stage.service.calibrate(OPERATOR, name, Calibrate()))


@pytest.mark.parametrize("damage", ["changed", "torn", "missing"])
@pytest.mark.parametrize("kind", ["bases", "imports"])
def test_a_damaged_file_costs_its_adapter_and_no_other(stage: Stage, kind: str, damage: str) -> None:
    stage.bring("acme/a")
    (path,) = (stage.directory / kind).iterdir()
    make_adapter(stage, "acme/b")
    stage.kill()
    path = stage.directory / kind / path.name
    content = path.read_bytes()
    if damage == "changed":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    # They would do in place of what is on disk.
    shutil.rmtree(stage.directory / "snapshots", ignore_errors=True)
    stage.start()
    states = {adapter.row.name: adapter.info().state for adapter in stage.registry.all()}
    assert states == {"acme/a": "failed", "acme/b": "ready"}
    with pytest.raises(ApiError) as failed:
        stage.change("acme/a", Update(0, ()))
    assert (failed.value.status, failed.value.code) == (500, "adapter_failed")
    assert stage.change("acme/b", Update(0, ((1, 0.5),)))[0] == 1
    stage.run(stage.service.delete("acme/a"))
    assert not list((stage.directory / "imports").iterdir())


def test_an_adapter_that_failed_is_mended_behind_those_who_read_it(stage: Stage) -> None:
    stage.bring("acme/a")
    registry, engine = stage.registry, stage._engine

    async def read_through_a_failure() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        adapter = await registry.calibrated("acme/a")
        async with registry.at(adapter, 0) as point:
            before = await engine.read(point.key, 0)
            with stage.failing("hold", done=False), pytest.raises(Broken):
                async with registry.changing("acme/a"):
                    await registry.change(adapter, Update(0, ((1, 0.5),)))
            assert adapter.info().state == "failed"
            mending = asyncio.create_task(registry.calibrated("acme/a"))
            late = asyncio.create_task(stage.read_later("acme/a", 0))
            for _ in range(10):
                await asyncio.sleep(0)
            after = await engine.read(point.key, 0)
            assert (mending.done(), late.done()) == (False, False)
        assert (await mending).version == 1
        np.testing.assert_array_equal(await late, before)
        return before, after

    np.testing.assert_array_equal(*stage.run(read_through_a_failure()))


@pytest.mark.parametrize("method", ["put", "hold"])
def test_a_basis_that_could_not_be_loaded_is_there_once_it_can(stage: Stage, method: str) -> None:
    ask = CreateAdapter(name="acme/a", rank=2, sites=list(SITES), basis=BasisSpec(source="random"))
    stage.run(stage.service.create(OPERATOR, ask))
    with stage.failing(method, done=False):
        for call in (
            lambda: stage.run(stage.service.calibrate(OPERATOR, "acme/a", Calibrate())),
            lambda: stage.read("acme/a", 0),
            lambda: stage.change("acme/a", Update(0, ())),
        ):
            with pytest.raises(ApiError) as failed:
                call()
            assert (failed.value.status, failed.value.code) == (500, "adapter_failed")
            assert stage.registry.adapter("acme/a").info().state == "failed"
    assert not stage.read("acme/a", 0).any()
    info = stage.registry.adapter("acme/a").info()
    assert (info.state, info.version, info.digest is None) == ("ready", 0, False)
    assert stage.change("acme/a", Update(0, ((1, 0.5),)))[0] == 1


def test_what_the_device_has_no_room_for_is_refused_and_the_rest_serves(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = stage.bring("acme/a")
    for version in range(OLD_VERSIONS_KEPT + 2):
        stage.change("acme/a", Update(version, ((version, 0.5),)))
    monkeypatch.setattr(Room, "free", lambda room: BUFFERS_OF_UPDATE * 4 * layout.size)
    with pytest.raises(ApiError, match=r"left for adapters, 1 MiB are wanted: delete adapters") as refused:
        stage.bring("acme/b")
    assert (refused.value.status, refused.value.code) == (507, "no_room")
    assert [adapter.row.name for adapter in stage.registry.all()] == ["acme/a"]
    assert len(list((stage.directory / "bases").iterdir())) == 1
    newest = stage.change("acme/a", Update(OLD_VERSIONS_KEPT + 2, ((1, 0.5),)))[0]
    monkeypatch.setattr(Room, "free", lambda room: 0)
    late = Update(newest, ((2, 0.5),), key="late")
    for _ in range(2):
        with pytest.raises(ApiError) as refused:
            stage.change("acme/a", late)
        assert (refused.value.status, refused.value.code) == (507, "no_room")
        assert stage.registry.adapter("acme/a").info().version == newest
    with pytest.raises(ApiError) as refused:
        stage.read("acme/a", 1)
    assert (refused.value.status, refused.value.code) == (507, "no_room")
    assert stage.read("acme/a", newest).any()
    assert stage.registry.adapter("acme/a").info().state == "ready"
    monkeypatch.undo()
    assert stage.read("acme/a", 1).any()
    version, _, applied = stage.change("acme/a", late)
    assert (version, applied) == (newest + 1, True)
    stage.bring("acme/b")


def test_an_adapter_without_room_at_its_calibration_serves_once_there_is_some(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = CreateAdapter(name="acme/a", rank=2, sites=list(SITES), basis=BasisSpec(source="random"))
    stage.run(stage.service.create(OPERATOR, ask))
    monkeypatch.setattr(Room, "free", lambda room: 0)
    for call in (
        lambda: stage.run(stage.service.calibrate(OPERATOR, "acme/a", Calibrate())),
        lambda: stage.change("acme/a", Update(0, ())),
    ):
        with pytest.raises(ApiError) as refused:
            call()
        assert (refused.value.status, refused.value.code) == (507, "no_room")
    monkeypatch.undo()
    assert stage.change("acme/a", Update(0, ((1, 0.5),)))[0] == 1


def test_a_call_that_is_cancelled_in_mid_change_leaves_the_adapter_as_the_journal_has_it(stage: Stage) -> None:
    layout, (start,) = stage.bring("acme/a")
    update = Update(0, ((1, 0.5),))
    append = Journal.append

    async def cancel() -> None:
        begun, end = threading.Event(), threading.Event()

        def wait(*args: Any) -> int:
            begun.set()
            assert end.wait(20)
            return append(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "append", wait)
            async with stage.registry.changing("acme/a") as adapter:
                changing = asyncio.create_task(stage.registry.change(adapter, update))
                assert await asyncio.to_thread(begun.wait, 20)
                changing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await changing
            end.set()

    stage.run(cancel())
    np.testing.assert_array_equal(stage.read("acme/a", 0), start)
    assert stage.registry.adapter("acme/a").version == 1
    np.testing.assert_array_equal(stage.read("acme/a", 1), apply_update(start, layout, "rademacher", update))
    assert stage.change("acme/a", Update(1, ()))[0] == 2


@pytest.mark.parametrize("call", ["create", "import", "calibrate", "delete"])
def test_a_call_that_is_cancelled_in_its_commit_has_done_what_it_says(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    method = {"create": "add_adapter", "import": "add_adapter", "calibrate": "set_basis", "delete": "remove_adapter"}
    service, ask = stage.service, CreateAdapter(name="acme/a", rank=2, basis=BasisSpec(source="random"))
    if call == "calibrate":
        stage.run(service.create(OPERATOR, ask))
    elif call == "delete":
        stage.bring("acme/a")
    begun, end = threading.Event(), threading.Event()
    commit = getattr(Journal, method[call])

    def wait(*args: Any) -> None:
        begun.set()
        assert end.wait(20)
        commit(*args)

    async def cancel() -> None:
        calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "create": lambda: service.create(OPERATOR, ask),
            "import": lambda: stage.bring_later("acme/a"),
            "calibrate": lambda: service.calibrate(OPERATOR, "acme/a", Calibrate()),
            "delete": lambda: service.delete("acme/a"),
        }
        calling = asyncio.create_task(calls[call]())
        assert await asyncio.to_thread(begun.wait, 20)
        calling.cancel()
        await asyncio.sleep(0.05)
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await calling

    with monkeypatch.context() as patch:
        patch.setattr(Journal, method[call], wait)
        stage.run(cancel())
    expected = {"create": ["new"], "import": ["ready"], "calibrate": ["ready"], "delete": []}[call]
    for _ in range(2):
        assert [adapter.info().state for adapter in stage.registry.all()] == expected
        if expected == ["ready"]:
            stage.read("acme/a", 0)
        stage.stop()
        stage.start()


@pytest.mark.parametrize("stands", [False, True])
def test_a_commit_that_fails_may_yet_stand(stage: Stage, monkeypatch: pytest.MonkeyPatch, stands: bool) -> None:
    """Where what was written is in the file although the disk says that it failed, it counts once the server died."""
    stage.bring("acme/a")
    first, second = Update(0, ((1, 0.5),), key="first"), Update(1, ((2, 0.5),), key="second")
    stage.change("acme/a", first)

    def fail(method: str) -> None:
        stock = getattr(Journal, method)

        def failing(*args: Any) -> None:
            if stands:
                stock(*args)
            raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(Journal, method, failing)

    for method, call in (
        ("append", lambda: stage.change("acme/a", second)),
        ("add_adapter", lambda: stage.bring("acme/b", 1)),
    ):
        fail(method)
        with pytest.raises(ApiError, match=r"a change may stand all the same; it can be sent again") as failed:
            call()
        assert (failed.value.status, failed.value.code) == (503, "storage_failed")
    assert [(a.row.name, a.version, a.info().state) for a in stage.registry.all()] == [("acme/a", 1, "ready")]
    monkeypatch.undo()
    stage.kill()
    stage.start()
    found = [(a.row.name, a.version, a.info().state) for a in stage.registry.all()]
    assert found == ([("acme/a", 2, "ready"), ("acme/b", 0, "ready")] if stands else [("acme/a", 1, "ready")])
    assert len(list((stage.directory / "imports").iterdir())) == len(found)
    version, _, applied = stage.change("acme/a", second)
    assert (version, applied) == (2, not stands)


@pytest.mark.parametrize("fails", ["files", "engine"])
def test_a_deleted_adapter_is_gone_whatever_is_left_of_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    stage.bring("acme/a")

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    owner, method = (StateFiles, "remove") if fails == "files" else (stage._engine, "drop")
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, fail)
        stage.run(stage.service.delete("acme/a"))
    assert "acme/a" not in stage.registry
    assert list((stage.directory / "imports").iterdir())
    stage.bring("acme/a", 1)
    stage.stop()
    stage.start()
    assert len(list((stage.directory / "imports").iterdir())) == 1, "what was left goes at the next start"


def test_a_failure_keeps_nothing_that_its_frames_held(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.bring("acme/a")
    read = StateFiles.read_basis
    held: list[weakref.ref[Any]] = []

    def watch(*args: Any) -> Any:
        basis = read(*args)
        held.extend(weakref.ref(vectors) for vectors in basis.values())
        return basis

    monkeypatch.setattr(StateFiles, "read_basis", watch)
    stage.stop()
    with stage.failing("put", done=False):
        stage.start()
    assert stage.registry.adapter("acme/a").info().state == "failed"
    gc.collect()
    assert held
    assert not [vectors for vectors in held if vectors() is not None]


def test_a_history_that_is_deleted_while_it_is_read_is_not_empty(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.bring("acme/a")
    stage.change("acme/a", Update(0, ((1, 0.5),)))
    begun, end, remove = threading.Event(), threading.Event(), Journal.remove_adapter

    def wait(*args: Any) -> None:
        begun.set()
        assert end.wait(20)
        remove(*args)

    async def read_behind_a_deletion() -> None:
        deleting = asyncio.create_task(stage.service.delete("acme/a"))
        assert await asyncio.to_thread(begun.wait, 20)
        reading = asyncio.create_task(stage.service.journal("acme/a", 0, 10))
        await asyncio.sleep(0.05)
        end.set()
        await deleting
        with pytest.raises(ApiError) as gone:
            await reading
        assert (gone.value.status, gone.value.code) == (404, "adapter_not_found")

    monkeypatch.setattr(Journal, "remove_adapter", wait)
    stage.run(read_behind_a_deletion())


def test_another_adapters_coefficients_are_not_taken(stage: Stage) -> None:
    for seed, name in enumerate(NAMES):
        stage.bring(name, seed)
    first, second = sorted((stage.directory / "imports").iterdir())
    shutil.copy(first, second)
    stage.kill()
    stage.start()
    assert sorted(adapter.info().state for adapter in stage.registry.all()) == ["failed", "ready"]


def test_a_version_that_replays_to_something_else_is_never_read(stage: Stage) -> None:
    make_adapter(stage, "acme/a")
    for version in range(8):
        stage.change("acme/a", Update(version, ((version, 0.5),)))
    registry = stage.registry
    key = registry.adapter("acme/a").row.key
    stage.run(registry._journal(Journal.set_digest, key, 2, "sha256:other"))

    async def read() -> None:
        async with registry.at(await registry.calibrated("acme/a"), 2):
            pass

    for _ in range(2):
        with pytest.raises(ValueError, match="version 2 of acme/a replays to other coefficients"):
            stage.run(read())


def test_what_an_engine_let_go_of_before_it_failed_is_made_again(stage: Stage) -> None:
    stage.bring("acme/a")
    for version in range(8):
        stage.change("acme/a", Update(version, ((version, 0.5),)))
    before = stage.read("acme/a", 1)
    for version in range(2, 2 + OLD_VERSIONS_KEPT):
        stage.read("acme/a", version)
    with stage.failing("hold", done=True), pytest.raises(Broken):
        stage.read("acme/a", 6)
    np.testing.assert_array_equal(stage.read("acme/a", 1), before)


def test_a_pinned_version_stays_while_others_come_and_go(stage: Stage) -> None:
    make_adapter(stage, "acme/a")
    registry, engine = stage.registry, stage._engine

    async def read_through_changes() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        adapter = await registry.calibrated("acme/a")
        async with registry.at(adapter, adapter.version) as point:
            before = await engine.read(point.key, point.version)
            for version in range(8):
                async with registry.changing("acme/a"):
                    await registry.change(adapter, Update(version, ((version, 0.5),)))
                async with registry.at(adapter, version // 2):
                    pass
            return before, await engine.read(point.key, point.version)

    before, after = stage.run(read_through_changes())
    np.testing.assert_array_equal(before, after)
    # Nobody needs it any longer, so it goes with the next change or two.
    held = engine._store[registry.adapter("acme/a").row.key].versions
    stage.change("acme/a", Update(8, ()))
    assert len(held) <= 4


def test_of_many_versions_asked_for_at_once_few_are_held(stage: Stage) -> None:
    layout, flats = stage.bring("acme/a")
    newest = 2 * VERSIONS_READ_AT_ONCE
    for version in range(newest):
        change = Update(version, ((version, 0.5),))
        flats.append(apply_update(flats[-1], layout, "rademacher", change))
        stage.change("acme/a", change)
    registry, held = stage.registry, stage._engine._store[stage.registry.adapter("acme/a").row.key].versions
    inside: list[int] = []
    most = {"read": 0, "held": 0}

    async def read(adapter: Adapter, version: int, end: asyncio.Event) -> NDArray[np.float32]:
        async with registry.at(adapter, version) as point:
            inside.append(version)
            most["read"] = max(most["read"], len(set(inside)))
            most["held"] = max(most["held"], len(held))
            await end.wait()
            flat = await stage._engine.read(point.key, version)
            inside.remove(version)
        return flat

    async def crowd() -> list[NDArray[np.float32]]:
        adapter, end = await registry.calibrated("acme/a"), asyncio.Event()
        asked = [version for version in range(newest + 1) for _ in range(2)]
        readers = [asyncio.create_task(read(adapter, version, end)) for version in asked]
        while len(inside) < 2 * VERSIONS_READ_AT_ONCE:
            await asyncio.sleep(0.001)
        # Training does not wait for them.
        async with registry.changing("acme/a"):
            assert (await registry.change(adapter, Update(newest, ()))).applied
        end.set()
        return await asyncio.gather(*readers)

    for i, found in enumerate(stage.run(crowd())):
        np.testing.assert_array_equal(found, flats[i // 2])
    assert most["read"] == VERSIONS_READ_AT_ONCE
    assert most["held"] <= 1 + VERSIONS_READ_AT_ONCE + OLD_VERSIONS_KEPT + 1


@pytest.mark.parametrize(
    ("files", "method", "use"),
    [
        ("_files", "read_basis", lambda s: s.export_later("acme/a")),
        ("_files", "read_import", lambda s: s.read_later("acme/a", 0)),
        ("_files", "write_import", lambda s: s.bring_later("acme/c")),
        ("_files", "write_basis", lambda s: s.bring_later("acme/c")),
        ("_files", "remove", lambda s: s.service.delete("acme/a")),
        ("snapshots", "read", lambda s: s.read_later("acme/a", EVERY)),
    ],
)
def test_nobodys_files_hold_up_a_commit(
    stage: Stage, files: str, method: str, use: Callable[[Stage], Coroutine[Any, Any, Any]]
) -> None:
    stage.bring("acme/a")
    for version in range(2 * EVERY):
        stage.change("acme/a", Update(version, ((version, 0.5),)))
    make_adapter(stage, "umbra/a")
    # So that the engine holds nothing but the newest version.
    stage.stop()
    stage.start()
    owner = stage.registry._files if files == "_files" else stage.registry._files.snapshots
    function, begun, end = getattr(owner, method), threading.Event(), threading.Event()

    def wait(*args: Any) -> Any:
        begun.set()
        assert end.wait(20)
        return function(*args)

    async def change_meanwhile() -> None:
        using = asyncio.create_task(use(stage))
        try:
            assert await asyncio.to_thread(begun.wait, 30)
            async with stage.registry.changing("umbra/a") as adapter:
                result = await stage.registry.change(adapter, Update(0, ((1, 0.5),)))
            assert (result.version, using.done()) == (1, False)
        finally:
            end.set()
            await using

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, wait)
        stage.run(change_meanwhile())


@pytest.mark.parametrize("version", [0, 1])
def test_an_adapter_deleted_under_an_evaluation_that_fails_is_dropped(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    stage.bring("acme/a")
    stage.change("acme/a", Update(0, ((1, 0.5),)))
    held = stage._engine._store._adapters
    key = stage.registry.adapter("acme/a").row.key

    async def delete_meanwhile() -> None:
        begun, end = asyncio.Event(), asyncio.Event()

        async def fail(*_: Any) -> Any:
            begun.set()
            await end.wait()
            raise RuntimeError("out of memory")

        monkeypatch.setattr(stage._engine, "score", fail)
        ask = AskScores(rows=[CompletionRow(prompt=[0, 40], completion=[41])], version=version)
        scoring = asyncio.create_task(stage.service.scores(OPERATOR, "acme/a", ask))
        await begun.wait()
        await stage.service.delete("acme/a")
        assert key in held
        end.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            await scoring

    stage.run(delete_meanwhile())
    assert key not in held


def test_what_a_killed_server_left_behind_is_removed(stage: Stage) -> None:
    make_adapter(stage, "acme/a")
    for version in range(EVERY):
        stage.change("acme/a", Update(version, ()))
    stage.stop()
    there = set(stage.directory.rglob("*.safetensors"))
    key = next(iter(there)).stem
    for left in (
        "bases/gone.safetensors",
        "imports/lost.safetensors",
        f"bases/{key}.safetensors.partial",
        "snapshots/gone/3.safetensors",
    ):
        (stage.directory / left).parent.mkdir(exist_ok=True)
        (stage.directory / left).touch()
    for snapshot in (stage.directory / "snapshots").glob("*/*.safetensors"):
        snapshot.with_name("9.safetensors.partial").touch()
    stage.start()
    assert {path for path in stage.directory.rglob("*") if ".safetensors" in path.name} == there
    assert [path.stem for path in (stage.directory / "snapshots").iterdir()] == [
        path.stem for path in (stage.directory / "bases").iterdir()
    ]


def test_one_directory_has_one_server(stage: Stage, engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match="another server uses"):
        Service(engine, stage.directory)


def test_adapters_of_another_model_are_not_served(stage: Stage, engine: TransformersEngine) -> None:
    make_adapter(stage, "acme/a")
    stage.stop()
    model = engine.model
    try:
        engine.model = replace(model, digest="sha256:another")
        with pytest.raises(ValueError, match=f"adapters of another model, such as acme/a: .*{model.digest}.*:another"):
            Service(engine, stage.directory)
    finally:
        engine.model = model
        stage.start()
