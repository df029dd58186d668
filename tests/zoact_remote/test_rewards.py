"""Ready-made rewards."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoact_remote import InvalidValue
from zoact_remote.rewards import exact_match, length, passing_tests, valid_json

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_exact_match() -> None:
    row = {"references": ["Paris", "the city of Paris"], "answer": "Rome"}
    assert exact_match()(row, " paris.") == 1.0
    assert exact_match()(row, "Rome") == 0.0
    assert exact_match("answer")(row, "Rome") == 1.0
    with pytest.raises(InvalidValue, match=r"^solution: .*'references', 'answer'"):
        exact_match("solution")(row, "Rome")


@given(st.integers(1, 40), st.integers(0, 100))
def test_length(target: int, words: int) -> None:
    reward = length(target)
    text = "word " * words
    assert (reward({}, text) == 1.0) == (words == target)
    assert (reward({}, text) == 0.0) == (words == 0 or words >= 2 * target)
    if 0 < words < 2 * target:
        assert reward({}, text) == pytest.approx(length(target, count=len)({}, "x" * words))
        nearer = words + (words < target) - (words > target)
        assert reward({}, "word " * nearer) >= reward({}, text)


def test_length_of_nothing() -> None:
    with pytest.raises(InvalidValue, match=r"^target: "):
        length(0)


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_json_is_worth_1(value: Any, graded: bool, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert valid_json(graded=graded)({}, f" {text}\n") == 1.0
    assert valid_json({}, graded=graded)({}, text) == 1.0


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), min_size=1, max_size=3), st.data())
def test_what_is_no_json_is_worth_half_at_most(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    assert 0.0 <= valid_json()({}, cut) <= 0.5
    assert valid_json(graded=False)({}, cut) == 0.0
    # The longer what follows, the worse.
    worth = [valid_json()({}, text + tail) for tail in (" so", " so it is")]
    assert 0.5 > worth[0] > worth[1] > 0.0


@pytest.mark.parametrize("text", ["", "   ", "NaN", "[1, Infinity]", "[" * 100_000, "9" * 5000, "no"])
def test_what_is_not_at_all_json(text: str) -> None:
    assert valid_json()({}, text) == 0.0
    assert valid_json(graded=False)({}, text) == 0.0


@pytest.mark.parametrize(
    ("value", "worth"),
    [
        ({"name": "Ada", "age": 36}, 1.0),
        ({"name": "Ada"}, 0.75),
        ({"name": "Ada", "age": "36"}, 0.75),
        ({"name": 3, "age": "36"}, 0.5 + 0.5 / 3),
        ([], 0.75),
    ],
)
def test_json_by_a_schema(value: Any, worth: float) -> None:
    text = json.dumps(value)
    assert valid_json(SCHEMA)({}, text) == pytest.approx(worth)
    assert valid_json(SCHEMA, graded=False)({}, text) == float(worth == 1.0)


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400])
def test_a_number_beyond_the_schemas_arithmetic(number: str) -> None:
    assert valid_json({"multipleOf": 0.01})({}, number) == 0.0


def test_a_schema_that_is_none() -> None:
    with pytest.raises(InvalidValue, match=r"^schema: 'objekt' is not valid"):
        valid_json({"type": "objekt"})


def test_a_schema_needs_jsonschema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert valid_json()({}, "1") == 1.0
    with pytest.raises(InvalidValue, match=r"^schema: needs jsonschema"):
        valid_json(SCHEMA)


DATACLASS = """from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Doubled:
    value: int
def double(x): return Doubled(2 * x).value
"""
TESTS = ["assert double(2) == 4", "assert double('a') == 'aa'", "assert double(0) == 1"]


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("def double(x):\n    return 2 * x", 2),
        ("Here it is:\n```python\ndef double(x):\n    return x + x\n```\nIt doubles.", 2),
        ("```\ndef double(x): return 2 * x", 2),
        ("def double(x):\n    print('x' * 100)\n    return 2 * x if x else 1", 3),
        (DATACLASS, 2),
        ("def double(x): return x", 0),
        ("def double(x) return x", 0),
        ("def double(x):\n    if x == 'a': raise SystemExit\n    return 2 * x", 1),
        ("import os; os._exit(0)", 0),
        ("def double(x):\n    x[0].y", 0),
        ("\ud800", 0),
    ],
)
def test_tests_that_pass(text: str, passed: int) -> None:
    assert passing_tests(timeout=60.0)({"tests": TESTS}, text) == pytest.approx(passed / 3)


def test_time_and_memory_are_limited() -> None:
    forever = "def double(x):\n    while x == 'a': pass\n    return 2 * x"
    started = time.monotonic()
    assert passing_tests(timeout=5.0)({"tests": TESTS}, forever) == pytest.approx(1 / 3)
    asleep = "import time, os\nif os.fork() == 0: time.sleep(600)\ntime.sleep(600)"
    assert passing_tests(timeout=0.5)({"tests": TESTS}, asleep) == 0.0
    assert time.monotonic() - started < 300
    hungry = "def double(x): return len(bytearray(300 << 20)) and 2 * x"
    for memory_mib, passed in ((256, 0), (1024, 1)):
        reward = passing_tests(timeout=60.0, memory_mib=memory_mib)
        assert reward({"tests": TESTS[:1]}, hungry) == passed


def test_a_limit_may_be_lower_already() -> None:
    lower = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    script = f"{lower}from zoact_remote.rewards import passing_tests\nprint(passing_tests()({{'tests': ['pass']}}, ''))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "1.0\n"


def test_code_sees_neither_the_environment_nor_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZOACT_API_KEY", "sesame")
    monkeypatch.chdir(tmp_path)
    code = "import os\nopen('left', 'w').write('x')\nfound = os.environ.get('ZOACT_API_KEY')"
    assert (
        passing_tests(timeout=60.0)({"tests": ["assert found is None", "assert os.listdir() == ['left']"]}, code) == 1.0
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tests", [None, [], "assert True"])
def test_rows_without_tests(tests: Any) -> None:
    with pytest.raises(InvalidValue, match=r"^tests: "):
        passing_tests()({"tests": tests}, "")


@pytest.mark.parametrize("options", [{"timeout": 0.0}, {"timeout": float("inf")}, {"memory_mib": 1}])
def test_limits_out_of_bounds(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=f"^{next(iter(options))}: "):
        passing_tests(**options)
