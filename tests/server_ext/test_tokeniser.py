"""Tokenising beside the event loop, with an engine that takes as long for it as the tests want."""

from __future__ import annotations

import asyncio
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ext import tokeniser
from server_ext.engines.transformers import TransformersEngine
from server_ext.errors import ApiError
from server_ext.metrics import Metrics
from server_ext.schemas import (
    AskGeneration,
    AskScores,
    BasisSpec,
    Calibrate,
    ChatMessage,
    CompletionRow,
    CreateAdapter,
    Row,
    TenantLimits,
)
from server_ext.service import Service
from server_ext.tokeniser import Tokeniser
from tests.server_ext.support import OPERATOR

WITHIN_S = 30
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def characters(text: str, special: bool) -> list[int]:
    return [ord(character) for character in text]


def engine(encode: Callable[[str, bool], list[int]] = characters) -> Any:
    def render(messages: Any, opened: bool) -> str:
        return "".join(message["content"] for message in messages) + "!" * opened

    return Namespace(encode=encode, render_chat=render, longest_token=4, model=Namespace(vocabulary=256, max_tokens=64))


def rows_of(lengths: list[int]) -> list[Row]:
    """Rows that come to so many tokens through the model."""
    return [CompletionRow(prompt="p" * length, completion="c") for length in lengths]


@given(st.data(), LENGTHS, st.integers(0, 80))
def test_rows_pass_if_they_fit_at_all_points_and_no_more_are_tokenised(
    data: st.DataObject, lengths: list[int], most: int
) -> None:
    points = data.draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    seen = []

    def encode(text: str, special: bool) -> list[int]:
        seen.append(text)
        return characters(text, special)

    limits = TenantLimits(max_call_tokens=most)
    asked = Tokeniser(engine(encode)).rows("acme", rows_of(lengths), limits, points)
    costs = [times * length for times, length in zip(points, lengths, strict=True)]
    fitting = [n for n in range(len(lengths) + 1) if sum(costs[:n]) <= most]
    if len(fitting) == len(lengths) + 1:
        assert [len(row.prompt) for row in asyncio.run(asked)] == lengths
    else:
        with pytest.raises(ApiError, match=rf"max_call_tokens \({most}\)") as refused:
            asyncio.run(asked)
        assert refused.value.param == "rows"
        assert len(seen) == 2 * len(fitting), "up to the first row that is too much, prompt and completion"


def test_too_many_rows_are_not_tokenised() -> None:
    def encode(text: str, special: bool) -> list[int]:
        raise AssertionError

    with pytest.raises(ApiError, match=r"max_rows \(2\)"):
        asyncio.run(Tokeniser(engine(encode)).rows("acme", rows_of([1, 1, 1]), TenantLimits(max_rows=2), [1] * 3))


@pytest.mark.parametrize(
    ("ask", "tokens"),
    [
        (AskGeneration(prompt="ab"), (97, 98)),
        (AskGeneration(prompt=[1, 2]), (1, 2)),
        (AskGeneration(messages=[ChatMessage(role="user", content="a")]), (97, 33)),
    ],
)
def test_prompts(ask: AskGeneration, tokens: tuple[int, ...]) -> None:
    assert asyncio.run(Tokeniser(engine()).prompt("acme", ask)) == tokens


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (AskGeneration(prompt="a\u0100"), "prompt"),
        (AskGeneration(prompt=[1, 256]), "prompt"),
        (AskGeneration(messages=[ChatMessage(role="user", content="\u0100")]), "messages"),
    ],
)
def test_prompts_are_of_tokens_that_the_model_has(ask: AskGeneration, param: str) -> None:
    with pytest.raises(ApiError, match=r"token ids must lie in 0 to 255") as refused:
        asyncio.run(Tokeniser(engine()).prompt("acme", ask))
    assert refused.value.param == param


