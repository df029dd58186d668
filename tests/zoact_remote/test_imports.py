"""What the client sends of a PEFT directory, and when it sends nothing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import responses
from responses import matchers

from tests.zoact_remote.test_client import API, INFO, PATH, URL, adapter_json
from zoact_remote import Client, ConnectionFailed, InvalidValue, TooLarge
from zoact_remote.exports import ABOUT, CONFIG, TENSORS


@pytest.fixture
def server() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(URL, retries=2) as client:
        yield client


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in (CONFIG, TENSORS):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "README.md").write_text("not sent")
    return tmp_path


@pytest.mark.parametrize("own", [False, True])
def test_the_files_are_sent(client: Client, server: responses.RequestsMock, directory: Path, own: bool) -> None:
    if own:
        (directory / ABOUT).write_bytes(ABOUT.encode())
    server.get(f"{API}/info", json=INFO)
    made = adapter_json(imported_digest="sha256:1", state="ready")
    query = matchers.query_param_matcher({"noise": "gaussian"})
    server.post(f"{PATH}/import", json=made, status=201, match=[query])
    adapter = client.import_adapter("acme/triage", directory, noise="gaussian")
    assert (adapter.name, adapter.info.imported_digest) == ("acme/triage", "sha256:1")
    body = server.calls[-1].request.body
    assert isinstance(body, bytes)
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        contents = {member.name: tar.extractfile(member).read().decode() for member in tar}  # type: ignore[union-attr]
    names = (CONFIG, TENSORS, ABOUT) if own else (CONFIG, TENSORS)
    assert contents == {name: name for name in names}


def test_it_is_not_sent_again(client: Client, server: responses.RequestsMock, directory: Path) -> None:
    """The server may have made it, and would then say that it is there already."""
    server.get(f"{API}/info", json=INFO)
    server.post(f"{PATH}/import", body=ConnectionResetError("cut off"))
    with pytest.raises((ConnectionFailed, ConnectionResetError)):
        client.import_adapter("acme/triage", directory)
    assert len([call for call in server.calls if call.request.method == "POST"]) == 1


def test_what_is_too_long_is_not_sent(client: Client, server: responses.RequestsMock, directory: Path) -> None:
    limits = INFO["limits"] | {"max_request_bytes": 10, "max_import_bytes": 5000}
    server.get(f"{API}/info", json=INFO | {"limits": limits})
    with pytest.raises(TooLarge, match=r"max_import_bytes is 5000"):
        client.import_adapter("acme/triage", directory)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(client: Client, server: responses.RequestsMock, directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(InvalidValue, match=f"holds no {name}"):
        client.import_adapter("acme/triage", directory)
