"""Filling a slot of vLLM's LoRA buffers with a point: one kernel for every site, Z drawn in registers.

A slot has ``max_lora_rank`` columns a layer, of which a point takes two groups: C from column 0 on, and ``epsilon Z``
from column ``max_lora_rank / 2`` on. Apart, C rounds alike on both sides of a probe, and ``epsilon Z``, for Rademacher
noise and epsilon a power of two, does not round at all. The basis is written once a slot and adapter, in the first
slice of a packed layer: its slices read one input, so that V' is theirs in common, and both column groups' too. The
kernels in ``server_ext.gpu.lora`` know a point's slot by its rank in ``ranks``, layer by layer, and read no other
column, so that what an earlier tenant left there needs no clearing. Layers that an adapter leaves alone have rank 0,
and cost next to nothing.

Bytes: for Llama-3-8B's seven layers a block and rank 16, 22M coefficients: 88 MB of float32 read and 88 MB of bfloat16
written, 60 microseconds at 3 TB/s, and as much again when the basis changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import triton
import triton.language as tl

from server_ext.gpu.noise import normals, philox_words, seed_halves, signs
from server_ext.store import AdapterState
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import LANES, STREAMS

PROGRAM_ELEMENTS = 4096
"""Coefficients that one program writes: a multiple of every distribution's lanes."""
PROGRAM_COLUMNS = 512
"""Elements of a basis vector that one program writes."""
STOCK = -1
"""Rank of a slot that holds an ordinary LoRA of vLLM's."""
MOST_LAYERS = 4096
"""That ``ranks`` has rows for: it is made before the layers are, and stays where it is, since CUDA graphs read it."""
_rows: dict[int, int] = {}


def row_of(lora_a: torch.Tensor) -> int:
    """A LoRA layer's row in ``ranks``, by the buffer of its first slice. Layers get theirs as they come."""
    row = _rows.setdefault(lora_a.data_ptr(), len(_rows))
    if row >= MOST_LAYERS:
        raise RuntimeError(f"there are more than {MOST_LAYERS} LoRA layers")
    return row


@triton.jit
def _store(target, flat, element, z, epsilon, first, count, HALF: tl.constexpr, RANK: tl.constexpr):
    """C and epsilon Z of some elements of a site, where they fall into this rank's rows."""
    row = element // RANK - first
    column = element % RANK
    mine = (row >= 0) & (row < count)
    here = target + row.to(tl.int64) * (2 * HALF) + column
    c = tl.load(flat + element, mask=mine, other=0.0)
    kind = target.dtype.element_ty
    tl.store(here, c.to(kind), mask=mine)
    tl.store(here + HALF, (z * epsilon).to(kind), mask=mine)


