"""What a server counts, against the calls that were made."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from server_ext import gate as gate_module
from server_ext import metrics as metrics_module
from server_ext.engines.base import Slots
from server_ext.engines.transformers import TransformersEngine
from server_ext.gate import Gate
from server_ext.metrics import NOBODY, OPERATOR, OTHER, Metrics
from server_ext.routes import ADAPTER, PREFIX
from server_ext.schemas import AskLosses, BasisSpec, Calibrate, CreateAdapter, Update
from server_ext.service import Service
from server_ext.tenants import Tenants
from tests.server_ext.support import OPERATOR as OPERATOR_CALLER
from tests.server_ext.support import Figures, layout_of
from tests.support import CALL_TIMEOUT_S, KEY, ROWS, SLOTS, Server
from zoact_remote import Adapter, Basis, Client, Probe, RateLimited, StaleVersion
from zoact_remote import Update as ClientUpdate

PROBES = [Probe(seed, 0.1) for seed in range(3)]
_numbers = itertools.count()


@pytest.fixture
def adapter(client: Client) -> Adapter:
    """An adapter of a tenant that has no other."""
    adapter = client.create_adapter(f"metered-{next(_numbers)}/secret-name", rank=2, basis=Basis(source="random"))
    adapter.calibrate([])
    return adapter


def tenant_of(adapter: Adapter) -> str:
    return adapter.name.partition("/")[0]


# Servers --------------------------------------------------------------------------------------------------------------


def test_every_call_counts_once(server: Server, client: Client, adapter: Adapter) -> None:
    tenant, before = tenant_of(adapter), Figures.of(server)
    first = ClientUpdate(0, ((1, 0.1),), key="first")
    answers = [adapter.losses(ROWS, PROBES, base=True, update=first), adapter.losses(ROWS, PROBES[:1], update=first)]
    adapter.update(ClientUpdate(1, ((2, 0.1),)))
    with pytest.raises(StaleVersion):
        adapter.update(ClientUpdate(1, ((2, 0.1),)))
    adapter.rollback(1)
    adapter.scores(ROWS)
    after = Figures.of(server)

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    assert after("zoact_updates_total", tenant=tenant) == 2
    assert after("zoact_rollbacks_total", tenant=tenant) == 1
    assert after("zoact_probes_total", tenant=tenant) == len(PROBES) + 1
    assert after("zoact_training_tokens_total", tenant=tenant) == sum(answer.tokens for answer in answers)
    assert after("zoact_losses_seconds_count", tenant=tenant) == len(answers)
    pieces = after("zoact_evaluation_seconds_count", tenant=tenant)
    assert pieces == after("zoact_queueing_seconds_count", tenant=tenant) >= 2 * (len(PROBES) + 1) + 2
    assert grown("zoact_journal_append_seconds_count") == 3
    for path, status, number in (("/losses", "2xx", 2), ("/updates", "2xx", 1), ("/updates", "4xx", 1)):
        assert grown("zoact_calls_total", route=PREFIX + ADAPTER + path, status=status) == number
    assert grown("zoact_refusals_total", tenant=OPERATOR, code="stale_version") == 1

    held = after("zoact_versions_held", tenant=tenant)
    assert held >= 1
    assert after("zoact_coefficient_bytes", tenant=tenant) == held * 4 * layout_of(client, adapter).size
    assert after("zoact_adapters", tenant=tenant, state="ready") == 1
    assert after("zoact_calls_under_way", tenant=OPERATOR) == 0
    assert not any("secret-name" in value for _, labels in after for _, value in labels)

    adapter.delete()
    gone = Figures.of(server)
    assert [gone(f"zoact_{name}", tenant=tenant) for name in ("versions_held", "coefficient_bytes")] == [0, 0]
    assert gone("zoact_adapters", tenant=tenant, state="ready") == 0


@pytest.mark.parametrize("server", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)
def test_vllm_shows_its_own_and_ours(server: Server, adapter: Adapter) -> None:
    before = Figures.of(server)
    tokens = adapter.losses(ROWS, PROBES).tokens
    after = Figures.of(server)
    points = 2 * len(PROBES)
    assert after("zoact_training_tokens_total", tenant=tenant_of(adapter)) == tokens
    # A row is one request, or one for each of its choices but for what they share.
    assert sum(value for (name, _), value in after.items() if name == "vllm:prompt_tokens_total") >= tokens
    assert after("zoact_slots") == SLOTS
    assert after("zoact_slots_filled") == SLOTS
    assert after("zoact_slot_misses_total") - before("zoact_slot_misses_total") == points
    # They are in the memory behind the slots, which has twice the room.
    adapter.losses(ROWS, PROBES)
    assert Figures.of(server)("zoact_slot_misses_total") == after("zoact_slot_misses_total")


def test_figures_are_the_operators(server_with_key: Server) -> None:
    url = server_with_key.url

    def ask(key: str) -> requests.Response:
        return requests.get(f"{url}/metrics", headers={"authorization": f"Bearer {key}"}, timeout=CALL_TIMEOUT_S)

    with server_with_key.client(api_key=KEY) as operator:
        limits = {"requests_per_minute": 2}
        keys = {name: operator.tenants.add(name, limits) for name in ("metered-a", "metered-b")}
        for name, key in keys.items():
            with server_with_key.client(api_key=key) as client:
                client.create_adapter(f"{name}/secret-name").delete()
                with pytest.raises(RateLimited):
                    client.info()
        for key in (*keys.values(), "wrong", ""):
            answer = ask(key)
            assert answer.status_code == (403 if key in keys.values() else 401)
            assert answer.json()["error"]["code"] == ("operator_only" if key in keys.values() else "invalid_api_key")
            assert not any(name in answer.text for name in keys)
        figures = Figures.of(server_with_key, KEY)
        for name in keys:
            for code in ("rate_limited", "operator_only"):
                assert figures("zoact_refusals_total", tenant=name, code=code) == 1
            operator.tenants.remove(name)
        assert figures("zoact_refusals_total", tenant=NOBODY, code="invalid_api_key") >= 2


# In this process ------------------------------------------------------------------------------------------------------


class House:
    """A gate of its own, with an adapter ``acme/a``."""

    def __init__(self, engine: TransformersEngine, directory: Path) -> None:
        self.metrics = Metrics()
        service = Service(engine, directory, metrics=self.metrics)
        self.gate = Gate(service, Tenants(directory / "tenants.sqlite"))

    @property
    def service(self) -> Service:
        return self.gate.service

    def figures(self) -> Figures:
        return Figures.read(prometheus_client.generate_latest(self.metrics.registry).decode())

    async def train(self, updates: int) -> None:
        await self.gate.restore()
        await self.service.create(OPERATOR_CALLER, CreateAdapter(name="acme/a", basis=BasisSpec(source="random")))
        await self.service.calibrate(OPERATOR_CALLER, "acme/a", Calibrate())
        for version in range(updates):
            await self.service.update("acme/a", Update(base_version=version, terms=[(version, 0.1)]))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(str(tiny_model))


def test_a_start_counts_what_it_replays(engine: TransformersEngine, tmp_path: Path) -> None:
    async def run() -> None:
        first = House(engine, tmp_path)
        await first.train(3)
        await first.gate.drain()
        # What a full disk would have left out.
        shutil.rmtree(tmp_path / "snapshots")
        second = House(engine, tmp_path)
        await second.gate.restore()
        registry = second.service.registry
        async with registry.at(registry.adapter("acme/a"), 2):
            pass
        await second.gate.drain()
        figures = second.figures()
        assert figures("zoact_replayed_entries_total", when="start") == 3
        assert figures("zoact_replayed_entries_total", when="serving") == 2
        assert figures("zoact_restore_seconds") > 0
        assert figures("zoact_updates_total", tenant="acme") == 0
        assert first.figures()("zoact_updates_total", tenant="acme") == 3

    asyncio.run(run())


def test_calls_under_way_and_slots(engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    answer: asyncio.Future[Slots]

    async def slots() -> Slots:
        nonlocal asked
        asked += 1
        return await answer

    async def run() -> None:
        nonlocal answer
        answer = asyncio.get_running_loop().create_future()
        house = House(engine, tmp_path)
        await house.train(0)
        monkeypatch.setattr(engine, "slots", slots)
        monkeypatch.setattr(gate_module, "SLOTS_WITHIN_S", 0.01)
        with house.gate.call(OPERATOR_CALLER):
            await house.gate.measure()
            await house.gate.measure()
            assert asked == 1
            assert house.figures()("zoact_calls_under_way", tenant=OPERATOR) == 1
            assert house.figures()("zoact_slots") == 0
        answer.set_result(Slots(8, 5, 17))
        await house.gate.measure()
        figures = house.figures()
        assert figures("zoact_calls_under_way", tenant=OPERATOR) == 0
        assert [figures(f"zoact_{name}") for name in ("slots", "slots_filled", "slot_misses_total")] == [8, 5, 17]

        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(RuntimeError("the engine is gone"))
        await house.gate.measure()
        assert house.figures()("zoact_slots_filled") == 5
        await house.gate.drain()

    asyncio.run(run())


def test_counting_never_fails_a_call(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for kind, method in (("Counter", "inc"), ("Gauge", "set"), ("Histogram", "observe")):
        monkeypatch.setattr(getattr(prometheus_client, kind), method, fail)

    async def run() -> None:
        house = House(engine, tmp_path)
        await house.train(1)
        ask = AskLosses.model_validate({"rows": ROWS, "probes": [{"seed": 1, "epsilon": 0.1}]})
        assert (await house.service.losses(OPERATOR_CALLER, "acme/a", ask)).version == 1
        await house.gate.measure()
        house.metrics.answered("/route", 200, OPERATOR, None)
        await house.gate.drain()

    asyncio.run(run())
    assert "not counted" in capsys.readouterr().err


@given(tenants=st.lists(st.sampled_from("abcdefgh"), max_size=30), room=st.integers(0, 5))
def test_tenants_beyond_the_limit_share_a_label(tenants: list[str], room: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_module, "TENANTS_SHOWN", room)
        metrics = Metrics()
        for tenant in tenants:
            metrics.evaluated(tenant, 1, 2, 0.1)
            metrics.answered("/route", 429, OPERATOR, "rate_limited")
        metrics.measure([], Counter(tenants))
    figures = Figures.read(prometheus_client.generate_latest(metrics.registry).decode())
    apart = list(dict.fromkeys(tenants))[:room]
    assert figures.labels("tenant") <= {*apart, OTHER, OPERATOR}
    for name in ("zoact_probes_total", "zoact_calls_under_way"):
        assert {tenant: figures(name, tenant=tenant) for tenant in apart} == {t: tenants.count(t) for t in apart}
        assert figures(name, tenant=OTHER) == len(tenants) - sum(map(tenants.count, apart))


def test_registries_are_apart() -> None:
    one, other = Metrics(), Metrics(CollectorRegistry())
    one.evaluated("acme", 3, 4, 0.5)
    assert b'tenant="acme"' in prometheus_client.generate_latest(one.registry)
    assert b'tenant="acme"' not in prometheus_client.generate_latest(other.registry)


COUNTING = """
import os
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess
from server_ext.engines.base import Slots
from server_ext.metrics import Metrics
from zoact_remote import Update

