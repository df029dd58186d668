"""Rows, the contexts that score them, and their losses, against a model that is a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server_ext.errors import ApiError
from server_ext.rows import Context, ContextScore, TokenRow, Tokens, contexts_of, score_of, tokenise_rows
from server_ext.schemas import ChatMessage, ChatRow, ChoicesRow, CompletionRow, Row

VOCABULARY = 4
TOKENS = st.integers(0, VOCABULARY - 1)
SEQUENCES = st.lists(TOKENS, min_size=1, max_size=4).map(tuple)


def table(before: Tokens) -> NDArray[np.float64]:
    """A model: log-probabilities of the token that follows a sequence."""
    logits = np.random.default_rng(list(before)).normal(size=VOCABULARY) * 3
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def likelihood(prompt: Tokens, continuation: Tokens) -> float:
    """By brute force, token by token."""
    whole = (*prompt, *continuation)
    return sum(float(table(whole[:i])[whole[i]]) for i in range(len(prompt), len(whole)))


def evaluate(context: Context) -> ContextScore:
    """What an engine makes of a context."""
    tokens = context.tokens
    inner = tuple(float(table(tokens[:i])[tokens[i]]) for i in range(context.start, len(tokens)))
    return ContextScore(inner, tuple(float(table(tokens)[token]) for token in context.candidates))


@st.composite
def token_rows(draw: st.DrawFn) -> TokenRow:
    if draw(st.booleans()):
        return TokenRow(draw(SEQUENCES), (draw(SEQUENCES),), None)
    # The same choice may come twice, or begin as another one does.
    choices = draw(st.lists(SEQUENCES, min_size=2, max_size=6))
    return TokenRow(draw(SEQUENCES), tuple(choices), draw(st.integers(0, len(choices) - 1)))


@given(token_rows())
def test_scores_and_losses_are_the_brute_force_ones(row: TokenRow) -> None:
    contexts = contexts_of(row)
    score = score_of(row, contexts, [evaluate(context) for context in contexts])
    expected = [likelihood(row.prompt, continuation) for continuation in row.continuations]
    assert score.logprobs == pytest.approx(expected, abs=1e-12)
    if row.answer is None:
        assert score.loss == pytest.approx(-expected[0] / len(row.continuations[0]), abs=1e-12)
    else:
        softmax = np.exp(expected) / np.exp(expected).sum()
        assert score.loss == pytest.approx(-math.log(softmax[row.answer]), abs=1e-9)


@given(token_rows())
def test_choices_that_begin_alike_share_a_context(row: TokenRow) -> None:
    contexts = contexts_of(row)
    beginnings = {continuation[:-1] for continuation in row.continuations}
    assert len(contexts) == len(beginnings)
    assert {context.tokens for context in contexts} == {row.prompt + beginning for beginning in beginnings}
    for context in contexts:
        assert context.start == len(row.prompt)
        assert len(set(context.candidates)) == len(context.candidates)
    asked = {(*c.tokens[c.start :], candidate) for c in contexts for candidate in c.candidates}
    assert asked == set(row.continuations)


@given(SEQUENCES, st.lists(TOKENS, min_size=2, max_size=4, unique=True))
def test_one_token_answers_cost_one_sequence_and_no_inner_token(prompt: Tokens, choices: list[int]) -> None:
    (context,) = contexts_of(TokenRow(prompt, tuple((choice,) for choice in choices), 0))
    assert context == Context(prompt, len(prompt), tuple(choices))


def test_a_loss_of_choices_does_not_overflow() -> None:
    row = TokenRow((0,), ((1,), (2,)), 1)
    (context,) = contexts_of(row)
    score = score_of(row, [context], [ContextScore((), (-2000.0, -1000.0))])
    assert score.loss == pytest.approx(0.0)
    assert score_of(row, [context], [ContextScore((), (-1000.0, -2000.0))]).loss == pytest.approx(1000.0)


def encode(text: str, special: bool) -> list[int]:
    """One token a letter, with a beginning before prompts."""
    return [0] * special + [ord(letter) - ord("a") for letter in text]


def render(messages: list[dict[str, str]], opened: bool) -> str:
    """A turn is its role's letter, its text and a z; one role is not to be had."""
    if any(message["role"] == "wizard" for message in messages):
        raise ValueError("no wizards")
    turns = "".join(f"{message['role'][0]}{message['content']}z" for message in messages)
    return turns + "a" * opened


