"""Where a text ends, against a reader that sees it letter by letter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server_ext.engines.base import GeneratedText, text_before

WORDS = st.text("ab", min_size=1, max_size=4)


@given(st.text("abc", max_size=12), st.lists(WORDS, max_size=4))
def test_a_text_ends_before_what_is_complete_first(text: str, stop: list[str]) -> None:
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            wanted = text[: end - max(map(len, complete))]
            assert text_before(text, stop) == wanted
            assert GeneratedText.cut((1,), text, False, stop) == GeneratedText((1,), wanted, True)
            assert not any(string in wanted for string in stop)
            return
    assert text_before(text, stop) is None
    assert GeneratedText.cut((1,), text, False, stop) == GeneratedText((1,), text, False)
