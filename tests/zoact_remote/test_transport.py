"""Retries happen exactly where they are safe, and failures have a type."""

import socket
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest
import requests
import responses
from urllib3.exceptions import MaxRetryError, NewConnectionError

from zoact_remote import errors
from zoact_remote.transport import LONGEST_WAIT_S, Transport

URL = "http://server:8000"
INFO = f"{URL}/zoact/v1/info"


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def transport(waits: list[float]) -> Iterator[Transport]:
    transport = Transport(URL, api_key="secret", retries=3, sleep=waits.append)
    yield transport
    transport.close()


def refused_connection() -> requests.ConnectionError:
    reason = NewConnectionError(None, "refused")  # type: ignore[arg-type]
    return requests.ConnectionError(MaxRetryError(None, INFO, reason))  # type: ignore[arg-type]


BROKEN_CONNECTION = requests.ConnectionError("connection reset")


def same(data: Any) -> Any:
    return data


@responses.activate
@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_repeatable_calls_are_retried(transport: Transport, waits: list[float], status: int) -> None:
    responses.get(INFO, status=status)
    responses.get(INFO, body=BROKEN_CONNECTION)
    responses.get(INFO, body=requests.ReadTimeout())
    responses.get(INFO, json={"fine": True})
    assert transport.call("GET", "/info", same, repeatable=True) == {"fine": True}
    assert len(waits) == 3
    assert all(0 < wait <= 31 for wait in waits)


@responses.activate
def test_one_request_id_and_the_key_on_every_attempt(transport: Transport) -> None:
    responses.get(INFO, status=503)
    responses.get(INFO, json={})
    transport.call("GET", "/info", same, repeatable=True)
    first, second = (call.request.headers for call in responses.calls)
    assert first["x-request-id"] == second["x-request-id"]
    assert first["Authorization"] == second["Authorization"] == "Bearer secret"


@responses.activate
def test_retries_end(transport: Transport) -> None:
    for _ in range(4):
        responses.get(INFO, status=502)
    with pytest.raises(errors.ServerError):
        transport.call("GET", "/info", same, repeatable=True)
    assert len(responses.calls) == 4


@responses.activate
@pytest.mark.parametrize("failure", [{"status": 502}, {"status": 504}, {"status": 500}, {"body": BROKEN_CONNECTION}])
def test_unsafe_calls_are_not_retried_once_they_may_have_arrived(transport: Transport, failure: dict[str, Any]) -> None:
    responses.post(INFO, **failure)
    with pytest.raises(errors.ZoActError):
        transport.call("POST", "/info", same, json={}, repeatable=False)
    assert len(responses.calls) == 1


@responses.activate
@pytest.mark.parametrize(
    "failure",
    [{"status": 429}, {"status": 503}, {"body": refused_connection()}, {"body": requests.ConnectTimeout()}],
)
def test_unsafe_calls_are_retried_if_they_never_arrived(transport: Transport, failure: dict[str, Any]) -> None:
    responses.post(INFO, **failure)
    responses.post(INFO, json={"made": True})
    assert transport.call("POST", "/info", same, json={}, repeatable=False) == {"made": True}


@responses.activate
@pytest.mark.parametrize(
    "failure", [{"status": 500}, {"status": 400}, {"body": requests.exceptions.SSLError("expired")}]
)
def test_permanent_failures_are_not_retried(transport: Transport, failure: dict[str, Any]) -> None:
    responses.get(INFO, **failure)
    with pytest.raises(errors.ZoActError):
        transport.call("GET", "/info", same, repeatable=True)
    assert len(responses.calls) == 1


@responses.activate
def test_retry_after_in_seconds_and_as_a_date(transport: Transport, waits: list[float]) -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    responses.get(INFO, status=503, headers={"Retry-After": "7"})
    responses.get(INFO, status=429, headers={"Retry-After": date})
    responses.get(INFO, status=429, headers={"Retry-After": "soon"})
    responses.get(INFO, json={})
    transport.call("GET", "/info", same, repeatable=True)
    assert waits[0] == 7.0
    assert 25.0 < waits[1] <= 30.0
    assert 0.0 < waits[2] < 31.0


@responses.activate
def test_a_long_wait_is_left_to_the_caller(transport: Transport) -> None:
    responses.get(INFO, status=429, headers={"Retry-After": str(LONGEST_WAIT_S + 1)})
    with pytest.raises(errors.RateLimited) as caught:
        transport.call("GET", "/info", same, repeatable=True)
    assert caught.value.retry_after == LONGEST_WAIT_S + 1
    assert len(responses.calls) == 1


@responses.activate
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_value", errors.BadRequest),
        (400, "context_length_exceeded", errors.TooLarge),
        (401, "invalid_api_key", errors.AuthenticationError),
        (403, None, errors.AuthenticationError),
        (404, "adapter_not_found", errors.NotFound),
        (409, "basis_exists", errors.Conflict),
        (412, "stale_version", errors.StaleVersion),
        (413, None, errors.TooLarge),
        (418, None, errors.BadRequest),
        (500, None, errors.ServerError),
    ],
)
def test_errors_have_a_type(transport: Transport, status: int, code: str | None, kind: type[errors.ZoActError]) -> None:
    error = {"message": "no", "type": "t", "param": "rows[3].prompt", "code": code, "current_version": 9}
    responses.post(INFO, status=status, json={"error": error}, headers={"x-request-id": "r-1"})
    with pytest.raises(errors.ZoActError) as caught:
        transport.call("POST", "/info", same, json={}, repeatable=True)
    found = caught.value
    assert type(found) is kind
    assert (found.message, found.status, found.code) == ("no", status, code)
    assert (found.param, found.request_id) == ("rows[3].prompt", "r-1")
    assert "r-1" in str(found)
    if isinstance(found, errors.StaleVersion):
        assert found.current_version == 9


@responses.activate
@pytest.mark.parametrize("body", ["<html>Bad gateway</html>", '"text"', '{"error": "text"}', '{"detail": []}', ""])
def test_errors_in_other_shapes(transport: Transport, body: str) -> None:
    responses.get(INFO, status=500, body=body)
    with pytest.raises(errors.ServerError) as caught:
        transport.call("GET", "/info", same, repeatable=True)
    assert caught.value.request_id == responses.calls[0].request.headers["x-request-id"]


@responses.activate
@pytest.mark.parametrize("body", ["<html>Welcome</html>", "{}", "[]", ""])
def test_answers_that_make_no_sense(transport: Transport, body: str) -> None:
    responses.get(INFO, body=body)
    with pytest.raises(errors.ServerError, match="could not be understood"):
        transport.call("GET", "/info", lambda data: data["version"], repeatable=True)
    assert len(responses.calls) == 1


def test_nothing_is_sent_that_json_cannot_hold(transport: Transport) -> None:
    with pytest.raises(errors.InvalidValue):
        transport.call("POST", "/info", same, json={"epsilon": float("nan")}, repeatable=True)


def test_a_server_that_is_not_there(waits: list[float]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transport = Transport(f"http://127.0.0.1:{port}", retries=1, sleep=waits.append)
    with pytest.raises(errors.ConnectionFailed) as caught:
        transport.call("POST", "/info", same, json={}, repeatable=False)
    assert not caught.value.sent
    assert len(waits) == 1


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="http://"):
        Transport("server:8000")
    with pytest.raises(ValueError, match="retries"):
        Transport(URL, retries=-1)
