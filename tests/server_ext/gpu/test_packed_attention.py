"""What attention is told of packed requests, read back from a cache that holds tokens for keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from server_ext.gpu.packed_attention import block_of, split_rows
from server_ext.gpu.scored_rows import Rows
from server_ext.packing import Packing
from server_ext.rows import Context
from tests.server_ext.test_packing import contexts

BLOCK, BLOCKS = 4, 40


class State:
    """Keeps what vLLM would make attention's metadata from."""

    def prepare_attn(self, batch: Any, mode: Any, tables: Any, slots: Any, *rest: Any, **options: Any) -> str:
        self.seen = batch, tables, options
        self.planned = [builder.aot_schedule for builder in self.builders]
        return "metadata"

    def __init__(self) -> None:
        self.builders = [SimpleNamespace(aot_schedule=True)]


def _runner(**changes: Any) -> SimpleNamespace:
    """What of a runner says whether requests can be split, with some of it changed."""
    state = object.__new__(DefaultModelState)
    state.rope_state = None
    wanted: dict[str, Any] = {
        "backend": "FLASH_ATTN",
        "kernel_block_sizes": [16],
        "sliding_window": None,
        "is_mm_prefix_lm": False,
        "speculator": None,
        "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
    }
    assert set(changes) <= set(wanted)
    given = SimpleNamespace(**(wanted | changes))
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float16, sliding_window=given.sliding_window
    )
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: given.backend))
    return SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]),
        attn_groups=[[group]],
        kernel_block_sizes=given.kernel_block_sizes,
        parallel_config=SimpleNamespace(use_ubatching=False),
        model_config=SimpleNamespace(rswa_window=None, is_mm_prefix_lm=given.is_mm_prefix_lm),
        compilation_config=SimpleNamespace(cudagraph_mode=given.cudagraph_mode),
        model_state=state,
        speculator=given.speculator,
        pcp_manager=None,
        use_dcp=False,
        use_pp=False,
    )


def test_requests_are_split_where_all_attention_is_plain() -> None:
    assert block_of(_runner()) == 16


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "FLASHINFER"},
        {"kernel_block_sizes": [8]},
        {"sliding_window": 64},
        {"is_mm_prefix_lm": True},
        {"speculator": "eagle"},
        {"cudagraph_mode": CUDAGraphMode.FULL},
    ],
)
def test_requests_stay_whole_elsewhere(change: dict[str, Any]) -> None:
    assert block_of(_runner(**change)) is None


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[list[Context] | None, int, int, int]]:
    """Requests: their contexts, None for one that decodes or is plain, and length, first and after-last position."""
    found: list[tuple[list[Context] | None, int, int, int]] = []
    for rows in draw(st.lists(st.one_of(st.none(), contexts()), min_size=1, max_size=4)):
        length = draw(st.integers(1, 30)) if rows is None else len(_pack(rows).tokens)
        first = draw(st.integers(0, length - 1))
        found.append((rows, length, first, draw(st.integers(first + 1, length))))
    return found


def _pack(rows: list[Context]) -> Any:
    (pack,) = Packing(BLOCK, 10**6, True).pack(rows, 10**6)
    return pack


