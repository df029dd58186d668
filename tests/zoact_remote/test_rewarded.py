"""Rewards of generated text, against an adapter whose losses they are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import Servers, new_adapter
from tests.zoact_remote.regression import ROWS, Regression, trainer
from zoact_remote import (
    Adam,
    BadRequest,
    Basis,
    InvalidValue,
    LeaveOneOut,
    Probe,
    Rewarded,
    Row,
    Side,
    Trainer,
    TwoPoint,
    Update,
    evaluate,
)
from zoact_remote.wire import Generation

ANSWER = {"role": "assistant", "content": "4"}
NO_QUESTIONS: list[tuple[Row, str]] = [
    ({"question": "?"}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": [ANSWER]}, "messages"),
]
PROBES = (Probe(3, 0.25), Probe(4, 0.5, "plus"))


@dataclass
class Version:
    version: int


class Author(Regression):
    """The regression, which writes its prediction for a row down as text."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, Any]] = []

    def refresh(self) -> Version:
        self.calls.append("refresh")
        return Version(len(self.versions) - 1)

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        version: int | None = None,
        probe: Side | None = None,
    ) -> Generation:
        self.asked.append({"prompt": prompt, "messages": messages, "seed": seed, "version": version, "probe": probe})
        assert version is not None
        c = self.versions[version]
        if probe is not None:
            c = c + probe.sign * probe.epsilon * self.z(probe.seed)
        text = repr(float(np.dot(prompt, c))) if prompt is not None else ""
        return Generation(version, text if stop == " and" else text + " and so on", (1, 2, 3), "length")


def closeness(row: Row, text: str) -> float:
    return -((float(text) - float(row["completion"])) ** 2)


def rewarded(adapter: Author, **options: Any) -> Rewarded:
    return Rewarded(adapter, closeness, stop=" and", **options)


def test_losses_are_minus_the_mean_rewards() -> None:
    author, plain = Author(), Author()
    update = Update(0, ((7, 0.1),), key="a")
    found = rewarded(author).losses(ROWS[:5], PROBES, base=True, version=1, update=update)
    wanted = plain.losses(ROWS[:5], PROBES, base=True, version=1, update=update)
    assert (found.version, found.update) == (wanted.version, wanted.update)
    assert [(p.seed, p.epsilon) for p in found.losses] == [(p.seed, p.epsilon) for p in wanted.losses]
    assert found.losses[0].plus == pytest.approx(wanted.losses[0].plus)
    assert found.losses[0].minus == pytest.approx(wanted.losses[0].minus)
    assert found.losses[1].plus == pytest.approx(wanted.losses[1].plus)
    assert found.losses[1].minus is None
    assert found.base == pytest.approx(wanted.base)
    assert found.tokens == 5 * 4 * 3


@pytest.mark.parametrize("estimator", [TwoPoint(0.25), LeaveOneOut(0.25)])
def test_a_trainer_takes_it_as_it_takes_an_adapter(estimator: Any) -> None:
    author, plain = Author(), Author()
    by_reward = trainer(rewarded(author), estimator=estimator, eval_rows=ROWS).run()  # type: ignore[arg-type]
    by_loss = trainer(plain, estimator=estimator).run()
    np.testing.assert_allclose(author.versions, plain.versions, rtol=1e-6)
    assert [r.loss for r in by_reward.steps] == pytest.approx([r.loss for r in by_loss.steps])
    before, after = by_reward.evaluations
    assert before.loss == pytest.approx(plain.loss(ROWS, plain.versions[0]))
    assert after.loss < before.loss
    assert (after.accuracy, after.perplexity, after.calibrated_accuracy) == (None, None, None)


@given(st.integers(0, 2**32), st.integers(0, 50))
def test_sides_share_their_random_numbers_and_rows_do_not(seed: int, version: int) -> None:
    author = Author()
    author.versions *= version + 2
    run = rewarded(author, temperature=1.0, seed=seed)
    run.losses(ROWS[:3], PROBES, base=True, version=version)
    run.losses(ROWS[:3], PROBES, base=True, version=version + 1)
    by_row = {(a["version"], tuple(a["prompt"])): set() for a in author.asked}  # type: ignore[var-annotated]
    for asked in author.asked:
        by_row[asked["version"], tuple(asked["prompt"])].add(asked["seed"])
    assert all(len(seeds) == 1 for seeds in by_row.values())
    assert len(set.union(*by_row.values())) == len(by_row) == 6
    assert all(0 <= asked["seed"] < 2**63 for asked in author.asked)


@pytest.mark.parametrize("rows_per_call", [1, 3, 64])
def test_every_row_that_is_evaluated_has_random_numbers_of_its_own(rows_per_call: int) -> None:
    whole, parts = Author(), Author()
    rewarded(whole, temperature=1.0).evaluate(ROWS)
    evaluate(rewarded(parts, temperature=1.0), ROWS, rows_per_call=rows_per_call)
    by_row = [{tuple(asked["prompt"]): asked["seed"] for asked in author.asked} for author in (whole, parts)]
    assert by_row[0] == by_row[1]
    assert len(set(by_row[0].values())) == len(ROWS)


