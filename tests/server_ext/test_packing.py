"""Packs hold every context whole, whatever they leave out of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server_ext.packing import Packing
from server_ext.rows import Context

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=24)


@st.composite
def contexts(draw: st.DrawFn) -> list[Context]:
    """Contexts of few different tokens, many of which begin alike."""
    beginning = draw(TOKENS)
    found = []
    for rest in draw(st.lists(TOKENS, min_size=1, max_size=8)):
        tokens = (*beginning[: draw(st.integers(0, len(beginning)))], *rest)
        start = draw(st.integers(1, len(tokens)))
        candidates = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
        found.append(Context(tokens, start, tuple(candidates)))
    return found


@given(contexts(), st.sampled_from([1, 2, 4]), st.integers(1, 60), st.integers(1, 12), st.booleans())
def test_every_context_can_be_read_back(rows: list[Context], block: int, most: int, answers: int, many: bool) -> None:
    packs = Packing(block, answers, many).pack(rows, most)
    read: list[Context] = []
    for pack in packs:
        assert len(pack.rows) == 1 or (many and len(pack.tokens) <= most and pack.answers <= answers)
        whole: list[tuple[int, ...]] = []
        at = 0
        for like, shared, length, start, *candidates in pack.rows:
            assert at % block == shared % block == 0
            # What is scored is predicted by a token of the row's own.
            assert shared < start <= length
            whole.append((*(whole[like][:shared] if shared else ()), *pack.tokens[at : at + length - shared]))
            at += -(-(length - shared) // block) * block
            read.append(Context(whole[-1], start, tuple(candidates)))
        scores = pack.scores([float(i) for i in range(pack.answers)])
        assert [v for score in scores for v in score.candidates] == [float(i) for i in range(pack.answers)]
        assert [len(score.candidates) for score in scores] == [len(row) - 4 for row in pack.rows]
    assert read == rows


def test_common_beginnings_are_left_out_once_they_are_there() -> None:
    examples = tuple(range(100, 140))
    rows = [
        Context((*examples, 1), 41, (7,)),
        Context((*examples, 2, 3), 41, (7, 8)),
        Context((*examples, 2, 3, 4, 5, 6, 7, 8, 9, 10), 48, (7,)),
        Context((*examples, 2, 3, 4, 5, 6, 7, 8, 9, 11), 49, (9,)),
    ]
    (pack,) = Packing(8, 128, True).pack(rows, 2048)
    assert [row[:3] for row in pack.rows] == [[0, 0, 41], [0, 40, 42], [0, 40, 49], [2, 48, 49]]
    assert len(pack.tokens) == 48 + 8 + 16 + 1


def test_contexts_keep_their_order_from_pack_to_pack() -> None:
    rows = [Context((i, i + 1, i + 2), 2, (0,)) for i in range(7)]
    packs = Packing(2, 128, True).pack(rows, 8)
    assert [len(pack.rows) for pack in packs] == [2, 2, 2, 1]
    assert packs[0].tokens == [0, 1, 2, 0, 1, 2, 3]
