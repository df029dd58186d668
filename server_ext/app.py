"""The server without vLLM: the same routes over the Transformers engine."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from server_ext.engines.base import Engine
from server_ext.routes import KeyCheck, router
from server_ext.service import Service


def create_app(engine: Engine, directory: Path, keys: Sequence[str] = ()) -> FastAPI:
    """A FastAPI app that serves ``/zoact/v1`` and ``/health``, with its state in a directory."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(engine, directory)
        await service.registry.restore()
        app.state.zoact = service
        yield
        await service.registry.close()

    app = FastAPI(title="ZO-Act", lifespan=lifespan)
    app.state.zoact_keys = KeyCheck(keys)
    app.include_router(router)

    @app.get("/health")
    async def health() -> None:
        """Answers as soon as every adapter is back at its last version."""

    return app


def serve(model: str, host: str, port: int, directory: Path, dtype: str, keys: Sequence[str]) -> None:
    """Serves a model on the Transformers engine, on a GPU if there is one, until the process is told to end."""
    # Imported here, as making an app needs neither.
    import torch
    import uvicorn

    from server_ext.engines.transformers import TransformersEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"loading {model} on {device}", file=sys.stderr, flush=True)
    uvicorn.run(
        create_app(TransformersEngine(model, dtype=dtype, device=device), directory, keys), host=host, port=port
    )
