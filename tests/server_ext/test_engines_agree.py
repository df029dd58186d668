"""vLLM against the reference engine, and vLLM's mixed batches against one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests

from tests.server_ext.support import Lora
from tests.support import ROWS, SLOTS, Servers, new_adapter, trained_adapter
from zoact_remote import Adapter, Basis, Client, Normaliser, Probe, Side, Update

pytestmark = pytest.mark.vllm

Pair = tuple[Client, Client]


@pytest.fixture
def both(servers: Servers) -> Iterator[Pair]:
    with servers("transformers").client() as transformers, servers("vllm").client() as vllm:
        yield transformers, vllm


def test_engines_describe_one_model(both: Pair) -> None:
    one, other = (client.info() for client in both)
    assert (one.engine, other.engine) == ("transformers", "vllm")
    assert one.sites == other.sites
    assert (one.model_digest, one.dtype) == (other.model_digest, other.dtype)


def test_engines_agree_on_coefficients_and_losses(both: Pair) -> None:
    adapters = [new_adapter(client, rank=4, basis=Basis(source="random", seed=11)) for client in both]
    assert adapters[0].info.basis_digest == adapters[1].info.basis_digest
    updates = [
        Update(0, ((1, 0.1), (2, -0.05))),
        Update(1, ((3, 0.05),), decay=0.1, normaliser=Normaliser(((3, 0.2),), 0.3, 1e-8)),
        Update(2, ((4, 0.1),)),
    ]
    for update in updates:
        one, other = (adapter.update(update) for adapter in adapters)
        assert one.digest == other.digest
    for version in (0, 2, None):
        found = [adapter.scores(ROWS, version=version) for adapter in adapters]
        for mine, theirs in zip(*(scores.rows for scores in found), strict=True):
            for a, b, tokens in zip(mine.logprobs, theirs.logprobs, mine.tokens, strict=True):
                assert a == pytest.approx(b, abs=1e-4 * tokens)
    probes = [Probe(seed, 2.0**-6) for seed in range(3)]
    one_losses, other_losses = (adapter.losses(ROWS, probes, base=True) for adapter in adapters)
    assert one_losses.base == pytest.approx(other_losses.base, abs=1e-4)
    assert one_losses.tokens == other_losses.tokens
    for mine_, theirs_ in zip(one_losses.losses, other_losses.losses, strict=True):
        assert (mine_.plus, mine_.minus) == pytest.approx((theirs_.plus, theirs_.minus), abs=1e-4)


@pytest.mark.parametrize("positions", ["scored", "prompt", "both"])
def test_engines_agree_on_bases(both: Pair, tmp_path: Path, positions: str) -> None:
    bases, energies = [], []
    for client in both:
        spec = Basis(positions=positions, passes=2)  # type: ignore[arg-type]
        adapter = new_adapter(client, rank=3, basis=spec, rows=ROWS)
        bases.append(Lora.exported(adapter.export(tmp_path / client.info().engine)).a)
        energies.append(adapter.info.energy)
        assert adapter.info.positions_seen == {"scored": 12, "prompt": 33, "both": 45}[positions]
    assert energies[0] == pytest.approx(energies[1], abs=1e-4)
    for name, vectors in bases[0].items():
        cosines = np.linalg.svd(vectors @ bases[1][name].T)[1]
        assert cosines.min() > 1 - 1e-4


def test_more_probes_than_slots(both: Pair) -> None:
    adapters = [new_adapter(client, basis=Basis(source="random", seed=5)) for client in both]
    probes = [Probe(seed, 2.0**-4) for seed in range(3 * SLOTS)]
    one, other = (adapter.losses(ROWS, probes, base=True) for adapter in adapters)
    for a, b in zip(one.losses, other.losses, strict=True):
        assert (a.plus, a.minus) == pytest.approx((b.plus, b.minus), abs=1e-4)
    assert len({round(loss.plus, 4) for loss in one.losses}) == len(probes)


def test_a_mixed_batch_is_what_its_parts_are(servers: Servers) -> None:
    """The base model, adapters, probes and calibration at once. vLLM's own CPU kernels perturb the base model here."""
    with servers("vllm").client() as client:
        adapters = [trained_adapter(client, size=0.2, seed=i) for i in range(SLOTS)]
        rows = [{"prompt": [0, *range(20 + i, 60 + i)], "completion": [100 + i, 200 + i]} for i in range(12)]

        def scores(adapter: Adapter, version: int | None, probe: Side | None = None) -> Callable[[], list[float]]:
            return lambda: [r.loss for r in adapter.scores(rows, version=version, probe=probe).rows]

        def calibration() -> list[float]:
            adapter = new_adapter(client, basis=Basis(positions="both"), rows=rows)
            return list((adapter.info.energy or {}).values())

        jobs = [scores(adapters[0], 0), calibration, scores(adapters[1], 0)]
        jobs += [scores(adapter, None) for adapter in adapters]
        jobs += [scores(adapters[i], 1, Side(i, 0.125, -1)) for i in (0, 1)]
        alone = [job() for job in jobs]
        assert len({round(sum(losses), 3) for losses in alone}) == len(jobs) - 1, "only the base model comes up twice"
        with ThreadPoolExecutor(len(jobs)) as pool:
            for _ in range(3):
                together = [future.result(90) for future in [pool.submit(job) for job in jobs]]
                for mixed, lone in zip(together, alone, strict=True):
                    assert mixed == pytest.approx(lone, abs=1e-4)


def test_an_adapter_that_left_its_slot_comes_back(servers: Servers) -> None:
    with servers("vllm").client() as client:
        adapter = trained_adapter(client, updates=2, size=0.2)
        before = adapter.scores(ROWS).loss
        crowd = [Probe(seed, 2.0**-4) for seed in range(4 * SLOTS)]
        new_adapter(client).losses(ROWS[:1], crowd)
        assert adapter.scores(ROWS).loss == pytest.approx(before, abs=1e-5)


def test_one_name_never_serves_two_adapters(servers: Servers) -> None:
    """A prefix cache or a slot kept from an adapter that was deleted would answer for its successor."""
    with servers("vllm").client() as client:
        rows = [{"prompt": [0, *range(50, 150)], "choices": [[7], [8]], "answer": 0}]
        losses = []
        for seed in (1, 2):
            adapter = client.create_adapter("tests/successor", basis=Basis(source="random"))
            adapter.calibrate()
            adapter.update(Update(0, ((seed, 0.3),)))
            losses.append(adapter.scores(rows).loss)
            adapter.delete()
        assert losses[0] != pytest.approx(losses[1], abs=1e-3)


def test_metrics_do_not_grow_with_every_probe(servers: Servers) -> None:
    server = servers("vllm")
    with server.client() as client:
        adapter = new_adapter(client)

        def series() -> int:
            text = requests.get(f"{server.url}/metrics", timeout=30).text
            return sum(line.startswith("vllm:lora_requests_info{") for line in text.splitlines())

        adapter.losses(ROWS, [Probe(0, 0.01)])
        before = series()
        for seed in range(1, 9):
            adapter.losses(ROWS, [Probe(seed, 0.01), Probe(seed + 100, 0.01)])
        assert before <= series() <= before + 2
