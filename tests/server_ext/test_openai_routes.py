"""What stands before vLLM's routes, with an app in vLLM's place that tells what it was given."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server_ext import openai_routes
from server_ext.engines.transformers import TransformersEngine
from server_ext.gate import Gate
from server_ext.packing import SCORED_ROWS
from server_ext.schemas import BasisSpec, Calibrate, CreateAdapter, TenantLimits, Update
from server_ext.service import Service
from server_ext.tenants import Tenants, calling, key_digest
from tests.server_ext.support import OPERATOR

T = TypeVar("T")

OPERATOR_KEY, VLLM_KEY = "sesame", "vllm's own"
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)
FORMS = ("", "@0", "@1", "@9", "@1+17*0.01", "@1-17*0.01")


class Models:
    """What vLLM's ``OpenAIServingModels`` is to the middleware."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, Any] = {"stock/lora": Namespace(lora_name="stock/lora")}

    def is_base_model(self, name: str) -> bool:
        return name == "base/model"

    def model_name(self, lora: Any = None) -> str:
        return "base/model" if lora is None else str(lora.lora_name)


class House:
    """A server with two tenants, each of which has an adapter ``tuned`` at version 2."""

    def __init__(self, engine: TransformersEngine, directory: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.models = Models()
        self.gate = Gate(Service(engine, directory), Tenants(directory / "tenants.sqlite", [key_digest(OPERATOR_KEY)]))
        self.keys = {tenant: self.gate.tenants.add(tenant, TenantLimits()) for tenant in ("acme", "umbra")}
        self.app = FastAPI()
        self.app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        self.app.add_api_route("/metrics", self.headers)
        self.streaming, self.go_on = asyncio.Event(), asyncio.Event()
        self.callers: list[str | None] = []

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    async def start(self) -> None:
        stub: Any = Namespace(lora_request=lambda point: Namespace(lora_name=point.name))
        openai_routes.install(self.app, self.gate, stub, self.models, VLLM_KEY)
        await self.gate.restore()
        service = self.gate.service
        for tenant in self.keys:
            name = f"{tenant}/tuned"
            await service.create(OPERATOR, CreateAdapter(name=name, rank=1, basis=BasisSpec(source="random")))
            await service.calibrate(OPERATOR, name, Calibrate())
            for version in range(2):
                await self.update(name, version)

    async def update(self, name: str, base: int) -> None:
        await self.gate.service.update(name, Update(base_version=base, terms=[(base, 0.1)]))

    async def complete(self, request: Request) -> Any:
        """The LoRA that vLLM would find; twice, with a wait between, if the answer is streamed."""
        content = await request.json()

        def found() -> dict[str, str]:
            self.callers.append(calling.get())
            table, name = self.models.lora_requests, content["model"]
            # As vLLM does it.
            lora = table[name] if name in table else None  # noqa: SIM401
            return {"lora": "" if lora is None else lora.lora_name, "model": self.models.model_name(lora)}

        async def stream() -> AsyncIterator[str]:
            yield found()["model"] + "\n"
            self.streaming.set()
            await self.go_on.wait()
            yield found()["model"] + "\n"

        return StreamingResponse(stream()) if content.get("stream") else JSONResponse(found())

    async def headers(self, request: Request) -> dict[str, str]:
        return dict(request.headers)

    def client(self, key: str | None) -> httpx.AsyncClient:
        headers = {} if key is None else {"authorization": f"Bearer {self.keys.get(key, key)}"}
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test", headers=headers)

    async def ask(
        self, key: str | None, model: Any, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        async with self.client(key) as client:
            return await client.post("/v1/completions", json={"model": model, **more}, headers=headers)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(str(tiny_model))


@pytest.fixture
def house(engine: TransformersEngine, tmp_path: Path) -> Iterator[House]:
    loop = asyncio.new_event_loop()
    house = House(engine, tmp_path, loop)
    house.run(house.start())
    yield house
    house.run(house.gate.drain())
    loop.close()


@pytest.mark.parametrize(
    ("model", "version", "probe", "served"),
    [
        ("acme/tuned", 2, "", "acme/tuned@2"),
        ("acme/tuned@2", 2, "", "acme/tuned@2"),
        ("acme/tuned@1", 1, "", "acme/tuned@1"),
        ("acme/tuned@0", 0, "", "acme/tuned@0"),
        ("acme/tuned@1+17*1e-2", 1, "+17*0.01", "acme/tuned@1+17*0.01"),
        ("acme/tuned@1-17*0.01", 1, "+17*-0.01", "acme/tuned@1-17*0.01"),
    ],
)
@pytest.mark.parametrize("key", ["acme", OPERATOR_KEY])
def test_a_name_stands_for_a_point(house: House, key: str, model: str, version: int, probe: str, served: str) -> None:
    answer = house.run(house.ask(key, model)).json()
    adapter = house.gate.service.registry.adapter("acme/tuned")
    assert answer["lora"].startswith(f"zoact:{adapter.row.key}@{version}.")
    assert answer["lora"].endswith(probe)
    assert answer["lora"].count("*") == bool(probe)
    assert answer["model"] == served


@pytest.mark.parametrize(
    ("model", "lora"), [("base/model", ""), ("stock/lora", "stock/lora"), ("a model", ""), (None, ""), (7, "")]
)
def test_other_models_are_vllms(house: House, model: Any, lora: str) -> None:
    for key in ("acme", OPERATOR_KEY):
        answer = house.run(house.ask(key, model))
        assert (answer.status_code, answer.json()["lora"]) == (200, lora)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_anothers_is_not_there(house: House, form: str) -> None:
    for theirs in ("umbra/tuned", "umbra/none", "acme/none"):
        answer = house.run(house.ask("acme", theirs + form))
        assert answer.json() == {"lora": "", "model": "base/model"}, "vLLM is left to say that it does not know it"


@pytest.mark.parametrize("adapter", ["acme/tuned", "umbra/tuned", "acme/none"])
def test_malformed_names_are_refused_whosever_they_are(house: House, adapter: str) -> None:
    answer = house.run(house.ask("acme", f"{adapter}@1+17"))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, "model", "invalid_request_error")


def test_versions_that_never_were_are_refused(house: House) -> None:
    for form in ("@3", "@3+17*0.01", f"@{10**19}"):
        answer = house.run(house.ask("acme", f"acme/tuned{form}"))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (404, "model", "version_not_found")


def test_an_adapter_without_a_basis_is_refused(house: House) -> None:
    house.run(house.gate.service.create(OPERATOR, CreateAdapter(name="acme/new")))
    answer = house.run(house.ask("acme", "acme/new"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "basis_missing")


def test_requests_under_way_keep_their_version(house: House) -> None:
    registry = house.gate.service.registry

    async def use_others(first: int) -> None:
        # An engine keeps the versions that were used last, in use or not: two others, then.
        for base in range(first, first + 3):
            await house.ask("acme", f"acme/tuned@{base - 1}")
            await house.update("acme/tuned", base)

    async def scene() -> tuple[str, set[int], set[int]]:
        asking = asyncio.create_task(house.ask("acme", "acme/tuned@1", stream=True))
        await house.streaming.wait()
        await use_others(3)
        # Another's request sees its own model, and what is streaming goes on with its own.
        assert (await house.ask("acme", "acme/tuned")).json()["model"] == "acme/tuned@6"
        during = set(registry.adapter("acme/tuned").digests)
        house.go_on.set()
        text = (await asking).text
        await use_others(6)
        return text, during, set(registry.adapter("acme/tuned").digests)

    house.run(house.update("acme/tuned", 2))
    text, during, after = house.run(scene())
    assert text.split() == ["acme/tuned@1", "acme/tuned@1"]
    assert 1 in during
    assert 1 not in after
    assert list(house.models.lora_requests) == ["stock/lora"]


@given(st.text().map("zoact_".__add__) | st.just(SCORED_ROWS), JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nobody_speaks_to_the_workers_in_the_engines_name(house: House, name: str, value: Any) -> None:
    for key in ("acme", OPERATOR_KEY):
        for arguments in ({name: value}, {"theirs": 1, name: value}):
            answer = house.run(house.ask(key, "base/model", vllm_xargs=arguments))
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", f"vllm_xargs.{name}")


def test_a_refusal_can_quote_half_a_character(house: House) -> None:
    async def ask() -> httpx.Response:
        async with house.client("acme") as client:
            body = json.dumps({"model": "base/model", "vllm_xargs": {"zoact_\ud800": 1}})
            return await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    answer = house.run(ask())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "vllm_xargs.zoact_\\ud800")


def test_no_websocket_gets_where_texts_are_asked_for(house: House) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {house.keys['acme']}".encode())]
    where = {"path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "", "query_string": b""}
    scope = {"type": "websocket", **where, "headers": headers, "extensions": {"websocket.http.response": {}}}
    house.run(house.app(scope, receive, send))
    assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", 404)


@given(JSON | st.dictionaries(st.text().filter(lambda name: not name.startswith("zoact_")), JSON))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_extra_arguments_are_vllms(house: House, arguments: Any) -> None:
    house.gate.tenants.change_limits("acme", TenantLimits(requests_per_minute=None))
    for key in ("acme", OPERATOR_KEY):
        assert house.run(house.ask(key, "base/model", vllm_xargs=arguments)).status_code == 200


@pytest.mark.parametrize("model", ["base/model", "acme/tuned"])
def test_the_engine_knows_whose_a_request_is_to_its_end(house: House, model: str) -> None:
    async def scene() -> list[str | None]:
        asking = asyncio.create_task(house.ask("acme", model, stream=True))
        await house.streaming.wait()
        for key in ("umbra", OPERATOR_KEY):
            await house.ask(key, "base/model")
        house.go_on.set()
        await asking
        assert calling.get() is None
        return house.callers

    assert house.run(scene()) == ["acme", "umbra", None, "acme"]


@pytest.mark.parametrize("priority", [-1, "-1", -3.0, "-5.0", -(2**63)])
def test_tenants_do_not_go_before_others(house: House, priority: Any) -> None:
    for asked in ({"priority": priority}, {"headers": {"x-vllm-priority": str(int(float(priority)))}}):
        answer = house.run(house.ask("acme", "base/model", **asked))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
        assert answer.json()["error"]["param"] in ("priority", "x-vllm-priority")
        assert house.run(house.ask(OPERATOR_KEY, "base/model", **asked)).status_code == 200


@pytest.mark.parametrize("priority", [0, 7, "first", None, [1]])
def test_other_priorities_are_vllms(house: House, priority: Any) -> None:
    assert house.run(house.ask("acme", "base/model", priority=priority)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/metrics", "/v1/nothing", "/nothing"])
def test_nobody_without_a_key_passes(house: House, path: str) -> None:
    async def ask(headers: dict[str, str]) -> int:
        async with house.client(None) as client:
            return (await client.get(path, headers=headers)).status_code

    digests = [key_digest(key) for key in (OPERATOR_KEY, *house.keys.values())]
    tried = ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {OPERATOR_KEY}", f"Bearer {VLLM_KEY}"]
    for header in [*tried, *(f"Bearer {digest}" for digest in digests)]:
        assert house.run(ask({"authorization": header})) == 401


def test_the_operator_passes_vllms_own_check(house: House) -> None:
    async def ask(key: str) -> httpx.Response:
        async with house.client(key) as client:
            return await client.get("/metrics")

    assert house.run(ask(OPERATOR_KEY)).json()["authorization"] == f"Bearer {VLLM_KEY}"
    refused = house.run(ask("acme"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")


def test_limits_hold(house: House) -> None:
    house.gate.tenants.change_limits("acme", TenantLimits(max_request_bytes=200, requests_per_minute=3))
    answer = house.run(house.ask("acme", "acme/tuned", padding=200 * "x"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert house.run(house.ask("acme", "acme/tuned")).status_code == 200
    assert house.run(house.ask("acme", "acme/tuned@99")).status_code == 404
    answer = house.run(house.ask("acme", "acme/tuned"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) > 0
    assert house.run(house.ask("umbra", "umbra/tuned")).status_code == 200


def test_a_server_that_stops_takes_no_more(house: House) -> None:
    house.run(house.gate.drain())
    answer = house.run(house.ask("acme", "base/model"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
