"""Metrics against their definitions, spelled out."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from zoact_remote.metrics import (
    accuracy,
    exact_match,
    final_number,
    macro_f1,
    normalise,
    number_match,
    perplexity,
    token_f1,
)

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)
WORDS = st.lists(st.sampled_from(["a", "the", "cat", "Cat", "dog,", "dog", "ran"]), max_size=6).map(" ".join)


@given(PAIRS)
def test_accuracy_and_macro_f1_follow_from_the_confusion_matrix(pairs: list[tuple[int, int]]) -> None:
    predictions, answers = zip(*pairs, strict=True)
    table = np.zeros((5, 5))
    for guess, answer in pairs:
        table[answer, guess] += 1
    assert accuracy(predictions, answers) == pytest.approx(np.trace(table) / table.sum())
    scores = []
    for label in sorted({*predictions, *answers}):
        hits, guessed, there = table[label, label], table[:, label].sum(), table[label].sum()
        precision, recall = (hits / guessed if guessed else 0.0), (hits / there if there else 0.0)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1(predictions, answers) == pytest.approx(np.mean(scores))


def test_macro_f1_counts_rare_labels_as_much_as_others() -> None:
    assert macro_f1([0] * 10, [0] * 9 + [1]) == pytest.approx((18 / 19 + 0) / 2)
    assert macro_f1([2, 2], [2, 2]) == 1.0


@given(st.lists(st.tuples(st.floats(-1e3, 0), st.integers(1, 20)), min_size=1))
def test_perplexity_is_of_a_token(texts: list[tuple[float, int]]) -> None:
    logprobs, tokens = zip(*texts, strict=True)
    mean = np.float64(-sum(logprobs)) / sum(tokens)
    assume(mean < 700)
    assert perplexity(logprobs, tokens) == pytest.approx(np.exp(mean))


def test_perplexity_of_guessing() -> None:
    assert perplexity([-3 * math.log(50), -math.log(50)], [3, 1]) == pytest.approx(50)
    assert perplexity([-1e6], [1]) == math.inf


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat, a dog!", "cat dog"),
        ("an apple  a\tday\n", "apple day"),
        ("theatre of an-other", "theatre of another"),
        ("U.S.A.", "usa"),
        ("the", ""),
        ("Ærø — “x”", "ærø — “x”"),
    ],
)
def test_text_is_compared_as_squad_does(text: str, normal: str) -> None:
    assert normalise(text) == normal


@given(WORDS, WORDS)
def test_exact_match(text: str, reference: str) -> None:
    assert exact_match(text, [reference]) == (normalise(text) == normalise(reference))
    assert exact_match(f"The {text.upper()}!", ["neither", text]) == 1.0
    assert exact_match(text, [reference, text]) == 1.0


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_token_f1_is_the_best_overlap(text: str, references: list[str]) -> None:
    def f1(words: list[str], wanted: list[str]) -> float:
        if not words or not wanted:
            return float(words == wanted)
        left = list(wanted)
        common = 0
        for word in words:
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = common / len(words), common / len(wanted)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    expected = max(f1(normalise(text).split(), normalise(r).split()) for r in references)
    assert token_f1(text, references) == pytest.approx(expected)
    assert exact_match(text, references) <= token_f1(text, references) + 1e-12


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{:.2f}", "{:,.1f}"]))
def test_final_numbers_are_read_as_they_are_written(number: int, form: str) -> None:
    written = form.format(number)
    assert final_number(f"7 apples cost 3.50, and so it is {written}.") == number
    assert final_number(f"So:\n#### {written}\nQuestion: what is 4?") == number
    assert number_match(f"It is {written} km", [str(number)]) == 1.0
    assert number_match(f"It is {written} km", [str(number + 1)]) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5-3", 3),
        ("(2)-1", 1),
        ("it is -3", -3),
        ("$1,234.50 each", 1234.5),
        ("x=.5", 0.5),
        ("10%", 10),
        ("1, 2, 3", 3),
        ("#### none, so 8", 8),
        ("8 #### none", 8),
        ("it is -$5", -5),
        ("it is -$1,234.50", -1234.5),
        ("it is $-5", -5),
        ("it is \u22127", -7),
        ("5\u22123", 3),
        ("none", None),
        ("", None),
    ],
)
def test_final_numbers(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_numbers_are_compared_and_not_their_digits() -> None:
    assert number_match("10.333", ["10.333333333333334"]) == 1.0
    assert number_match("10.33", ["10.333333333333334"]) == 0.0
    assert number_match("4.0", ["none", "4"]) == 1.0
    assert number_match("none", ["none"]) == 0.0
    assert number_match("0", ["0"]) == 1.0
