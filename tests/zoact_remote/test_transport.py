"""Retries happen exactly where they are safe, and failures have a type."""

import io
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
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
def test_every_wait_is_logged_with_its_reason(
    transport: Transport, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    error = {"message": "the server is still starting", "code": "not_ready"}
    responses.get(INFO, status=503, json={"error": error}, headers={"Retry-After": "7"})
    responses.get(INFO, body=BROKEN_CONNECTION)
    responses.get(INFO, json={})
    transport.call("GET", "/info", same, repeatable=True)
    first, second = caplog.records
    assert (first.name, first.levelname) == ("zoact_remote", "WARNING")
    assert first.getMessage().startswith("the server is still starting (503, not_ready, request zoact-")
    assert first.getMessage().endswith("; trying again in 7.0 s")
    assert "connection reset" in second.getMessage()
    assert second.getMessage().endswith(f"; trying again in {waits[1]:.1f} s")


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
    "failure",
    [{"status": 500, "body": "no"}, {"status": 400, "body": "no"}, {"body": requests.exceptions.SSLError("expired")}],
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
    assert 25.0 < waits[1] <= 60.0
    assert 0.0 < waits[2] < 31.0


@responses.activate
def test_too_many_calls_are_waited_for_patiently(transport: Transport, waits: list[float]) -> None:
    for _ in range(10):
        responses.get(INFO, status=429, headers={"Retry-After": "1"})
    responses.get(INFO, json={})
    transport.call("GET", "/info", same, repeatable=True)
    assert len(waits) == 10, "more than the retries"
    assert all(1.0 <= wait <= 2.0 for wait in waits)
    assert len(set(waits)) > 1, "those who are refused together do not come back together"


@responses.activate
def test_a_server_that_asks_for_no_wait_is_not_asked_for_ever(waits: list[float]) -> None:
    responses.get(INFO, json={})
    responses.get(INFO, status=503, headers={"Retry-After": "0"})
    transport = Transport(URL, retries=3, patience=5.0, sleep=waits.append)
    with closing(transport):
        transport.call("GET", "/info", same, repeatable=True)
        with pytest.raises(errors.ServerError):
            transport.call("GET", "/info", same, repeatable=True)
    assert 5.0 <= sum(waits) < 6.0


@responses.activate
def test_patience_with_too_many_calls_ends(waits: list[float]) -> None:
    responses.get(INFO, status=429, headers={"Retry-After": "1"})
    transport = Transport(URL, retries=3, patience=20.0, sleep=waits.append)
    with closing(transport), pytest.raises(errors.RateLimited):
        transport.call("GET", "/info", same, repeatable=True)
    assert 20.0 <= sum(waits) <= 22.0


@responses.activate
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_named_and_not_followed(transport: Transport, status: int) -> None:
    responses.post(INFO, status=status, headers={"Location": "https://server/zoact/v1/info"})
    with pytest.raises(errors.InvalidValue, match="redirects to https://server/zoact/v1/info: give the server's own"):
        transport.call("POST", "/info", same, json={}, repeatable=True)
    assert len(responses.calls) == 1


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
        (400, "batch_too_large", errors.TooLarge),
        (403, None, errors.PermissionDenied),
        (403, "operator_only", errors.PermissionDenied),
        (403, "limit_exceeded", errors.LimitExceeded),
        (404, "adapter_not_found", errors.NotFound),
        (409, "basis_exists", errors.Conflict),
        (412, "stale_version", errors.StaleVersion),
        (413, None, errors.TooLarge),
        (418, None, errors.BadRequest),
        (500, None, errors.ServerError),
    ],
)
def test_errors_have_a_type(transport: Transport, status: int, code: str | None, kind: type[errors.CallFailed]) -> None:
    error = {"message": "no", "type": "t", "param": "rows[3].prompt", "code": code, "current_version": 9}
    responses.post(INFO, status=status, json={"error": error}, headers={"x-request-id": "r-1"})
    with pytest.raises(errors.CallFailed) as caught:
        transport.call("POST", "/info", same, json={}, repeatable=True)
    found = caught.value
    assert type(found) is kind
    assert (found.message, found.status, found.code) == ("no", status, code)
    assert (found.param, found.request_id) == ("rows[3].prompt", "r-1")
    assert "r-1" in str(found)
    if isinstance(found, errors.StaleVersion):
        assert found.current_version == 9


@responses.activate
@pytest.mark.parametrize("body", ["<html>Bad gateway</html>", '"text"', '{"error": "text"}', '{"detail": []}'])
def test_errors_in_other_shapes(transport: Transport, body: str) -> None:
    responses.get(INFO, status=500, body=body)
    with pytest.raises(errors.ServerError) as caught:
        transport.call("GET", "/info", same, repeatable=True)
    assert caught.value.request_id == responses.calls[0].request.headers["x-request-id"]


