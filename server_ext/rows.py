"""Rows as token ids, the contexts that score them, and their losses.

Both engines score the same thing: a context is a sequence of tokens, of which the model's log-probabilities are read
for the last few tokens themselves and for a few candidates of the token that would follow. The last position's logits
are computed for every sequence anyway, so a one-token answer, and every one-token choice beside it, costs one sequence
and no read-back of the prompt's logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server_ext.errors import invalid
from server_ext.schemas import ChatMessage, ChatRow, ChoicesRow, CompletionRow, Row

Tokens = tuple[int, ...]
Encode = Callable[[str, bool], list[int]]
RenderChat = Callable[[list[dict[str, str]], bool], str]
TOO_LONG = "context_length_exceeded"
MESSAGE = 16
"""About as many characters as a chat template puts around a message."""


@dataclass(frozen=True)
class TokenRow:
    """A row as token ids: one continuation for a completion, several for choices.

    Attributes:
        prompt: at least one token.
        continuations: each at least one token.
        answer: which continuation is right; None for a completion.

    """

    prompt: Tokens
    continuations: tuple[Tokens, ...]
    answer: int | None

    @property
    def target(self) -> Tokens:
        """The continuation that training makes more likely."""
        return self.continuations[self.answer or 0]


@dataclass(frozen=True)
class Context:
    """One sequence to score.

    Attributes:
        tokens: the sequence.
        start: tokens from here on are scored, each given what stands before it; ``len(tokens)`` for none.
        candidates: tokens whose log-probability to follow the sequence is asked for, without repetition.

    """

    tokens: Tokens
    start: int
    candidates: Tokens


@dataclass(frozen=True)
class ContextScore:
    """Log-probabilities (nats) that one model gives a context: of ``tokens[start:]``, and of the candidates."""

    tokens: tuple[float, ...]
    candidates: tuple[float, ...]


@dataclass(frozen=True)
class RowScore:
    """Summed log-likelihoods of a row's continuations (nats), and the loss that they make."""

    logprobs: tuple[float, ...]
    loss: float


def tokenise(
    value: str | list[int], param: str, special: bool, encode: Encode, vocabulary: int, most_characters: int | None
) -> Tokens:
    """A prompt or continuation as token ids.

    Args:
        value: text or token ids.
        param: where the call has it.
        special: whether special tokens are added to a text, as for prompts.
        encode: text and ``special`` to token ids.
        vocabulary: token ids must lie below it.
        most_characters: a text with more is too long, whatever its tokens; None for any.

    Raises:
        ApiError: no tokens, a token id out of range, or too long a text.

    """
    if isinstance(value, str) and most_characters is not None and len(value) > most_characters:
        message = f"{len(value):,} characters are more than the model's longest sequence can have ({most_characters:,})"
        raise invalid(param, message, TOO_LONG)
    ids = encode(value, special) if isinstance(value, str) else value
    if not ids:
        raise invalid(param, "tokenises to nothing; at least one token is needed")
    # Of a text too: a tokeniser may have tokens that its model has no embeddings for.
    if not (min(ids) >= 0 and max(ids) < vocabulary):
        raise invalid(param, f"its token ids must lie in 0 to {vocabulary - 1}, the model's vocabulary")
    return tuple(ids)


def chat_text(messages: Sequence[ChatMessage], opened: bool, param: str, render: RenderChat) -> str:
    """A conversation in the model's chat template.

    Args:
        messages: the conversation.
        opened: whether the assistant's next turn is opened behind it.
        param: where the call has it.
        render: messages and ``opened`` to text.

    Raises:
        ApiError: the model has no chat template, or the template refuses the messages.

    """
    try:
        return render([message.model_dump() for message in messages], opened)
    except Exception as error:  # a chat template is a program of the model's author and may raise anything
        raise invalid(param, f"the model's chat template refuses them: {error}") from None


