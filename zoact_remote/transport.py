"""HTTP with safe retries: a call is sent again only where the server cannot have acted on it twice.

A call is *repeatable* if doing it twice is the same as doing it once: reads, and updates that carry a key. Repeatable
calls are sent again after any failure that may pass, an answer that was cut off in transit among them. Other calls are
sent again only if the server never received them or said that it would not take them now (429, 503).

A server that has answered before and is then gone (the connection refused or broken; 502, 503 or 504) is being
restarted, which takes minutes where it must load a model: it is waited for patiently. A server that never answered is
given up after a few attempts, since its URL is probably wrong.

A server that refuses a call for now and says for how long (429 with Retry-After) is waited for as patiently: threads
that share one limit may each be refused many times before their turn.

Every call that is sent again is logged first ("zoact_remote", as a warning), with the reason and the delay.

Answers name their call by its request id. One that names another call of ours comes from a connection on which answers
were duplicated: it is thrown away with its connection.
"""

from __future__ import annotations

import copy
import ipaddress
import logging
import random
import threading
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import IO, Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import tenacity
from urllib3.exceptions import ConnectTimeoutError, MaxRetryError, NewConnectionError

from zoact_remote.errors import CallFailed, ConnectionFailed, InvalidValue, ServerError, error_of
from zoact_remote.threads import pause

log = logging.getLogger("zoact_remote")
log.addHandler(logging.NullHandler())

PREFIX = "/zoact/v1"
TOO_MANY = 429
REFUSED = frozenset({TOO_MANY, 503})
"""The server has not acted on the call, and will take it later."""
PASSING = REFUSED | {502, 504}
"""A gateway failed; the server may have acted on the call."""
GONE = frozenset({502, 503, 504})
"""The server, or a gateway in its place, says that it is away."""
BROKEN = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)
"""Failures of the connection that may pass. A body that was cut off comes as one of the last two."""
BACKOFF = tenacity.wait_exponential(multiplier=0.5, max=30.0) + tenacity.wait_random(0.0, 0.5)
LONGEST_WAIT_S = 120.0
"""A server that asks for a longer wait is not waited for."""
LEAST_WAIT_S = 0.1
"""A server that asks for no wait at all is not asked again at once: it may do so for a long time."""
CONNECTIONS_KEPT = 256
"""Connections that stay open for the next call: more than threads that one process is likely to call from at once."""
CHUNK_BYTES = 1 << 20
ID_HEADER = "x-request-id"
ID_PREFIX = "zoact-"
"""Of our own request ids: a gateway may answer with ids of its own."""

Answer = TypeVar("Answer")


