"""The server's log: one JSON object a line on standard error, never a prompt, a completion or a key."""

from __future__ import annotations

import sys

import structlog

log = structlog.wrap_logger(
    structlog.PrintLogger(sys.stderr),
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Plain tracebacks: those that show local variables would show prompts.
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ],
)
