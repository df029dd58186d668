"""What is written as TOML is read as it was."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoact_remote import InvalidValue, toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = (
    TEXT | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.lists(TEXT, max_size=3)
)
TABLES = st.recursive(
    st.dictionaries(TEXT, VALUES, max_size=3), lambda inner: st.dictionaries(TEXT, VALUES | inner, max_size=3)
)


@given(data=TABLES)
def test_what_is_written_is_read(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    path.write_text(toml.dumps(data), encoding="utf-8")
    assert toml.load(path) == data


def test_it_reads_as_one_would_write_it() -> None:
    data = {"template": "{q}\n", "table": {"a b": True, "inner": {"0": "x"}}, "list": ("a", "b"), "max_tokens": 8}
    assert toml.dumps(data) == (
        'template = "{q}\\n"\nlist = ["a", "b"]\nmax_tokens = 8\n\n[table]\n"a b" = true\n\n[table.inner]\n0 = "x"\n'
    )


def test_a_mark_of_utf_8_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    assert toml.load(path) == {"a": 1}


@pytest.mark.parametrize("content", [b"a = ", b"a = '\xff'"])
def test_what_is_not_toml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidValue, match="not TOML") as caught:
        toml.load(path)
    assert caught.value.param == str(path)
