"""What every call passes on its way to the service: readiness, keys, limits and the log."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request, Response, status
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import Message
from structlog.contextvars import bound_contextvars

from server_ext import schemas
from server_ext.errors import ApiError
from server_ext.logs import log
from server_ext.metrics import NOBODY, OPERATOR
from server_ext.rate import RateLimit
from server_ext.service import Service
from server_ext.tenants import Caller, Tenants, calling

REQUEST_ID = "x-request-id"
READY_RETRY_S = 1
CALLER_GONE = 499
"""The status, in logs and counts, of a call whose caller went away before its end."""
DRAIN_S = 30.0
SLOTS_WITHIN_S = 1.0
"""An engine says how its slots are used between two steps, which may take longer."""

_UNION_TAGS = {"CompletionRow", "ChoicesRow", "ChatRow", "str", "body", "query", "path"}


class Gate:
    """One server's gate: it stands at ``app.state.zoact`` from the first call on.

    Args:
        service: whose adapters are brought back by :meth:`restore`.
        tenants: who may come in.

    """

    def __init__(self, service: Service, tenants: Tenants) -> None:
        self.service = service
        self.tenants = tenants
        self.rate = RateLimit()
        self._ready = False
        self._draining = False
        self._calls: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self._restoring: asyncio.Task[None] | None = None
        self._reading_slots: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Begins to bring every adapter back, beside the server, which listens and says that it is not ready."""
        self._restoring = asyncio.create_task(self.restore())

    async def restore(self) -> None:
        """Brings every adapter back; calls are refused until then."""
        started = time.perf_counter()
        await self.service.registry.restore()
        self._ready = True
        seconds = time.perf_counter() - started
        self.service.metrics.restored(seconds)
        log.info("ready", adapters=len(self.service.registry.all()), seconds=round(seconds, 3))

    async def drain(self, timeout: float = DRAIN_S) -> None:
        """Refuses further calls, waits for those under way and leaves everything on disk."""
        if self._draining:
            return
        self._draining = True
        log.info("draining", calls=sum(self._calls.values()))
        if self._restoring is not None:
            self._restoring.cancel()
            await asyncio.wait([self._restoring])
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            log.warning("calls cut off", calls=sum(self._calls.values()))
        if self._reading_slots is not None:
            self._reading_slots.cancel()
        await self.service.registry.close()
        self.tenants.close()
        log.info("drained")

    def check_ready(self) -> None:
        """Raises ApiError (503) while adapters come back, and once the server is about to stop."""
        if self._draining:
            raise ApiError(503, "draining", "the server is about to stop", retry_after=READY_RETRY_S)
        if not self._ready:
            raise ApiError(503, "not_ready", "the server is still starting", retry_after=READY_RETRY_S)

    @contextmanager
    def call(self, caller: Caller) -> Iterator[None]:
        """A call under way: it counts against its caller's limit, and a stopping server waits for it.

        Raises:
            ApiError: the server is not ready (503), or the caller has called too often (429).

        """
        self.check_ready()
        self.rate.take(caller.tenant or "", caller.limits.requests_per_minute)
        whose = calling.set(caller.tenant)
        try:
            with self.answering(caller):
                yield
        finally:
            calling.reset(whose)

    @contextmanager
    def answering(self, caller: Caller) -> Iterator[None]:
        """A call of a caller under way, in itself or in what is left to send of its answer."""
        who = label_of(caller)
        self._calls[who] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls[who] -= 1
            if not any(self._calls.values()):
                self._idle.set()

    async def measure(self) -> None:
        """Brings the gauges up to date, before they are read. An engine that is busy leaves its slots' as they are."""
        self.service.metrics.measure(self.service.registry.all(), self._calls)
        if self._reading_slots is None or self._reading_slots.done():
            self._reading_slots = asyncio.create_task(self._read_slots())
        await asyncio.wait([self._reading_slots], timeout=SLOTS_WITHIN_S)

    async def _read_slots(self) -> None:
        try:
            self.service.metrics.measure_slots(await self.service.engine.slots())
        except Exception:
            log.warning("slots not read", exc_info=True)

    def list_tenants(self) -> schemas.TenantList:
        owners = [adapter.row.tenant for adapter in self.service.registry.all()]
        return schemas.TenantList(
            tenants=[
                schemas.TenantInfo(
                    name=tenant.name,
                    limits=tenant.limits,
                    adapters=owners.count(tenant.name),
                    created=tenant.created,
                )
                for tenant in self.tenants.all()
            ]
        )