class Transport:
    """Sends calls to one server.

    Args:
        url: where the server is, such as ``http://127.0.0.1:8000``.
        api_key: sent as a bearer token; None for none.
        timeout: seconds to connect, and seconds between bytes of an answer.
        retries: how often a call is sent again at most, but for a server that is waited for.
        patience: seconds that a server is waited for, summed over the pauses of one call, if it has answered before
            and is then gone, or says that there were too many calls.
        sleep: waits for a number of seconds, or raises what ends the call; tests replace it.

    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: tuple[float, float] = (5.0, 600.0),
        retries: int = 5,
        patience: float = 600.0,
        sleep: Callable[[float], None] = pause,
    ) -> None:
        host = _host(url)
        self.url = url.rstrip("/")
        self._set(timeout, retries, patience)
        self._sleep = sleep
        self._answered = threading.Event()
        self._session = requests.Session()
        self._session.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS_KEPT))
        # A proxy from the environment cannot reach this machine's own loopback.
        self._session.trust_env = not is_loopback(host)
        if api_key is not None:
            # An auth object, not a header: requests would let a matching .netrc entry replace the header.
            self._session.auth = _Bearer(_checked_key(api_key))

    def with_options(
        self,
        *,
        timeout: tuple[float, float] | None = None,
        retries: int | None = None,
        patience: float | None = None,
    ) -> Transport:
        """The same server over the same connections, under other options; None leaves an option as it is."""
        other = copy.copy(self)
        other._set(
            self.timeout if timeout is None else timeout,
            self.retries if retries is None else retries,
            self.patience if patience is None else patience,
        )
        return other

    def _set(self, timeout: tuple[float, float], retries: int, patience: float) -> None:
        if not (isinstance(timeout, tuple) and len(timeout) == 2 and all(seconds > 0 for seconds in timeout)):
            raise InvalidValue("timeout", f"must be two numbers of seconds greater than 0, got {timeout!r}")
        if retries < 0:
            raise InvalidValue("retries", f"must be at least 0, got {retries}")
        if not patience >= 0:
            raise InvalidValue("patience", f"must be at least 0, got {patience}")
        self.timeout = timeout
        self.retries = retries
        self.patience = patience

    def call(
        self,
        method: str,
        path: str,
        decode: Callable[[Any], Answer],
        *,
        json: Any = None,
        content: bytes | None = None,
        params: Mapping[str, Any] | None = None,
        repeatable: bool,
        once: bool = False,
    ) -> Answer:
        """Make a call and decode its answer.

        Args:
            method: HTTP method.
            path: below ``/zoact/v1``.
            decode: makes the result from the answer's JSON; from None where the answer has no content.
            json: body.
            content: body that is not JSON, in its place.
            params: query; entries that are None are left out.
            repeatable: whether the call may be sent again although the server may have acted on it.
            once: never send it again, whatever happens.

        Raises:
            CallFailed: the call failed, after retries where they were safe.

        """

        def read(response: requests.Response) -> Answer:
            try:
                return decode(_json_of(response))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ServerError(
                    f"{method} {path}: the answer could not be understood ({type(error).__name__}: {error}); is "
                    f"{self.url} a server with the ZO-Act extension, of a version that fits this client's?",
                    status=response.status_code,
                    request_id=response.headers.get(ID_HEADER),
                ) from error

        return self._send(
            method, path, read, json=json, content=content, params=params, repeatable=repeatable, once=once
        )

    def download(self, path: str, file: IO[bytes], *, params: Mapping[str, Any] | None = None) -> None:
        """Write the answer to a GET to a file, from the file's start.

        Raises:
            CallFailed: the call failed, after retries.

        """

        def read(response: requests.Response) -> None:
            file.seek(0)
            file.truncate()
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)

        self._send("GET", path, read, params=params, repeatable=True)

    def text(self, path: str) -> str:
        """The answer to a GET of a path of the server's own, beside ``/zoact/v1``.

        Raises:
            CallFailed: the call failed, after retries.

        """
        return self._send("GET", path, lambda response: response.text, prefix="", repeatable=True)

    def close(self) -> None:
        self._session.close()

    def _send(
        self,
        method: str,
        path: str,
        read: Callable[[requests.Response], Answer],
        *,
        prefix: str = PREFIX,
        json: Any = None,
        content: bytes | None = None,
        params: Mapping[str, Any] | None = None,
        repeatable: bool,
        once: bool = False,
    ) -> Answer:
        # One id for all attempts: in the server's log they are one call.
        request_id = f"{ID_PREFIX}{uuid.uuid4().hex}"

        def attempt() -> Answer:
            try:
                with self._session.request(
                    method,
                    self.url + prefix + path,
                    json=json,
                    data=content,
                    params=params,
                    headers={ID_HEADER: request_id},
                    timeout=self.timeout,
                    # Followed, a POST would arrive as a GET without its body.
                    allow_redirects=False,
                    # A body that nobody reads takes its connection with it, which an answer to another call must.
                    stream=True,
                ) as response:
                    if response.is_redirect:
                        place = urljoin(response.url, response.headers["location"])
                        raise InvalidValue("url", f"{self.url} redirects to {place}: give the server's own URL")
                    answered = response.headers.get(ID_HEADER, request_id)
                    if answered != request_id and answered.startswith(ID_PREFIX):
                        raise requests.ConnectionError(f"the answer is to another call, {answered}")
                    if _ends_in_its_head(response):
                        raise requests.exceptions.ChunkedEncodingError("the answer was cut off in its head")
                    if response.status_code not in GONE:
                        self._answered.set()
                    if not response.ok:
                        raise _error_in(response, method, path, request_id)
                    return read(response)
            except requests.exceptions.InvalidJSONError as error:
                raise InvalidValue("body", str(error)) from error
            except requests.RequestException as error:
                raise ConnectionFailed(
                    f"{method} {self.url}{prefix}{path}: {error}", sent=_was_sent(error), request_id=request_id
                ) from error

        def stop(state: tenacity.RetryCallState) -> bool:
            if once or state.attempt_number <= self.retries:
                return once
            error = None if state.outcome is None else state.outcome.exception()
            patient = self._answered.is_set() and (_is_gone(error) or _is_too_soon(error))
            return not patient or state.idle_for >= self.patience

        retrying = tenacity.Retrying(
            stop=stop,
            retry=tenacity.retry_if_exception(lambda error: _may_retry(error, repeatable)),
            wait=_wait,
            before_sleep=_log_wait,
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(attempt)


def _host(url: str) -> str:
    """The host of a server's URL. Raises InvalidValue if it can be none."""
    if not url.startswith(("http://", "https://")):
        raise InvalidValue("url", f"must start with http:// or https://, got {url!r}")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:
        raise InvalidValue("url", f"is not one: {error}; got {url!r}") from None
    if not host:
        raise InvalidValue("url", f"has no host, got {url!r}")
    return host


