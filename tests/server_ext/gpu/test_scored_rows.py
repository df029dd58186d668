"""Continuations' log-likelihoods, from a runner with the fields of vLLM's V2 model runner and a table for a model."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

from server_ext.gpu import scored_rows
from server_ext.gpu.scored_rows import ScoredRows
from server_ext.packing import SCORED_ROWS, Pack, Packing
from server_ext.rows import Context

VOCABULARY, BLOCK, ANSWERS = 50, 4, 6
INDEXES = {"packed": 0, "one": 2, "plain": 3}
"""Indexes of the requests: of many rows, of a single one, and of nobody's business."""


def _log_softmax(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(1, tokens)


def _packs() -> dict[str, Pack]:
    choose = np.random.default_rng(0)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(choose.integers(0, VOCABULARY, number).tolist())

    common = tokens(9)
    rows = [
        Context(common + tokens(2), 11, (1, 2, 3)),  # nothing but candidates
        Context(common + tokens(5), 9, (4,)),  # a completion, the beginning shared
        Context(tokens(4), 2, (5, 6)),
    ]
    (packed,) = Packing(BLOCK, 128, True).pack(rows, 100)
    (one,) = Packing(BLOCK, 128, True).pack([Context(tokens(7), 1, (8,))], 100)
    return {"packed": packed, "one": one}


class Runner:
    """Its hidden state at a token is the logits themselves."""

    max_num_reqs = 4
    device = "cpu"

    def __init__(self) -> None:
        self.packs = _packs()
        self.columns = ANSWERS
        self.tokens = torch.zeros(self.max_num_reqs, 60, dtype=torch.int32)
        self.logits = torch.randn(self.max_num_reqs, 60, VOCABULARY)
        lengths = np.full(self.max_num_reqs, 12, np.int32)
        for name, pack in self.packs.items():
            self.tokens[INDEXES[name], : len(pack.tokens)] = torch.tensor(pack.tokens)
            lengths[INDEXES[name]] = len(pack.tokens)
        self.req_states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=lengths), all_token_ids=SimpleNamespace(gpu=self.tokens)
        )
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden)
        self.prompt_logprobs_worker = SimpleNamespace(add_request=lambda *_: None, remove_request=lambda _: None)

    def length(self, name: str) -> int:
        return int(self.req_states.prompt_len.np[INDEXES[name]])

    def sample(self, hidden: torch.Tensor, batch: Any, *_: Any) -> tuple[Any, None, None]:
        logprobs = torch.zeros(len(batch.idx_mapping_np), 1 + self.columns)
        return SimpleNamespace(logprobs_tensors=SimpleNamespace(logprobs=logprobs)), None, None

    def answers(self, parts: dict[str, tuple[int, int]]) -> dict[str, list[float]]:
        """What comes back for each request of a batch with these of its tokens, from first to after last."""
        hidden = torch.cat([self.logits[INDEXES[name], first:after] for name, (first, after) in parts.items()])
        counts = [after - first for first, after in parts.values()]
        batch = SimpleNamespace(
            req_ids=list(parts),
            idx_mapping_np=np.array([INDEXES[name] for name in parts], np.int32),
            num_computed_prefill_tokens_np=np.array([first for first, _ in parts.values()], np.int32),
            num_scheduled_tokens=np.array(counts, np.int32),
            query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        )
        logprobs = self.sample(hidden, batch, None)[0].logprobs_tensors.logprobs
        return {name: row[1:].tolist() for name, row in zip(parts, logprobs, strict=True)}

    def expected(self, name: str) -> list[float]:
        """Row by row, with positions counted by hand."""
        found, at = [], 0
        table = self.logits[INDEXES[name]].double().log_softmax(-1)
        tokens = self.tokens[INDEXES[name]]
        for _, shared, length, start, *candidates in self.packs[name].rows:
            shift, last = at - shared, at - shared + length - 1
            inner = sum(float(table[p - 1, tokens[p]]) for p in range(start + shift, last + 1))
            found += [inner + float(table[last, candidate]) for candidate in candidates]
            at += -(-(length - shared) // BLOCK) * BLOCK
        return found


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    torch.manual_seed(0)
    monkeypatch.setattr(scored_rows, "compute_token_logprobs", _log_softmax)
    monkeypatch.setattr(scored_rows, "CHUNK", 3)
    runner = Runner()
    ScoredRows(runner, BLOCK)
    _add(runner, "packed", "one", "plain")
    return runner


def _add(runner: Runner, *names: str) -> None:
    for name in names:
        extra = {SCORED_ROWS: runner.packs[name].rows} if name in runner.packs else None
        runner.prompt_logprobs_worker.add_request(name, INDEXES[name], SimpleNamespace(extra_args=extra))


def _check(runner: Runner, found: dict[str, list[float]], *names: str) -> None:
    for name in names:
        expected = runner.expected(name)
        assert found[name][: len(expected)] == pytest.approx(expected, abs=1e-4)


def test_answers_are_rows_sums_with_their_candidates(runner: Runner) -> None:
    assert [row[:2] for row in runner.packs["packed"].rows] == [[0, 0], [0, 8], [0, 0]]
    found = runner.answers({"one": (0, 7), "plain": (0, 12), "packed": (0, runner.length("packed"))})
    _check(runner, found, "one", "packed")
    assert found["plain"] == [0.0] * ANSWERS


def test_others_may_ask_for_more_than_there_are_answers(runner: Runner) -> None:
    runner.columns = 2 * MAX_LOGPROB_TOKEN_IDS
    _check(runner, runner.answers({"plain": (0, 12), "packed": (0, runner.length("packed"))}), "packed")


@pytest.mark.parametrize("cuts", [(cut,) for cut in range(1, 24)] + [(3, 4, 5), (9, 13, 17, 22), (14, 16)])
def test_chunks_give_the_same_answers(runner: Runner, cuts: tuple[int, ...]) -> None:
    ends = [0, *cuts, runner.length("packed")]
    for i, (first, after) in enumerate(pairwise(ends)):
        found = runner.answers({"plain": (i, i + 1), "packed": (first, after), "one": (0, 7)})
    _check(runner, found, "packed", "one")


def test_a_preempted_request_starts_again(runner: Runner) -> None:
    runner.answers({"packed": (0, 15)})
    runner.prompt_logprobs_worker.remove_request("packed")
    _add(runner, "packed")
    _check(runner, runner.answers({"packed": (0, runner.length("packed"))}), "packed")


def test_an_index_is_anothers_after_its_request(runner: Runner) -> None:
    runner.answers({"one": (0, 7)})
    runner.prompt_logprobs_worker.remove_request("one")
    assert runner.answers({"one": (0, 7)})["one"] == [0.0] * ANSWERS
