"""Attention for requests that hold many rows: each row attends to itself alone, and to what it shares with another.

A request's keys and values lie in blocks of the cache, listed in its block table. Rows begin with a block, so a row is
to the attention kernels a sequence of its own if only they are told so: its tokens' positions count from the row's
beginning, and its block table lists its own blocks, after those that an earlier row has filled for both. (A layer
writes the keys and values of a whole batch before it attends.) So the batch that the attention's metadata is made from
has a sequence for every row, or part of a row, that it computes; everything else in vLLM sees one request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from server_ext.gpu.scored_rows import Rows, to_device

Ints = NDArray[np.int64]


def block_of(runner: Any) -> int | None:
    """Tokens of a block of the cache; None where this instance of vLLM cannot split requests.

    It can where all layers attend to everything before them with FlashAttention, whose metadata are known here, and
    nothing else looks at those: no speculative decoding, no parallelism along sequences or layers, no batches in two
    halves, and no CUDA graphs of whole batches other than decoding ones.
    """
    groups, parallel = runner.kv_cache_config.kv_cache_groups, runner.parallel_config
    spec = groups[0].kv_cache_spec
    plain_attention = (
        len(groups) == 1
        and type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and runner.model_config.rswa_window is None
        and not runner.model_config.is_mm_prefix_lm
        and all(group.backend.get_name() == "FLASH_ATTN" for group in runner.attn_groups[0])
        # Where a kernel's blocks are parts of the cache's, block tables list these or those, by vLLM's version.
        and runner.kernel_block_sizes[0] == spec.block_size
    )
    plain_batches = (
        type(runner.model_state) is DefaultModelState
        and runner.model_state.rope_state is None
        and runner.speculator is None
        and runner.pcp_manager is None
        and getattr(runner, "fast_prefill", None) is None
        and not (runner.use_dcp or runner.use_pp or parallel.use_ubatching)
        and runner.compilation_config.cudagraph_mode.mixed_mode() != CUDAGraphMode.FULL
    )
    return int(spec.block_size) if plain_attention and plain_batches else None


@dataclass(frozen=True)
class Parts:
    """The sequences that a batch is to attention, in the order of its tokens. All but the last are ``[parts]``.

    Attributes:
        request: place in the batch of the request that each belongs to.
        tokens: how many of its tokens are computed.
        length: how long it is after that.
        shift: what is to be taken from a position in the request to have it in the sequence.
        packed: whether it is a row.
        blocks: of rows only, the places of their blocks among the request's: ``[rows, most]``.

    """

    request: Ints
    tokens: Ints
    length: Ints
    shift: Ints
    packed: NDArray[np.bool_]
    blocks: Ints


def parts_of(rows: Sequence[Rows | None], first: Ints, after: Ints) -> Parts:
    """The parts of a batch of requests.

    Args:
        rows: by request; None for one that is a sequence itself.
        first: by request, the first position computed.
        after: by request, the position after the last one computed.

    """
    request, start, end, shift, blocks = [], [], [], [], []
    for i, held in enumerate(rows):
        begins = np.zeros(1, np.int64) if held is None else held.begins
        # From the row that the first position lies in to the one that the last does.
        a, b = np.searchsorted(begins, first[i], "right") - 1, np.searchsorted(begins, after[i])
        request.append(np.full(b - a, i))
        start.append(np.maximum(begins[a:b], first[i]))
        end.append(np.append(begins[a + 1 : b], after[i]))
        shift.append(begins if held is None else held.shifts[a:b])
        if held is not None:
            blocks.append(held.blocks[a:b])
    most = max((table.shape[1] for table in blocks), default=0)
    of, ends, shifts = np.concatenate(request), np.concatenate(end), np.concatenate(shift)
    return Parts(
        of,
        ends - np.concatenate(start),
        ends - shifts,
        shifts,
        np.array([held is not None for held in rows])[of],
        np.concatenate([np.pad(table, ((0, 0), (0, most - table.shape[1]))) for table in blocks]),
    )


def split_rows(runner: Any, rows_of: Callable[[str], Rows | None]) -> None:
    """Has attention see every row of a request as a sequence; vLLM has no door for it.

    Args:
        runner: an instance of vLLM's V2 model runner that has a :func:`block_of`.
        rows_of: a request's rows, None for one without.

    """
    state = runner.model_state
    stock = state.prepare_attn
    builders = [group.get_metadata_builder(0) for group in runner.attn_groups[0]]

    def prepare_attn(
        batch: Any, mode: CUDAGraphMode, tables: Sequence[torch.Tensor], slots: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        rows = [rows_of(request) for request in batch.req_ids]
        if not any(held is not None and len(held.begins) > 1 for held in rows):
            return stock(batch, mode, tables, slots, *rest, **options)
        split, split_table = _split(batch, rows, tables[0])
        if mode == CUDAGraphMode.FULL:
            # A graph of a whole batch has one token a request, so requests are parts, and it reads lengths and blocks
            # from where they lay when it was captured. Sampling wants the requests' lengths, as they were.
            lengths, batch.seq_lens = batch.seq_lens, batch.seq_lens.clone()
            lengths[: split.num_reqs] = split.seq_lens
            tables[0][: split.num_reqs] = split_table
            return stock(replace(batch, seq_lens=lengths), mode, tables, slots, *rest, **options)
        # FlashAttention 3 can plan a batch ahead, but the plan goes to a buffer with room for max_num_seqs sequences.
        planning = [builder.aot_schedule for builder in builders]
        try:
            for builder in builders:
                builder.aot_schedule = False
            return stock(split, mode, (split_table,), slots, *rest, **options)
        finally:
            for builder, planned in zip(builders, planning, strict=True):
                builder.aot_schedule = planned

    state.prepare_attn = prepare_attn


def _split(batch: Any, rows: Sequence[Rows | None], table: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A batch with a sequence for every row, and their block table; tokens' positions become those in their rows.

    The slots of the cache that the tokens go to have been worked out from the old positions by now.
    """
    first = batch.num_computed_tokens_np[: batch.num_reqs].astype(np.int64)
    parts = parts_of(rows, first, first + batch.num_scheduled_tokens[: batch.num_reqs])
    starts = np.concatenate([[0], np.cumsum(parts.tokens)])
    columns = np.stack([parts.request, parts.tokens, parts.length, parts.shift, parts.packed, starts[1:]])
    (request, tokens, length, shift, packed, ends), at, blocks = to_device(
        [columns, np.flatnonzero(parts.packed), parts.blocks], table.device
    )
    positions = batch.positions[: batch.num_tokens]
    positions -= torch.repeat_interleave(shift, tokens, output_size=batch.num_tokens)
    split_table = table[request]
    split_table[at, : blocks.shape[1]] = split_table[at].gather(1, blocks)
    query_starts = torch.zeros(len(ends) + 1, dtype=torch.int32, device=table.device)
    query_starts[1:] = ends
    lengths = torch.where(
        torch.from_numpy(parts.packed), torch.from_numpy(parts.length), batch.seq_lens_cpu_upper_bound[parts.request]
    )
    split = replace(
        batch,
        num_reqs=len(ends),
        num_reqs_after_padding=len(ends),
        idx_mapping_np=batch.idx_mapping_np[parts.request],
        num_scheduled_tokens=parts.tokens.astype(np.int32),
        query_start_loc=query_starts,
        query_start_loc_np=starts.astype(np.int32),
        # Of a request that decodes, the device alone knows the length for sure.
        seq_lens=torch.where(packed.bool(), length, batch.seq_lens[request]).int(),
        seq_lens_cpu_upper_bound=lengths.int(),
        is_prefilling_np=batch.is_prefilling_np[parts.request],
    )
    return split, split_table
