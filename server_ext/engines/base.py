"""What the service asks of an engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from server_ext.basis import Basis
from server_ext.rows import Context, ContextScore, Tokens
from server_ext.schemas import BasisSpec
from server_ext.store import Point
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import Distribution
from zoact_remote.wire import Update


@dataclass(frozen=True)
class Model:
    """The frozen model.

    Attributes:
        name: as given to the server.
        digest: of its configuration and weights (``zoact_remote.model_digest``).
        dtype: of its weights, such as ``float32``.
        vocabulary: number of token ids.
        max_tokens: longest sequence.

    """

    name: str
    digest: str
    dtype: str
    vocabulary: int
    max_tokens: int


@dataclass(frozen=True)
class CalibrationRow:
    """A sequence whose activations make a basis.

    Attributes:
        tokens: prompt and continuation, less the continuation's last token, whose activations predict nothing scored.
        prompt: tokens of the prompt; from the last of them on, positions are scored ones.

    """

    tokens: Tokens
    prompt: int


@dataclass(frozen=True)
class GeneratedText:
    """What a model wrote.

    Attributes:
        tokens: all of it, the end of a stop string included.
        text: without the stop string.
        stopped: whether the model, or a stop string, ended it.

    """

    tokens: Tokens
    text: str
    stopped: bool

    @classmethod
    def cut(cls, tokens: Tokens, text: str, ended: bool, stop: Sequence[str]) -> GeneratedText:
        """A text, cut off before the stop string that was complete first."""
        before = text_before(text, stop)
        return cls(tokens, text, ended) if before is None else cls(tokens, before, True)


def longest_token(tokenizer: Any) -> int:
    """Characters of a tokeniser's longest token: bytes, for one that takes text apart so far."""
    return max(map(len, tokenizer.get_vocab()))


def text_before(text: str, stop: Sequence[str]) -> str | None:
    """What stands before the string that is complete first, of several the longest; None if none is there."""
    ends = [(text.find(string) + len(string), -len(string)) for string in stop if string in text]
    return text[: sum(min(ends))] if ends else None


@dataclass(frozen=True)
class Slots:
    """Places in a batch, each for one point.

    Attributes:
        number: of slots; 0 for an engine without.
        filled: those that hold a point or another LoRA.
        misses: how often a request's point was held in none, nor in the memory behind them, since the engine started.

    """

    number: int = 0
    filled: int = 0
    misses: int = 0


class Engine(Protocol):
    """Holds the model, and evaluates it at points of many adapters' coefficient spaces.

    Of adapters it holds what it is given and nothing else knows of: the registry says which versions to make, and which
    are still in use. Methods that change an adapter are called one at a time for that adapter.
    """

    version: str
    model: Model
    sites: tuple[Site, ...]
    max_rank: int
    longest_token: int
    """Characters of the vocabulary's longest token."""
    tokens_at_once: int
    """Tokens that keep it busy; more of them only wait inside it, where nobody can go before them."""

    @property
    def name(self) -> Literal["vllm", "transformers"]:
        """Which engine this is."""
        ...

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids of a text, with the special tokens that the model expects around a prompt if ``special``.

        This and ``render_chat`` are called from one thread, beside the event loop's.
        """
        ...

    def render_chat(self, messages: list[dict[str, str]], opened: bool) -> str:
        """A conversation in the model's chat template, with the assistant's next turn opened behind it if ``opened``.

        Raises:
            Exception: the model has no chat template, or the template refuses the messages; of any class.

        """
        ...

    async def calibrate(
        self, rows: Sequence[CalibrationRow], layout: Layout, spec: BasisSpec
    ) -> tuple[dict[str, Basis], int]:
        """The basis of every input of a layout, and the number of positions that it was taken from.

        Raises:
            ValueError: the rows gave no activations other than zero.

        """
        ...

    async def put(
        self,
        key: str,
        layout: Layout,
        distribution: Distribution,
        basis: dict[str, NDArray[np.float32]],
    ) -> None:
        """Takes in an adapter, without any version of it as yet, in place of one of that key."""
        ...

    async def hold(
        self,
        key: str,
        version: int,
        base: int | NDArray[np.float32] | None,
        update: Update | None,
        keep: Collection[int],
    ) -> str:
        """Takes in a version of an adapter, and lets go of all others but those to keep.

        Args:
            key: the adapter's.
            version: the version.
            base: what it is made from: a version held, coefficients (float32 ``[layout.size]``), or None for zeros.
            update: applied to the base; None for none.
            keep: versions still needed.

        Returns:
            The digest of its coefficients.

        """
        ...

    async def read(self, key: str, version: int) -> NDArray[np.float32]:
        """The coefficients of a version held: float32 ``[layout.size]``."""
        ...

    async def drop(self, key: str) -> None:
        """Forgets an adapter."""
        ...

    async def score(self, point: Point | None, contexts: Sequence[Context]) -> list[ContextScore]:
        """Scores every context at a point, None being the model itself."""
        ...

    async def generate(
        self,
        point: Point | None,
        tokens: Tokens,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        stop: Sequence[str],
    ) -> GeneratedText:
        """Continues a sequence, greedily at temperature 0, until a token completes a stop string."""
        ...

    async def slots(self) -> Slots:
        """How its slots are used."""
        ...
