"""The routes under ``/zoact/v1``: they check who calls and what comes in, call the service and answer."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response, status
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import Receive, Scope, Send

from server_ext import schemas
from server_ext.errors import ApiError
from server_ext.gate import Gate, ImportRoute, PlainRoute, ZoActRoute
from server_ext.service import Service
from server_ext.tenants import Caller
from server_ext.together import Gone

PREFIX = "/zoact/v1"


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.zoact_caller
    return caller


async def _gate(request: Request) -> Gate:
    gate: Gate = request.app.state.zoact
    return gate


async def _service(request: Request) -> Service:
    return (await _gate(request)).service


async def _adapter_name(tenant: str, adapter: str, caller: Annotated[Caller, Depends(_caller)]) -> str:
    name = f"{tenant}/{adapter}"
    if not caller.owns(name):
        # Word for word what is said of one that is not there.
        raise ApiError(404, "adapter_not_found", f"there is no adapter {name!r}", "adapter")
    return name


async def _operator(caller: Annotated[Caller, Depends(_caller)]) -> None:
    if caller.tenant is not None:
        raise ApiError(403, "operator_only", "tenants are managed with the operator's key")


async def _gone(request: Request) -> Gone:
    async def gone() -> None:
        # The body has been read: nothing else comes behind it.
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return gone


Who = Annotated[Caller, Depends(_caller)]
Zo = Annotated[Service, Depends(_service)]
Entrance = Annotated[Gate, Depends(_gate)]
Leaving = Annotated[Gone, Depends(_gone)]
Name = Annotated[str, Depends(_adapter_name)]
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": schemas.ErrorBody} for code in (400, 401, 403, 404, 409, 412, 413, 429, 503)
}

router = APIRouter(prefix=PREFIX, route_class=ZoActRoute, tags=["zoact"], responses=ERRORS)
imports = APIRouter(route_class=ImportRoute)
health = APIRouter(prefix=f"{PREFIX}/health", route_class=PlainRoute, tags=["health"])
metrics = APIRouter(route_class=PlainRoute, tags=["metrics"])
ADAPTER = "/adapters/{tenant}/{adapter}"
TENANT = "/tenants/{tenant}"
TAR = "application/x-tar"
CHUNK = 1 << 18
"""Bytes of an archive that are read at a time."""


class ArchiveResponse(StreamingResponse):
    """An archive as an answer.

    Args:
        file: the archive, at its end.
        stack: closed when the answer has ended, however it does.

    """

    media_type = TAR

    def __init__(self, file: IO[bytes], stack: AsyncExitStack) -> None:
        length = file.tell()
        file.seek(0)
        super().__init__(iter(partial(file.read, CHUNK), b""), headers={"content-length": str(length)})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


@router.get("/info")
async def info(service: Zo, caller: Who) -> schemas.Info:
    """The model, the sites of its adapters, the noise specification and the caller's limits."""
    return service.info(caller.limits)


@router.post("/adapters", status_code=status.HTTP_201_CREATED)
async def create_adapter(service: Zo, caller: Who, ask: schemas.CreateAdapter) -> schemas.AdapterInfo:
    """Creates an adapter. It needs a basis before anything can be evaluated."""
    return await service.create(caller, ask)


@router.get("/adapters")
async def list_adapters(service: Zo, caller: Who) -> schemas.AdapterList:
    """The caller's adapters."""
    return service.list_adapters(caller)


@router.get(ADAPTER)
async def get_adapter(service: Zo, name: Name) -> schemas.AdapterInfo:
    """One adapter."""
    return service.registry.adapter(name).info()


@router.delete(ADAPTER, status_code=status.HTTP_204_NO_CONTENT)
async def delete_adapter(service: Zo, name: Name) -> None:
    """Deletes an adapter and its history."""
    await service.delete(name)


@router.post(ADAPTER + "/basis")
async def take_basis(service: Zo, caller: Who, name: Name, ask: schemas.Calibrate) -> schemas.BasisResult:
    """Takes the basis from the model's activations on these rows, once. The rows are not kept."""
    return await service.calibrate(caller, name, ask)


@router.post(ADAPTER + "/losses")
async def ask_losses(service: Zo, caller: Who, gone: Leaving, name: Name, ask: schemas.AskLosses) -> schemas.Losses:
    """Losses of a batch under probes. May carry an update to apply first."""
    return await service.losses(caller, name, ask, gone)


@router.post(ADAPTER + "/scores")
async def ask_scores(service: Zo, caller: Who, gone: Leaving, name: Name, ask: schemas.AskScores) -> schemas.Scores:
    """Log-likelihoods of every row's completion, or of its choices."""
    return await service.scores(caller, name, ask, gone)


