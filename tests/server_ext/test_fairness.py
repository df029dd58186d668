"""Fair sharing: of a queue that the tests work off by hand, and on a real server that one tenant floods."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from server_ext.app import create_app
from server_ext.engines.transformers import TransformersEngine
from server_ext.fairness import FairQueue
from server_ext.schemas import AskGeneration, AskScores, BasisSpec, Calibrate, CompletionRow, CreateAdapter
from server_ext.service import Service
from server_ext.tenants import Tenants
from tests.server_ext.support import OPERATOR
from tests.support import CALL_TIMEOUT_S
from zoact_remote import Client, Probe
from zoact_remote.cli.local_server import free_port

COSTS = st.integers(1, 12)
CAPACITIES = st.integers(1, 20)


@dataclass(eq=False)
class Piece:
    """A piece of work, which takes as long as it is wanted to."""

    tenant: str
    cost: int
    state: Literal["waiting", "under way", "done"] = "waiting"
    end: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Hall:
    """A queue, who waits in it and who has passed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.queue = FairQueue(capacity)
        self.pieces: list[Piece] = []
        self.admitted: list[Piece] = []

    def those(self, state: str) -> list[Piece]:
        return [piece for piece in self.pieces if piece.state == state]

    async def submit(self, tenant: str, cost: int) -> Piece:
        piece = Piece(tenant, cost)

        async def work() -> None:
            try:
                async with self.queue.turn(tenant, cost):
                    piece.state = "under way"
                    self.admitted.append(piece)
                    await piece.end.wait()
            finally:
                piece.state = "done"

        piece.task = asyncio.create_task(work())
        self.pieces.append(piece)
        await self._settle()
        return piece

    async def finish(self, piece: Piece) -> None:
        piece.end.set()
        await self._settle()

    async def cancel(self, piece: Piece) -> None:
        assert piece.task is not None
        piece.task.cancel()
        await self._settle()

    async def finish_all(self) -> None:
        while under_way := self.those("under way"):
            await self.finish(under_way[0])

    async def _settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)
        under_way = self.those("under way")
        assert sum(piece.cost for piece in under_way) <= self.capacity or len(under_way) == 1
        assert under_way or not self.those("waiting"), "work waits though nobody is at it"


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


STEPS = st.lists(
    st.tuples(st.just("submit"), st.sampled_from("abc"), COSTS)
    | st.tuples(st.sampled_from(["finish", "cancel"]), st.just(""), st.integers(0, 50)),
    max_size=40,
)


@given(CAPACITIES, STEPS)
def test_everybody_gets_through_and_nothing_is_leaked(capacity: int, steps: list[tuple[str, str, int]]) -> None:
    async def go() -> None:
        hall = Hall(capacity)
        cancelled = []
        for step, tenant, number in steps:
            there = hall.those("under way") if step == "finish" else [p for p in hall.pieces if p.state != "done"]
            if step == "submit":
                await hall.submit(tenant, number)
            elif there and step == "finish":
                await hall.finish(there[number % len(there)])
            elif there:
                cancelled.append(there[number % len(there)])
                await hall.cancel(cancelled[-1])
        await hall.finish_all()
        assert {p for p in hall.pieces if p not in hall.admitted} <= set(cancelled)
        assert not hall.those("waiting")
        # As if nobody had ever been there.
        assert vars(hall.queue) | {"_order": None} == vars(FairQueue(capacity)) | {"_order": None}

    run(go())


@given(CAPACITIES, st.lists(st.lists(COSTS, max_size=15), min_size=1, max_size=3), COSTS, st.integers(0, 20))
def test_who_comes_new_waits_for_one_piece_of_everybody_else(
    capacity: int, floods: list[list[int]], cost: int, before: int
) -> None:
    async def go() -> None:
        hall = Hall(capacity)
        for number, flood in enumerate(floods):
            for each in flood:
                await hall.submit(f"flooder {number}", each)
        for _ in range(before):
            if under_way := hall.those("under way"):
                await hall.finish(under_way[0])
        ahead = len(hall.admitted)
        light = await hall.submit("light", cost)
        await hall.finish_all()
        overtakers = Counter(p.tenant for p in hall.admitted[ahead : hall.admitted.index(light)])
        assert all(count == 1 for count in overtakers.values()), overtakers

    run(go())


@given(CAPACITIES, st.lists(COSTS, min_size=1, max_size=25), st.lists(COSTS, min_size=1, max_size=25))
def test_those_who_always_wait_get_the_same(capacity: int, one: list[int], other: list[int]) -> None:
    async def go() -> None:
        hall = Hall(capacity)
        # Held up until all stand in the queue.
        first = await hall.submit("", capacity)
        for cost in one:
            await hall.submit("one", cost)
        for cost in other:
            await hall.submit("other", cost)
        await hall.finish(first)
        await hall.finish_all()
        left = {"one": len(one), "other": len(other)}
        got: Counter[str] = Counter()
        for piece in hall.admitted[1:]:
            got[piece.tenant] += piece.cost
            left[piece.tenant] -= 1
            if min(left.values()) > 0:
                # Goyal, Vin and Cheng, "Start-time fair queueing", 1996, theorem 1.
                assert abs(got["one"] - got["other"]) <= max(one) + max(other)

    run(go())


@given(CAPACITIES, st.lists(COSTS, min_size=1, max_size=8), COSTS, COSTS)
def test_who_gives_up_has_paid_nothing(capacity: int, given_up: list[int], one: int, other: int) -> None:
    async def go() -> None:
        hall = Hall(capacity)
        first = await hall.submit("", capacity)
        for piece in [await hall.submit("one", cost) for cost in given_up]:
            await hall.cancel(piece)
        mine, theirs = await hall.submit("one", one), await hall.submit("other", other)
        await hall.finish(first)
        await hall.finish_all()
        assert hall.admitted == [first, mine, theirs], "first come, first served"

    run(go())


