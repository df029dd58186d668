"""Rows scored at many points, in pieces that take turns with those of other tenants."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate, pairwise

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
        self, tenant: str, points: Sequence[Point | None], rows: Sequence[TokenRow]
    ) -> tuple[list[list[RowScore]], int]:
        """By point (None for the model itself) the rows' scores; and the tokens that went through the model."""
        contexts = [contexts_of(row) for row in rows]
        bounds = list(pairwise(accumulate((len(c) for c in contexts), initial=0)))
        flat = [context for row in contexts for context in row]
        pieces = _pieces(flat, self._engine.tokens_at_once // PIECES_AT_ONCE)
        scores = await together(*(self._piece(tenant, point, piece) for point in points for piece in pieces))
        by_point = [
            [score for piece in scores[i : i + len(pieces)] for score in piece]
            for i in range(0, len(scores), len(pieces))
        ]
        return [
            [score_of(r, c, point[a:b]) for r, c, (a, b) in zip(rows, contexts, bounds, strict=True)]
            for point in by_point
        ], len(points) * _tokens(flat)

    async def score_parts(
        self, tenant: str, points: Sequence[tuple[Point | None, range]], rows: Sequence[TokenRow]
    ) -> tuple[list[list[RowScore]], int]:
        """By point the scores of those rows that are its own; and the tokens that went through the model."""
        places: dict[range, list[int]] = {}
        for place, (_, part) in enumerate(points):
            places.setdefault(part, []).append(place)
        found = await together(
            *(
                self.score(tenant, [points[place][0] for place in of_part], rows[part.start : part.stop])
                for part, of_part in places.items()
            )
        )
        scores = {
            place: score
            for of_part, (of_points, _) in zip(places.values(), found, strict=True)
            for place, score in zip(of_part, of_points, strict=True)
        }
        return [scores[place] for place in range(len(points))], sum(tokens for _, tokens in found)

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
