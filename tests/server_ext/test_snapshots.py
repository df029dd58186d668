"""Snapshots: what is read is what was written or nothing, and few are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server_ext.snapshots import Snapshots, superseded
from tests.strategies import layouts
from zoact_remote.digest import coefficients_digest
from zoact_remote.layout import Layout, Site

LAYOUT = Layout((Site(0, "a", "x", 8, 40), Site(3, "b", "x", 8, 7)), 3)
KEY = "key"


def coefficients(layout: Layout, seed: int = 0) -> NDArray[np.float32]:
    flat = np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)
    for start, stop in layout.gaps:
        flat[start:stop] = 0
    return flat


def write(snapshots: Snapshots, version: int, layout: Layout = LAYOUT, seed: int = 0) -> NDArray[np.float32]:
    flat = coefficients(layout, seed)
    snapshots.write(KEY, version, coefficients_digest(flat, layout), flat)
    return flat


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path, every=4)


@given(layouts(), st.integers(1, 2**40))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, layout: Layout, version: int) -> None:
    snapshots = Snapshots(tmp_path_factory.mktemp("snapshots"), every=32)
    flat = write(snapshots, version, layout)
    found = snapshots.read(KEY, version, layout)
    assert found is not None
    assert found.tobytes() == flat.tobytes()
    assert snapshots.versions(KEY) == [version]
    assert snapshots.versions("another") == []


def test_a_version_that_is_written_again_is_replaced(snapshots: Snapshots) -> None:
    write(snapshots, 4, seed=1)
    flat = write(snapshots, 4, seed=2)
    found = snapshots.read(KEY, 4, LAYOUT)
    assert found is not None
    assert found.tobytes() == flat.tobytes()


@given(st.data())
def test_a_damaged_snapshot_is_not_read_again(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("snapshots")
    snapshots = Snapshots(directory, every=4)
    flat = write(snapshots, 4)
    write(snapshots, 8)
    path = directory / KEY / "8.safetensors"
    whole = path.read_bytes()
    damaged = data.draw(
        st.builds(lambda n: whole[:n], st.integers(0, len(whole) - 1))
        | st.builds(_with_flipped_bit, st.just(whole), st.integers(0, 8 * len(whole) - 1))
        | st.binary(max_size=300)
    )
    path.write_bytes(damaged)
    found = snapshots.read(KEY, 8, LAYOUT)
    # A bit of the header may change nothing that is read.
    if found is not None:
        assert found.tobytes() == flat.tobytes()
    else:
        assert snapshots.versions(KEY) == [4]
    before = snapshots.read(KEY, 4, LAYOUT)
    assert before is not None
    assert before.tobytes() == flat.tobytes()


def _with_flipped_bit(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def test_every_bit_of_the_coefficients_is_covered(snapshots: Snapshots, tmp_path: Path) -> None:
    flat = write(snapshots, 4)
    path = tmp_path / KEY / "4.safetensors"
    whole = path.read_bytes()
    first = len(whole) - flat.nbytes
    for bit in range(8 * first, 8 * len(whole), 97):
        path.write_bytes(_with_flipped_bit(whole, bit))
        assert snapshots.read(KEY, 4, LAYOUT) is None


def test_a_snapshot_of_another_layout_is_discarded(snapshots: Snapshots) -> None:
    flat = coefficients(LAYOUT)
    other = Layout(LAYOUT.sites, LAYOUT.rank + 1)
    renamed = Layout((Site(0, "A", "x", 8, 40), LAYOUT.sites[1]), LAYOUT.rank)
    for layout in (other, renamed):
        snapshots.write(KEY, 4, coefficients_digest(flat, LAYOUT), flat)
        assert snapshots.read(KEY, 4, layout) is None
        assert snapshots.versions(KEY) == []


def test_a_snapshot_that_is_gone_is_none(snapshots: Snapshots) -> None:
    assert snapshots.read(KEY, 4, LAYOUT) is None


def test_half_written_snapshots_are_none(snapshots: Snapshots, tmp_path: Path) -> None:
    write(snapshots, 4)
    (tmp_path / KEY / "8.safetensors.partial").write_bytes(b"half")
    assert snapshots.versions(KEY) == [4]


def test_an_adapters_snapshots_go_together(snapshots: Snapshots) -> None:
    flat = write(snapshots, 4)
    snapshots.write("other", 4, coefficients_digest(flat, LAYOUT), flat)
    snapshots.remove(KEY)
    snapshots.remove("nobody")
    assert (snapshots.versions(KEY), snapshots.versions("other")) == ([], [4])


# Thinning -------------------------------------------------------------------------------------------------------------


def kept_after(written: Iterable[int], every: int) -> list[int]:
    """Versions whose snapshots are there after some were written."""
    there: list[int] = []
    for version in written:
        there.append(version)
        gone = superseded(there, every)
        there = [each for each in there if each not in gone]
    return there


CHANGES, EVERY = st.integers(1, 3000), st.integers(1, 40)


@given(CHANGES, EVERY, st.data())
def test_a_version_is_near_a_snapshot_for_its_age(changes: int, every: int, data: st.DataObject) -> None:
    kept = kept_after(range(every, changes + 1, every), every)
    version = data.draw(st.integers(1, changes))
    start = max([0, *(each for each in kept if each <= version)])
    assert version - start <= max(every, 2 * (changes - version))


@given(CHANGES, EVERY, st.data())
def test_few_are_kept(changes: int, every: int, data: st.DataObject) -> None:
    """Though some could not be written, and a server that stops writes one wherever it is."""
    regular = set(range(every, changes + 1, every))
    lost = data.draw(st.sets(st.sampled_from(sorted(regular)))) if regular else set()
    stops = data.draw(st.sets(st.integers(1, changes)))
    written = sorted((regular - lost) | stops)
    kept = kept_after(written, every)
    assert len(kept) <= 2 * math.log2(1 + changes / every) + 4
    assert kept[-2:] == written[-2:]


@given(st.lists(st.integers(1, 10**6), unique=True).map(sorted), st.integers(1, 64))
def test_the_two_newest_always_stay(versions: list[int], every: int) -> None:
    gone = superseded(versions, every)
    assert set(gone) <= set(versions[:-2])
    left = [version for version in versions if version not in gone]
    assert superseded(left, every) == []
