"""Figures by which a model is judged.

All are shares from 0 to 1, but for the perplexity. Text that a model generated is compared with any number of
references, and the best comparison counts.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212][$€£¥]?)?(?:\d+(?:,\d{3})*(?:\.\d+)?|(?<!\w)\.\d+)")
"""A minus behind a word, a number or a bracket takes away, and is no sign."""
FINAL_ANSWER = "####"
"""GSM8K's solutions have their answer behind it (Cobbe et al., arXiv 2110.14168)."""
MOST_NATS = 700.0
"""Beyond this, an exponential is no double."""
NUMBERS_AGREE = 1e-3
"""Difference up to which two numbers are one, since 31/3 is written to some decimal place; as in the evaluation of
LLM-Adapters (Hu et al., arXiv 2304.01933)."""


def accuracy(predictions: Sequence[int], answers: Sequence[int]) -> float:
    """Share of predictions that are the answer."""
    return sum(guess == answer for guess, answer in zip(predictions, answers, strict=True)) / len(answers)


def macro_f1(predictions: Sequence[int], answers: Sequence[int]) -> float:
    """Mean over labels of the harmonic mean of precision and recall.

    Labels that are neither predicted nor an answer are left out of the mean.
    """
    predicted, right = Counter(predictions), Counter(answers)
    hits = Counter(guess for guess, answer in zip(predictions, answers, strict=True) if guess == answer)
    labels = predicted.keys() | right.keys()
    return math.fsum(2 * hits[label] / (predicted[label] + right[label]) for label in labels) / len(labels)


def perplexity(logprobs: Sequence[float], tokens: Sequence[int]) -> float:
    """Exponential of the mean negative log-likelihood of a token.

    Args:
        logprobs: summed log-likelihood of each text, in nats.
        tokens: number of tokens of each.

    """
    mean = -math.fsum(logprobs) / sum(tokens)
    return math.exp(mean) if mean < MOST_NATS else math.inf


def normalise(text: str) -> str:
    """Text as SQuAD compares it: without case, ASCII punctuation, English articles and surplus white space.

    The order is that of the set's own evaluation (Rajpurkar et al., arXiv 1606.05250, evaluate-v1.1).
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 if the text is a reference, up to :func:`normalise`; else 0."""
    return float(normalise(text) in map(normalise, references))


def token_f1(text: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the text's words among a reference's, after :func:`normalise`.

    Where either has no words, 1 if neither has, else 0 (Rajpurkar et al., arXiv 1806.03822, evaluate-v2.0).
    """
    return max(_overlap(normalise(text).split(), normalise(reference).split()) for reference in references)


def number_match(text: str, references: Sequence[str]) -> float:
    """1 if the text's final number is that of a reference, up to 0.001; else 0."""
    found = final_number(text)
    wanted = [final_number(reference) for reference in references]
    return float(found is not None and any(w is not None and abs(found - w) <= NUMBERS_AGREE for w in wanted))


def final_number(text: str) -> float | None:
    """The number behind the first ``####``, else the last number in the text; None if there is none.

    Commas may group thousands; units and currency signs are passed over, between a minus and its number too.
    """
    before, _, behind = text.partition(FINAL_ANSWER)
    numbers = NUMBER.findall(behind)[:1] or NUMBER.findall(before)[-1:]
    return float(re.sub(r"[,$€£¥]", "", numbers[0]).replace("\u2212", "-")) if numbers else None


def spelt(figure: str) -> str:
    """A figure's name as it is shown."""
    return figure.replace("_", " ")


def _overlap(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    return 2 * (Counter(words) & Counter(wanted)).total() / (len(words) + len(wanted))


OF_TEXT: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "number_match": number_match,
}
"""Metrics of generated text, by the names that tasks give them."""
FIGURES = dict.fromkeys(("accuracy", "macro_f1", *OF_TEXT), ".1%") | {"perplexity": ".2f", "loss": ".3f"}
"""All figures of an evaluation in the order shown, and the format of each."""
LESS_IS_BETTER = ("perplexity", "loss")
"""Of the others more is, and they are the shares."""
