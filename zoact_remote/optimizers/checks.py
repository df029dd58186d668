"""Checks of settings."""

from __future__ import annotations

import math

from zoact_remote.errors import InvalidValue


def share(**values: float) -> None:
    """Raise InvalidValue for a value outside [0, 1)."""
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise InvalidValue(name, f"must be at least 0 and below 1, got {value!r}")


def positive(**values: float) -> None:
    """Raise InvalidValue for a value that is not finite and greater than 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0.0):
            raise InvalidValue(name, f"must be finite and greater than 0, got {value!r}")


def not_negative(**values: float) -> None:
    """Raise InvalidValue for a value that is not finite and at least 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0.0):
            raise InvalidValue(name, f"must be finite and at least 0, got {value!r}")
