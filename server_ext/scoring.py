"""Rows scored at many points, in pieces that take turns with those of other tenants."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from server_ext.engines.base import Engine
from server_ext.fairness import FairQueue
from server_ext.metrics import Metrics
from server_ext.rows import Context, ContextScore, RowScore, TokenRow, contexts_of, score_of
from server_ext.store import Point
from server_ext.together import together

PIECES_AT_ONCE = 8
"""Pieces of work that the engine takes at once: what another tenant waits for is one of them."""


class Scorer:
    """Scores rows.

    Args:
        engine: evaluates.
        turns: of everything that is evaluated.
        metrics: count the pieces.

    """

    def __init__(self, engine: Engine, turns: FairQueue, metrics: Metrics) -> None:
        self._engine = engine
        self._turns = turns
        self._metrics = metrics

    async def score(
        self, tenant: str, points: Sequence[tuple[Point | None, range]], rows: Sequence[TokenRow]
    ) -> tuple[list[list[RowScore]], int]:
        """By point (None for the model itself) the scores of the rows beside it; and the tokens that went through."""
        contexts = [contexts_of(row) for row in rows]
        flat = {part: [context for i in part for context in contexts[i]] for part in {part for _, part in points}}
        at_once = self._engine.tokens_at_once // PIECES_AT_ONCE
        pieces = {part: _pieces(of_part, at_once) for part, of_part in flat.items()}
        scores = iter(
            await together(*(self._piece(tenant, point, piece) for point, part in points for piece in pieces[part]))
        )
        by_point = []
        for _, part in points:
            of_point = iter([score for _ in pieces[part] for score in next(scores)])
            by_point.append([score_of(rows[i], contexts[i], list(islice(of_point, len(contexts[i])))) for i in part])
        return by_point, sum(_tokens(flat[part]) for _, part in points)

    async def _piece(self, tenant: str, point: Point | None, contexts: Sequence[Context]) -> list[ContextScore]:
        asked = time.perf_counter()
        async with self._turns.turn(tenant, _tokens(contexts)):
            begun = time.perf_counter()
            scores = await self._engine.score(point, contexts)
        self._metrics.piece(tenant, begun - asked, time.perf_counter() - begun)
        return scores


def _tokens(contexts: Sequence[Context]) -> int:
    return sum(len(context.tokens) for context in contexts)


def _pieces(contexts: Sequence[Context], tokens: int) -> list[Sequence[Context]]:
    """Contexts in parts of some tokens at most, or of one context."""
    parts: list[list[Context]] = []
    room = 0
    for context in contexts:
        if len(context.tokens) > room:
            parts.append([])
            room = tokens
        parts[-1].append(context)
        room -= len(context.tokens)
    return list(parts)