def _checked_key(key: str) -> str:
    """An API key as a header can hold it, without the line's end that a file may have left. It is never shown."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise InvalidValue("api_key", "must be of printable ASCII characters")
    return key


class _Bearer(requests.auth.AuthBase):
    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _may_retry(error: BaseException, repeatable: bool) -> bool:
    if isinstance(error, ConnectionFailed):
        cause = error.__cause__
        passing = isinstance(cause, BROKEN) and not isinstance(cause, requests.exceptions.SSLError)
        return passing and (repeatable or not error.sent)
    if not isinstance(error, CallFailed) or (error.retry_after or 0.0) > LONGEST_WAIT_S:
        return False
    return error.status in (PASSING if repeatable else REFUSED)


def _is_gone(error: BaseException | None) -> bool:
    if isinstance(error, ConnectionFailed):
        # A server that keeps a connection open and says nothing is another matter: it is there.
        return not isinstance(error.__cause__, requests.ReadTimeout)
    return isinstance(error, CallFailed) and error.status in GONE


def _is_too_soon(error: BaseException | None) -> bool:
    return isinstance(error, CallFailed) and error.status == TOO_MANY and error.retry_after is not None


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, CallFailed) else None
    if asked is None:
        return BACKOFF(state)
    asked = max(asked, LEAST_WAIT_S)
    # Those who were refused together must not all come back together.
    return asked + random.uniform(0.0, max(asked, 0.5)) if _is_too_soon(error) else asked


def _log_wait(state: tenacity.RetryCallState) -> None:
    assert state.outcome is not None
    assert state.next_action is not None
    log.warning("%s; trying again in %.1f s", state.outcome.exception(), state.next_action.sleep)


def _was_sent(error: requests.RequestException) -> bool:
    """Whether any of the call may have reached the server."""
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return False
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, MaxRetryError) else cause
    return not isinstance(reason, (NewConnectionError, ConnectTimeoutError))


def _ends_in_its_head(response: requests.Response) -> bool:
    """Whether an answer broke off before its body: Python's HTTP client takes that for the end of the head."""
    length, coding = (response.headers.get(name, "").strip() for name in ("content-length", "transfer-encoding"))
    announced = length.isdigit() or coding.lower() == "chunked"
    return not (announced or response.status_code in PASSING | {204} or response.content)


def _json_of(response: requests.Response) -> Any:
    """An answer's JSON; None where it has no content."""
    if not response.content:
        return None
    try:
        return response.json()
    except requests.exceptions.JSONDecodeError as error:
        if not response.headers.get("content-type", "").startswith("application/json"):
            raise
        # All that shows of it where the body's length was not announced.
        raise requests.exceptions.ChunkedEncodingError("the answer's JSON was cut off") from error


def _error_in(response: requests.Response, method: str, path: str, request_id: str) -> CallFailed:
    try:
        body = response.json()
    except requests.exceptions.JSONDecodeError:
        body = None
    return error_of(
        response.status_code,
        body,
        request_id=response.headers.get(ID_HEADER) or request_id,
        retry_after=_retry_after(response.headers.get("retry-after")),
        fallback=f"{method} {path}: {response.status_code} {response.reason}",
    )


def _retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait: it holds seconds, or a date (RFC 9110, section 10.2.3)."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    aware = date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
    return max(0.0, (aware - datetime.now(timezone.utc)).total_seconds())


def is_passing(error: CallFailed) -> bool:
    """Whether a call failed because a server, or a gateway before it, is not there or not ready."""
    return isinstance(error, ConnectionFailed) or error.status in PASSING


def is_loopback(host: str) -> bool:
    """Whether a name or address can only be this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
