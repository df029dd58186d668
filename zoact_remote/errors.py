"""What can go wrong, as one exception class per remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ZoActError(Exception):
    """Base of the library's exceptions."""


class InvalidValue(ZoActError, ValueError):
    """A value that the server would refuse, found before anything was sent, or that means nothing to the library.

    Attributes:
        param: path of the value at fault, such as ``terms[3]``; the same form as :attr:`CallFailed.param`.
        message: what is wrong with it. The exception's text is both.

    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(param, message)
        self.param = param
        self.message = message

    def __str__(self) -> str:
        return f"{self.param}: {self.message}"


class Inconclusive(ZoActError, RuntimeError):
    """Losses do not show what was to be measured with them."""


class TrainingDiverged(ZoActError, RuntimeError):
    """A loss is not finite, or stays far above where it was. No update was made from it."""


class CallFailed(ZoActError):
    """A call that failed.

    Attributes:
        message: what went wrong, in the server's words where it answered.
        status: HTTP status code; None if no answer came.
        code: a short word that programs can match, such as ``adapter_not_found``.
        param: path of the field at fault, such as ``rows[3].prompt``.
        request_id: names the call in the server's log.
        retry_after: seconds that the server asked to wait; None if it named none.

    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        notes = [str(note) for note in (self.status, self.code) if note is not None]
        if self.request_id is not None:
            notes.append(f"request {self.request_id}")
        return f"{self.message} ({', '.join(notes)})" if notes else self.message


class BadRequest(CallFailed):
    """The call is at fault; sending it again will not help."""


class TooLarge(BadRequest):
    """A row is longer than the model's context, or a call has too many rows, tokens, probes or bytes: send less.

    What a call may have is in :attr:`zoact_remote.wire.Info.limits`.
    """


class AuthenticationError(CallFailed):
    """The API key is missing or wrong."""


class PermissionDenied(CallFailed):
    """The API key is good, but not for this: it is for the operator, or for another tenant."""


class LimitExceeded(CallFailed):
    """The tenant has as many adapters, or coefficients, as it may have: delete some, or ask the operator for more."""


class NotFound(CallFailed):
    """No such adapter, or no such version of it."""


class Conflict(CallFailed):
    """The adapter's state forbids the call: it exists already, or its basis does or does not."""


class StaleVersion(CallFailed):
    """An update's base version is not the newest one: someone else has updated the adapter. Nothing was changed.

    Attributes:
        current_version: the adapter's newest version; None if the server did not say.

    """

    def __init__(self, message: str, *, current_version: int | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.current_version = current_version


class RateLimited(CallFailed):
    """The server has too much to do, and still did after all retries."""


class ServerError(CallFailed):
    """The server failed, or its answer could not be understood."""


class ConnectionFailed(CallFailed):
    """No complete answer came.

    Attributes:
        sent: False if the connection was never made, so that the server cannot have acted on the call.

    """

    def __init__(self, message: str, *, sent: bool, **details: Any) -> None:
        super().__init__(message, **details)
        self.sent = sent


_BY_STATUS: dict[int, type[CallFailed]] = {
    401: AuthenticationError,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    412: StaleVersion,
    413: TooLarge,
    429: RateLimited,
}
_BY_CODE: dict[str | None, type[CallFailed]] = {
    "batch_too_large": TooLarge,
    "context_length_exceeded": TooLarge,
    "limit_exceeded": LimitExceeded,
}
"""Where the status says too little."""


def error_of(status: int, body: Any, *, request_id: str | None, retry_after: float | None, fallback: str) -> CallFailed:
    """The exception for an answer that is not a success.

    Args:
        status: HTTP status code.
        body: the decoded JSON body, of any shape; proxies answer in their own.
        request_id: names the call in the server's log.
        retry_after: seconds that the server asked to wait.
        fallback: the message where the body holds none.

    """
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        error = {"message": error} if isinstance(error, str) else {}
    code = error.get("code")
    details: dict[str, Any] = {
        "status": status,
        "code": None if code is None else str(code),
        "param": error.get("param"),
        "request_id": request_id,
        "retry_after": retry_after,
    }
    message = str(error.get("message") or fallback)
    kind = _BY_CODE.get(details["code"]) or _BY_STATUS.get(status, ServerError if status >= 500 else BadRequest)
    if kind is StaleVersion:
        return StaleVersion(message, current_version=error.get("current_version"), **details)
    return kind(message, **details)
