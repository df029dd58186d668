"""Hypothesis strategies for what adapters are made of."""

from __future__ import annotations

from hypothesis import strategies as st

from zoact_remote import Normaliser, Update
from zoact_remote.layout import Layout, Site

SEEDS = st.integers(0, 2**64 - 1)


@st.composite
def layouts(draw: st.DrawFn, largest: int = 150) -> Layout:
    """Layouts of up to four sites, some of which end in the middle of a block and so leave gaps."""
    # As in a model of which an adapter takes a subset: numbers rise, and are not consecutive.
    indices = sorted(draw(st.sets(st.integers(0, 300) | st.just(2**32 - 1), min_size=1, max_size=4)))
    sites = tuple(
        Site(index, f"layers.{index}.proj", f"layers.{index}.input", 8, draw(st.integers(1, largest)))
        for index in indices
    )
    return Layout(sites, draw(st.integers(1, 6)))


@st.composite
def updates(draw: st.DrawFn, base_version: int = 0) -> Update:
    """Updates with and without decay and normaliser. Scalars are doubles that float32 must round."""
    scalars = st.floats(-1e3, 1e3)
    terms = draw(st.lists(st.tuples(SEEDS, scalars), max_size=4))
    normaliser = None
    if draw(st.booleans()):
        weights = st.tuples(SEEDS, st.floats(0, 1e3))
        squares = draw(st.lists(weights, max_size=3))
        normaliser = Normaliser(tuple(squares), draw(st.floats(0, 1e3)), draw(st.floats(1e-8, 1.0)))
    decay = draw(st.just(0.0) | st.floats(0, 1))
    return Update(base_version, tuple(terms), decay, normaliser)