def tokenise_rows(
    rows: Sequence[Row],
    encode: Encode,
    render: RenderChat,
    vocabulary: int,
    max_tokens: int,
    most_characters: int | None = None,
) -> Iterator[TokenRow]:
    """Rows as token ids, each when it is asked for.

    Args:
        rows: rows whose prompts and continuations are text or token ids, or conversations.
        encode: as for ``tokenise``.
        render: as for ``chat_text``.
        vocabulary: as for ``tokenise``.
        max_tokens: longest sequence, prompt and continuation together.
        most_characters: as for ``tokenise``.

    Raises:
        ApiError: a prompt or continuation without tokens, a token id out of range, a row that is too long, or a
            conversation that the model's chat template cannot write.

    """
    for i, row in enumerate(rows):
        (param, start), *rest = _texts(row, f"rows[{i}]", render)
        # A chat template writes the special tokens itself.
        prompt = tokenise(start, param, not isinstance(row, ChatRow), encode, vocabulary, most_characters)
        continuations = tuple(
            tokenise(value, place, False, encode, vocabulary, most_characters) for place, value in rest
        )
        longest = max(map(len, continuations))
        if len(prompt) + longest > max_tokens:
            raise invalid(
                param,
                f"prompt ({len(prompt)} tokens) and continuation ({longest}) exceed the limit of {max_tokens} tokens",
                TOO_LONG,
            )
        yield TokenRow(prompt, continuations, row.answer if isinstance(row, ChoicesRow) else None)


def _texts(row: Row, place: str, render: RenderChat) -> list[tuple[str, str | list[int]]]:
    """A row's prompt and its continuations, each with where the call has it."""
    if isinstance(row, CompletionRow):
        return [(f"{place}.prompt", row.prompt), (f"{place}.completion", row.completion)]
    if isinstance(row, ChoicesRow):
        return [(f"{place}.prompt", row.prompt), *((f"{place}.choices[{j}]", c) for j, c in enumerate(row.choices))]
    param = f"{place}.messages"
    before = chat_text(row.messages[:-1], True, param, render)
    whole = chat_text(row.messages, False, param, render)
    if not whole.startswith(before):
        raise invalid(
            param,
            "the model's chat template does not continue the turn that it opens for the assistant: send the text as "
            "prompt and completion",
        )
    return [(param, before), (param, whole[len(before) :])]


def length(row: Row) -> int:
    """Characters, and token ids, of a row."""
    if isinstance(row, ChatRow):
        return chat_length(row.messages)
    return len(row.prompt) + sum(map(len, row.choices if isinstance(row, ChoicesRow) else [row.completion]))


def chat_length(messages: Sequence[ChatMessage]) -> int:
    """Characters of a conversation. Its template has some of its own for each message, which may be empty."""
    return sum(len(message.content) + MESSAGE for message in messages)


def contexts_of(row: TokenRow) -> list[Context]:
    """The fewest contexts that score a row: one for each distinct beginning (all but the last token) of its answers."""
    candidates: dict[Tokens, dict[int, None]] = {}
    for continuation in row.continuations:
        candidates.setdefault(continuation[:-1], {})[continuation[-1]] = None
    return [Context(row.prompt + beginning, len(row.prompt), tuple(last)) for beginning, last in candidates.items()]


def score_of(row: TokenRow, contexts: Sequence[Context], scores: Sequence[ContextScore]) -> RowScore:
    """A row's log-likelihoods and loss from its contexts' scores.

    The loss of a completion is the mean negative log-likelihood of its tokens; the loss of choices is the cross-entropy
    of the softmax over their summed log-likelihoods. Both in nats.
    """
    found: dict[Tokens, float] = {}
    for context, score in zip(contexts, scores, strict=True):
        beginning = context.tokens[context.start :]
        for candidate, logprob in zip(context.candidates, score.candidates, strict=True):
            found[(*beginning, candidate)] = math.fsum((*score.tokens, logprob))
    logprobs = tuple(found[c] for c in row.continuations)
    if row.answer is None:
        return RowScore(logprobs, -logprobs[0] / len(row.target))
    top = max(logprobs)
    partition = top + math.log(math.fsum(math.exp(v - top) for v in logprobs))
    return RowScore(logprobs, partition - logprobs[row.answer])
