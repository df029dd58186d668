"""An audit passes what is right, and finds whatever is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.strategies import layouts, updates
from tests.support import ROWS, Servers, new_adapter
from zoact_remote import Basis, InvalidValue, Update
from zoact_remote.audit import audit
from zoact_remote.digest import basis_digest, coefficients_digest
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import Distribution
from zoact_remote.replay import lineage, replay
from zoact_remote.wire import AdapterInfo, JournalEntry

NOW = datetime(2026, 11, 22, tzinfo=timezone.utc)
LAYOUT = Layout(
    (Site(0, "q_proj", "attn", 8, 6), Site(1, "k_proj", "attn", 8, 3), Site(4, "up_proj", "mlp", 5, 7)), rank=2
)
STEPS: Sequence[Update | int] = (
    Update(0, ((1, 0.5), (2, -0.25))),
    Update(1, ((3, 0.125),), decay=0.1),
    1,
    Update(3, ()),
)
"""Updates, and versions to return to."""


def history(
    layout: Layout, steps: Sequence[Update | int], noise: Distribution = "rademacher"
) -> tuple[AdapterInfo, list[JournalEntry]]:
    """What a server says of an adapter, and its journal."""
    digests = [coefficients_digest(replay(layout, noise, []), layout)]
    entries: list[JournalEntry] = []
    for version, step in enumerate(steps, 1):
        update = replace(step, base_version=version - 1) if isinstance(step, Update) else Update(version - 1, ())
        back = None if isinstance(step, Update) else step
        entries.append(JournalEntry(version, update, "", digests[-1], back, NOW))
        path = [entry.update for entry in lineage(entries, version)]
        digests.append(coefficients_digest(replay(layout, noise, path), layout))
        entries[-1] = replace(entries[-1], digest=digests[-1])
    about = AdapterInfo(
        name="acme/triage",
        version=len(entries),
        rank=layout.rank,
        noise=noise,
        noise_version=1,
        sites=tuple(site.name for site in layout.sites),
        parameters=layout.parameters,
        basis=Basis(),
        basis_digest=basis_digest(basis_of(layout)),
        energy=None,
        positions_seen=None,
        digest=digests[-1],
        created=NOW,
        state="ready",
    )
    return about, entries


def basis_of(layout: Layout) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(width, layout.rank)).astype(np.float32) for name, width in layout.inputs.items()}


def exported(
    directory: Path, entries: Sequence[JournalEntry], version: int, noise: Distribution = "rademacher"
) -> Path:
    """An export of a version."""
    flat = replay(LAYOUT, noise, [entry.update for entry in lineage(entries, version)])
    basis, matrices = basis_of(LAYOUT), LAYOUT.matrices(flat)
    tensors = {}
    for site in LAYOUT.sites:
        tensors[f"base_model.model.{site.name}.lora_A.weight"] = np.ascontiguousarray(basis[site.input].T)
        tensors[f"base_model.model.{site.name}.lora_B.weight"] = matrices[site.name]
    save_file(tensors, directory / "adapter_model.safetensors")
    digest = ([coefficients_digest(np.zeros_like(flat), LAYOUT)] + [entry.digest for entry in entries])[version]
    about = {"adapter": "acme/triage", "version": version, "coefficients_digest": digest}
    (directory / "zoact.json").write_text(json.dumps(about))
    return directory


def changed(export: Path, name: str, change: Any) -> None:
    """Change a tensor of an export."""
    file = export / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{name}.weight"] = change(tensors[f"base_model.model.{name}.weight"])
    save_file(tensors, file)


@settings(max_examples=30)
@given(layouts(60), st.lists(updates() | st.integers(0, 9), max_size=6))
def test_what_is_right_passes(layout: Layout, steps: list[Update | int]) -> None:
    steps = [step if isinstance(step, Update) else step % (at + 1) for at, step in enumerate(steps)]
    about, entries = history(layout, steps)
    found = audit(about, layout, entries)
    assert not found.failures
    assert (found.version, found.digest) == (len(steps), about.digest)
    assert coefficients_digest(found.coefficients, layout) == about.digest


@pytest.mark.parametrize("at", range(len(STEPS)))
@pytest.mark.parametrize("field", ["digest", "digest_before"])
def test_every_digest_is_compared(at: int, field: str) -> None:
    about, entries = history(LAYOUT, STEPS)
    entries[at] = replace(entries[at], **{field: "sha256:0"})  # type: ignore[arg-type]
    (failure,) = audit(about, LAYOUT, entries).failures
    assert failure.startswith(f"version {at + 1}: ")


def test_a_history_that_was_changed_is_found() -> None:
    about, entries = history(LAYOUT, STEPS)
    entries[1] = replace(entries[1], update=replace(entries[1].update, decay=0.1000001))
    # The rollback leads back to what was right.
    assert [failure[:10] for failure in audit(about, LAYOUT, entries).failures] == ["version 2:", "version 3:"]


def test_the_newest_version_is_compared() -> None:
    about, entries = history(LAYOUT, STEPS)
    for wrong in (replace(about, digest="sha256:0"), replace(about, version=7)):
        (failure,) = audit(wrong, LAYOUT, entries).failures
        assert failure.startswith("acme/triage is at version")


def test_a_journal_with_a_hole_is_refused() -> None:
    about, entries = history(LAYOUT, STEPS)
    for wrong in (entries[1:], [entries[0], *entries[2:]], [*entries[:3], replace(entries[3], rollback_to=4)]):
        with pytest.raises(InvalidValue, match="journal"):
            audit(about, LAYOUT, wrong)
    with pytest.raises(InvalidValue, match="noise"):
        audit(replace(about, noise_version=2), LAYOUT, entries)


@pytest.mark.parametrize("version", range(len(STEPS) + 1))
def test_an_export_of_any_version_is_compared(tmp_path: Path, version: int) -> None:
    about, entries = history(LAYOUT, STEPS)
    found = audit(about, LAYOUT, entries, exported(tmp_path, entries, version))
    assert (found.exported, found.failures) == (version, ())


@pytest.mark.parametrize(
    ("name", "change", "failures"),
    [
        ("up_proj.lora_B", lambda b: np.nextafter(b, np.float32(9)), ["lora_B of up_proj is off"]),
        ("q_proj.lora_B", lambda b: np.where(b == b[0, 0], np.float32(np.nan), b), ["lora_B of q_proj is off"]),
        ("k_proj.lora_A", lambda a: -a, ["lora_A of k_proj is not that of the other sites"]),
        ("up_proj.lora_A", lambda a: -a, ["the digest of the basis is"]),
    ],
)
def test_an_export_that_was_changed_is_found(tmp_path: Path, name: str, change: Any, failures: list[str]) -> None:
    about, entries = history(LAYOUT, STEPS)
    export = exported(tmp_path, entries, 2)
    changed(export, name, change)
    found = audit(about, LAYOUT, entries, export).failures
    assert len(found) == len(failures)
    assert all(part in failure for part, failure in zip(failures, found, strict=True))


def test_a_zero_has_its_sign(tmp_path: Path) -> None:
    about, entries = history(LAYOUT, STEPS)
    export = exported(tmp_path, entries, 0)
    changed(export, "up_proj.lora_B", np.negative)
    assert "lora_B of up_proj" in audit(about, LAYOUT, entries, export).failures[0]


@pytest.mark.parametrize(
    "about",
    [
        '{"adapter": "acme/other", "version": 1}',
        '{"adapter": "acme/triage", "version": 9}',
        '{"adapter": "acme/triage"}',
        "[]",
        "{",
    ],
)
def test_an_export_of_something_else_is_refused(tmp_path: Path, about: str) -> None:
    info, entries = history(LAYOUT, STEPS)
    export = exported(tmp_path, entries, 1)
    (export / "zoact.json").write_text(about)
    with pytest.raises(InvalidValue, match=r"zoact\.json|version"):
        audit(info, LAYOUT, entries, export)


def test_an_export_of_other_sites_is_refused(tmp_path: Path) -> None:
    about, entries = history(LAYOUT, STEPS)
    export = exported(tmp_path, entries, 1)
    changed(export, "q_proj.lora_B", lambda b: b[:, :1].copy())
    with pytest.raises(InvalidValue, match=r"q_proj\.lora_B\.weight: is \(6, 1\), must be \(6, 2\)"):
        audit(about, LAYOUT, entries, export)


def test_gaussian_coefficients_need_only_be_close(tmp_path: Path) -> None:
    about, entries = history(LAYOUT, STEPS, "gaussian")
    # Another device's digests: of their own, but of a piece.
    renamed = {entry.digest: f"sha256:{entry.digest[-9:]}" for entry in entries if entry.version not in (0, 1)}
    other = [
        replace(e, digest=renamed.get(e.digest, e.digest), digest_before=renamed.get(e.digest_before, e.digest_before))
        for e in entries
    ]
    info = replace(about, digest=other[-1].digest)
    export = exported(tmp_path, other, 2, "gaussian")
    changed(export, "up_proj.lora_B", lambda b: np.nextafter(b, np.float32(9)))
    found = audit(info, LAYOUT, other, export)
    assert not found.failures
    assert not found.exact
    other[3] = replace(other[3], digest_before="sha256:0")
    changed(export, "up_proj.lora_B", lambda b: b * np.float32(1.0001))
    failures = audit(info, LAYOUT, other, export).failures
    assert failures[0].startswith("version 4: ")
    assert "lora_B of up_proj" in failures[1]


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_a_server_passes(servers: Servers, tmp_path: Path, noise: Distribution) -> None:
    with servers("transformers").client() as client:
        adapter = new_adapter(client, noise=noise, basis=Basis(positions="both"), rows=ROWS)
        for version in range(5):
            adapter.update(Update(version, ((version, 0.1), (version + 1, -0.03)), decay=0.01))
        assert adapter.rollback(2).version == 6
        adapter.update(Update(6, ((9, 0.2),)))
        assert adapter.rollback(6).version == 8
        for version in (3, 7, 8):
            adapter.export(tmp_path, version=version)
            found = adapter.audit(tmp_path)
            assert not found.failures
            assert (found.version, found.exported, found.exact) == (8, version, noise == "rademacher")
        entries = list(adapter.journal())
        assert [entry.rollback_to for entry in entries[5:]] == [2, None, 6]
        assert entries[1].digest == entries[5].digest == entries[7].digest == found.digest or not found.exact
        assert found.layout == adapter.layout()
