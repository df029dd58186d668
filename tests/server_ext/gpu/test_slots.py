"""A slot holds what the specification and the coefficients say, whatever was in it before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server_ext.gpu.slots import MOST_LAYERS, STOCK, SlotWriter, row_of
from server_ext.noise import Noise
from server_ext.store import AdapterState
from tests.server_ext.gpu.support import DEVICE, DTYPE, layer
from zoact_remote import noise
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import DISTRIBUTIONS, Distribution

SLOT_RANK, SLOTS = 16, 3
PARTS = {"qkv": ["q", "k", "v"], "down": ["down"]}
SITES = (
    Site(0, "q", "x", 48, 40),
    Site(1, "k", "x", 48, 24),
    Site(2, "v", "x", 48, 24),
    Site(9, "down", "h", 72, 640),
)
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 0xF123456789ABCDEF, 2**64 - 1]


def _modules(shards: int = 1, shard: int = 0) -> dict[str, Any]:
    return {
        "qkv": layer((40, 24, 24), 48, SLOTS, SLOT_RANK, shards, shard),
        "down": layer((640,), 72, SLOTS, SLOT_RANK, shards, shard, split_inputs=True),
    }


def _state(layout: Layout, distribution: Distribution) -> AdapterState:
    basis = {name: torch.randn(width, layout.rank) for name, width in layout.inputs.items()}
    return AdapterState(Noise(layout, distribution, torch.device(DEVICE)), basis)


def _flat(layout: Layout) -> torch.Tensor:
    return torch.randn(layout.size, device=DEVICE) * 0.05


def _check(
    modules: dict[str, Any],
    state: AdapterState,
    flat: torch.Tensor,
    distribution: Distribution,
    seed: int,
    epsilon: float,
    slot: int,
    shards: int = 1,
    shard: int = 0,
) -> None:
    rank, half = state.layout.rank, SLOT_RANK // 2
    coefficients = state.layout.matrices(flat)
    for site in state.layout.sites:
        module, piece = next((m, names.index(site.name)) for m, names in PARTS.items() if site.name in names)
        lora_a, lora_b = modules[module].lora_a_stacked[0][slot, 0], modules[module].lora_b_stacked[piece][slot, 0]
        rows, columns = lora_b.shape[0], lora_a.shape[1]
        first = shard * rows if rows < site.out_features else 0
        z = noise.draw(distribution, seed, site.index, rows * rank, first * rank).reshape(rows, rank)
        scaled = torch.from_numpy(z * np.float32(epsilon)).to(DTYPE)
        assert torch.equal(lora_b[:, :rank], coefficients[site.name][first : first + rows].to(DTYPE))
        found = lora_b[:, half : half + rank].cpu()
        if distribution == "rademacher":
            assert torch.equal(found, scaled)
        else:
            torch.testing.assert_close(found, scaled, rtol=2**-10, atol=1e-7)
        first_column = shard * columns if columns < site.in_features else 0
        vectors = state.basis[site.input][first_column : first_column + columns]
        assert torch.equal(lora_a[:rank], vectors.T.to(DTYPE))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_slot_holds_coefficients_noise_and_basis(rank: int, distribution: Distribution) -> None:
    layout = Layout(SITES, rank)
    modules, state, flat = _modules(), _state(layout, distribution), _flat(layout)
    ranks = torch.full((MOST_LAYERS, SLOTS), STOCK, dtype=torch.int32, device=DEVICE)
    writer = SlotWriter(modules, PARTS.__getitem__, ranks)
    for seed in SEEDS:
        for epsilon in (2.0**-7, -(2.0**-7)):
            writer.write(1, state, flat, seed, epsilon)
            _check(modules, state, flat, distribution, seed, epsilon, slot=1)
    for module in modules.values():
        assert ranks[row_of(module.lora_a_stacked[0])].tolist() == [STOCK, rank, STOCK]
    others = torch.stack([buffer[[0, 2]].amax() for m in modules.values() for buffer in m.lora_b_stacked])
    assert (others == 7.0).all()


def test_tensor_parallel_ranks_hold_their_shares() -> None:
    layout = Layout(SITES, 3)
    state, flat = _state(layout, "rademacher"), _flat(layout)
    for shard in range(2):
        modules = _modules(shards=2, shard=shard)
        ranks = torch.full((MOST_LAYERS, SLOTS), STOCK, dtype=torch.int32, device=DEVICE)
        SlotWriter(modules, PARTS.__getitem__, ranks).write(0, state, flat, 5, 2.0**-7)
        _check(modules, state, flat, "rademacher", 5, 2.0**-7, slot=0, shards=2, shard=shard)


def test_every_tensor_parallel_rank_holds_all_of_a_replicated_layer() -> None:
    layout = Layout(SITES[3:], 3)
    state, flat = _state(layout, "rademacher"), _flat(layout)
    modules = {"down": layer((640,), 72, SLOTS, SLOT_RANK, shard=1)}
    ranks = torch.full((MOST_LAYERS, SLOTS), STOCK, dtype=torch.int32, device=DEVICE)
    SlotWriter(modules, PARTS.__getitem__, ranks).write(0, state, flat, 5, 2.0**-7)
    _check(modules, state, flat, "rademacher", 5, 2.0**-7, slot=0)


def test_an_adapter_of_fewer_sites_shows_nothing_of_the_others() -> None:
    modules = _modules()
    every, few = (_state(Layout(sites, 4), "rademacher") for sites in (SITES, SITES[:1]))
    ranks = torch.full((MOST_LAYERS, SLOTS), STOCK, dtype=torch.int32, device=DEVICE)
    writer = SlotWriter(modules, PARTS.__getitem__, ranks)
    writer.write(0, every, _flat(every.layout), 1, 2.0**-7)
    flat = _flat(few.layout)
    writer.write(0, few, flat, 1, 2.0**-7)
    _check(modules, few, flat, "rademacher", 1, 2.0**-7, slot=0)
    qkv, down = (ranks[row_of(module.lora_a_stacked[0]), 0] for module in modules.values())
    assert qkv == 4
    assert not modules["qkv"].lora_b_stacked[1][0].any(), "slices of one layer share its rank"
    assert down == 0
    writer.write(0, every, _flat(every.layout), 1, 2.0**-7)
    assert ranks[row_of(modules["down"].lora_a_stacked[0]), 0] == 4


def test_a_slot_that_changed_hands_gets_its_basis_again() -> None:
    modules = _modules()
    layout = Layout(SITES, 4)
    one, other = _state(layout, "rademacher"), _state(layout, "rademacher")
    ranks = torch.full((MOST_LAYERS, SLOTS), STOCK, dtype=torch.int32, device=DEVICE)
    writer = SlotWriter(modules, PARTS.__getitem__, ranks)
    flat = _flat(layout)
    for state in (one, other, one):
        writer.write(2, state, flat, 3, 2.0**-5)
        _check(modules, state, flat, "rademacher", 3, 2.0**-5, slot=2)
    writer.release(2)
    assert (ranks[:, 2] == STOCK).all()
    modules["qkv"].lora_a_stacked[0][2] = 7.0
    writer.write(2, one, flat, 3, 2.0**-5)
    _check(modules, one, flat, "rademacher", 3, 2.0**-5, slot=2)
    writer.clear(2)
    assert (ranks[:, 2] == 0).all()