def test_a_piece_that_exceeds_the_capacity_passes_alone() -> None:
    async def go() -> None:
        hall = Hall(4)
        small = await hall.submit("a", 1)
        large = await hall.submit("b", 100)
        after = await hall.submit("c", 1)
        assert [p.state for p in (small, large, after)] == ["under way", "waiting", "waiting"]
        await hall.finish(small)
        assert [p.state for p in (large, after)] == ["under way", "waiting"]
        await hall.finish(large)
        assert after.state == "under way"
        await hall.finish(after)

    run(go())


def test_nobody_waits_for_one_who_has_given_up() -> None:
    async def go() -> None:
        hall = Hall(4)
        small, large, after = [await hall.submit(name, cost) for name, cost in (("a", 1), ("b", 100), ("c", 1))]
        await hall.cancel(large)
        assert after.state == "under way"
        for piece in (small, after):
            await hall.finish(piece)

    run(go())


ROWS = [{"prompt": [5] * 200, "completion": [seed] * 4} for seed in range(10)]
PROBES = [Probe(seed, 0.01) for seed in range(6)]


@pytest.fixture
def url(tiny_model: Path, tmp_path: Path) -> Iterator[str]:
    """A server that takes ten of the rows at once: few, so that a flood need not be large."""
    engine = TransformersEngine(str(tiny_model))
    engine.tokens_at_once = 10 * 204
    port = free_port()
    app = create_app(engine, tmp_path / "state", Tenants(tmp_path / "tenants.sqlite"))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(60)


def test_a_flood_does_not_hold_up_the_others(url: str) -> None:
    with Client(url, timeout=CALL_TIMEOUT_S, retries=20) as client, ThreadPoolExecutor(4) as pool:
        flooder, light = (client.create_adapter(f"{name}/model", rank=2) for name in ("flooder", "light"))
        for adapter in (flooder, light):
            adapter.calibrate(ROWS[:2])
        # Four hundred and eighty pieces of work.
        calls = [pool.submit(flooder.losses, ROWS, PROBES) for _ in range(4)]
        light.scores(ROWS[:1])
        light.losses(ROWS[:1], PROBES[:1])
        assert not any(call.done() for call in calls)
        one, *others = (call.result(300) for call in calls)
        for other in others:
            for mine, same in zip(one.losses, other.losses, strict=True):
                assert (mine.plus, mine.minus) == pytest.approx((same.plus, same.minus), abs=1e-5)


def test_nobody_waits_for_texts_to_end_before_they_train(tiny_model: Path, tmp_path: Path) -> None:
    engine: Any = TransformersEngine(str(tiny_model))
    generate, may_end = engine.generate, asyncio.Event()

    async def slow_generate(*args: Any) -> Any:
        await may_end.wait()
        return await generate(*args)

    async def go() -> None:
        service = Service(engine, tmp_path)
        await service.create(OPERATOR, CreateAdapter(name="acme/a", rank=1, basis=BasisSpec(source="random")))
        await service.calibrate(OPERATOR, "acme/a", Calibrate())
        # More of them than the engine takes at once.
        engine.generate = slow_generate
        ask = AskGeneration(prompt=[5] * 100, max_tokens=100)
        texts = [asyncio.create_task(service.generate("acme/a", ask)) for _ in range(2 + engine.tokens_at_once // 200)]
        await asyncio.sleep(0)
        row = CompletionRow(prompt=[5], completion=[6])
        await asyncio.wait_for(service.scores(OPERATOR, "acme/a", AskScores(rows=[row])), 60)
        assert not any(text.done() for text in texts)
        may_end.set()
        await asyncio.gather(*texts[:1])
        for text in texts:
            text.cancel()
        await asyncio.gather(*texts, return_exceptions=True)
        await service.registry.close()

    run(go())


def test_a_calibration_takes_its_turn_by_all_its_passes(tiny_model: Path, tmp_path: Path) -> None:
    """It is charged for: who calibrates much waits for others afterwards."""
    engine: Any = TransformersEngine(str(tiny_model))
    row = CompletionRow(prompt=[5] * 100, completion=[6])
    engine.tokens_at_once = 2 * 100
    calibrate, score = engine.calibrate, engine.score
    order: list[str] = []
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow_calibrate(*args: Any) -> Any:
        begun.set()
        await may_end.wait()
        order.append("calibration")
        return await calibrate(*args)

    async def watched_score(*args: Any) -> Any:
        order.append("score")
        return await score(*args)

    async def go() -> None:
        service = Service(engine, tmp_path)
        for name, source in (("acme/new", "activations"), ("umbra/tuned", "random")):
            basis = BasisSpec(source=source, passes=2)
            await service.create(OPERATOR, CreateAdapter(name=name, rank=1, basis=basis))
        await service.calibrate(OPERATOR, "umbra/tuned", Calibrate())
        engine.calibrate, engine.score = slow_calibrate, watched_score
        calibrating = asyncio.create_task(service.calibrate(OPERATOR, "acme/new", Calibrate(rows=[row])))
        await begun.wait()
        scoring = asyncio.create_task(service.scores(OPERATOR, "umbra/tuned", AskScores(rows=[row])))
        done, _ = await asyncio.wait([scoring], timeout=0.5)
        assert not done, "two passes of one row are all that the engine takes at once"
        may_end.set()
        await asyncio.gather(calibrating, scoring)
        await service.registry.close()

    run(go())
    assert order == ["calibration", "score"]
