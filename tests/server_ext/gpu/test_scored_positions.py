"""Continuations' log-likelihoods, from a runner with the fields of vLLM's V2 model runner and a table for a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

from server_ext.gpu import scored_positions
from server_ext.worker import SCORE_FROM

VOCABULARY, CANDIDATES = 50, 2
PROMPTS = {0: (30, 25), 2: (12, 0), 3: (17, 1)}
"""Request index: length and first scored token, 0 for none."""


def _log_softmax(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, tokens)


class Runner:
    """Its hidden state at a token is the logits themselves."""

    max_num_reqs = 4

    def __init__(self) -> None:
        self.tokens = torch.randint(VOCABULARY, (self.max_num_reqs, 40))
        self.logits = torch.randn(self.max_num_reqs, 40, VOCABULARY)
        lengths = np.array([PROMPTS.get(i, (0, 0))[0] for i in range(self.max_num_reqs)], np.int32)
        self.req_states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=lengths), all_token_ids=SimpleNamespace(gpu=self.tokens)
        )
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden)
        self.prompt_logprobs_worker = SimpleNamespace(add_request=lambda *_: None)

    def sample(self, hidden: torch.Tensor, batch: Any, *_: Any) -> tuple[Any, None, None]:
        rows = len(batch.idx_mapping_np)
        return SimpleNamespace(logprobs_tensors=SimpleNamespace(logprobs=torch.zeros(rows, 1 + CANDIDATES))), None, None

    def batch(self, parts: dict[int, tuple[int, int]]) -> tuple[torch.Tensor, Any]:
        """Hidden states and description of a batch with these tokens, from first to after last, of each request."""
        hidden = torch.cat([self.logits[i, first:after] for i, (first, after) in parts.items()])
        counts = [after - first for first, after in parts.values()]
        return hidden, SimpleNamespace(
            idx_mapping_np=np.array(list(parts), np.int32),
            num_computed_prefill_tokens_np=np.array([first for first, _ in parts.values()], np.int32),
            num_scheduled_tokens=np.array(counts, np.int32),
            query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        )

    def expected(self, index: int) -> float:
        length, start = PROMPTS[index]
        table = self.logits[index].double().log_softmax(-1)
        return sum(float(table[i - 1, self.tokens[index, i]]) for i in range(start, length)) if start else 0.0


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    torch.manual_seed(0)
    monkeypatch.setattr(scored_positions, "compute_token_logprobs", _log_softmax)
    monkeypatch.setattr(scored_positions, "CHUNK", 7)
    runner = Runner()
    scored_positions.score_positions(runner)
    for index, (_, start) in PROMPTS.items():
        extra = {SCORE_FROM: start} if start else None
        runner.prompt_logprobs_worker.add_request(str(index), index, SimpleNamespace(extra_args=extra))
    return runner


def _sums(runner: Runner, parts: dict[int, tuple[int, int]]) -> torch.Tensor:
    logprobs: torch.Tensor = runner.sample(*runner.batch(parts), None)[0].logprobs_tensors.logprobs
    return logprobs


def test_sums_are_added_to_their_requests_candidates(runner: Runner) -> None:
    found = _sums(runner, {i: (0, length) for i, (length, _) in PROMPTS.items()})
    for row, index in zip(found, PROMPTS, strict=True):
        assert row.tolist() == pytest.approx([runner.expected(index)] * (1 + CANDIDATES), abs=1e-4)


@pytest.mark.parametrize("cut", [3, 16, 24, 27, 29])
def test_prompts_in_chunks_give_the_same_sums(runner: Runner, cut: int) -> None:
    _sums(runner, {0: (0, cut), 2: (0, 12)})
    found = _sums(runner, {3: (0, 17), 0: (cut, 30)})
    assert found[:, 1].tolist() == pytest.approx([runner.expected(3), runner.expected(0)], abs=1e-4)


def test_a_preempted_prompt_starts_again(runner: Runner) -> None:
    _sums(runner, {0: (0, 28)})
    assert _sums(runner, {0: (0, 30)})[0, 1].item() == pytest.approx(runner.expected(0), abs=1e-4)
