"""Tenants, their limits and the names of their models in vLLM's own routes.

vLLM knows one kind of key, guards some of its prefixes with it, and shows every LoRA to everybody. So what comes in
passes here first:

- ``OPEN`` routes answer anybody.
- ``TEXT`` routes and ``/v1/models`` answer tenants, each with the base model, the LoRAs that the operator gave vLLM
  itself, and the tenant's own adapters.
- All others, such as ``/metrics``, ``/v1/load_lora_adapter`` and stored responses, answer the operator alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from server_ext.adapters import Adapter
from server_ext.errors import ApiError, invalid
from server_ext.gate import Gate, error_response, internal_error, label_of, limited, request_id_of
from server_ext.lanes import FOREGROUND
from server_ext.logs import log
from server_ext.metrics import OTHER
from server_ext.model_names import ModelName
from server_ext.routes import PREFIX
from server_ext.tenants import Caller

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from server_ext.engines.vllm import VllmEngine

OPEN = frozenset({"/health", "/ping", "/version", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})
TEXT = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/tokenize",
        "/detokenize",
    }
)
MODELS = "/v1/models"
METRICS = "/metrics"
PRIORITY_HEADER = "x-vllm-priority"
WHOLE_NUMBER = TypeAdapter(int)
STORED = ("background", "previous_response_id")
"""Members of a request to ``/v1/responses`` that speak of other responses."""
WORKERS_OWN = "zoact_"
"""Extra arguments of such names are what the engine tells its own workers."""


@dataclass(frozen=True)
class Asked:
    """The model of ours that a request is for.

    Attributes:
        name: as the request has it.
        served: with the version that answers.
        lora: what vLLM knows it by.

    """

    name: str
    served: str
    lora: LoRARequest


_asked: ContextVar[Asked | None] = ContextVar("zoact_asked", default=None)


class ModelTable(dict[str, "LoRARequest"]):
    """vLLM's table of LoRAs by model name, in which a request for a model of ours finds that one too.

    Nothing of ours is held in it: every request brings its own entry, which nobody else sees and which cannot go stale.
    """

    def __contains__(self, name: object) -> bool:
        asked = _asked.get()
        return super().__contains__(name) or (asked is not None and name == asked.name)

    def __missing__(self, name: str) -> LoRARequest:
        asked = _asked.get()
        if asked is None or name != asked.name:
            raise KeyError(name)
        return asked.lora


class OpenAIRoutes:
    """ASGI middleware around all of vLLM's app.

    Args:
        app: what it stands around.
        gate: of the server.
        engine: of the server.
        models: vLLM's ``OpenAIServingModels``, which all of its routes share.
        key: one that vLLM's own check lets in; None if it has none.

    """

    def __init__(self, app: ASGIApp, gate: Gate, engine: VllmEngine, models: Any, key: str | None) -> None:
        self._app = app
        self._inner = app if key is None else _with_key(app, key)
        self._gate = gate
        self._engine = engine
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return await self._app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN or path.startswith(f"{PREFIX}/"):
            return await self._app(scope, receive, send)
        connection = HTTPConnection(scope)
        request_id = request_id_of(connection)
        started = time.perf_counter()
        outcome: dict[str, Any] = {"status": None}
        caller: Caller | None = None

        async def answer(message: Message) -> None:
            if message["type"].endswith("response.start"):
                outcome["status"] = message["status"]
            await send(message)

        async with AsyncExitStack() as stack:
            stack.enter_context(bound_contextvars(request_id=request_id))
            try:
                caller = self._gate.tenants.identify(connection.headers.get("authorization", ""))
                stack.enter_context(bound_contextvars(tenant=caller.tenant))
                app, receive = await self._enter(caller, path, scope, receive, stack)
            except ApiError as error:
                app = error_response(error, request_id)
                outcome |= {"code": error.code, "param": error.param}
            except ClientDisconnect:
                return None
            except Exception:
                app = internal_error(path, request_id)
            try:
                await app(scope, receive, answer)
            finally:
                seconds = round(time.perf_counter() - started, 4)
                log.info("call", method=scope.get("method"), route=path, seconds=seconds, **outcome)
                if outcome["status"] is not None:
                    self._gate.service.metrics.answered(
                        _route(path), outcome["status"], label_of(caller), outcome.get("code")
                    )

    async def _enter(
        self, caller: Caller, path: str, scope: Scope, receive: Receive, stack: AsyncExitStack
    ) -> tuple[ASGIApp, Receive]:
        """What answers a caller on a path, and from where it reads the body. The stack is closed after the answer.

        Raises:
            ApiError: the call is refused.

        """
        listing = scope.get("method") == "GET" and (path == MODELS or path.startswith(f"{MODELS}/"))
        if not listing and path not in TEXT:
            if caller.tenant is not None:
                raise ApiError(403, "operator_only", f"{path} is for the operator's key")
            if path.startswith(METRICS):
                await self._gate.measure()
            return self._inner, receive
        if scope["type"] != "http":
            raise ApiError(404, "not_found", f"{path} takes no websockets")
        stack.enter_context(self._gate.call(caller))
        if listing:
            one = path.removeprefix(MODELS).removeprefix("/")
            return JSONResponse(await (self._card(caller, one) if one else self._list(caller))), receive
        body = await limited(Request(scope, receive), caller.limits.max_request_bytes).body()
        content = _json_object(body)
        _check_extra_arguments(content.get("vllm_xargs"))
        if caller.tenant is not None:
            _check_priority(content.get("priority"), "priority")
            _check_priority(Headers(scope=scope).get(PRIORITY_HEADER), PRIORITY_HEADER)
        name = content.get("model")
        ours = isinstance(name, str) and await self._serve(caller, name, stack)
        if path == "/v1/responses" and (ours or caller.tenant is not None):
            for member in STORED:
                if content.get(member):
                    # vLLM keeps responses of all tenants together, and a version is held for as long as a call.
                    raise invalid(member, "responses are not stored for tenants, nor for tuned models")
        return self._inner, _replay(body, receive)

    async def _find(self, caller: Caller, name: str) -> tuple[ModelName, Adapter] | None:
        """The model of ours that a name stands for, with its version; None for a name that is left to vLLM.

        Raises:
            ApiError: it is malformed (400), never had that version (404), or cannot be served (409, 500).

        """
        if self._models.is_base_model(name) or name in self._models.lora_requests:
            return None
        wanted = ModelName.parse(name)
        registry = self._gate.service.registry
        # One that is not the caller's goes the way of one that is not there.
        if wanted is None or not caller.owns(wanted.adapter) or wanted.adapter not in registry:
            return None
        adapter = await registry.calibrated(wanted.adapter)
        return replace(wanted, version=registry.existing(adapter, wanted.version, "model")), adapter

    async def _serve(self, caller: Caller, name: str, stack: AsyncExitStack) -> bool:
        """Has vLLM find a model of ours under its name, and holds its version; False for a name that is vLLM's."""
        found = await self._find(caller, name)
        if found is None:
            return False
        model, adapter = found
        assert model.version is not None
        stack.enter_context(bound_contextvars(adapter=model.adapter, version=model.version))
        point = await stack.enter_async_context(self._gate.service.registry.at(adapter, model.version))
        if model.probe is not None:
            point = replace(point, seed=model.probe.seed, epsilon=model.probe.sign * model.probe.epsilon)
        lora = self._engine.lora_request(point)
        assert lora is not None
        stack.callback(_asked.reset, _asked.set(Asked(name, str(model), lora)))
        return True

    async def _list(self, caller: Caller) -> dict[str, Any]:
        """``/v1/models`` as vLLM answers it, with the caller's adapters behind."""
        listed: dict[str, Any] = (await self._models.show_available_models()).model_dump()
        base = listed["data"][0]
        for adapter in self._gate.service.registry.all():
            if caller.owns(adapter.row.name) and adapter.info().state == "ready":
                newest = str(ModelName(adapter.row.name, adapter.version))
                listed["data"].append(_card(base, adapter.row.name, newest, adapter))
        return listed

    async def _card(self, caller: Caller, name: str) -> dict[str, Any]:
        """One model. Raises ApiError (404) if the caller has none of that name."""
        listed: list[dict[str, Any]] = (await self._models.show_available_models()).model_dump()["data"]
        for card in listed:
            if card["id"] == name:
                return card
        found = await self._find(caller, name)
        if found is None:
            raise ApiError(404, "model_not_found", f"model: there is no model {name!r}", "model")
        model, adapter = found
        return _card(listed[0], name, str(model), adapter)


