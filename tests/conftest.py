"""What all tests share: a real model, small enough to be made on the spot, and real servers that serve it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import KEY, Server, Servers
from tests.tiny_model import make_tiny_model

# Time limits of single examples measure the machine; hung calls have timeouts of their own. CI always tries the same
# examples, so that what it says is about the change; new ones are tried wherever people work.
settings.register_profile("zoact", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("zoact")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`make_tiny_model`."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def servers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers that all tests share, one an engine."""
    found = Servers(tiny_model, tmp_path_factory.mktemp)
    yield found
    found.kill()


@pytest.fixture(scope="session")
def server_with_key(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants ``KEY``. No test leaves an adapter on it."""
    server = Server(tiny_model, "transformers", tmp_path_factory.mktemp("with-key"), KEY).start()
    yield server
    server.kill()
