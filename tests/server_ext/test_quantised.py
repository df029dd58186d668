"""Float adapters on a model of int4 or FP8 weights, served by vLLM, against the numbers that the weights stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.quantised import Quantised, quantise, round_inputs
from tests.server_ext.support import Lora, Reference, layout_of
from tests.support import ROWS, Server, new_adapter, new_name, trained_adapter
from zoact_remote import Adapter, Basis, Client, InvalidValue, Probe
from zoact_remote.cli.vllm_command import LAYERS
from zoact_remote.digest import coefficients_digest
from zoact_remote.replay import direction, replay

pytestmark = pytest.mark.vllm

DTYPES = {"int4": "float16", "fp8": "float32"}
"""What a model of each kind is served in. FP8 layers round their inputs to four bits, where a difference in the last of
float16's eleven often goes one level further: only in float32 can they be followed. vLLM wants 16 bits beside int4."""
CLOSE = 5e-3
"""How far a batch's loss may be off. In float16 a logit goes through some 20 roundings of up to 2^-12 of a number; for
logits of 6 they come to 0.006, and to a quarter of that in the mean over 20 tokens. Seen: 0.001."""
A_TOKEN = 4 * CLOSE
"""Likewise a token's log-likelihood. Seen: 0.007."""
SHOWS = 5 * CLOSE
"""How far one must be off for a test to see it."""
PROBES = [Probe(seed, 2.0**-3) for seed in (42, 2**64 - 1)]


class RoundingReference(Reference):
    """A model whose blocks' layers round their inputs as FP8 layers do; what an adapter reads is not rounded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, layer in self.layers.items():
            if name.rpartition(".")[2] in LAYERS:
                layer.forward = partial(_on_rounded_inputs, layer.forward)  # type: ignore[method-assign]


def _on_rounded_inputs(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return forward(round_inputs(x))


NOT_ON_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's LoRA kernels take no float32 there")


@pytest.fixture(scope="module", params=["int4", pytest.param("fp8", marks=NOT_ON_GPU)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(kind: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    return quantise(tiny_model, tmp_path_factory.mktemp("quantised"), kind)


@pytest.fixture(scope="module")
def client(kind: str, checkpoint: Quantised, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    # Where the processor has AMX, vLLM would round the inputs of int4 layers to 8 bits.
    environment = {"VLLM_CPU_INT4_W4A8": "0"}
    directory = tmp_path_factory.mktemp("server")
    server = Server(checkpoint.served, "vllm", directory, environment=environment, flags=["--dtype", DTYPES[kind]])
    with server.start().client() as client:
        yield client
    server.kill()


@pytest.fixture(scope="module")
def quantised(kind: str, checkpoint: Quantised) -> Reference:
    """The float64 model of the numbers that the weights stand for."""
    return RoundingReference(checkpoint.plain) if kind == "fp8" else Reference(checkpoint.plain)


@pytest.fixture(scope="module")
def adapter(client: Client) -> Adapter:
    return trained_adapter(client, updates=2, size=0.25)


def test_it_is_the_quantised_model(client: Client, kind: str, quantised: Reference, reference: Reference) -> None:
    assert client.info().dtype == DTYPES[kind]
    found = new_adapter(client).scores(ROWS, version=0)
    assert found.loss == pytest.approx(quantised.loss(ROWS), abs=CLOSE)
    assert found.loss != pytest.approx(reference.loss(ROWS), abs=SHOWS), "quantisation must show for this test"
    for row, score in zip(ROWS, found.rows, strict=True):
        for logprob, expected, tokens in zip(score.logprobs, quantised.logprobs(row), score.tokens, strict=True):
            assert logprob == pytest.approx(expected, abs=A_TOKEN * tokens)


def test_adapters_and_probes_act_on_it_as_on_any_other(
    client: Client, adapter: Adapter, quantised: Reference, tmp_path: Path
) -> None:
    layout, lora = layout_of(client, adapter), Lora.exported(adapter.export(tmp_path))
    found = adapter.losses(ROWS, PROBES, base=True)
    assert found.base == pytest.approx(quantised.loss(ROWS, lora), abs=CLOSE)
    assert found.base != pytest.approx(quantised.loss(ROWS), abs=SHOWS), "the adapter must show for this test"
    for probe, pair in zip(PROBES, found.losses, strict=True):
        z = np.float32(probe.epsilon) * direction(layout, "rademacher", probe.seed)
        assert pair.plus == pytest.approx(quantised.loss(ROWS, lora.plus(layout, z)), abs=CLOSE)
        assert pair.minus == pytest.approx(quantised.loss(ROWS, lora.plus(layout, -z)), abs=CLOSE)
        assert np.ptp([found.base, pair.plus, pair.minus]) > SHOWS, "the probe must show for this test"


def test_bases_come_from_its_activations(client: Client, quantised: Reference, tmp_path: Path) -> None:
    adapter = new_adapter(client, rank=3, basis=Basis(positions="both", passes=2), rows=ROWS)
    assert adapter.info.energy is not None
    bases = Lora.exported(adapter.export(tmp_path)).a
    for layer, energy in adapter.info.energy.items():
        covariance = quantised.covariance(ROWS, layer, ("prompt", "scored"))
        kept = np.trace(bases[layer] @ covariance @ bases[layer].T)
        assert kept >= 0.99 * np.linalg.eigvalsh(covariance)[-3:].sum()
        assert energy == pytest.approx(kept, abs=1e-2)


def test_coefficients_are_exact_and_leave_and_come_back(client: Client, adapter: Adapter, tmp_path: Path) -> None:
    layout = layout_of(client, adapter)
    flat = replay(layout, "rademacher", [entry.update for entry in adapter.journal()])
    assert adapter.refresh().digest == coefficients_digest(flat, layout)
    exported = adapter.export(tmp_path)
    for name, matrix in layout.matrices(flat).items():
        np.testing.assert_array_equal(Lora.exported(exported).b[name], matrix)
    again = client.import_adapter(new_name(), exported)
    assert again.info.digest == adapter.info.digest
    assert again.scores(ROWS).loss == pytest.approx(adapter.scores(ROWS).loss, abs=CLOSE)


def test_it_is_not_merged_into(adapter: Adapter, checkpoint: Quantised, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"is quantised .* export without --merge"):
        adapter.export_merged(tmp_path / "merged", checkpoint.served)
    assert not (tmp_path / "merged").exists()
