"""One model over two tensor-parallel workers is the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.server_ext.support import Lora
from tests.support import ROWS, SLOTS, Server, Servers, new_adapter
from zoact_remote import Basis, Client, Probe, Update

pytestmark = pytest.mark.vllm

Pair = tuple[Client, Client]


@pytest.fixture(scope="module")
def sharded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("sharded")
    # By default vLLM wants a NUMA node for each of its workers.
    server = Server(
        tiny_model,
        "vllm",
        directory,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        flags=["--tensor-parallel-size", "2"],
    ).start()
    yield server
    server.kill()


@pytest.fixture
def both(servers: Servers, sharded: Server) -> Iterator[Pair]:
    with servers("vllm").client() as whole, sharded.client() as halves:
        yield whole, halves


def test_coefficients_are_equal_and_losses_agree(both: Pair) -> None:
    one, other = (client.info() for client in both)
    assert one.sites == other.sites
    adapters = [new_adapter(client, rank=4, basis=Basis(source="random", seed=11)) for client in both]
    for update in (Update(0, ((1, 0.1), (2, -0.05))), Update(1, ((3, 0.05),), decay=0.1)):
        digests = [adapter.update(update).digest for adapter in adapters]
        assert digests[0] == digests[1]
    for version in (0, 1, 2):
        mine, theirs = (adapter.scores(ROWS, version=version).loss for adapter in adapters)
        assert mine == pytest.approx(theirs, abs=1e-4)
    probes = [Probe(seed, 2.0**-6) for seed in range(2 * SLOTS)]
    found = [adapter.losses(ROWS, probes, base=True) for adapter in adapters]
    assert found[0].base == pytest.approx(found[1].base, abs=1e-4)
    for a, b in zip(*(losses.losses for losses in found), strict=True):
        assert (a.plus, a.minus) == pytest.approx((b.plus, b.minus), abs=1e-4)


def test_bases_come_from_activations_of_all_workers(both: Pair, tmp_path: Path) -> None:
    spec = Basis(positions="both", passes=2)
    adapters = [new_adapter(client, rank=3, basis=spec, rows=ROWS) for client in both]
    one, other = (adapter.info for adapter in adapters)
    assert one.positions_seen == other.positions_seen
    assert one.energy == pytest.approx(other.energy, abs=1e-4)
    bases = [Lora.exported(adapter.export(tmp_path / str(i))).a for i, adapter in enumerate(adapters)]
    for name, vectors in bases[0].items():
        assert np.linalg.svd(vectors @ bases[1][name].T)[1].min() > 1 - 1e-4
