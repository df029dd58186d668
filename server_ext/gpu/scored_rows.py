"""Log-likelihoods of rows, many to a request, summed over their tokens before they leave the device.

vLLM's ``prompt_logprobs`` puts every position of a prompt through lm_head, finds each token's rank as well, and sends
three tensors a request. A loss needs one number a continuation. Here the hidden states that predict scored tokens,
gathered over the whole batch, meet lm_head in GEMMs of up to 1,024 rows, one kernel takes log-probabilities in float32,
and they are added up by row. The answers take the places of the log-probabilities of the first few token ids, which
vLLM brings back for all requests in one copy anyway.

A request asks for it by ``extra_args={SCORED_ROWS: rows}``, the rows of a ``server_ext.packing.Pack``, beside
``logprob_token_ids=range(n)``, n being the number of all their candidates. Answer c is the log-likelihood of a row's
scored tokens and the c-th candidate together. The request must not read the prefix cache, which has no hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

from server_ext.packing import SCORED_ROWS

CHUNK = 1024
"""Rows of logits held at once."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """What is scored of one request's rows by the hidden states of some of its positions.

    Attributes:
        inner: positions that predict a scored token of their own row, ``[inner]``.
        sums: how many of them belong to each row that has any, or ends here: ``[rows]``, in order.
        last: last positions of the rows that end here, ``[ends]``; they are the first of the rows.
        candidates: by row that ends here, its candidates, filled up with zeros: ``[ends, width]``.
        answers: row that ends here, place among its candidates, and place among the request's answers:
            ``[3, answers]``.
        continued: whether the first row has positions before these.
        open: whether the last row ends after these.

    """

    inner: Ints
    sums: Ints
    last: Ints
    candidates: Ints
    answers: Ints
    continued: bool
    open: bool


class Rows:
    """The rows of one request. A row's own tokens are those that it does not share with an earlier one.

    Args:
        rows: as ``server_ext.packing.Pack`` has them.
        block: tokens of a block of the key-value cache; own tokens begin with one.

    Attributes:
        begins: first position of each row's own tokens, ``[rows]``.
        shifts: what is to be taken from a position of an own token to have its position in the row, ``[rows]``.
        blocks: places, among the request's blocks, of each row's blocks, filled up with zeros: ``[rows, most]``.

    """

    def __init__(self, rows: Sequence[Sequence[int]], block: int) -> None:
        like, shared, lengths, starts = np.array([row[:4] for row in rows], np.int64).T
        counts = np.array([len(row) - 4 for row in rows])
        filled = -(-(lengths - shared) // block) * block
        self.begins: Ints = np.cumsum(filled) - filled
        self.shifts: Ints = self.begins - shared
        self.blocks: Ints = np.zeros((len(rows), -(-int(lengths.max()) // block)), np.int64)
        for i, (begin, theirs, own) in enumerate(
            zip(self.begins // block, shared // block, filled // block, strict=True)
        ):
            self.blocks[i, :theirs] = self.blocks[like[i], :theirs]
            self.blocks[i, theirs : theirs + own] = np.arange(begin, begin + own)
        self._last = self.shifts + lengths - 1
        # Position p predicts token p + 1.
        inner = [np.arange(a, b) for a, b in zip(self.shifts + starts - 1, self._last, strict=True)]
        self._inner = np.concatenate(inner)
        self._row = np.repeat(np.arange(len(rows)), [len(positions) for positions in inner])
        self._candidates = np.zeros((len(rows), counts.max()), np.int64)
        for candidates, row in zip(self._candidates, rows, strict=True):
            candidates[: len(row) - 4] = row[4:]
        self._answer = np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def whole(self) -> Span:
        """All positions."""
        return self.span(0, int(self._last[-1]) + 1)

    def span(self, first: int, after: int) -> Span:
        """The positions from ``first`` to before ``after``."""
        begin, end = np.searchsorted(self._last, (first, after))
        a, b = np.searchsorted(self._inner, (first, after))
        row = self._row[a:b]
        open_ = bool(b > a and row[-1] == end)
        of_row = np.repeat(np.arange(end - begin), np.diff(self._answer[begin : end + 1]))
        answer = np.arange(self._answer[begin], self._answer[end])
        return Span(
            inner=self._inner[a:b],
            sums=np.bincount(row - begin, minlength=end - begin + open_),
            last=self._last[begin:end],
            candidates=self._candidates[begin:end],
            answers=np.stack([of_row, answer - self._answer[begin:end][of_row], answer]),
            continued=bool(a > 0 and self._row[a - 1] == begin),
            open=open_,
        )


class ScoredRows:
    """The rows of all requests of one instance of vLLM's V2 model runner.

    Args:
        runner: the model runner, which learns of the extra argument; vLLM has no door for it.
        block: see ``Rows``.

    """

    def __init__(self, runner: Any, block: int) -> None:
        self._runner = runner
        self._rows: dict[str, Rows] = {}
        device = runner.device
        # By request index: the answers so far, and the sum over the row that a chunk of the prompt has cut in two.
        self._answers = torch.zeros(runner.max_num_reqs, MAX_LOGPROB_TOKEN_IDS, device=device)
        self._open = torch.zeros(runner.max_num_reqs, device=device)
        worker = runner.prompt_logprobs_worker
        add_request, remove_request, sample = worker.add_request, worker.remove_request, runner.sample

        def add_request_with_rows(request: str, index: int, parameters: Any) -> None:
            add_request(request, index, parameters)
            if rows := (parameters.extra_args or {}).get(SCORED_ROWS):
                self._rows[request] = Rows(rows, block)

        def remove_request_with_rows(request: str) -> None:
            remove_request(request)
            self._rows.pop(request, None)

        def sample_with_rows(hidden: torch.Tensor, batch: Any, *rest: Any) -> Any:
            answer = sample(hidden, batch, *rest)
            if any(request in self._rows for request in batch.req_ids):
                self._score(hidden, batch, answer[0].logprobs_tensors.logprobs)
            return answer

        worker.add_request = add_request_with_rows
        worker.remove_request = remove_request_with_rows
        runner.sample = sample_with_rows

    def get(self, request: str) -> Rows | None:
        """The rows of a request, if it has any."""
        return self._rows.get(request)

    def _score(self, hidden: torch.Tensor, batch: Any, logprobs: torch.Tensor) -> None:
        """Puts the answers of the requests that end in a batch into ``logprobs``, float32 ``[requests, 1 + n]``."""
        parts: list[Part] = []
        ends: list[tuple[int, int]] = []
        lengths = self._runner.req_states.prompt_len.np
        for place, (request, index) in enumerate(zip(batch.req_ids, batch.idx_mapping_np.tolist(), strict=True)):
            rows = self._rows.get(request)
            if rows is None:
                continue
            first, length = int(batch.num_computed_prefill_tokens_np[place]), int(lengths[index])
            after = first + int(batch.num_scheduled_tokens[place])
            span = rows.whole if first == 0 and after >= length else rows.span(first, after)
            parts.append(Part(span, index, int(batch.query_start_loc_np[place]) - first))
            if after >= length:
                ends.append((place, index))
        tables = to_device([*_tables(parts), _pairs(ends)], hidden.device)
        positions, (index_of, following), candidates, counts, answers, continued, open_, (place_of, ended) = tables
        inner = len(index_of)
        tokens = candidates.new_zeros(len(positions), candidates.shape[1])
        tokens[:inner, 0] = self._runner.req_states.all_token_ids.gpu[index_of, following]
        tokens[inner:] = candidates
        scores = torch.empty(tokens.shape, device=hidden.device)
        for at in range(0, len(positions), CHUNK):
            chunk = slice(at, at + CHUNK)
            logits = self._runner.model.compute_logits(hidden[positions[chunk]])
            scores[chunk] = compute_token_logprobs(logits, tokens[chunk])
        sums = torch.segment_reduce(scores[:inner, 0], "sum", lengths=counts, unsafe=True)
        sums[continued[0]] += self._open[continued[1]]
        self._open[open_[1]] = sums[open_[0]]
        row, end, candidate, answering, answer = answers
        self._answers[answering, answer] = sums[row] + scores[inner + end, candidate]
        # Another request may ask for more log-probabilities than any has answers.
        columns = self._answers[ended, : logprobs.shape[1] - 1]
        logprobs[place_of, 1 : 1 + columns.shape[1]] = columns


class Part(NamedTuple):
    """A span of a request, by the runner's index; ``shift`` makes its positions the batch's tokens."""

    span: Span
    request: int
    shift: int


def _tables(parts: Sequence[Part]) -> list[Ints]:
    """What is scored in a batch.

    Returns:
        The scored tokens, all inner ones before all last ones, ``[inner + ends]``; of the inner ones, the request's
        index and the position of the token that each predicts, ``[2, inner]``; of the last ones, their candidates,
        ``[ends, width]``; the number of inner ones by row, ``[rows]``; of every answer, its row, its row among those
        that end, its place among the candidates, the request's index and its place among the request's answers,
        ``[5, answers]``; and of rows that continue, and of rows left open, the row and the request's index,
        ``[2, …]`` each.

    """
    width = max(part.span.candidates.shape[1] for part in parts)
    # Where each request's rows, and those of them that end, begin among all.
    at_row = list(accumulate((len(part.span.sums) for part in parts), initial=0))
    at_end = list(accumulate((len(part.span.last) for part in parts), initial=0))
    following, candidates, answers = [], [], []
    for i, (span, request, _) in enumerate(parts):
        following.append(np.stack([np.full(len(span.inner), request), span.inner + 1]))
        candidates.append(np.pad(span.candidates, ((0, 0), (0, width - span.candidates.shape[1]))))
        row, place, answer = span.answers
        answers.append(np.stack([row + at_row[i], row + at_end[i], place, np.full(len(row), request), answer]))
    return [
        np.concatenate([*(p.span.inner + p.shift for p in parts), *(p.span.last + p.shift for p in parts)]),
        np.concatenate(following, axis=1),
        np.concatenate(candidates),
        np.concatenate([part.span.sums for part in parts]),
        np.concatenate(answers, axis=1),
        _pairs([(at_row[i], part.request) for i, part in enumerate(parts) if part.span.continued]),
        _pairs([(at_row[i + 1] - 1, part.request) for i, part in enumerate(parts) if part.span.open]),
    ]


def _pairs(pairs: Sequence[tuple[int, int]]) -> Ints:
    """``[2, pairs]``."""
    return np.array(pairs, np.int64).reshape(-1, 2).T


def to_device(arrays: Sequence[Ints], device: torch.device) -> list[torch.Tensor]:
    """Arrays of any shapes, in one copy."""
    flat = async_tensor_h2d(np.concatenate([array.ravel() for array in arrays]), device)
    parts = torch.split(flat, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
