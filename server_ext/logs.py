"""The server's log: one JSON object a line on standard error, never a prompt, a completion or a key."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO, cast

import structlog


class _Stderr:
    """Standard error, but lines that it cannot take are lost: a log on a full disk must not fail calls."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


log = structlog.wrap_logger(
    structlog.PrintLogger(cast(TextIO, _Stderr())),
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Plain tracebacks: those that show local variables would show prompts.
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ],
)