class PlainRoute(APIRoute):
    """Answers errors in OpenAI's shape and every call with a request id, whatever handlers the app around it has."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await inner(request)
            except (HTTPException, RecursionError) as error:
                raise _unreadable_body(error) from error

        async def handler(request: Request) -> Response:
            request_id = request_id_of(request)
            response: Response
            code = None
            try:
                response = await self.answer(request, handle, request_id)
            except (ApiError, RequestValidationError) as error:
                refusal = error if isinstance(error, ApiError) else _validation_error(error)
                code = refusal.code
                response = error_response(refusal, request_id)
            except ClientDisconnect:
                response = Response(status_code=CALLER_GONE)
            except Exception:
                response = internal_error(request.url.path, request_id)
            response.headers[REQUEST_ID] = request_id
            gate: Gate | None = getattr(request.app.state, "zoact", None)
            if gate is not None:
                caller = getattr(request.state, "zoact_caller", None)
                gate.service.metrics.answered(self.path, response.status_code, label_of(caller), code)
            return response

        return handler

    async def answer(
        self, request: Request, handle: Callable[[Request], Coroutine[Any, Any, Response]], request_id: str
    ) -> Response:
        return await handle(request)


class ZoActRoute(PlainRoute):
    """A call that a tenant makes: it is let in by its key, counted, limited in size and logged."""

    async def answer(
        self, request: Request, handle: Callable[[Request], Coroutine[Any, Any, Response]], request_id: str
    ) -> Response:
        gate: Gate | None = getattr(request.app.state, "zoact", None)
        if gate is None:
            raise ApiError(503, "not_ready", "the server is still starting", retry_after=READY_RETRY_S)
        caller = gate.tenants.identify(request.headers.get("authorization", ""))
        request.state.zoact_caller = caller
        adapter = "/".join(request.path_params.values()) or None
        # Whatever is logged on the way carries these; the service adds the version.
        with bound_contextvars(request_id=request_id, tenant=caller.tenant, adapter=adapter):
            started = time.perf_counter()
            outcome: dict[str, Any] = {"status": status.HTTP_500_INTERNAL_SERVER_ERROR}
            try:
                with gate.call(caller):
                    response = await handle(limited(request, *self.most(gate, caller)))
                outcome = {"status": response.status_code}
                return response
            except ApiError as error:
                outcome = {"status": error.status, "code": error.code, "param": error.param}
                raise
            except RequestValidationError:
                outcome = {"status": status.HTTP_400_BAD_REQUEST}
                raise
            except ClientDisconnect:
                outcome = {"status": CALLER_GONE}
                raise
            finally:
                seconds = round(time.perf_counter() - started, 4)
                log.info("call", method=request.method, route=self.path, seconds=seconds, **outcome)

    def most(self, gate: Gate, caller: Caller) -> tuple[int, str]:
        """The most bytes that a body may have, and the name of that limit."""
        return caller.limits.max_request_bytes, "max_request_bytes"


class ImportRoute(ZoActRoute):
    """A call whose body is an adapter, and as long as one."""

    def most(self, gate: Gate, caller: Caller) -> tuple[int, str]:
        return gate.service.max_import_bytes(caller.limits), "max_import_bytes"


def label_of(caller: Caller | None) -> str:
    """Whom a call counts for."""
    return NOBODY if caller is None else caller.tenant or OPERATOR


def request_id_of(request: HTTPConnection) -> str:
    """The id that the caller gave its request, or a new one."""
    return request.headers.get(REQUEST_ID, "")[:128].strip() or uuid.uuid4().hex


def limited(request: Request, most: int, limit: str = "max_request_bytes") -> Request:
    """A request whose body is refused once it is longer than a number of bytes, which is a limit's of that name."""
    too_large = ApiError(413, "request_too_large", f"the body exceeds {limit} ({most})")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > most:
            raise too_large
        return message

    return Request(request.scope, receive)


def error_response(error: ApiError, request_id: str) -> JSONResponse:
    """The answer to a call that is refused."""
    headers = {REQUEST_ID: request_id}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return JSONResponse(error.body(request_id), error.status, headers)


def internal_error(path: str, request_id: str) -> JSONResponse:
    """The answer to a call that the server failed at; the exception under way is logged."""
    log.exception("request failed", request_id=request_id, path=path)
    failed = ApiError(500, "internal_error", "the server failed; its log has the details under this request id")
    return error_response(failed, request_id)


def _unreadable_body(error: HTTPException | RecursionError) -> ApiError:
    """Why a body could not be read: FastAPI wraps what goes wrong meanwhile, be it an error of our own."""
    cause = error.__cause__ if isinstance(error, HTTPException) else error
    if isinstance(cause, ApiError):
        return cause
    nested = isinstance(cause, RecursionError)
    return ApiError(400, "invalid_value", "the body is nested too deeply" if nested else "the body is not JSON")


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a request, and where."""
    first = error.errors()[0]
    path = ""
    # Where a body that is no JSON breaks off is a place in the text, not a field.
    for part in () if first["type"] == "json_invalid" else first["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _UNION_TAGS and not part.startswith(("list[", "constrained", "function-", "tuple[")):
            path += f".{part}" if path else part
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, "invalid_value", f"{path}: {message}" if path else message, path or None)
