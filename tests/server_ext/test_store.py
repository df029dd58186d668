"""Versions of an adapter on a device, made a piece at a time."""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server_ext import store
from server_ext.coefficients import Coefficients
from server_ext.engines.transformers import TransformersEngine
from server_ext.noise import Noise
from server_ext.room import NoRoom, Room
from server_ext.store import AdapterState, AdapterStore
from tests.strategies import layouts, updates
from zoact_remote import Normaliser, Update
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import Distribution

LONG = Update(0, tuple((seed, 1e-3) for seed in range(40)), normaliser=Normaliser(((1, 0.5), (2, 0.5)), 0.1, 1e-8))


@given(layouts(), st.sampled_from(["rademacher", "gaussian"]), updates())
def test_in_pieces_an_update_comes_to_the_same(layout: Layout, distribution: Distribution, update: Update) -> None:
    noise = Noise(layout, distribution)
    state = AdapterState(noise, {})
    assert state.hold(0, None, None, []) == Coefficients(noise).digest()
    pieces = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PIECE_S", -1.0)
        digest = state.hold(1, 0, update, [0])
        while digest is None:
            assert state.versions.keys() == {0}
            digest = state.hold_on()
            pieces += 1
    assert pieces == 1 + len(update.terms) + len(update.normaliser.terms if update.normaliser else ())
    assert digest == state.hold_on() == Coefficients(noise).after(update).digest()
    assert state.versions.keys() == {0, 1}


def test_what_a_version_was_made_from_is_let_go_of() -> None:
    state = AdapterState(Noise(Layout((Site(0, "a", "a", 4, 8),), 1), "rademacher"), {})
    base = torch.ones(state.layout.size)
    left = weakref.ref(base)
    state.hold(1, base, Update(1, ((1, 0.5),)), [])
    del base
    assert left() is None


def test_others_have_their_turn_while_a_long_update_is_made(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PIECE_S", -1.0)
    engine = TransformersEngine(str(tiny_model))
    layout = Layout(engine.sites, 2)

    async def calls() -> list[str]:
        ended = []

        async def hold() -> None:
            await engine.hold("key", 1, 0, LONG, [0])
            ended.append("hold")

        async def read() -> None:
            np.testing.assert_array_equal(await engine.read("key", 0), np.zeros(layout.size, np.float32))
            ended.append("read")

        await engine.put("key", layout, "rademacher", {})
        await engine.hold("key", 0, None, None, [])
        await asyncio.gather(hold(), read())
        return ended

    assert asyncio.run(calls()) == ["read", "hold"]


def test_a_version_that_cannot_be_made_is_not_gone_on_with() -> None:
    state = AdapterState(Noise(Layout((Site(0, "a", "a", 4, 8),), 1), "rademacher"), {})
    with pytest.raises(RuntimeError, match=r"version 3 is not held, only \[\]"):
        state.hold(4, 3, None, [])
    with pytest.raises(RuntimeError, match="no version is being taken in"):
        state.hold_on()


def test_draws_go_with_their_adapter() -> None:
    layout = Layout((Site(0, "a", "a", 256, 1024),), 4)
    adapters = AdapterStore(torch.device("cpu"))
    for key in ("a", "b"):
        adapters.put(key, layout, "rademacher", {})
        adapters[key].hold(0, None, Update(0, ((1, 0.5),)), [])
    kept, left = adapters["a"].noise._cache, weakref.ref(adapters["a"].noise)
    both = kept._held
    adapters.drop("a")
    assert (kept._held, left()) == (both // 2, None)
    adapters.drop("b")
    assert not kept._held


def test_an_adapter_finds_room_at_the_cost_of_kept_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((Site(0, "a", "a", 256, 1024),), 4)
    adapters = AdapterStore(torch.device("cpu"))
    adapters.put("a", layout, "rademacher", {})
    adapters["a"].hold(0, None, Update(0, ((1, 0.5),)), [])
    kept, left = adapters["a"].noise._cache, 1 << 20
    monkeypatch.setattr(Room, "free", lambda room: left - kept._held)
    assert kept._held
    left = 9 * 4 * layout.size + 24 * layout.size // 128 + 4 * 256 * 4
    with pytest.raises(NoRoom, match=r"^the device has 0 MiB left for adapters, 1 MiB are wanted: "):
        adapters.put("a", layout, "rademacher", {"a": torch.ones(256, 4), "b": torch.ones(1, 1)})
    assert not kept._held
    with pytest.raises(RuntimeError, match="the engine holds no adapter a"):
        adapters["a"]
    adapters.put("a", layout, "rademacher", {"a": torch.ones(256, 4)})
    adapters["a"].hold(0, None, None, [])
    left = 2 * 4 * layout.size
    adapters["a"].hold(1, 0, Update(0, ((1, 0.5),)), [0])
    with pytest.raises(NoRoom):
        adapters["a"].hold(2, 1, LONG, [0, 1])
    assert adapters["a"].versions.keys() == {0, 1}
