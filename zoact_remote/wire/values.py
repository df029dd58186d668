"""What a caller sends. Values are checked when they are made and raise :class:`~zoact_remote.errors.InvalidValue`."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from zoact_remote.errors import InvalidValue
from zoact_remote.noise import MAX_SEED

NAME = r"[a-z0-9][a-z0-9._-]{0,62}"
"""A tenant's name, and what stands behind it in an adapter's, as a regular expression."""
Text: TypeAlias = str | Sequence[int]
"""Text, which the server tokenises, or its token ids."""


class CompletionRow(TypedDict):
    """A prompt, and what should follow it."""

    prompt: Text
    completion: Text


class ChoicesRow(TypedDict):
    """A prompt, what could follow it, and which of these is right, from 0."""

    prompt: Text
    choices: Sequence[Text]
    answer: int


class Message(TypedDict):
    """A turn of a conversation."""

    role: str
    content: str


class ChatRow(TypedDict):
    """A conversation, which ends with the assistant's turn."""

    messages: Sequence[Message]


Row: TypeAlias = Mapping[str, Any]
"""One of the three. Any dictionary will do; one that is declared as one of them is checked by mypy and editors."""
Term: TypeAlias = tuple[int, float]
Json: TypeAlias = dict[str, Any]
Sides = Literal["both", "plus"]
Source = Literal["activations", "random", "imported"]
Positions = Literal["scored", "prompt", "both"]

MAX_KEY_LENGTH = 128
"""Characters of an update's idempotency key."""


def _seed(value: Any, param: str) -> int:
    try:
        seed = operator.index(value)
    except TypeError:
        raise InvalidValue(param, f"a seed must be an integer, got {value!r}") from None
    if not 0 <= seed <= MAX_SEED:
        raise InvalidValue(param, f"a seed must lie in 0 to 2^64 - 1, got {seed}")
    return seed


