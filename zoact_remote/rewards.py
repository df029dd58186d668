"""Ready-made rewards, for :class:`zoact_remote.Rewarded`: functions of a row and a text, 1 for the best.

A reward that says how near a text came teaches faster than one of right and wrong: where all texts of a step are wrong
alike, the step learns nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from zoact_remote import metrics
from zoact_remote.errors import InvalidValue
from zoact_remote.rewarded import Reward
from zoact_remote.unit_tests import passing_tests
from zoact_remote.wire import Row

__all__ = ["exact_match", "length", "passing_tests", "valid_json"]


def exact_match(references: str = "references") -> Reward:
    """1 for a text that is a reference, up to case, punctuation and articles (:func:`metrics.exact_match`); else 0.

    Args:
        references: name of the rows' field that holds them, a list of texts or a text.

    """

    def reward(row: Row, text: str) -> float:
        found = field_of(row, references)
        return metrics.exact_match(text, [found] if isinstance(found, str) else found)

    return reward


def length(target: int, *, count: Callable[[str], int] = lambda text: len(text.split())) -> Reward:
    """How near a text's length comes to a target: 1 at the target, 0 at nothing and from twice the target on.

    Args:
        target: at least 1.
        count: what the length is, words unless told otherwise; ``len`` counts characters.

    """
    if target < 1:
        raise InvalidValue("target", f"must be at least 1, got {target}")
    return lambda row, text: max(0.0, 1.0 - abs(count(text) - target) / target)


def valid_json(schema: Mapping[str, Any] | None = None, *, graded: bool = True) -> Reward:
    """1 for a text that is one JSON value (RFC 8259; no NaN, nothing before or after it) and fits a schema.

    Else 0 or, if graded: for a value that does not fit the schema, ``1/2 + 1/2 1/(1 + violations)``; for what is no
    JSON, half the share of its characters up to where that shows.

    Args:
        schema: a JSON Schema, draft 2020-12 unless it names another; needs ``pip install 'zoact-remote[json]'``.
        graded: whether there is anything between 0 and 1.

    Raises:
        InvalidValue: the schema is none, or jsonschema is not installed.

    """
    violations = _no_violations if schema is None else _violations_of(schema)

    def reward(row: Row, text: str) -> float:
        text = text.strip()
        try:
            found = violations(json.loads(text, parse_constant=_refuse))
        except json.JSONDecodeError as error:
            return 0.5 * error.pos / len(text) if graded and text else 0.0
        # NaN, a number of too many digits or too large for the schema's arithmetic, brackets beyond all bounds
        except (ValueError, ArithmeticError, RecursionError):
            return 0.0
        return 0.5 + 0.5 / (1 + found) if graded else float(not found)

    return reward


def field_of(row: Row, name: str) -> Any:
    """A row's field.

    Raises:
        InvalidValue: the row does not have it.

    """
    if name not in row:
        raise InvalidValue(name, f"the reward needs this field; the row has {', '.join(map(repr, row))}")
    return row[name]


def _no_violations(value: Any) -> int:
    return 0


def _violations_of(schema: Mapping[str, Any]) -> Callable[[Any], int]:
    try:
        import jsonschema
    except ImportError:
        raise InvalidValue("schema", "needs jsonschema: pip install 'zoact-remote[json]'") from None
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InvalidValue("schema", error.message) from None
    validator = kind(schema)
    return lambda value: sum(1 for _ in validator.iter_errors(value))


def _refuse(constant: str) -> None:
    raise ValueError(constant)
