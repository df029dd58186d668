"""Sites: their numbers, and which of them share an input."""

from __future__ import annotations

import random

import pytest

from server_ext.inputs import input_of, make_sites


def test_sites_are_numbered_in_natural_order_whatever_order_they_come_in() -> None:
    names = [f"model.layers.{i}.{part}" for i in (0, 2, 10) for part in ("mlp.down_proj", "self_attn.q_proj")]
    layers = [(name, 8, 4) for name in names]
    random.Random(3).shuffle(layers)
    sites = make_sites(layers)
    assert [site.name for site in sites] == names
    assert [site.index for site in sites] == list(range(6))


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("model.layers.3.self_attn.v_proj", "model.layers.3.self_attn.q_proj"),
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj"),
        ("model.layers.3.self_attn.o_proj", "model.layers.3.self_attn.o_proj"),
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_proj"),
        ("model.layers.3.mlp.down_proj", "model.layers.3.mlp.down_proj"),
        ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_fc"),
    ],
)
def test_layers_of_a_block_that_read_one_input_share_it(name: str, reads: str) -> None:
    assert input_of(name) == reads