def test_the_likeliest_text_needs_no_random_numbers() -> None:
    author = Author()
    rewarded(author).losses(ROWS[:2], PROBES)
    assert {asked["seed"] for asked in author.asked} == {None}


def test_without_a_version_all_texts_are_of_the_newest() -> None:
    author = Author()
    author.update(Update(0, ((7, 0.1),), key="a"))
    assert rewarded(author).losses(ROWS[:2], PROBES).version == 1
    assert {asked["version"] for asked in author.asked} == {1}
    assert rewarded(author).evaluate(ROWS, version=0).version == 0


def test_evaluate() -> None:
    author, seen = Author(), list[tuple[int, int]]()
    found = rewarded(author).evaluate(ROWS, progress=lambda done, of: seen.append((done, of)))
    assert found.rewards == tuple(closeness(row, text) for row, text in zip(ROWS, found.texts, strict=True))
    assert found.reward == pytest.approx(np.mean(found.rewards))
    assert found.texts[0] == "0.0"
    assert seen == [(i + 1, len(ROWS)) for i in range(len(ROWS))]
    assert evaluate(rewarded(author), ROWS).loss == pytest.approx(-found.reward)


def test_choices_that_a_row_holds_are_for_the_reward() -> None:
    rows = [{**row, "choices": [" no", " yes"]} for row in ROWS]
    found = evaluate(rewarded(Author()), rows)
    assert found == evaluate(rewarded(Author()), ROWS)
    assert (found.accuracy, found.calibrated_accuracy, found.predictions) == (None, None, (None,) * len(ROWS))


def test_a_conversation_is_shown_up_to_its_answer() -> None:
    author = Author()
    question = {"role": "user", "content": "2 + 2?"}
    rows: list[Row] = [
        {"messages": [question]},
        {"messages": [question, ANSWER], "references": ["4"]},
    ]
    Rewarded(author, lambda row, text: len(text)).evaluate(rows)
    assert [asked["messages"] for asked in author.asked] == [[question], [question]]


def test_nothing_is_sent_for_what_is_wrong() -> None:
    author = Author()
    run = rewarded(author)
    with pytest.raises(InvalidValue, match=r"^probes: "):
        run.losses(ROWS[:1], ())
    with pytest.raises(InvalidValue, match=r"^version: must be 1"):
        run.losses(ROWS[:1], PROBES, version=0, update=Update(0, ((7, 0.1),), key="a"))
    with pytest.raises(InvalidValue, match=r"^rows: "):
        run.losses([], PROBES)
    for row, param in NO_QUESTIONS:
        with pytest.raises(InvalidValue, match=rf"^rows\[1\]\.{param}: "):
            run.evaluate([ROWS[0], row])
    assert author.calls == []
    assert author.asked == []


def test_a_row_at_fault_is_named_by_its_place_in_all() -> None:
    for row, param in NO_QUESTIONS:
        with pytest.raises(InvalidValue, match=rf"^rows\[3\]\.{param}: ") as caught:
            evaluate(rewarded(Author()), [*ROWS[:3], row], rows_per_call=2)
        assert caught.value.param == f"rows[3].{param}"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_is_a_number(value: float) -> None:
    with pytest.raises(InvalidValue, match=r"^rows\[0\]: the reward must be finite, got .* for '0.0 and so on'"):
        Rewarded(Author(), lambda row, text: value).evaluate(ROWS[:1])


def test_what_a_reward_raises_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        Rewarded(Author(), lambda row, text: 1 / 0).evaluate(ROWS[:3])


def test_training_for_a_reward_on_a_real_server(servers: Servers) -> None:
    def vowels(row: Row, text: str) -> float:
        return sum(letter in "aeiou" for letter in text) / max(len(text), 1)

    rows = [{"messages": [{"role": "user", "content": f"{word} it was"}]} for word in ("What", "Where", "Until")]
    with servers("transformers").client() as client:
        digests = []
        for _ in range(2):
            adapter = new_adapter(client, basis=Basis(source="random"))
            run = Rewarded(adapter, vowels, max_tokens=4, temperature=1.0)
            history = Trainer(
                run, TwoPoint(0.25), Adam(), 0.1, rows, steps=4, batch_size=2, eval_rows=rows, eval_every=2
            ).run()
            assert any(g for record in history.steps for _, g in record.terms)
            digests.append(adapter.refresh().digest)
        assert digests[0] == digests[1]
        with pytest.raises(BadRequest) as refused:
            run.evaluate([*rows, {"prompt": []}])
        assert refused.value.param == "rows[3].prompt"
        run.evaluate([{"prompt": np.array([3, 4])}, {"prompt": [np.int64(3), 4]}])
        with pytest.raises(InvalidValue, match=r"^rows\[3\]\.prompt\[1\]: must be text, integers .*, got set"):
            run.evaluate([*rows, {"prompt": [1, {2}]}])


def test_the_adapter_is_rolled_back() -> None:
    author = Author()
    run = rewarded(author)
    run.update(Update(0, ((7, 0.1),), key="a"))
    assert run.rollback(0, base_version=1, key="b").version == run.refresh().version == 2
    np.testing.assert_array_equal(author.versions[2], author.versions[0])
