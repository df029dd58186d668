"""Every contract test runs over both engines, vLLM's behind the marker ``vllm``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server_ext.support import Reference
from tests.support import Server, Servers
from zoact_remote import Client

ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="session", params=ENGINES)
def server(request: pytest.FixtureRequest, servers: Servers) -> Server:
    return servers(request.param)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def vllm_server(servers: Servers) -> Server:
    """For tests of what vLLM alone does."""
    return servers("vllm")


@pytest.fixture(scope="session")
def vllm_client(vllm_server: Server) -> Iterator[Client]:
    with vllm_server.client() as client:
        yield client


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)
