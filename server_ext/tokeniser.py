"""What calls carry, as token ids, without holding anybody up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from server_ext.engines.base import Engine
from server_ext.errors import BATCH_TOO_LARGE, invalid
from server_ext.fairness import FairQueue
from server_ext.rows import TokenRow, Tokens, chat_length, chat_text, contexts_of, length, tokenise, tokenise_rows
from server_ext.schemas import AskGeneration, Row, TenantLimits

T = TypeVar("T")


PIECE = 1 << 16
"""Characters that are tokenised, some tens of milliseconds, before another tenant has its turn."""


class Tokeniser:
    """Tokenises on a thread of its own, since megabytes of text take seconds, and tenants in turn.

    Args:
        engine: whose tokeniser it uses, alone.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # What no sequence of the model can hold is not worth the seconds that it would take.
        self._most_characters = engine.model.max_tokens * engine.longest_token
        self._thread = ThreadPoolExecutor(1, "zoact-tokeniser")
        self._turns = FairQueue(1)

    async def rows(
        self, tenant: str, rows: Sequence[Row], limits: TenantLimits, points: Sequence[int]
    ) -> list[TokenRow]:
        """Rows that fit a caller's limits when each is evaluated at a number of points.

        Raises:
            ApiError: there are too many, or too many tokens of them; or as ``tokenise_rows`` says.

        """
        if len(rows) > limits.max_rows:
            message = f"at most max_rows ({limits.max_rows}) a call, got {len(rows)}"
            raise invalid("rows", message, BATCH_TOO_LARGE)
        coming, found = self._rows(rows, limits.max_call_tokens, points), list[TokenRow]()
        for count, characters in _pieces(rows):
            found += await self._run(tenant, characters, list, islice(coming, count))
        return found

    def _rows(self, rows: Sequence[Row], most: int, points: Sequence[int]) -> Iterator[TokenRow]:
        engine, model = self._engine, self._engine.model
        tokens = 0
        found = tokenise_rows(
            rows, engine.encode, engine.render_chat, model.vocabulary, model.max_tokens, self._most_characters
        )
        for row, times in zip(found, points, strict=True):
            tokens += times * sum(len(context.tokens) for context in contexts_of(row))
            # Here, so that what is refused has not all been tokenised first.
            if tokens > most:
                message = f"more tokens over all sides than max_call_tokens ({most}) a call"
                raise invalid("rows", message, BATCH_TOO_LARGE)
            yield row

    async def prompt(self, tenant: str, ask: AskGeneration) -> Tokens:
        """What is to be continued. Raises ApiError as ``tokenise`` and ``chat_text`` do."""
        size = len(ask.prompt or "") + chat_length(ask.messages or ())
        return await self._run(tenant, size, self._prompt, ask)

    def _prompt(self, ask: AskGeneration) -> Tokens:
        encode, vocabulary, most = self._engine.encode, self._engine.model.vocabulary, self._most_characters
        if ask.messages is not None:
            opened = chat_text(ask.messages, True, "messages", self._engine.render_chat)
            return tokenise(opened, "messages", False, encode, vocabulary, most)
        assert ask.prompt is not None
        return tokenise(ask.prompt, "prompt", True, encode, vocabulary, most)

    async def _run(self, tenant: str, characters: int, function: Callable[..., T], *args: Any) -> T:
        async with self._turns.turn(tenant, characters):
            return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args))


def _pieces(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Numbers of rows that are tokenised at a time, with their characters."""
    count = characters = 0
    for row in rows:
        count, characters = count + 1, characters + length(row)
        if characters >= PIECE:
            yield count, characters
            count = characters = 0
    if count:
        yield count, characters