@responses.activate
@pytest.mark.parametrize("body", ["<html>Welcome</html>", "{}", "[]"])
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
    with pytest.raises(ValueError, match="patience"):
        Transport(URL, patience=-1.0)
    for timeout in ((0.0, 1.0), (1.0, -1.0), (1.0,)):
        with pytest.raises(ValueError, match="timeout"):
            Transport(URL, timeout=timeout)  # type: ignore[arg-type]


def test_a_call_that_is_made_once_is_not_repeated(waits: list[float]) -> None:
    for patience in (0.0, 600.0):
        with (
            closing(Transport(URL, patience=patience, sleep=waits.append)) as transport,
            responses.RequestsMock() as mock,
        ):
            mock.get(INFO, json={})
            transport.call("GET", "/info", same, repeatable=True)
            mock.get(INFO, status=503)
            with pytest.raises(errors.ServerError):
                transport.call("GET", "/info", same, repeatable=True, once=True)
    assert not waits


# A server that goes away ---------------------------------------------------------------------------------------------


GONE = [{"status": 502}, {"status": 503}, {"status": 504}, {"body": refused_connection()}, {"body": BROKEN_CONNECTION}]


@responses.activate
@pytest.mark.parametrize("gone", GONE)
def test_a_server_that_has_answered_is_waited_for(transport: Transport, waits: list[float], gone: Any) -> None:
    responses.get(INFO, json={"answer": 1})
    transport.call("GET", "/info", same, repeatable=True)
    for _ in range(20):
        responses.get(INFO, **gone)
    responses.get(INFO, json={"answer": 2})
    assert transport.call("GET", "/info", same, repeatable=True) == {"answer": 2}
    assert len(waits) == 20
    assert 300 < sum(waits) < transport.patience + 31


@responses.activate
def test_what_answered_one_answered_all_that_share_its_connections(transport: Transport, waits: list[float]) -> None:
    responses.get(INFO, json={"answer": 1})
    transport.with_options(patience=0.0).call("GET", "/info", same, repeatable=True)
    for _ in range(20):
        responses.get(INFO, status=503)
    responses.get(INFO, json={"answer": 2})
    assert transport.call("GET", "/info", same, repeatable=True) == {"answer": 2}
    assert len(waits) == 20


@responses.activate
@pytest.mark.parametrize("gone", GONE)
def test_patience_ends(transport: Transport, waits: list[float], gone: Any) -> None:
    responses.get(INFO, json={})
    transport.call("GET", "/info", same, repeatable=True)
    # The last mock answers all further calls.
    responses.get(INFO, **gone)
    with pytest.raises(errors.ZoActError):
        transport.call("GET", "/info", same, repeatable=True)
    assert transport.patience <= sum(waits) < transport.patience + 31


@responses.activate
@pytest.mark.parametrize("gone", GONE)
def test_a_server_that_never_answered_is_given_up(transport: Transport, gone: Any) -> None:
    # What a gateway says in its place is no answer of it.
    responses.get(INFO, **gone)
    for _ in range(2):
        with pytest.raises(errors.ZoActError):
            transport.call("GET", "/info", same, repeatable=True)
    assert len(responses.calls) == 2 * (1 + transport.retries)


@responses.activate
@pytest.mark.parametrize("failure", [{"status": 429}, {"body": requests.ReadTimeout()}])
def test_a_server_that_is_there_but_busy_gets_no_more_than_its_retries(transport: Transport, failure: Any) -> None:
    responses.get(INFO, json={})
    transport.call("GET", "/info", same, repeatable=True)
    responses.get(INFO, **failure)
    with pytest.raises(errors.ZoActError):
        transport.call("GET", "/info", same, repeatable=True)
    assert len(responses.calls) == 2 + transport.retries


@responses.activate
def test_calls_that_are_unsafe_to_repeat_wait_only_for_a_server_that_never_got_them(transport: Transport) -> None:
    responses.get(INFO, json={})
    transport.call("GET", "/info", same, repeatable=True)
    for _ in range(9):
        responses.post(INFO, body=refused_connection())
    responses.post(INFO, status=502)
    with pytest.raises(errors.ServerError):
        transport.call("POST", "/info", same, json={}, repeatable=False)
    assert len(responses.calls) == 11


# Answers that were cut off, or come twice, over a real socket ---------------------------------------------------------

JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
WHOLE = JSON_HEAD + b'Content-Length: 12\r\n\r\n{"fine": 12}'
CUT_OFF = [
    b"",
    b"HTTP/1.1 2",
    b"HTTP/1.1 200",
    b"HTTP/1.1 412 Precondition Failed\r\n",
    JSON_HEAD,
    JSON_HEAD + b"Content-Length:",
    JSON_HEAD + b"Content-Length: 12\r\n",
    JSON_HEAD + b"Transfer-Encoding: chunk",
    JSON_HEAD + b"Content-Length: 12\r\n\r\n",
    JSON_HEAD + b'Content-Length: 12\r\n\r\n{"fine": 1',
    JSON_HEAD + b"\r\n",
    JSON_HEAD + b'\r\n{"fine": 1',
    JSON_HEAD + b'Transfer-Encoding: chunked\r\n\r\nc\r\n{"fine',
    JSON_HEAD + b'Transfer-Encoding: chunked\r\n\r\n6\r\n{"fine\r\n',
    b'HTTP/1.1 412 Precondition Failed\r\nContent-Length: 90\r\n\r\n{"error": {"mess',
]


@contextmanager
def listening(*connections: Sequence[bytes]) -> Iterator[str]:
    """The URL of a server that answers the requests on each connection with given bytes, and then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answers in connections:
                connection, _ = server.accept()
                with connection:
                    for answer in answers:
                        connection.recv(1 << 16)
                        connection.sendall(answer)

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        serving.join(10)
        assert not serving.is_alive(), "every answer must have been fetched"


@pytest.mark.parametrize("cut", CUT_OFF)
def test_an_answer_that_was_cut_off_is_asked_for_again(waits: list[float], cut: bytes) -> None:
    with listening([cut], [WHOLE]) as url, closing(Transport(url, sleep=waits.append)) as transport:
        assert transport.call("POST", "/updates", same, json={}, repeatable=True) == {"fine": 12}
    assert len(waits) == 1


@pytest.mark.parametrize("cut", CUT_OFF)
def test_an_answer_that_was_cut_off_says_nothing_of_what_the_server_did(waits: list[float], cut: bytes) -> None:
    with listening([cut]) as url, closing(Transport(url, sleep=waits.append)) as transport:
        with pytest.raises(errors.ConnectionFailed) as caught:
            transport.call("POST", "/adapters", same, json={}, repeatable=False)
        assert caught.value.sent
    assert not waits


def test_a_download_that_was_cut_off_starts_again(waits: list[float]) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    with listening([head + b"ab"], [head + b"abcde"]) as url, closing(Transport(url, sleep=waits.append)) as transport:
        file = io.BytesIO()
        transport.download("/export", file)
    assert file.getvalue() == b"abcde"


def test_an_answer_without_content(waits: list[float]) -> None:
    # With the type of the content that there is not, as FastAPI writes it.
    head = b"HTTP/1.1 204 No Content\r\nContent-Type: application/json\r\n\r\n"
    with listening([head]) as url, closing(Transport(url)) as transport:
        assert transport.call("DELETE", "/adapters", same, repeatable=False) is None


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_that_comes_twice_answers_its_own_call_alone(waits: list[float], late: bool) -> None:
    """The second copy may arrive before the next call, or pass for its answer."""
    calls = 4
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(connection: socket.socket) -> None:
            before = b""
            with connection:
                while request := connection.recv(1 << 16):
                    head = request.lower().decode()
                    ask, name = head.split()[1][-1], head.split("x-request-id: ")[1].split()[0]
                    made = JSON_HEAD + f"x-request-id: {name}\r\nContent-Length: 1\r\n\r\n{ask}".encode()
                    connection.sendall(before + made if late else made + made)
                    before = made

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=[connection], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        transport = Transport(f"http://127.0.0.1:{server.getsockname()[1]}", sleep=waits.append)
        with closing(transport):
            found = [transport.call("GET", f"/{ask}", same, repeatable=True) for ask in range(calls)]
    assert found == list(range(calls))
    assert bool(waits) is late


@responses.activate
def test_a_gateway_may_name_calls_as_it_likes(transport: Transport) -> None:
    responses.get(INFO, json={"fine": True}, headers={"x-request-id": "gateway-7"})
    assert transport.call("GET", "/info", same, repeatable=True) == {"fine": True}


@pytest.mark.parametrize(
    "url",
    [
        "server:8000",
        "http://",
        "http://[::1",
        "http://server:99999",
        "http://server:x",
        f"http://{'a' * 64}",
        "http://.x",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(errors.InvalidValue, match=r"^url: "):
        Transport(url)


@responses.activate
def test_a_key_comes_without_its_line_end() -> None:
    responses.get(INFO, json={})
    with closing(Transport(URL, api_key=" secret\n")) as transport:
        transport.call("GET", "/info", same, repeatable=True)
    assert responses.calls[0].request.headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("key", ["sec\nret", "schl\u00fcssel", "\x00"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key: str) -> None:
    with pytest.raises(errors.InvalidValue, match="api_key") as caught:
        Transport(URL, api_key=key)
    assert key not in str(caught.value)