def chat(*turns: str) -> ChatRow:
    return ChatRow(messages=[ChatMessage(role=role, content=text) for role, text in (t.split() for t in turns)])


def tokenise(rows: Sequence[Row], max_tokens: int = 8) -> list[TokenRow]:
    return list(tokenise_rows(rows, encode, render, 26, max_tokens))


def test_prompts_get_special_tokens_and_continuations_do_not() -> None:
    rows: list[Row] = [
        CompletionRow(prompt="ab", completion="c"),
        ChoicesRow(prompt=[5], choices=["a", [25], "cc"], answer=2),
    ]
    assert tokenise(rows) == [
        TokenRow((0, 0, 1), ((2,),), None),
        TokenRow((5,), ((0,), (25,), (2, 2)), 2),
    ]
    assert [row.target for row in tokenise(rows)] == [(2,), (2, 2)]


def test_a_conversation_is_scored_from_where_the_assistant_speaks_last() -> None:
    rows: list[Row] = [chat("user b", "assistant c"), chat("user b", "assistant c", "user d", "assistant ef")]
    parts = [("ubza", "cz"), ("ubzaczudza", "efz")]
    expected = [TokenRow(tuple(encode(b, False)), (tuple(encode(t, False)),), None) for b, t in parts]
    assert tokenise(rows, 13) == expected


def test_a_template_must_continue_the_turn_that_it_opens() -> None:
    def thinks(messages: list[dict[str, str]], opened: bool) -> str:
        return render(messages, opened) + "t" * opened

    with pytest.raises(ApiError, match="prompt and completion") as error:
        list(tokenise_rows([chat("user b", "assistant c")], encode, thinks, 26, 8))
    assert error.value.param == "rows[0].messages"


def test_the_longest_row_fits() -> None:
    assert tokenise([ChoicesRow(prompt=[1] * 5, choices=["abc", "a"], answer=1)])
    assert tokenise([chat("user abc", "assistant d")])


@pytest.mark.parametrize(
    ("row", "param", "code"),
    [
        (CompletionRow(prompt=[], completion="a"), "prompt", "invalid_value"),
        (CompletionRow(prompt="a", completion=""), "completion", "invalid_value"),
        (CompletionRow(prompt="a", completion=[26]), "completion", "invalid_value"),
        (CompletionRow(prompt=[-1], completion="a"), "prompt", "invalid_value"),
        (CompletionRow(prompt="a{", completion="a"), "prompt", "invalid_value"),
        (ChoicesRow(prompt="a", choices=["a", "{"], answer=0), "choices[1]", "invalid_value"),
        (chat("user {", "assistant b"), "messages", "invalid_value"),
        (CompletionRow(prompt=[1] * 8, completion="a"), "prompt", "context_length_exceeded"),
        (ChoicesRow(prompt=[1] * 6, choices=["a", "abc"], answer=0), "prompt", "context_length_exceeded"),
        (ChoicesRow(prompt="a", choices=["a", []], answer=0), "choices[1]", "invalid_value"),
        (chat("user abc", "assistant de"), "messages", "context_length_exceeded"),
        (chat("wizard a", "assistant b"), "messages", "invalid_value"),
    ],
)
def test_errors_name_the_field(row: Row, param: str, code: str) -> None:
    with pytest.raises(ApiError) as error:
        tokenise([CompletionRow(prompt="a", completion="b"), row])
    assert (error.value.status, error.value.param, error.value.code) == (400, f"rows[1].{param}", code)
