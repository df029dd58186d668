"""The server without vLLM: the same routes over the Transformers engine."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response, status
from starlette.exceptions import HTTPException

from server_ext.engines.base import Engine
from server_ext.errors import ApiError
from server_ext.gate import DRAIN_S, Gate, error_response, request_id_of
from server_ext.routes import health, metrics, router
from server_ext.service import Service
from server_ext.tenants import Tenants
from zoact_remote.extension import KEEP_ALIVE_S


def create_app(engine: Engine, directory: Path, tenants: Tenants) -> FastAPI:
    """A FastAPI app that serves ``/zoact/v1``, ``/health`` and ``/metrics``, with its state in a directory.

    The tenants are closed when the app ends.

    Raises:
        ValueError: another server uses the directory, or what is in it is of another model.

    """
    gate = Gate(Service(engine, directory), tenants)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.zoact = gate
        gate.begin()
        yield
        await gate.drain()

    app = FastAPI(title="ZO-Act", lifespan=lifespan)
    app.include_router(router)
    app.include_router(health)
    app.include_router(metrics)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        """Answers what no route takes; those of ours answer for themselves."""
        code = "method_not_allowed" if error.status_code == status.HTTP_405_METHOD_NOT_ALLOWED else "not_found"
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = error_response(ApiError(error.status_code, code, message), request_id_of(request))
        response.headers.update(error.headers or {})
        return response

    @app.get("/health")
    async def alive() -> None:
        """Answers as long as the process does, as vLLM's does."""

    return app


def serve(model: str, host: str, port: int, directory: Path, dtype: str, tenants: Tenants) -> None:
    """Serves a model on the Transformers engine, on a GPU if there is one, until the process is told to end.

    ``server_ext.tenants.open_tenants`` says who may come in from where the host is reached. Raises ValueError as
    :func:`create_app` does, and for an address that is not free.
    """
    _check_free(host, port)
    # Imported here, as making an app needs neither.
    import torch
    import uvicorn

    from server_ext.engines.transformers import TransformersEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"loading {model} on {device}", file=sys.stderr, flush=True)
    engine = TransformersEngine(model, dtype=dtype, device=device)
    # The server's own log has a line a call.
    uvicorn.run(
        create_app(engine, directory, tenants),
        host=host,
        port=port,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        # Whoever does not go on with a call meanwhile is cut off, and then the gate drains.
        timeout_graceful_shutdown=int(DRAIN_S),
    )


def _check_free(host: str, port: int) -> None:
    """Says before a model is loaded what uvicorn would say after."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                trial = socket.socket(family, kind)
            except OSError:
                continue  # a family that this machine lacks, which asyncio leaves out too
            with trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror}") from None
