"""Contexts packed into requests, so that many share vLLM's cost of one, and their common beginnings are computed once.

Taking in a request, scheduling it and sending its answer costs vLLM about half a millisecond of Python, which for a
small model is more than computing it. A pack is one request whose prompt is many contexts one after the other; the
worker (``server_ext.gpu``) has each attend to itself alone and answers for all of them.

A context that begins like an earlier one, as the choices of a row do and rows that show the same examples first, leaves
out what blocks of the key-value cache they can share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server_ext.rows import Context, ContextScore

SCORED_ROWS = "zoact_rows"
"""A request's extra argument: a list for each context, see :attr:`Pack.rows`."""


@dataclass(frozen=True)
class Packing:
    """How contexts may be packed.

    Attributes:
        block: tokens of a block of the key-value cache.
        answers: the most candidates a pack.
        many: whether a pack may have more than one context.

    """

    block: int
    answers: int
    many: bool

    def pack(self, contexts: Sequence[Context], most: int) -> list[Pack]:
        """Contexts in packs of ``most`` tokens at most, or of one context, in order."""
        packs: list[Pack] = []
        for context in contexts:
            if not (packs and self.many and packs[-1].add(context, most, self.answers)):
                packs.append(Pack(self.block, context))
        return packs


class Pack:
    """Contexts that go through vLLM as one request.

    Attributes:
        tokens: the request's prompt. Every context begins with a block.
        rows: by context, the earlier one that it begins like (its place; 0 for none), how many tokens it leaves out
            for that, its length, its first scored token, and its candidates.
        answers: the number of all candidates.

    """

    def __init__(self, block: int, first: Context) -> None:
        self._block = block
        # What contexts begin with, block by block: from what stands before a block, and its tokens, to its number and
        # the context that has it first.
        self._beginnings: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._counts: list[int] = []
        self.tokens: list[int] = []
        self.rows: list[list[int]] = []
        self._append(first, 0, 0)

    @property
    def answers(self) -> int:
        return sum(self._counts)

    def add(self, context: Context, most: int, answers: int) -> bool:
        """Takes in another context, unless there would be too many tokens or candidates; says whether."""
        like, shared = self._like(context)
        room = most - len(self.tokens) - self._filling()
        if len(context.tokens) - shared > room or self.answers + len(context.candidates) > answers:
            return False
        self._append(context, like, shared)
        return True

    def scores(self, answers: Sequence[float]) -> list[ContextScore]:
        """What the worker's answers say of each context: log-likelihoods with the scored tokens' added already."""
        rest = iter(answers)
        return [ContextScore((), tuple(next(rest) for _ in range(count))) for count in self._counts]

    def _like(self, context: Context) -> tuple[int, int]:
        """An earlier context with the same beginning, and its whole blocks of tokens, as many as there are.

        What is scored is predicted by the context's own positions.
        """
        like = shared = before = 0
        while (end := shared + self._block) < context.start:
            found = self._beginnings.get((before, context.tokens[shared:end]))
            if found is None:
                break
            before, like = found
            shared = end
        return like, shared

    def _append(self, context: Context, like: int, shared: int) -> None:
        before = 0
        for at in range(0, len(context.tokens) - self._block + 1, self._block):
            key = before, context.tokens[at : at + self._block]
            before, _ = self._beginnings.setdefault(key, (len(self._beginnings) + 1, len(self.rows)))
        self.tokens += [0] * self._filling()
        self.tokens += context.tokens[shared:]
        self.rows.append([like, shared, len(context.tokens), context.start, *context.candidates])
        self._counts.append(len(context.candidates))

    def _filling(self) -> int:
        return -len(self.tokens) % self._block
