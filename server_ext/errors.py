"""Errors that a caller sees, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from server_ext.logs import log

STORAGE_RETRY_S = 5
BATCH_TOO_LARGE = "batch_too_large"
"""The code of a call that asks for more at once than a call may."""


class ApiError(Exception):
    """A call that is refused; nothing has changed, unless its message says otherwise.

    Attributes:
        status: HTTP status code.
        code: a short word that programs can match.
        param: path of the field at fault, such as ``rows[3].prompt``.
        retry_after: seconds after which the call may be sent again; None if that would not help.
        extra: further members of the error object.

    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after: int | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.extra = extra

    def body(self, request_id: str) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        param = None if self.param is None else _writable(self.param)
        error = {"message": _writable(self.message), "type": kind, "param": param, "code": self.code, **self.extra}
        return {"error": error, "request_id": request_id}


def _writable(text: str) -> str:
    """A text that quotes what a caller sent, which may be half a character: JSON can name it, UTF-8 cannot hold it."""
    return text.encode(errors="backslashreplace").decode()


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, code, f"{param}: {message}", param)


def storage_failed(error: Exception, outcome: str = "nothing changed") -> ApiError:
    """A 503 for a disk that is full or broken; the log says which."""
    log.error("disk failed", error=str(error))
    message = f"the server could not use its disk; {outcome}"
    return ApiError(503, "storage_failed", message, retry_after=STORAGE_RETRY_S)


def no_room(error: Exception) -> ApiError:
    """A 507 for an engine that has no memory left; the error says how much there is, and what is wanted."""
    return ApiError(507, "no_room", str(error))
