"""Which linear layers are sites, and which of them read the same input."""

from __future__ import annotations

import re
from collections.abc import Iterable

from zoact_remote.layout import Site

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one block that read one input, by the names that Llama-like checkpoints give them."""


def make_sites(layers: Iterable[tuple[str, int, int]]) -> tuple[Site, ...]:
    """Sites of a model's linear layers, numbered in natural order of name, so that every engine numbers them alike.

    Args:
        layers: name, width of the input and width of the output of every linear layer in the blocks.

    """
    ordered = sorted(layers, key=lambda layer: _natural(layer[0]))
    return tuple(Site(i, name, input_of(name), width, out) for i, (name, width, out) in enumerate(ordered))


def input_of(name: str) -> str:
    """The name of a layer's input: that of the first layer in its block which reads it."""
    block, _, last = name.rpartition(".")
    for group in SHARED_INPUTS:
        if last in group:
            return f"{block}.{group[0]}"
    return name


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