metrics = Metrics(REGISTRY)
metrics.answered("/route", 429, "acme", "rate_limited")
metrics.changed("acme", Update(0, ()))
metrics.evaluated("acme", 3, 100, 0.5)
metrics.piece("acme", 0.1, 0.2)
metrics.replayed(5)
metrics.restored(2.0)
for calls in ({"acme": 2, "umbra": 1}, {"acme": 1}):
    metrics.measure([], calls)
metrics.measure_slots(Slots(8, 5, 17))
registry = REGISTRY
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_multiprocess_mode_says_the_same(tmp_path: Path) -> None:
    """Where vLLM's operator sets ``PROMETHEUS_MULTIPROC_DIR``, ``/metrics`` is read from files."""

    def count(**environment: str) -> Figures:
        done = subprocess.run(
            [sys.executable, "-c", COUNTING], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = Figures.read(done.stdout)
        ours = {s: v for s, v in found.items() if s[0].startswith("zoact_") and not s[0].endswith("_created")}
        # Files hold no series that was never set.
        return Figures({series: value for series, value in ours.items() if value})

    plain = count()
    assert [plain("zoact_calls_under_way", tenant=tenant) for tenant in ("acme", "umbra")] == [1, 0]
    assert count(PROMETHEUS_MULTIPROC_DIR=str(tmp_path)) == plain
