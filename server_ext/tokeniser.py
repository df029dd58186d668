"""What calls carry, as token ids, without holding anybody up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from server_ext.engines.base import Engine
from server_ext.errors import BATCH_TOO_LARGE, invalid
from server_ext.rows import TokenRow, Tokens, chat_text, contexts_of, tokenise, tokenise_rows
from server_ext.schemas import AskGeneration, Row, TenantLimits

T = TypeVar("T")


class Tokeniser:
    """Tokenises on a thread of its own, call after call, since megabytes of text take seconds.

    Args:
        engine: whose tokeniser it uses, alone.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "zoact-tokeniser")

    async def rows(self, rows: Sequence[Row], limits: TenantLimits, points: int) -> list[TokenRow]:
        """Rows that fit a caller's limits when they are evaluated at a number of points.

        Raises:
            ApiError: there are too many, or too many tokens of them; or as ``tokenise_rows`` says.

        """
        if len(rows) > limits.max_rows:
            message = f"at most max_rows ({limits.max_rows}) a call, got {len(rows)}"
            raise invalid("rows", message, BATCH_TOO_LARGE)
        return await self._run(self._rows, rows, limits.max_call_tokens, points)

    def _rows(self, rows: Sequence[Row], most: int, points: int) -> list[TokenRow]:
        model = self._engine.model
        found = []
        tokens = 0
        for row in tokenise_rows(
            rows, self._engine.encode, self._engine.render_chat, model.vocabulary, model.max_tokens
        ):
            tokens += points * sum(len(context.tokens) for context in contexts_of(row))
            # Here, so that what is refused has not all been tokenised first.
            if tokens > most:
                message = f"more tokens over all sides than max_call_tokens ({most}) a call"
                raise invalid("rows", message, BATCH_TOO_LARGE)
            found.append(row)
        return found

    async def prompt(self, ask: AskGeneration) -> Tokens:
        """What is to be continued. Raises ApiError as ``tokenise`` and ``chat_text`` do."""
        return await self._run(self._prompt, ask)

    def _prompt(self, ask: AskGeneration) -> Tokens:
        encode, vocabulary = self._engine.encode, self._engine.model.vocabulary
        if ask.messages is not None:
            opened = chat_text(ask.messages, True, "messages", self._engine.render_chat)
            return tokenise(opened, "messages", False, encode, vocabulary)
        assert ask.prompt is not None
        return tokenise(ask.prompt, "prompt", True, encode, vocabulary)

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args))