def install(app: FastAPI, gate: Gate, engine: VllmEngine, models: Any, key: str | None) -> None:
    """Puts the middleware around vLLM's app and the names into its models, before the server listens.

    vLLM resolves names in the table of an instance that its routes share, and answers with the name that this instance
    gives a LoRA. There is no other door for names that differ by caller and change with every update.
    """
    models.lora_requests = ModelTable(models.lora_requests)
    stock_name = models.model_name

    def model_name(lora_request: LoRARequest | None = None) -> str:
        asked = _asked.get()
        if asked is not None and lora_request is asked.lora:
            return asked.served
        return str(stock_name(lora_request))

    models.model_name = model_name
    # Around what vLLM has built already, its own check of keys included.
    inner = app.middleware_stack or app.build_middleware_stack()
    app.middleware_stack = OpenAIRoutes(inner, gate, engine, models, key)


def _route(path: str) -> str:
    """A path as a label of metrics, of which there are few."""
    return MODELS if path.startswith(f"{MODELS}/") else path if path in {*TEXT, MODELS, METRICS} else OTHER


def _with_key(app: ASGIApp, key: str) -> ASGIApp:
    """An app that is asked with a key in place of the caller's: vLLM's own check does not know tenants."""

    async def ask(scope: Scope, receive: Receive, send: Send) -> None:
        headers = MutableHeaders(raw=list(scope["headers"]))
        headers["authorization"] = f"Bearer {key}"
        await app({**scope, "headers": headers.raw}, receive, send)

    return ask


def _card(base: Mapping[str, Any], name: str, newest: str, adapter: Adapter) -> dict[str, Any]:
    """A model's card, in the shape that the base model's has. Its root says which version answers."""
    created = int(adapter.row.created.timestamp())
    return {**base, "id": name, "root": newest, "parent": base["id"], "created": created}


def _json_object(body: bytes) -> dict[str, Any]:
    """A body's members; none where it is not an object, of which vLLM then complains."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_extra_arguments(arguments: Any) -> None:
    """Raises ApiError for one that a worker would take for the engine's. What is no object, vLLM refuses."""
    for name in arguments if isinstance(arguments, dict) else ():
        if name.startswith(WORKERS_OWN):
            raise invalid(f"vllm_xargs.{name}", f"names that begin with {WORKERS_OWN} are the server's own")


def _check_priority(value: Any, param: str) -> None:
    """Raises ApiError for a priority before that of all others. What is no number, vLLM refuses or ignores."""
    # vLLM reads headers as Python does, and bodies as pydantic does, which takes more for whole numbers.
    for read in (int, WHOLE_NUMBER.validate_python):
        with suppress(TypeError, ValueError, OverflowError):
            if read(value) < FOREGROUND:
                raise invalid(param, f"must be at least {FOREGROUND}: only the operator's requests go before others")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read once more, and then whatever comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
