"""The routes under ``/zoact/v1``: they check what comes in, call the service and answer."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response, status
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from server_ext import schemas
from server_ext.errors import ApiError
from server_ext.logs import log
from server_ext.service import Service

PREFIX = "/zoact/v1"
REQUEST_ID = "x-request-id"

_UNION_TAGS = {"CompletionRow", "ChoicesRow", "str", "body", "query", "path"}


class ZoActRoute(APIRoute):
    """Answers errors in OpenAI's shape and every call with a request id, whatever handlers the app around it has."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            request_id = request.headers.get(REQUEST_ID, "")[:128] or uuid.uuid4().hex
            response: Response
            try:
                response = await handle(request)
            except ApiError as error:
                response = JSONResponse(error.body(request_id), error.status)
            except RequestValidationError as error:
                response = JSONResponse(_validation_error(error).body(request_id), status.HTTP_400_BAD_REQUEST)
            except Exception:
                log.exception("request failed", request_id=request_id, path=request.url.path)
                failed = ApiError(
                    500, "internal_error", "the server failed; its log has the details under this request id"
                )
                response = JSONResponse(failed.body(request_id), failed.status)
            response.headers[REQUEST_ID] = request_id
            return response

        return handler


class KeyCheck:
    """Lets a call pass if its bearer token is one of the keys; every call if there are none."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __call__(self, authorization: str) -> None:
        """Raises ApiError (401) for a token that is no key. The comparison takes as long for any token."""
        scheme, _, token = authorization.partition(" ")
        sent = hashlib.sha256(token.strip().encode()).digest()
        matches = [hmac.compare_digest(sent, digest) for digest in self._digests]
        if self._digests and not (scheme.lower() == "bearer" and any(matches)):
            raise ApiError(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")


async def _authorised(request: Request) -> None:
    check: KeyCheck | None = getattr(request.app.state, "zoact_keys", None)
    if check is not None:
        check(request.headers.get("authorization", ""))


async def _service(request: Request) -> Service:
    service: Service | None = getattr(request.app.state, "zoact", None)
    if service is None:
        raise ApiError(503, "not_ready", "the server is still starting")
    return service


async def _adapter_name(tenant: str, adapter: str) -> str:
    return f"{tenant}/{adapter}"


Zo = Annotated[Service, Depends(_service)]
Name = Annotated[str, Depends(_adapter_name)]
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": schemas.ErrorBody} for code in (400, 401, 404, 409, 412, 503)
}

router = APIRouter(
    prefix=PREFIX, route_class=ZoActRoute, tags=["zoact"], dependencies=[Depends(_authorised)], responses=ERRORS
)
ADAPTER = "/adapters/{tenant}/{adapter}"


@router.get("/info")
async def info(service: Zo) -> schemas.Info:
    """The model, the sites of its adapters, the noise specification and the limits of a call."""
    return service.info()


@router.post("/adapters", status_code=status.HTTP_201_CREATED)
async def create_adapter(service: Zo, ask: schemas.CreateAdapter) -> schemas.AdapterInfo:
    """Creates an adapter. It needs a basis before anything can be evaluated."""
    return await service.create(ask)


@router.get("/adapters")
async def list_adapters(service: Zo) -> schemas.AdapterList:
    """All adapters."""
    return service.list_adapters()


@router.get(ADAPTER)
async def get_adapter(service: Zo, name: Name) -> schemas.AdapterInfo:
    """One adapter."""
    return service.registry.adapter(name).info()


@router.delete(ADAPTER, status_code=status.HTTP_204_NO_CONTENT)
async def delete_adapter(service: Zo, name: Name) -> None:
    """Deletes an adapter and its history."""
    await service.delete(name)


@router.post(ADAPTER + "/basis")
async def take_basis(service: Zo, name: Name, ask: schemas.Calibrate) -> schemas.BasisResult:
    """Takes the basis from the model's activations on these rows, once. The rows are not kept."""
    return await service.calibrate(name, ask)


@router.post(ADAPTER + "/losses")
async def ask_losses(service: Zo, name: Name, ask: schemas.AskLosses) -> schemas.Losses:
    """Losses of a batch under probes. May carry an update to apply first."""
    return await service.losses(name, ask)


@router.post(ADAPTER + "/scores")
async def ask_scores(service: Zo, name: Name, ask: schemas.AskScores) -> schemas.Scores:
    """Log-likelihoods of every row's completion, or of its choices."""
    return await service.scores(name, ask)


@router.post(ADAPTER + "/generate")
async def generate(service: Zo, name: Name, ask: schemas.AskGeneration) -> schemas.Generation:
    """Continues a prompt or a conversation."""
    return await service.generate(name, ask)


@router.post(ADAPTER + "/updates")
async def update(service: Zo, name: Name, ask: schemas.Update) -> schemas.UpdateResult:
    """Applies an update to the version that it names."""
    return await service.update(name, ask)


@router.get(ADAPTER + "/journal")
async def journal(
    service: Zo,
    name: Name,
    after: Annotated[int, Query(ge=0, le=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=10000)] = 1000,
) -> schemas.JournalPage:
    """The updates that made an adapter, in order."""
    return await service.journal(name, after, limit)


@router.get(ADAPTER + "/export", response_class=Response, responses={200: {"content": {"application/x-tar": {}}}})
async def export(
    service: Zo,
    name: Name,
    version: Annotated[int | None, Query(ge=0, le=2**62)] = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> Response:
    """A version as a PEFT directory, in a tar archive."""
    return Response(await service.export(name, version, dtype), media_type="application/x-tar")


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