@triton.jit(do_not_specialize=["slot", "low", "high"])
def _fill_b(
    programs,  # int32 [programs, 2]: segment and first element
    targets,  # int64 [segments]: addresses of the stacked buffers [slots, 1, rows, 2 HALF]
    shapes,  # int32 [segments, 3]: site, first row of this rank, rows of this rank
    offsets,  # int64 [segments]: the site's first element in ``flat``
    flat,  # float32: the coefficients
    like,  # a tensor of the buffers' dtype
    epsilon,
    slot,
    low,
    high,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    STREAM: tl.constexpr,
    LANES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    program = tl.program_id(0)
    segment = tl.load(programs + 2 * program)
    start = tl.load(programs + 2 * program + 1)
    site = tl.load(shapes + 3 * segment)
    first = tl.load(shapes + 3 * segment + 1)
    count = tl.load(shapes + 3 * segment + 2)
    target = tl.load(targets + segment).to(tl.pointer_type(like.dtype.element_ty))
    target += slot.to(tl.int64) * count * (2 * HALF)
    here = flat + tl.load(offsets + segment)
    block = start // LANES + tl.arange(0, ELEMENTS // LANES)
    w0, w1, w2, w3 = philox_words(block, site, low, high, STREAM)
    if LANES == 128:
        lane = (block * 128)[:, None] + tl.arange(0, 32)[None, :]
        _store(target, here, lane, signs(w0), epsilon, first, count, HALF, RANK)
        _store(target, here, lane + 32, signs(w1), epsilon, first, count, HALF, RANK)
        _store(target, here, lane + 64, signs(w2), epsilon, first, count, HALF, RANK)
        _store(target, here, lane + 96, signs(w3), epsilon, first, count, HALF, RANK)
    else:
        z0, z1 = normals(w0, w1)
        z2, z3 = normals(w2, w3)
        _store(target, here, block * 4, z0, epsilon, first, count, HALF, RANK)
        _store(target, here, block * 4 + 1, z1, epsilon, first, count, HALF, RANK)
        _store(target, here, block * 4 + 2, z2, epsilon, first, count, HALF, RANK)
        _store(target, here, block * 4 + 3, z3, epsilon, first, count, HALF, RANK)


@triton.jit(do_not_specialize=["slot"])
def _fill_a(
    programs,  # int32 [programs, 2]: segment and first column
    targets,  # int64 [segments]: addresses of the stacked buffers [slots, 1, SLOT_RANK, columns]
    bases,  # int64 [segments]: addresses of the bases, float32 [in, RANK]
    shapes,  # int32 [segments, 2]: first input of this rank, inputs of this rank
    like,
    slot,
    RANK: tl.constexpr,
    SLOT_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    segment = tl.load(programs + 2 * program)
    column = tl.load(programs + 2 * program + 1) + tl.arange(0, COLUMNS)
    first = tl.load(shapes + 2 * segment)
    count = tl.load(shapes + 2 * segment + 1)
    basis = tl.load(bases + segment).to(tl.pointer_type(tl.float32))
    target = tl.load(targets + segment).to(tl.pointer_type(like.dtype.element_ty))
    target += slot.to(tl.int64) * count * SLOT_RANK
    row = tl.arange(0, ROWS)
    mine = (column < count)[:, None] & (row < RANK)[None, :]
    vectors = tl.load(basis + (first + column)[:, None] * RANK + row[None, :], mask=mine)
    tl.store(target + row[None, :] * count + column[:, None], vectors.to(like.dtype.element_ty), mask=mine)


@dataclass(frozen=True)
class Place:
    """Where a site's matrices lie in the stacked buffers of the module that holds it.

    Attributes:
        lora_a: ``[slots, 1, rank, in]`` of the module's first slice.
        lora_b: ``[slots, 1, out, rank]`` of the site's own slice.
        first_row: number, in the unsharded layer, of this tensor-parallel rank's first output.
        first_column: likewise of its first input.

    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    first_row: int
    first_column: int


def find_places(modules: Mapping[str, Any], parts: Callable[[str], Sequence[str]]) -> dict[str, Place]:
    """The place of every site.

    Args:
        modules: vLLM's LoRA layers by name.
        parts: the names of the sites that a module holds, slice by slice.

    """
    places = {}
    for name, module in modules.items():
        shards = getattr(module, "output_ids", None) or [module.tp_rank]
        for site, lora_b, shard in zip(parts(name), module.lora_b_stacked, shards, strict=True):
            rows, columns = lora_b.shape[2], module.lora_a_stacked[0].shape[3]
            split_inputs = columns < module.base_layer.input_size
            whole = split_inputs or rows == module.base_layer.output_size
            places[site] = Place(
                module.lora_a_stacked[0],
                lora_b,
                first_row=0 if whole else shard * rows,
                first_column=module.tp_rank * columns if split_inputs else 0,
            )
    return places


class _Tables:
    """What the kernels need to know of one adapter, on the device.

    Attributes:
        ranks: int32 ``[MOST_LAYERS]``: its rank in the layers that it acts on, 0 in others.
        partly: layers of which it acts on some slices, and not on others.

    """

    def __init__(
        self,
        layout: Layout,
        basis: dict[str, torch.Tensor],
        places: Mapping[str, Place],
        modules: Mapping[str, Any],
        parts: Callable[[str], Sequence[str]],
    ) -> None:
        device = next(iter(basis.values())).device
        rank = layout.rank
        held = [(site, offset, places[site.name]) for site, offset in zip(layout.sites, layout.offsets, strict=True)]
        b_programs = (
            (segment, start)
            for segment, (_, _, place) in enumerate(held)
            for start in _starts(place.first_row * rank, place.lora_b.shape[2] * rank, PROGRAM_ELEMENTS)
        )
        self.b_programs = _int32(b_programs, 2, device)
        self.b_targets = _addresses((place.lora_b for _, _, place in held), device)
        self.b_shapes = _int32(((site.index, p.first_row, p.lora_b.shape[2]) for site, _, p in held), 3, device)
        self.b_offsets = torch.tensor([offset for _, offset, _ in held], device=device)
        readers: dict[int, tuple[Site, Place]] = {p.lora_a.data_ptr(): (site, p) for site, _, p in held}
        widths = [place.lora_a.shape[3] for _, place in readers.values()]
        a_programs = ((i, start) for i, width in enumerate(widths) for start in range(0, width, PROGRAM_COLUMNS))
        self.a_programs = _int32(a_programs, 2, device)
        self.a_targets = _addresses((place.lora_a for _, place in readers.values()), device)
        self.a_bases = _addresses((basis[site.input] for site, _ in readers.values()), device)
        self.a_shapes = _int32(((p.first_column, p.lora_a.shape[3]) for _, p in readers.values()), 2, device)
        names = {site.name for site in layout.sites}
        ranks = torch.zeros(MOST_LAYERS, dtype=torch.int32)
        self.partly = []
        for name, module in modules.items():
            slices = [site in names for site in parts(name)]
            if any(slices):
                ranks[row_of(module.lora_a_stacked[0])] = rank
                if not all(slices):
                    self.partly.append(module)
        self.ranks = ranks.to(device)


class SlotWriter:
    """Writes points into slots.

    Attributes:
        ranks: int32 ``[MOST_LAYERS, slots]``, a row by :func:`row_of` for each layer: the rank of a point's slot;
            ``STOCK`` for any other LoRA; 0 where the slot is to change nothing.

    """

    def __init__(self, modules: Mapping[str, Any], parts: Callable[[str], Sequence[str]], ranks: torch.Tensor) -> None:
        self.ranks = ranks
        self._modules = modules
        self._parts = parts
        self._places = find_places(modules, parts)
        self._like = next(iter(self._places.values())).lora_b
        self._tables: WeakKeyDictionary[AdapterState, _Tables] = WeakKeyDictionary()
        self._holders: dict[int, ref[AdapterState]] = {}

    def write(
        self,
        slot: int,
        state: AdapterState,
        flat: torch.Tensor,
        seed: int,
        epsilon: float,
    ) -> None:
        """Fills a slot with ``C + epsilon Z(seed)``.

        Args:
            slot: its index.
            state: the adapter.
            flat: C, float32 ``[layout.size]``.
            seed: of the probe.
            epsilon: its size, the side in its sign; 0 for C alone.

        """
        tables = self._tables.get(state)
        if tables is None:
            tables = _Tables(state.layout, state.basis, self._places, self._modules, self._parts)
            self._tables[state] = tables
        rank, slot_rank = state.layout.rank, self._like.shape[3]
        holder = self._holders.get(slot)
        if holder is None or holder() is not state:
            self._take(slot, state, tables)
        ((low,), (high,)) = seed_halves([seed]).tolist()
        _fill_b[(len(tables.b_programs),)](
            tables.b_programs,
            tables.b_targets,
            tables.b_shapes,
            tables.b_offsets,
            flat,
            self._like,
            epsilon,
            slot,
            low,
            high,
            RANK=rank,
            HALF=slot_rank // 2,
            STREAM=STREAMS[state.noise.distribution],
            LANES=LANES[state.noise.distribution],
            ELEMENTS=PROGRAM_ELEMENTS,
        )

    def clear(self, slot: int) -> None:
        """Makes a slot change nothing."""
        self._holders.pop(slot, None)
        self.ranks[:, slot] = 0

    def release(self, slot: int) -> None:
        """Says that vLLM has written a LoRA of its own into a slot."""
        self._holders.pop(slot, None)
        self.ranks[:, slot] = STOCK

    def _take(self, slot: int, state: AdapterState, tables: _Tables) -> None:
        # A layer has one rank for all of its slices, so those left alone must not show what the slot held before.
        for module in tables.partly:
            module.reset_lora(slot)
        rank, slot_rank = state.layout.rank, self._like.shape[3]
        _fill_a[(len(tables.a_programs),)](
            tables.a_programs,
            tables.a_targets,
            tables.a_bases,
            tables.a_shapes,
            self._like,
            slot,
            RANK=rank,
            SLOT_RANK=slot_rank,
            ROWS=triton.next_power_of_2(rank),
            COLUMNS=PROGRAM_COLUMNS,
        )
        self.ranks[:, slot] = tables.ranks
        self._holders[slot] = ref(state)


def _starts(first: int, count: int, step: int) -> range:
    """Multiples of ``step`` from which on blocks of ``step`` cover ``count`` elements."""
    return range(first // step * step, first + count, step)


def _int32(rows: Any, width: int, device: torch.device) -> torch.Tensor:
    flat = np.fromiter(chain.from_iterable(rows), np.int32)
    return torch.from_numpy(flat.reshape(-1, width)).to(device)


def _addresses(tensors: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=device)