def test_what_no_sequence_can_hold_is_not_tokenised() -> None:
    def encode(text: str, special: bool) -> list[int]:
        assert len(text) == 256
        return [1]

    shared = Tokeniser(engine(encode))
    longest = CompletionRow(prompt="a" * 256, completion="a" * 256)
    assert len(asyncio.run(shared.rows("acme", [longest], TenantLimits(), [1]))) == 1
    longer = CompletionRow(prompt="a" * 257, completion="b")
    with pytest.raises(ApiError, match=r"257 characters .* \(256\)") as refused:
        asyncio.run(shared.rows("acme", [longer], TenantLimits(), [1]))
    assert (refused.value.param, refused.value.code) == ("rows[0].prompt", "context_length_exceeded")
    with pytest.raises(ApiError, match="257 characters"):
        asyncio.run(shared.prompt("acme", AskGeneration(prompt="a" * 257)))


def test_who_sends_much_does_not_hold_up_those_who_send_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokeniser, "PIECE", 100)
    seen: list[str] = []

    def encode(text: str, special: bool) -> list[int]:
        seen.append(text[0])
        return [1]

    async def scene() -> None:
        shared = Tokeniser(engine(encode))
        much = [CompletionRow(prompt="m" * 50, completion="m" * 50) for _ in range(20)]
        little = [CompletionRow(prompt="l", completion="l")]
        await asyncio.gather(
            *(shared.rows("much", much, TenantLimits(), [1] * len(much)) for _ in range(5)),
            *(shared.rows("little", little, TenantLimits(), [1] * len(little)) for _ in range(5)),
        )

    asyncio.run(scene())
    assert seen.count("m") == 5 * 20 * 2
    assert "".join(seen).rindex("l") < 12, "behind the piece that came first, and one whose turn it was by then"


def test_others_go_on_meanwhile_but_for_those_who_tokenise() -> None:
    at_work: set[int] = set()
    may_end = threading.Event()

    def encode(text: str, special: bool) -> list[int]:
        assert not at_work, "the tokeniser is used from two threads at once"
        at_work.add(threading.get_ident())
        assert may_end.wait(WITHIN_S), "the event loop is held up"
        at_work.clear()
        return [1]

    async def scene() -> None:
        tokeniser = Tokeniser(engine(encode))
        calls = [asyncio.create_task(tokeniser.rows("acme", rows_of([1]), TenantLimits(), [1])) for _ in range(4)]
        calls_for_text = [asyncio.create_task(tokeniser.prompt("acme", AskGeneration(prompt="a"))) for _ in range(4)]
        while not at_work:
            await asyncio.sleep(0.001)
        may_end.set()
        await asyncio.wait_for(asyncio.gather(*calls, *calls_for_text), WITHIN_S)

    asyncio.run(scene())


def test_an_adapter_that_is_deleted_meanwhile_is_not_evaluated(tiny_model: Path, tmp_path: Path) -> None:
    real = TransformersEngine(str(tiny_model))
    begun, may_end = threading.Event(), threading.Event()
    encode = real.encode

    def slow(text: str, special: bool) -> list[int]:
        begun.set()
        assert may_end.wait(WITHIN_S)
        return encode(text, special)

    async def scene() -> None:
        service = Service(real, tmp_path, metrics=Metrics())
        await service.create(OPERATOR, CreateAdapter(name="acme/a", rank=1, basis=BasisSpec(source="random")))
        await service.calibrate(OPERATOR, "acme/a", Calibrate())
        real.encode = slow  # type: ignore[method-assign]
        ask = AskScores(rows=[CompletionRow(prompt="a", completion="b")], probe={"seed": 1, "epsilon": 0.1})
        asking = asyncio.create_task(service.scores(OPERATOR, "acme/a", ask))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        await service.delete("acme/a")
        may_end.set()
        with pytest.raises(ApiError) as refused:
            await asking
        assert (refused.value.status, refused.value.code) == (404, "adapter_not_found")
        await service.registry.close()

    asyncio.run(scene())