@given(batches(), st.integers(0, 3), st.booleans())
def test_every_token_attends_to_its_own_row(
    requests: list[tuple[list[Context] | None, int, int, int]], padding: int, graph: bool
) -> None:
    if graph:
        # Of whole batches there are graphs for one token a request alone.
        requests = [(rows, length, first, first + 1) for rows, length, first, _ in requests]
    number = len(requests)
    lengths = np.array([length for _, length, _, _ in requests], np.int32)
    first = np.array([a for _, _, a, _ in requests], np.int32)
    after = np.array([b for _, _, _, b in requests], np.int32)
    tables = torch.from_numpy(np.random.default_rng(0).permutation(number * BLOCKS).reshape(number, BLOCKS)).int()
    # Unique by request and position: what a cache slot holds says where it is from.
    cache = torch.full((number * BLOCKS * BLOCK,), -1)
    for i, length in enumerate(lengths):
        for position in range(min(int(after[i]), int(length))):
            cache[int(tables[i, position // BLOCK]) * BLOCK + position % BLOCK] = 1000 * i + position
    held = {str(i): Rows(_pack(rows).rows, BLOCK) for i, (rows, *_) in enumerate(requests) if rows}
    batch = _batch(first, after, padding)
    before, lengths_read = batch.positions.clone(), batch.seq_lens

    state = State()
    runner = SimpleNamespace(
        model_state=state,
        attn_groups=[[SimpleNamespace(get_metadata_builder=lambda _, builder=b: builder) for b in state.builders]],
    )
    split_rows(runner, held.get)
    mode = CUDAGraphMode.FULL if graph else CUDAGraphMode.NONE
    answer: Any = state.prepare_attn(batch, mode, (tables,), "slots")
    assert answer == "metadata"
    assert state.builders[0].aot_schedule
    seen, (table,), _ = state.seen
    if all(len(rows.begins) == 1 for rows in held.values()):
        assert seen is batch
        assert state.planned == [True]
        assert torch.equal(batch.positions, before)
        return
    assert state.planned == [graph]
    assert batch.seq_lens.tolist() == after.tolist()
    if graph:
        assert seen.seq_lens is lengths_read
        assert table is tables

    # Where every token is in its row, and what its row is, from the contexts alone.
    expected: list[tuple[int, list[int]]] = []
    for i, (rows, _, a, b) in enumerate(requests):
        if rows is None:
            expected += [(p, [1000 * i + q for q in range(p + 1)]) for p in range(a, b)]
            continue
        places: list[list[int]] = []
        own: list[tuple[int, list[int]]] = []
        at = 0
        for like, shared, length, *_ in _pack(rows).rows:
            filled = -(-(length - shared) // BLOCK) * BLOCK
            places.append([*(places[like][:shared] if shared else []), *(1000 * i + at + j for j in range(filled))])
            own += [(shared + j, places[-1][: shared + j + 1]) for j in range(filled)]
            at += filled
        expected += own[a:b]

    assert seen.num_reqs == seen.num_reqs_after_padding == len(seen.num_scheduled_tokens) == len(table)
    assert seen.query_start_loc.tolist() == seen.query_start_loc_np.tolist()
    assert (seen.query_start_loc.dtype, seen.seq_lens.dtype) == (torch.int32, torch.int32)
    assert np.diff(seen.query_start_loc_np).tolist() == seen.num_scheduled_tokens.tolist()
    assert seen.num_tokens == batch.num_tokens == len(expected)
    assert bool((seen.seq_lens_cpu_upper_bound >= seen.seq_lens).all())
    found: list[tuple[int, list[int]]] = []
    token = 0
    for part, computed in enumerate(seen.num_scheduled_tokens.tolist()):
        length = int(seen.seq_lens[part])
        keys = [int(cache[int(table[part, p // BLOCK]) * BLOCK + p % BLOCK]) for p in range(length)]
        for k in range(computed):
            found.append((int(batch.positions[token]), keys[: length - computed + k + 1]))
            token += 1
    assert found == expected
    assert torch.equal(batch.positions[batch.num_tokens :], before[batch.num_tokens :])


def test_what_only_looks_like_the_request_is_left_alone() -> None:
    state = State()
    builder = state.builders[0]
    runner = SimpleNamespace(model_state=state, attn_groups=[[SimpleNamespace(get_metadata_builder=lambda _: builder)]])
    rows = Rows(_pack([Context((1, 2, 3), 2, (0,)), Context((4, 5, 6), 2, (0,))]).rows, BLOCK)
    split_rows(runner, {"0": rows}.get)
    buffers = InputBuffers(4, 16, torch.device("cpu"))
    batch = InputBatch.make_dummy(1, 7, buffers)  # as when graphs are captured, at index 0
    state.prepare_attn(batch, CUDAGraphMode.FULL, ("tables",), "slots", for_capture=True)
    assert state.seen == (batch, ("tables",), {"for_capture": True})
    assert state.planned == [True]


def _batch(first: Any, after: Any, padding: int) -> InputBatch:
    """vLLM's own description of a batch of requests, as its runner makes it."""
    counts = (after - first).astype(np.int32)
    tokens, number = int(counts.sum()), len(counts)
    buffers = InputBuffers(number + padding, tokens + padding, torch.device("cpu"))
    batch = InputBatch.make_dummy(number, tokens + padding, buffers)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    batch.num_tokens, batch.num_tokens_after_padding = tokens, tokens + padding
    batch.req_ids, batch.num_scheduled_tokens = [str(i) for i in range(number)], counts
    batch.num_computed_tokens_np = first
    batch.query_start_loc, batch.query_start_loc_np = torch.from_numpy(starts), starts
    batch.seq_lens = torch.from_numpy(after.copy())
    batch.seq_lens_cpu_upper_bound = torch.from_numpy(after)
    batch.is_prefilling_np = np.ones(number, bool)
    positions = np.concatenate([np.arange(a, b) for a, b in zip(first, after, strict=True)])
    batch.positions = torch.from_numpy(np.concatenate([positions, np.full(padding, 99)]).astype(np.int64))
    return batch
