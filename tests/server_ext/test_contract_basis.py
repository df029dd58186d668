"""Bases that servers take, against the leading eigenvectors of a float64 model's activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.server_ext.support import Lora, Reference, layout_of
from tests.support import ROWS, new_adapter
from zoact_remote import Basis, Client

SPECS = [
    Basis(positions="scored", passes=2),
    Basis(positions="prompt", passes=2, centred=True),
    Basis(positions="both", passes=2),
    Basis(positions="prompt"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.positions}-{spec.passes}")
def test_a_basis_spans_what_the_activations_do(
    client: Client, reference: Reference, tmp_path: Path, spec: Basis
) -> None:
    adapter = new_adapter(client, rank=3, basis=spec, rows=ROWS)
    info = adapter.info
    assert info.energy is not None
    layout = layout_of(client, adapter)
    lora = Lora.exported(adapter.export(tmp_path))
    kinds = ("prompt", "scored") if spec.positions == "both" else (spec.positions,)

    for site in layout.sites:
        vectors = lora.a[site.name].T
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-5)
        if site.name != site.input:
            np.testing.assert_array_equal(vectors, lora.a[site.input].T)
            continue
        covariance = reference.covariance(ROWS, site.name, kinds, spec.centred)
        optimum = np.linalg.eigvalsh(covariance)[-3:].sum()
        kept = np.trace(vectors.T @ covariance @ vectors)
        assert kept >= optimum * (0.99 if spec.passes == 2 else 0.9)
        assert 0 < info.energy[site.input] <= kept + 1e-4
        assert info.energy[site.input] >= kept - (2e-2 if spec.passes == 2 else 0.2)

    seen = reference.activations(ROWS, layout.sites[0].name)
    assert info.positions_seen == sum(len(seen[kind]) for kind in kinds)


def test_a_random_basis_follows_from_its_seed(client: Client, tmp_path: Path) -> None:
    digests = []
    for seed in (5, 5, 6):
        adapter = new_adapter(client, basis=Basis(source="random", seed=seed))
        digests.append(adapter.info.basis_digest)
        assert (adapter.info.energy, adapter.info.positions_seen) == ({}, 0)
    assert digests[0] == digests[1] != digests[2]
    bases = Lora.exported(adapter.export(tmp_path)).a
    for vectors in bases.values():
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-6)
    one, other = bases["model.layers.0.self_attn.q_proj"], bases["model.layers.1.self_attn.q_proj"]
    assert np.linalg.svd(one @ other.T)[1].max() < 0.99, "inputs of one width have bases of their own"


def test_calibration_does_not_depend_on_the_adapters_beside_it(client: Client) -> None:
    spec = Basis(positions="both", passes=2)
    first = new_adapter(client, basis=spec, rows=ROWS)
    second = new_adapter(client, basis=spec, rows=ROWS)
    assert first.info.energy == pytest.approx(second.info.energy, abs=1e-5)
