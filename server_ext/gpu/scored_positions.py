"""Log-likelihoods of continuations, summed over their tokens before they leave the device.

vLLM's ``prompt_logprobs`` puts every position of a prompt through lm_head, finds each token's rank as well, and sends
three tensors a request. A loss needs one sum: the scored tokens' log-probabilities. Here their hidden states, gathered
over the whole batch, meet lm_head in GEMMs of up to 1,024 rows, one kernel takes the log-probability of each next token
in float32, and the request's sum is added to the log-probabilities of its candidates for the next token, which vLLM
brings back for all requests in one copy anyway. What comes back is the log-likelihood of the whole continuation.

A request asks for it by ``extra_args={SCORE_FROM: start}`` beside ``logprob_token_ids``: tokens from ``start`` on are
scored. It must not read the prefix cache, which has no hidden states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

from server_ext.worker import SCORE_FROM

CHUNK = 1024
"""Rows of logits held at once."""


def score_positions(runner: Any) -> None:
    """Teaches this instance of vLLM's V2 model runner the extra argument; vLLM has no door for it."""
    starts = np.zeros(runner.max_num_reqs, np.int64)
    """By request index: the first scored token; 0 for none."""
    partial: dict[int, torch.Tensor] = {}
    """By request index: the sum over the chunks of a long prompt so far."""
    worker = runner.prompt_logprobs_worker
    add_request, sample = worker.add_request, runner.sample

    def add_request_with_start(request: str, index: int, parameters: Any) -> None:
        add_request(request, index, parameters)
        starts[index] = (parameters.extra_args or {}).get(SCORE_FROM, 0)
        partial.pop(index, None)

    def sample_with_sums(hidden: torch.Tensor, batch: Any, *rest: Any) -> Any:
        answer = sample(hidden, batch, *rest)
        if starts[batch.idx_mapping_np].any():
            _add_sums(runner, starts, partial, hidden, batch, answer[0].logprobs_tensors.logprobs)
        return answer

    worker.add_request = add_request_with_start
    runner.sample = sample_with_sums


def _add_sums(
    runner: Any,
    starts: NDArray[np.int64],
    partial: dict[int, torch.Tensor],
    hidden: torch.Tensor,
    batch: Any,
    logprobs: torch.Tensor,
) -> None:
    """Adds every request's sum to its row of ``logprobs``, float32 ``[requests, 1 + candidates]``."""
    index = batch.idx_mapping_np
    asked = np.flatnonzero(starts[index])
    first = batch.num_computed_prefill_tokens_np[asked].astype(np.int64)
    after = first + batch.num_scheduled_tokens[asked]
    lengths = runner.req_states.prompt_len.np[index[asked]]
    # Position p predicts token p + 1, and the last one what comes after the prompt.
    begin = np.maximum(starts[index[asked]] - 1, first)
    sizes = np.maximum(np.minimum(after, lengths - 1) - begin, 0)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    positions = np.repeat(begin, sizes) + within
    rows = np.repeat(batch.query_start_loc_np[asked] - first, sizes) + positions
    table = np.stack([rows, np.repeat(index[asked], sizes), positions + 1]).astype(np.int64)
    row, request, following = async_tensor_h2d(table, hidden.device)
    scores = torch.empty(len(row), device=hidden.device)
    tokens = runner.req_states.all_token_ids.gpu[request, following].unsqueeze(1)
    for at in range(0, len(row), CHUNK):
        part = slice(at, at + CHUNK)
        scores[part] = compute_token_logprobs(runner.model.compute_logits(hidden[row[part]]), tokens[part]).squeeze(1)
    places = async_tensor_h2d(np.stack([sizes, asked]), hidden.device)
    sums = torch.segment_reduce(scores, "sum", lengths=places[0], unsafe=True)
    if partial or (after < lengths).any():
        _join_chunks(partial, index[asked], first, after < lengths, sums)
    logprobs[places[1]] += sums.unsqueeze(1)


def _join_chunks(
    partial: dict[int, torch.Tensor],
    requests: NDArray[np.int32],
    first: NDArray[np.int64],
    unfinished: NDArray[np.bool_],
    sums: torch.Tensor,
) -> None:
    """Sums of prompts that vLLM cuts into chunks: kept until the last chunk, which brings them back."""
    for i, request in enumerate(requests.tolist()):
        if first[i] > 0 and request in partial:
            sums[i] += partial.pop(request)
        if unfinished[i]:
            partial[request] = sums[i].clone()
