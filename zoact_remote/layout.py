"""Where an adapter acts, and how its coefficients lie in memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from zoact_remote.noise import LANES

ALIGNMENT = max(LANES.values())
"""Every site starts at a multiple of this many elements, so that no block of noise straddles two sites."""
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Site:
    """A linear layer that a basis acts on.

    Attributes:
        index: the site's number in the model: the third word of the noise's counter, the same on every engine.
        name: the layer's name in the Hugging Face checkpoint, such as ``model.layers.0.self_attn.q_proj``.
        input: the name of the input that the layer reads. Sites with the same input share one basis.
        in_features: width of the input.
        out_features: width of the output.

    """

    index: int
    name: str
    input: str
    in_features: int
    out_features: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Layout:
    """The coefficients of one adapter as one flat float32 buffer.

    Site ``i``'s matrix ``[out_features, rank]`` lies row-major from ``offsets[i]``. Gaps between sites (up to 127
    elements) hold zeros.
    """

    sites: tuple[Site, ...]
    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.sites:
            raise ValueError("an adapter needs at least one site")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First element of each site."""
        offsets, at = [], 0
        for site in self.sites:
            offsets.append(at)
            at += self.padded(site)
        return tuple(offsets)

    @cached_property
    def size(self) -> int:
        """Elements of the flat buffer, gaps included."""
        return sum(self.padded(site) for site in self.sites)

    @cached_property
    def parameters(self) -> int:
        """Trained coefficients, gaps left out."""
        return sum(self.count(site) for site in self.sites)

    @cached_property
    def inputs(self) -> dict[str, int]:
        """Width of every input that needs a basis, in the order of its first site."""
        return {site.input: site.in_features for site in self.sites}

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Ranges ``(start, stop)`` of the flat buffer that belong to no site."""
        ends = (*self.offsets[1:], self.size)
        spans = ((o + self.count(s), end) for o, s, end in zip(self.offsets, self.sites, ends, strict=True))
        return tuple((start, stop) for start, stop in spans if start < stop)

    def count(self, site: Site) -> int:
        """Coefficients of a site."""
        return site.out_features * self.rank

    def padded(self, site: Site) -> int:
        """Elements that a site takes in the flat buffer."""
        return -(-self.count(site) // ALIGNMENT) * ALIGNMENT

    def matrices(self, flat: Any) -> dict[str, Any]:
        """Views ``[out_features, rank]`` into a flat array or tensor, by site name."""
        return {
            site.name: flat[offset : offset + self.count(site)].reshape(site.out_features, self.rank)
            for offset, site in zip(self.offsets, self.sites, strict=True)
        }


def select_sites(sites: Sequence[Site], patterns: Sequence[str] | None) -> tuple[Site, ...]:
    """The sites whose name, or last component of it, is listed; all of them for None.

    Raises:
        ValueError: an entry that matches no site.

    """
    if patterns is None:
        return tuple(sites)
    names = {name for site in sites for name in (site.name, site.name.rpartition(".")[2])}
    for pattern in patterns:
        if pattern not in names:
            raise ValueError(f"{pattern!r} names no site of this model")
    wanted = set(patterns)
    return tuple(site for site in sites if wanted & {site.name, site.name.rpartition(".")[2]})


def choose_sites(sites: Sequence[Site], choice: str) -> tuple[str, ...]:
    """Names of the sites that a choice stands for.

    Args:
        sites: of the model.
        choice: ``mlp``: the layers of the MLPs; ``upper``: those in the upper half of the blocks, counted up to the
            head; ``upper-mlp``: those that are both; ``all``.

    Raises:
        ValueError: no site of this model is among them.

    """
    blocks = {site.name: int(number[0]) for site in sites if (number := re.search(r"(?<=\.)\d+(?=\.)", site.name))}
    numbers = sorted(set(blocks.values()))
    upper = set(numbers[len(numbers) // 2 :])

    def chosen(name: str) -> bool:
        fits = choice in ("all", "upper") or name.rpartition(".")[2] in _MLP
        return fits and (choice in ("all", "mlp") or blocks.get(name) in upper)

    found = tuple(site.name for site in sites if chosen(site.name))
    if not found:
        raise ValueError(f"{choice!r} names no layer of this model")
    return found
