"""Fields take their places, whatever they hold, and what is missing is named."""

from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoact_remote import RecordError
from zoact_remote.tasks.templates import lookup, parse, render, render_each, text_of


@given(st.text(), st.text(), st.text())
def test_what_a_field_holds_is_text_and_no_template(before: str, value: str, after: str) -> None:
    template = before.replace("{", "{{").replace("}", "}}") + "{x}" + after.replace("{", "{{").replace("}", "}}")
    assert render(template, {"x": value}, {}) == before + value + after


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{a}{b}", "Ann.I am"),
        ("{in.er}: {a b}", "deep: spaced"),
        ("{{{a}}}", "{Ann.}"),
        ("{a:unstopped} {a:uncapitalised} {b:uncapitalised} {c:capitalised}", "Ann ann. I am Éa"),
        ("{stops:unstopped}|{spaces:stripped}|", "what...|x|"),
        ("{none}", ""),
    ],
)
def test_forms_and_members(template: str, rendered: str) -> None:
    record = {"a": "Ann.", "b": "I am", "c": "éa", "a b": "spaced", "in": {"er": "deep"}, "none": ""}
    assert render(template, record | {"stops": "what.... ", "spaces": " x\n"}, {}) == rendered


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(True, "true"), (4.0, "4"), (0.5, "0.5"), (-3, "-3"), ("4.0", "4.0"), (float("inf"), "inf")],
        *[(np.False_, "false"), (np.float32(4), "4"), (np.float32(0.1), "0.1"), (np.int8(-3), "-3")],
        *[(np.str_("x"), "x"), (Decimal("1.50"), "1.50"), (date(2024, 1, 2), "2024-01-02")],
    ],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert text_of(value) == text == render("{x}", {"x": value}, {})
    assert render("{x}", {"x": value}, {}) == text


def test_values_in_other_words() -> None:
    words = {"question": {"cause": "because", "3": "three"}}
    assert render("{a} {question}", {"a": "cause", "question": "cause"}, words) == "cause because"
    assert render("{question}", {"question": 3.0}, words) == "three"
    with pytest.raises(RecordError, match="field 'question' is 'why', not one of 'cause', '3'"):
        render("{question}", {"question": "why"}, words)


def test_a_list_makes_a_text_an_item() -> None:
    record = {"options": {"text": ["One.", 2, "three"]}, "one": "1"}
    assert render_each(" {options.text:uncapitalised}\n", record, {}) == [" one.\n", " 2\n", " three\n"]
    assert render_each(" {one}", record, {}) == [" 1"]
    assert render_each("same", record, {}) == ["same"]
    with pytest.raises(RecordError, match=r"'options\.text' must hold text or a number, not"):
        render_each("{one} {options.text}", record, {})
    with pytest.raises(RecordError, match="'x' is an empty list"):
        render_each("{x}", {"x": []}, {})


@pytest.mark.parametrize("made", [tuple, np.array, lambda items: np.array(items, dtype=object)])
def test_tuples_and_arrays_are_lists(made: Callable[[list[str]], Any]) -> None:
    assert render_each(" {x}", {"x": made(["a", "b"])}, {}) == [" a", " b"]
    with pytest.raises(RecordError, match=r"field 'x' must hold text or a number, not .* \((tuple|ndarray)\)"):
        render("{x}", {"x": made(["a", "b"])}, {})
    with pytest.raises(RecordError, match="'x' is an empty list"):
        render_each("{x}", {"x": made([])}, {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"is empty \(NaN\)"),
        (np.float32("nan"), r"is empty \(NaN\)"),
        (b"Caf\xc3\xa9", r"must hold text or a number, not b'Caf.*' \(bytes\)"),
        ({"a"}, r"must hold text or a number, not {'a'} \(set\)"),
        (np.datetime64("2024-01-02", "ns"), r"must hold text or a number, not .* \(datetime64\)"),
    ],
)
def test_what_is_neither_text_nor_a_number(value: Any, message: str) -> None:
    for listed in (value, [value], (value,)):
        with pytest.raises(RecordError, match=f"field 'x' {message}"):
            render_each("{x}", {"x": listed}, {})


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        ("{text}", {"body": 1, "label": 2}, "field 'text' is missing; there is 'body', 'label'"),
        ("{text}", {}, "field 'text' is missing; there is nothing"),
        ("{a.b}", {"a": {"c": 1}}, "field 'a.b' is missing; there is 'c'"),
        ("{a.b}", {"a": "text"}, "field 'a.b' is missing; there is 'text'"),
        ("{a.__class__}", {"a": "text"}, "field 'a.__class__' is missing"),
        ("{text}", {"text": None}, "field 'text' is null"),
        ("{text}", {"text": [1]}, r"field 'text' must hold text or a number, not \[1\]"),
        ("{text}", {"text": {"a": 1}}, "field 'text' must hold text or a number"),
    ],
)
def test_fields_that_cannot_be_filled(template: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        render(template, record, {})


def test_long_records_are_shown_in_part() -> None:
    with pytest.raises(RecordError) as caught:
        render("{text}", {f"field-{i}": 1 for i in range(1000)}, {})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "template", ["{0}", "{}", "{a..b}", "{a.}", "{a[0]}", "{text!r}", "{text:>9}", "{a", "a}", "{ a}"]
)
def test_templates_that_make_no_sense(template: str) -> None:
    with pytest.raises(ValueError, match=r"plain name|form of a field|expected|Single"):
        parse(template)


def test_a_name_with_dots_is_a_field_or_a_member() -> None:
    assert lookup({"meta.label": "x", "meta": {"label": "y"}}, "meta.label") == "x"
    assert lookup({"meta": {"label": "y"}}, "meta.label") == "y"
    with pytest.raises(RecordError, match=r"field 'meta\.label' is missing; there is 'other'"):
        lookup({"other": 1}, "meta.label")