@router.post(ADAPTER + "/generate")
async def generate(service: Zo, gone: Leaving, name: Name, ask: schemas.AskGeneration) -> schemas.Generation:
    """Continues a prompt or a conversation."""
    return await service.generate(name, ask, gone)


@router.post(ADAPTER + "/updates")
async def update(service: Zo, name: Name, ask: schemas.Update) -> schemas.UpdateResult:
    """Applies an update to the version that it names."""
    return await service.update(name, ask)


@router.post(ADAPTER + "/rollback")
async def rollback(service: Zo, name: Name, ask: schemas.Rollback) -> schemas.UpdateResult:
    """Makes a new version with the coefficients of an earlier one."""
    return await service.rollback(name, ask)


@router.get(ADAPTER + "/journal")
async def journal(
    service: Zo,
    name: Name,
    after: Annotated[int, Query(ge=0, le=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=10000)] = 1000,
) -> schemas.JournalPage:
    """The updates and rollbacks that made an adapter, in order."""
    return await service.journal(name, after, limit)


@router.get(ADAPTER + "/export", response_class=Response, responses={200: {"content": {TAR: {}}}})
async def export(
    gate: Entrance,
    caller: Who,
    name: Name,
    version: Annotated[int | None, Query(ge=0, le=2**62)] = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> Response:
    """A version as a PEFT directory, in a tar archive."""
    stack = AsyncExitStack()
    file = await stack.enter_async_context(gate.service.export(name, version, dtype))
    stack.enter_context(gate.answering(caller))
    return ArchiveResponse(file, stack)


@imports.post(
    ADAPTER + "/import",
    status_code=status.HTTP_201_CREATED,
    openapi_extra={
        "requestBody": {"required": True, "content": {TAR: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def import_adapter(
    service: Zo, caller: Who, name: Name, request: Request, noise: Literal["rademacher", "gaussian"] = "rademacher"
) -> schemas.AdapterInfo:
    """Creates an adapter whose version 0 is a LoRA: a PEFT directory in a tar archive, as an export is."""
    return await service.import_adapter(caller, name, request.stream(), noise)


router.include_router(imports)


@router.get("/tenants", dependencies=[Depends(_operator)])
async def list_tenants(gate: Entrance) -> schemas.TenantList:
    """All tenants, for the operator."""
    return gate.list_tenants()


@router.post("/tenants", status_code=status.HTTP_201_CREATED, dependencies=[Depends(_operator)])
async def add_tenant(gate: Entrance, ask: schemas.CreateTenant) -> schemas.TenantKey:
    """Adds a tenant and answers with its key, for the operator."""
    return schemas.TenantKey(tenant=ask.name, key=gate.tenants.add(ask.name, ask.limits))


@router.put(TENANT + "/limits", dependencies=[Depends(_operator)])
async def change_limits(gate: Entrance, tenant: str, limits: schemas.TenantLimits) -> schemas.TenantLimits:
    """Changes what a tenant may use, for the operator."""
    return gate.tenants.change_limits(tenant, limits)


@router.post(TENANT + "/key", dependencies=[Depends(_operator)])
async def replace_key(gate: Entrance, tenant: str) -> schemas.TenantKey:
    """Gives a tenant a new key in place of the one that it had, for the operator."""
    return schemas.TenantKey(tenant=tenant, key=gate.tenants.replace_key(tenant))


@router.delete(TENANT, status_code=status.HTTP_204_NO_CONTENT, dependencies=[Depends(_operator)])
async def remove_tenant(gate: Entrance, tenant: str) -> None:
    """Takes a tenant's keys away, for the operator. Its adapters stay until they are deleted."""
    gate.tenants.remove(tenant)


@health.get("/live")
async def live() -> None:
    """Answers as long as the process does."""


@health.get("/ready")
async def ready(request: Request) -> None:
    """Answers once every adapter is back at its last version, until the server begins to stop."""
    (await _gate(request)).check_ready()


@metrics.get("/metrics", response_class=Response)
async def show_metrics(request: Request) -> Response:
    """What the server counts, in Prometheus' text format, for the operator. vLLM has this route itself."""
    gate = await _gate(request)
    caller = request.state.zoact_caller = gate.tenants.identify(request.headers.get("authorization", ""))
    if caller.tenant is not None:
        raise ApiError(403, "operator_only", "/metrics is for the operator's key")
    await gate.measure()
    return Response(generate_latest(gate.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