def _number(value: Any, param: str, *, above: float | None = None, least: float | None = None) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InvalidValue(param, f"must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise InvalidValue(param, f"must be finite, got {number}")
    if above is not None and number <= above:
        raise InvalidValue(param, f"must be greater than {above:g}, got {number:g}")
    if least is not None and number < least:
        raise InvalidValue(param, f"must be at least {least:g}, got {number:g}")
    return number


def whole_number(value: Any, param: str, *, least: int = 0) -> int:
    """A value as an int. Raises InvalidValue if it is none, or too small."""
    try:
        count = operator.index(value)
    except TypeError:
        raise InvalidValue(param, f"must be a whole number, got {value!r}") from None
    if count < least:
        raise InvalidValue(param, f"must be at least {least}, got {count}")
    return count


def _choice(value: Any, param: str, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise InvalidValue(param, f"must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _terms(terms: Iterable[tuple[Any, Any]], *, least: float | None = None) -> tuple[Term, ...]:
    return tuple(
        (_seed(seed, f"terms[{i}][0]"), _number(scalar, f"terms[{i}][1]", least=least))
        for i, (seed, scalar) in enumerate(terms)
    )


@dataclass(frozen=True)
class Probe:
    """A direction to evaluate: the coefficients C + epsilon Z(seed), and C - epsilon Z(seed) for both sides.

    Attributes:
        seed: 0 to 2^64 - 1.
        epsilon: greater than 0. A power of two scales Z without rounding.
        sides: ``"both"`` or ``"plus"``.
        part: ``(j, q)`` for the rows of the batch that it is evaluated on, the j-th, from 0, of q parts of equal length
            in the rows' order; None for all of them.

    """

    seed: int
    epsilon: float
    sides: Sides = "both"
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _seed(self.seed, "seed"))
        object.__setattr__(self, "epsilon", _number(self.epsilon, "epsilon", above=0))
        _choice(self.sides, "sides", get_args(Sides))
        if self.part is not None:
            part = tuple(whole_number(number, "part") for number in self.part)
            if len(part) != 2 or part[0] >= part[1]:
                raise InvalidValue("part", f"must be (j, q) with 0 <= j < q, got {self.part}")
            object.__setattr__(self, "part", part)

    @property
    def signs(self) -> tuple[Literal[1, -1], ...]:
        """Of the sides that it has."""
        return (1, -1) if self.sides == "both" else (1,)

    def rows_of(self, count: int) -> range:
        """The rows that it is evaluated on, of a batch of so many.

        Raises:
            InvalidValue: they cannot be parted equally.

        """
        if self.part is None:
            return range(count)
        place, parts = self.part
        length, rest = divmod(count, parts)
        if rest or not length:
            raise InvalidValue("part", f"{count} rows do not come in {parts} parts of equal length")
        return range(place * length, (place + 1) * length)

    def to_json(self) -> Json:
        made: Json = {"seed": self.seed, "epsilon": self.epsilon, "sides": self.sides}
        return made if self.part is None else made | {"part": list(self.part)}


@dataclass(frozen=True)
class Side:
    """One side of a probe, to score or generate with: the coefficients C + sign epsilon Z(seed).

    Attributes:
        seed: 0 to 2^64 - 1.
        epsilon: greater than 0.
        sign: 1 or -1.

    """

    seed: int
    epsilon: float
    sign: Literal[1, -1] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _seed(self.seed, "seed"))
        object.__setattr__(self, "epsilon", _number(self.epsilon, "epsilon", above=0))
        _choice(self.sign, "sign", (1, -1))

    def to_json(self) -> Json:
        return {"seed": self.seed, "epsilon": self.epsilon, "sign": self.sign}


@dataclass(frozen=True)
class Normaliser:
    """Divides an update's terms, by coordinate, by ``sqrt(offset + sum_i b_i Z(seed_i)^2) + epsilon``.

    Attributes:
        terms: ``(seed_i, b_i)`` with ``b_i`` at least 0.
        offset: at least 0.
        epsilon: greater than 0.

    """

    terms: tuple[Term, ...]
    offset: float
    epsilon: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", _terms(self.terms, least=0))
        object.__setattr__(self, "offset", _number(self.offset, "offset", least=0))
        object.__setattr__(self, "epsilon", _number(self.epsilon, "epsilon", above=0))

    def to_json(self) -> Json:
        return {"terms": [list(term) for term in self.terms], "offset": self.offset, "epsilon": self.epsilon}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Normaliser:
        return cls(data["terms"], data["offset"], data["epsilon"])


@dataclass(frozen=True)
class Update:
    """A change of coefficients: ``C <- (1 - decay) C + sum_i a_i Z(seed_i)``, in float32 and in listed order.

    Attributes:
        base_version: the version that it is made for; any other is refused.
        terms: ``(seed_i, a_i)``.
        decay: 0 to 1.
        normaliser: divides the sum of terms by coordinate; None for none.
        key: names the update, so that sending it again does not apply it again. :class:`~zoact_remote.client.Adapter`
            fills it in where it is None.

    """

    base_version: int
    terms: tuple[Term, ...]
    decay: float = 0.0
    normaliser: Normaliser | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_version", whole_number(self.base_version, "base_version"))
        object.__setattr__(self, "terms", _terms(self.terms))
        object.__setattr__(self, "decay", _number(self.decay, "decay", least=0))
        if self.decay > 1:
            raise InvalidValue("decay", f"must be at most 1, got {self.decay:g}")
        if self.key is not None and not 0 < len(self.key) <= MAX_KEY_LENGTH:
            raise InvalidValue("key", f"must have 1 to {MAX_KEY_LENGTH} characters, got {len(self.key)}")

    def to_json(self) -> Json:
        return {
            "base_version": self.base_version,
            "terms": [list(term) for term in self.terms],
            "decay": self.decay,
            "normaliser": None if self.normaliser is None else self.normaliser.to_json(),
            "key": self.key,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Update:
        normaliser = data.get("normaliser")
        return cls(
            base_version=data["base_version"],
            terms=data["terms"],
            decay=data.get("decay", 0.0),
            normaliser=None if normaliser is None else Normaliser.from_json(normaliser),
            key=data.get("key"),
        )


@dataclass(frozen=True)
class Rollback:
    """A return to an earlier version: a new one with its coefficients, bit for bit.

    Attributes:
        base_version: the version that it follows; any other is refused.
        to_version: the version whose coefficients come back.
        key: names the rollback, so that sending it again does nothing more.

    """

    base_version: int
    to_version: int
    key: str | None = None

    def to_json(self) -> Json:
        return asdict(self)


Change: TypeAlias = Update | Rollback


def change_from_json(data: Mapping[str, Any]) -> Change:
    """What :meth:`Update.to_json` or :meth:`Rollback.to_json` wrote."""
    return Rollback(**data) if "to_version" in data else Update.from_json(data)


@dataclass(frozen=True)
class Basis:
    """What an adapter's basis is taken from.

    Attributes:
        source: ``"activations"`` for the top right singular vectors of the calibration rows' activations, or
            ``"random"`` for a random orthonormal basis to compare with. ``"imported"`` is what a server says of a basis
            that came with its adapter; it cannot be asked for.
        positions: which activations count: ``"scored"`` for positions that predict a continuation's token,
            ``"prompt"`` for all of the prompt's, ``"both"`` for both.
        centred: take the mean activation away before the decomposition.
        passes: 1 or 2 passes over the calibration rows; a second one sharpens the basis.
        oversampling: columns of the sketch beyond the rank.
        seed: of the sketch, or of the random basis.

    """

    source: Source = "activations"
    positions: Positions = "scored"
    centred: bool = False
    passes: Literal[1, 2] = 1
    oversampling: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _choice(self.source, "source", get_args(Source))
        _choice(self.positions, "positions", get_args(Positions))
        _choice(self.passes, "passes", (1, 2))
        whole_number(self.oversampling, "oversampling")
        _seed(self.seed, "seed")

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Basis:
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})
