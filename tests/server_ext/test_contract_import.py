"""Adapters that were LoRAs before: what they compute, and how they live on."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import torch
from safetensors.numpy import load_file

from tests.loras import lora_archive, lora_directory, random_halves
from tests.server_ext.support import Lora, Reference, layout_of
from tests.support import CALL_TIMEOUT_S, ROWS, Server, new_name, trained_adapter
from zoact_remote import BadRequest, Client, Conflict, Probe, Update
from zoact_remote.digest import coefficients_digest
from zoact_remote.exports import ABOUT, TENSORS, read_coefficients
from zoact_remote.replay import replay

PROMPT = [0, 40, 41, 42, 43]


@pytest.mark.parametrize("rslora", [False, True])
def test_it_scores_as_in_peft(
    client: Client, reference: Reference, tiny_model: Path, tmp_path: Path, rslora: bool
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # B begins random, as if trained.
        config = LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=targets, init_lora_weights=False)
        network: Any = get_peft_model(base, config).eval()
    network.save_pretrained(tmp_path)

    adapter = client.import_adapter(new_name(), tmp_path)
    assert (adapter.info.rank, adapter.info.version, adapter.info.state) == (6, 0, "ready"), "q and v need 3 each"
    scores = adapter.scores(ROWS)
    for row, score in zip(ROWS, scores.rows, strict=True):
        prompt = reference.ids(row["prompt"], special=True)
        for continuation, found in zip(reference.continuations(row), score.logprobs, strict=True):
            with torch.inference_mode():
                table = network(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0].log_softmax(-1)
            expected = sum(float(table[len(prompt) + i - 1, token]) for i, token in enumerate(continuation))
            assert found == pytest.approx(expected, abs=1e-4 * len(continuation))
    assert scores.loss != pytest.approx(reference.loss(ROWS), abs=1e-2), "the LoRA must matter for this test"


def test_an_export_comes_back_and_goes_on(client: Client, reference: Reference, tmp_path: Path) -> None:
    before = trained_adapter(client, updates=2, size=0.25)
    digest = before.refresh().digest
    adapter = client.import_adapter(new_name(), before.export(tmp_path / "before"))
    assert adapter.info == adapter.refresh()
    assert (adapter.info.digest, adapter.info.imported_digest) == (digest, digest)
    assert adapter.info.basis_digest == before.info.basis_digest
    assert (adapter.info.basis.source, adapter.info.sites) == ("imported", before.info.sites)
    first, again = load_file(tmp_path / "before" / TENSORS), load_file(adapter.export(tmp_path / "again") / TENSORS)
    assert {name: tensor.tobytes() for name, tensor in first.items()} == {n: t.tobytes() for n, t in again.items()}

    # Version 0 is what was imported wherever it is asked for, and not the model.
    old = before.scores(ROWS)
    lora = Lora.exported(tmp_path / "again")
    assert adapter.scores(ROWS, version=0).loss == pytest.approx(old.loss, abs=1e-5)
    assert adapter.losses(ROWS, [], base=True).base == pytest.approx(reference.loss(ROWS, lora), abs=1e-4)
    probed = adapter.losses(ROWS, [Probe(3, 2**-4)], base=True, version=0)
    assert probed.base == pytest.approx(old.loss, abs=1e-5)
    (pair,), (wanted,) = probed.losses, before.losses(ROWS, [Probe(3, 2**-4)]).losses
    assert (pair.plus, pair.minus) == pytest.approx((wanted.plus, wanted.minus), abs=1e-5)
    text = before.generate(PROMPT, max_tokens=12).token_ids
    assert adapter.generate(PROMPT, max_tokens=12, version=0).token_ids == text

    # It is trained from there as the old one would have been.
    update = Update(0, ((5, 0.1), (6, -0.2)), decay=0.125)
    result = adapter.update(update)
    assert result.digest == before.update(Update(2, update.terms, update.decay)).digest
    back = adapter.rollback(0)
    assert (back.version, back.digest) == (2, digest)
    assert adapter.scores(ROWS).loss == pytest.approx(old.loss, abs=1e-5)
    assert adapter.scores(ROWS, version=1).loss != pytest.approx(old.loss, abs=1e-3)

    layout = layout_of(client, adapter)
    start = read_coefficients(adapter.export(tmp_path / "start", version=0), layout)
    entries = list(adapter.journal())
    assert [entry.digest_before for entry in entries] == [digest, result.digest]
    replayed = replay(layout, "rademacher", [entries[0].update], start)
    assert coefficients_digest(replayed, layout) == result.digest
    for version in range(3):
        audit = adapter.audit(adapter.export(tmp_path / "audited", version=version))
        assert (audit.failures, audit.version, audit.exported) == ((), 2, version)


def test_it_survives_a_server_that_is_killed(server: Server, tmp_path: Path) -> None:
    with server.client() as client:
        halves = random_halves([site for site in client.info().sites if site.name.endswith("up_proj")], 2)
        untouched, trained, deleted = (
            client.import_adapter(new_name(), lora_directory(tmp_path / "lora", halves)) for _ in range(3)
        )
        results = [trained.update(Update(version, ((version, 0.1),))) for version in range(3)]
        deleted.delete()
        loss = untouched.scores(ROWS).loss
        server.kill()
    server.start()
    with server.client() as client:
        for before in (untouched, trained):
            after = client.adapter(before.name)
            assert after.info.imported_digest == untouched.info.imported_digest
            assert not after.audit(after.export(tmp_path / "export", version=0)).failures
            assert after.scores(ROWS, version=0).loss == pytest.approx(loss, abs=1e-5)
        assert client.adapter(untouched.name).info == untouched.info
        again = client.adapter(trained.name)
        assert (again.info.version, again.info.digest) == (3, results[-1].digest)
        assert again.rollback(0).digest == untouched.info.digest
        assert deleted.name not in [info.name for info in client.adapters()]


def test_what_is_refused_changes_nothing(client: Client, server: Server, tmp_path: Path) -> None:
    sites = [site for site in client.info().sites if site.name.endswith("down_proj")]
    good = lora_directory(tmp_path / "good", random_halves(sites, 2))
    taken = client.import_adapter(new_name(), good)
    before, files = client.adapters(), sorted(server.state.glob("*/*"))

    with pytest.raises(Conflict) as conflict:
        client.import_adapter(taken.name, good)
    assert conflict.value.code == "adapter_exists"
    (tmp_path / "good" / ABOUT).write_text(json.dumps({"model_digest": "sha256:other"}))
    for directory, param in (
        (good, "zoact.json: model_digest"),
        (lora_directory(tmp_path / "dora", random_halves(sites, 2), use_dora=True), "adapter_config.json: use_dora"),
        (lora_directory(tmp_path / "wide", random_halves(sites, 60)), "adapter_config.json: r"),
    ):
        if server.engine == "transformers" and directory.name == "wide":
            continue  # it has no slots that limit the rank
        with pytest.raises(BadRequest) as refused:
            client.import_adapter(new_name(), directory)
        assert (refused.value.status, refused.value.param) == (400, param)
    url = f"{server.url}/zoact/v1/adapters/tests/Upper-Case/import"
    answer = requests.post(url, data=lora_archive(random_halves(sites, 2)), timeout=CALL_TIMEOUT_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "adapter")
    answer = requests.post(url.lower(), data=b"", params={"noise": "pink"}, timeout=CALL_TIMEOUT_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "noise")

    assert client.adapters() == before
    assert sorted(server.state.glob("*/*")) == files


def test_the_largest_adapter_that_there_can_be_comes_back(client: Client) -> None:
    info = client.info()
    rank = min(info.limits.max_rank, *(site.in_features for site in info.sites))
    adapter = trained_adapter(client, rank=rank)
    assert len(adapter.info.sites) == len(info.sites)
    with TemporaryDirectory() as directory:
        again = client.import_adapter(new_name(), adapter.export(directory))
    assert again.info.digest == adapter.refresh().digest


def test_an_export_is_sent_back_as_it_is(client: Client, server: Server) -> None:
    """Without this project's client: the answer to one call is the body of the other."""
    adapter = trained_adapter(client, noise="gaussian")
    api = f"{server.url}/zoact/v1/adapters"
    archive = requests.get(f"{api}/{adapter.name}/export", timeout=CALL_TIMEOUT_S).content
    name = new_name()
    answer = requests.post(f"{api}/{name}/import", data=archive, params={"noise": "gaussian"}, timeout=CALL_TIMEOUT_S)
    assert answer.status_code == 201
    assert answer.json()["digest"] == adapter.refresh().digest
    page = requests.get(f"{api}/{name}/journal", timeout=CALL_TIMEOUT_S).json()
    assert (page["imported_digest"], page["updates"]) == (adapter.info.digest, [])
    # Gaussian coefficients differ from device to device; what was imported does not.
    made = client.adapter(name)
    made.update(Update(0, ((1, 0.1),)))
    assert not made.audit().failures
    assert np.abs(made.audit().coefficients).max() > 0


def test_an_upload_that_breaks_off_is_no_failure_of_the_servers(server: Server) -> None:
    def counted() -> dict[str, float]:
        lines = requests.get(f"{server.url}/metrics", timeout=60).text.splitlines()
        ours = [line for line in lines if line.startswith("zoact_calls_total{") and "/import" in line]
        return {status: sum(float(line.split()[-1]) for line in ours if status in line) for status in ("4xx", "5xx")}

    before = counted()
    url = urlsplit(server.url)
    head = "POST /zoact/v1/adapters/acme/broken/import HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-tar\r\n"
    with socket.create_connection((url.hostname or "", url.port or 0), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + bytes(1000))
    deadline = time.monotonic() + 60
    while counted() == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert counted() == {"4xx": before["4xx"] + 1, "5xx": before["5xx"]}
