"""Losses and bases of a real server with our kernels, packs, chunks and shared beginnings included. Needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.server_ext.support import Lora, Reference, layout_of
from tests.support import ROWS, Server, new_adapter, trained_adapter
from zoact_remote import Basis, Client, Probe
from zoact_remote.replay import direction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOLERANCE = 0.02
"""A token's log-probability in float16, in nats; what is measured is many times that."""
EXAMPLES = list(range(60, 100))
MANY: list[dict[str, Any]] = [
    *ROWS,
    *({"prompt": [0, *EXAMPLES, 100 + i], "completion": [200 + i, 201, 202 + i]} for i in range(8)),
    *({"prompt": [0, *EXAMPLES, 120 + i], "choices": [[50], [51, 52, i], [51, 53]], "answer": 1} for i in range(8)),
    *({"prompt": [0, *range(30 + i, 45 + 2 * i)], "completion": [300 + i]} for i in range(20)),
]


@pytest.fixture(params=["packs", "chunks", "compiled", "two GPUs", "two GPUs, compiled"])
def server(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Iterator[Server]:
    flags = ["--dtype", "float16", "--gpu-memory-utilization", "0.1", "--max-model-len", "256"]
    if request.param.startswith("two GPUs"):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        # The tiny model's one key-value head is on both.
        flags += ["--tensor-parallel-size", "2"]
    if not request.param.endswith("compiled"):
        flags.append("--enforce-eager")
    if request.param == "chunks":
        flags += ["--max-num-batched-tokens", "48", "--max-num-seqs", "8"]
    environment = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    server = Server(tiny_model, "vllm", tmp_path, environment=environment, flags=flags).start()
    yield server
    server.kill()


def test_losses_and_bases_are_those_of_the_model_in_float64(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    reference = Reference(tiny_model)
    with server.client() as client:
        _check_losses(client, reference, tmp_path)
        _check_bases(client, reference, tmp_path)


def _check_losses(client: Client, reference: Reference, directory: Path) -> None:
    adapter = trained_adapter(client, updates=2, size=0.2)
    layout = layout_of(client, adapter)
    lora = Lora.exported(adapter.export(directory / "export"))
    for version, at in ((0, None), (2, lora)):
        scores = adapter.scores(MANY, version=version)
        for row, score in zip(MANY, scores.rows, strict=True):
            for found, wanted, tokens in zip(score.logprobs, reference.logprobs(row, at), score.tokens, strict=True):
                assert found == pytest.approx(wanted, abs=TOLERANCE * tokens)
    probes = [Probe(seed, 2**-4) for seed in range(6)]
    answer = adapter.losses(MANY, probes, base=True)
    assert answer.base == pytest.approx(reference.loss(MANY, lora), abs=TOLERANCE)
    differences = []
    for pair in answer.losses:
        z = np.float32(pair.epsilon) * direction(layout, "rademacher", pair.seed)
        plus, minus = reference.loss(MANY, lora.plus(layout, z)), reference.loss(MANY, lora.plus(layout, -z))
        assert (pair.plus, pair.minus) == pytest.approx((plus, minus), abs=TOLERANCE)
        differences.append(abs(plus - minus))
    assert max(differences) > 4 * TOLERANCE, "probes must matter for this test to say anything"


def _check_bases(client: Client, reference: Reference, directory: Path) -> None:
    adapter = new_adapter(client, rank=3, basis=Basis(positions="both", passes=2), rows=MANY)
    layout = layout_of(client, adapter)
    vectors = Lora.exported(adapter.export(directory / "basis")).a
    for name in layout.inputs:
        covariance = reference.covariance(MANY, name, ("prompt", "scored"))
        kept = np.trace(vectors[name] @ covariance @ vectors[name].T)
        assert kept >= 0.9 * np.linalg.eigvalsh(covariance)[-3:].sum()
    seen = reference.activations(MANY, layout.sites[0].name)
    assert adapter.info.positions_seen == sum(len(inputs) for inputs in seen.values())
