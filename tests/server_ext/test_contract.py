"""What every server promises, whatever its engine: real servers, a real socket, the real client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.server_ext.support import Lora, Reference, layout_of
from tests.support import ROWS, Server, new_adapter, trained_adapter
from zoact_remote import Basis, Client, Conflict, Normaliser, NotFound, Probe, Side, StaleVersion, Update
from zoact_remote.digest import coefficients_digest
from zoact_remote.model_digest import model_digest
from zoact_remote.replay import direction, replay

PROBES = [Probe(2**64 - 1, 2**-4), Probe(17, 2**-5, "plus")]


def test_info_describes_the_model(client: Client, server: Server, tiny_model: Path) -> None:
    info = client.info()
    assert (info.engine, info.dtype, info.noise_version) == (server.engine, "float32", 1)
    assert info.model_digest == model_digest(tiny_model)
    assert info.limits.max_row_tokens == 256
    assert [site.index for site in info.sites] == list(range(14))
    shapes = {site.name: (site.input, site.in_features, site.out_features) for site in info.sites}
    block = "model.layers.1"
    assert shapes[f"{block}.self_attn.q_proj"] == (f"{block}.self_attn.q_proj", 64, 64)
    assert shapes[f"{block}.self_attn.v_proj"] == (f"{block}.self_attn.q_proj", 64, 32)
    assert shapes[f"{block}.self_attn.o_proj"] == (f"{block}.self_attn.o_proj", 64, 64)
    assert shapes[f"{block}.mlp.up_proj"] == (f"{block}.mlp.gate_proj", 64, 128)
    assert shapes[f"{block}.mlp.down_proj"] == (f"{block}.mlp.down_proj", 128, 64)


def test_an_adapter_lives_and_dies(client: Client) -> None:
    adapter = client.create_adapter("tests/lifecycle", rank=2, sites=["down_proj"], basis=Basis(source="random"))
    assert (adapter.info.state, adapter.info.version, adapter.info.digest) == ("new", 0, None)
    assert adapter.info.sites == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    assert adapter.info.parameters == 2 * 64 * 2
    with pytest.raises(Conflict) as taken:
        client.create_adapter("tests/lifecycle")
    assert (taken.value.code, taken.value.param) == ("adapter_exists", "name")

    adapter.calibrate()
    adapter.update(Update(0, ((1, 0.5),)))
    assert adapter.refresh().state == "ready"
    assert adapter.info in client.adapters()

    adapter.delete()
    with pytest.raises(NotFound) as gone:
        adapter.refresh()
    assert gone.value.code == "adapter_not_found"
    assert "tests/lifecycle" not in [info.name for info in client.adapters()]

    reborn = client.create_adapter("tests/lifecycle", rank=1, basis=Basis(source="random"))
    reborn.calibrate()
    assert (reborn.info.version, list(reborn.journal())) == (0, [])
    reborn.delete()


@pytest.mark.parametrize("sides", ["both", "plus"])
@pytest.mark.parametrize("kind", ["completion", "choices"])
def test_losses_are_those_of_the_model_in_float64(
    client: Client, reference: Reference, tmp_path: Path, kind: str, sides: str
) -> None:
    adapter = trained_adapter(client)
    rows = [row for row in ROWS if kind in row]
    probe = Probe(42, 2**-4, sides)  # type: ignore[arg-type]
    answer = adapter.losses(rows, [probe], base=True)

    layout = layout_of(client, adapter)
    lora = Lora.exported(adapter.export(tmp_path))
    z = np.float32(probe.epsilon) * direction(layout, "rademacher", probe.seed)
    assert answer.version == 1
    assert answer.base == pytest.approx(reference.loss(rows, lora), abs=1e-4)
    (found,) = answer.losses
    assert (found.seed, found.epsilon) == (probe.seed, probe.epsilon)
    assert found.plus == pytest.approx(reference.loss(rows, lora.plus(layout, z)), abs=1e-4)
    if found.minus is not None:
        assert sides == "both"
        assert found.minus == pytest.approx(reference.loss(rows, lora.plus(layout, -z)), abs=1e-4)
        assert abs(found.plus - found.minus) > 1e-2, "the probe must matter for this test to say anything"
    else:
        assert sides == "plus"


def test_a_probe_of_a_part_sees_its_own_rows(client: Client) -> None:
    adapter = trained_adapter(client)
    rows = ROWS[:4]
    probes = [Probe(1, 0.25, part=(0, 2)), Probe(2, 0.25, part=(1, 2)), Probe(3, 0.25), Probe(4, 0.5, "plus", (3, 4))]
    answer = adapter.losses(rows, probes, base=True)
    for probe, found in zip(probes, answer.losses, strict=True):
        share = [rows[i] for i in probe.rows_of(len(rows))]
        (alone,) = adapter.losses(share, [replace(probe, part=None)]).losses
        assert found.seed == probe.seed
        assert found.plus == pytest.approx(alone.plus, abs=1e-5)
        assert found.minus == (None if probe.sides == "plus" else pytest.approx(alone.minus, abs=1e-5))
    assert answer.base == pytest.approx(adapter.losses(rows, [], base=True).base, abs=1e-5)
    assert answer.losses[0].plus != pytest.approx(adapter.losses(rows, [Probe(1, 0.25)]).losses[0].plus, abs=1e-4)
    whole = adapter.losses(rows, [Probe(3, 0.25)]).tokens
    parts = adapter.losses(rows, [Probe(i, 0.25, part=(i, 4)) for i in range(4)]).tokens
    assert parts == whole, "together they see every row once a side"


def test_losses_without_probes_give_the_unperturbed_loss(client: Client, reference: Reference) -> None:
    adapter = trained_adapter(client)
    answer = adapter.losses(ROWS, [], base=True, version=0)
    assert (answer.version, answer.losses, answer.update) == (0, (), None)
    assert answer.base == pytest.approx(reference.loss(ROWS), abs=1e-4)
    assert adapter.losses(ROWS, PROBES).base is None


def test_scores_of_every_version_and_of_probes(client: Client, reference: Reference, tmp_path: Path) -> None:
    adapter = trained_adapter(client, updates=3)
    layout = layout_of(client, adapter)
    seen = []
    for version in (0, 1, 3, None):
        scores = adapter.scores(ROWS, version=version)
        lora = Lora.exported(adapter.export(tmp_path / str(version), version=version))
        assert scores.version == (3 if version is None else version)
        for row, score in zip(ROWS, scores.rows, strict=True):
            expected = reference.logprobs(row, lora)
            assert score.tokens == tuple(len(c) for c in reference.continuations(row))
            for found, want, tokens in zip(score.logprobs, expected, score.tokens, strict=True):
                assert found == pytest.approx(want, abs=1e-4 * tokens)
            assert score.loss == pytest.approx(reference.loss([row], lora), abs=1e-4)
        assert scores.loss == pytest.approx(np.mean([score.loss for score in scores.rows]))
        seen.append(round(scores.loss, 3))
    assert len(set(seen)) == 3, "versions must differ for this test to say anything"

    for version, sign in ((0, 1), (2, -1)):
        lora = Lora.exported(adapter.export(tmp_path / f"probe{version}", version=version))
        z = np.float32(sign * 0.125) * direction(layout, "rademacher", 5)
        found_loss = adapter.scores(ROWS, version=version, probe=Side(5, 0.125, sign)).loss  # type: ignore[arg-type]
        assert found_loss == pytest.approx(reference.loss(ROWS, lora.plus(layout, z)), abs=1e-4)


def test_a_step_is_one_round_trip(client: Client) -> None:
    """A carried update comes first: the losses are those of the version that it makes."""
    adapter, alone = new_adapter(client), new_adapter(client)
    update = Update(0, ((3, 0.1), (4, -0.05)), decay=0.25)
    carried = adapter.losses(ROWS, PROBES, base=True, update=update, version=1)
    result = alone.update(update)
    assert carried.update is not None
    assert (carried.version, carried.update.version, carried.update.applied) == (1, 1, True)
    assert carried.update.digest == result.digest
    separate = alone.losses(ROWS, PROBES, base=True)
    assert carried.base == pytest.approx(separate.base, abs=1e-5)
    for one, other in zip(carried.losses, separate.losses, strict=True):
        assert one.plus == pytest.approx(other.plus, abs=1e-5)


def test_an_update_sent_twice_is_applied_once(client: Client) -> None:
    adapter = new_adapter(client)
    update = Update(0, ((3, 0.1),), key="once")
    first = adapter.update(update)
    adapter.update(Update(1, ((4, 0.1),)))
    again = adapter.update(update)
    assert first.applied
    assert (again.version, again.digest, again.applied) == (1, first.digest, False)
    carried = adapter.losses(ROWS, PROBES, update=update)
    assert carried.update == again
    assert carried.version == 1, "a call that is repeated gets the answer that it would have got"
    assert adapter.refresh().version == 2


def test_a_key_belongs_to_one_update(client: Client) -> None:
    adapter = new_adapter(client)
    adapter.update(Update(0, ((3, 0.1),), key="mine"))
    before = adapter.refresh()
    with pytest.raises(Conflict) as conflict:
        adapter.update(Update(0, ((3, 0.2),), key="mine"))
    assert (conflict.value.code, conflict.value.param) == ("key_conflict", "key")
    assert adapter.refresh() == before
    # Another adapter's keys are its own.
    assert new_adapter(client).update(Update(0, ((3, 0.2),), key="mine")).applied


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("base_version", [1, 3])
def test_a_stale_update_changes_nothing(client: Client, carried: bool, base_version: int) -> None:
    adapter = trained_adapter(client, updates=2)
    before = adapter.refresh()
    update = Update(base_version, ((9, 0.1),))
    send: Callable[[], Any] = (
        partial(adapter.losses, ROWS, PROBES, update=update) if carried else partial(adapter.update, update)
    )
    with pytest.raises(StaleVersion) as stale:
        send()
    assert (stale.value.status, stale.value.current_version) == (412, 2)
    assert stale.value.param == ("update.base_version" if carried else "base_version")
    assert adapter.refresh() == before


def test_every_digest_is_that_of_the_replayed_journal(client: Client) -> None:
    adapter = new_adapter(client, rank=3, sites=["q_proj", "v_proj", "down_proj"])
    updates = [
        Update(0, ((1, 0.5), (2, -0.25), (1, 1 / 3)), key="a"),
        Update(1, ((2**63, 1e-3),), decay=0.1),
        Update(2, ((5, 0.1), (6, 0.2)), decay=0.01, normaliser=Normaliser(((5, 0.3), (7, 0.7)), 0.01, 1e-8)),
        Update(3, (), decay=1.0),
        Update(4, ((8, -7e-5),)),
    ]
    results = [adapter.update(update) for update in updates]
    layout = layout_of(client, adapter)
    assert layout.gaps, "some sites must not fill their last block for this test to say enough"
    entries = list(adapter.journal(page=2))
    assert [entry.version for entry in entries] == [1, 2, 3, 4, 5]
    assert [entry.digest for entry in entries] == [result.digest for result in results]
    for i, (entry, update) in enumerate(zip(entries, updates, strict=True)):
        sent = (entry.update.terms, entry.update.decay, entry.update.normaliser)
        assert sent == (update.terms, update.decay, update.normaliser)
        flat = replay(layout, "rademacher", [e.update for e in entries[: i + 1]])
        assert entry.digest == coefficients_digest(flat, layout)
    assert entries[0].update.key == "a"
    assert adapter.refresh().digest == entries[-1].digest
    assert [entry.version for entry in adapter.journal(after=3)] == [4, 5]


def test_gaussian_adapters_replay_to_the_last_place(client: Client, tmp_path: Path) -> None:
    adapter = new_adapter(client, noise="gaussian")
    adapter.update(Update(0, ((1, 0.5), (2, -0.25))))
    adapter.update(Update(1, ((3, 0.1),), normaliser=Normaliser(((3, 0.5),), 0.1, 1e-8)))
    layout = layout_of(client, adapter)
    flat = replay(layout, "gaussian", [entry.update for entry in adapter.journal()])
    served = Lora.exported(adapter.export(tmp_path)).b
    for name, matrix in layout.matrices(flat).items():
        np.testing.assert_allclose(served[name], matrix, rtol=0, atol=2e-6)
    assert flat.std() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_export_is_an_adapter_that_peft_loads(
    client: Client, reference: Reference, tiny_model: Path, tmp_path: Path, dtype: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # Sites of one layer alone, so that the export must name layers in full.
    sites = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"]
    adapter = trained_adapter(client, updates=2, size=0.25, sites=sites)
    adapter.export(tmp_path, version=1, dtype=dtype)  # type: ignore[arg-type]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()

    scores = adapter.scores(ROWS, version=1)
    plain = adapter.scores(ROWS, version=0)
    allowed = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    for row, score, unadapted in zip(ROWS, scores.rows, plain.rows, strict=True):
        prompt = reference.ids(row["prompt"], special=True)
        for continuation, found, without in zip(
            reference.continuations(row), score.logprobs, unadapted.logprobs, strict=True
        ):
            with torch.inference_mode():
                table = model(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0].log_softmax(-1)
            expected = sum(float(table[len(prompt) + i - 1, token]) for i, token in enumerate(continuation))
            assert found == pytest.approx(expected, abs=allowed * len(continuation))
            assert found != pytest.approx(without, abs=1e-3)


def test_generation_follows_the_point_that_it_names(client: Client, reference: Reference) -> None:
    adapter = trained_adapter(client, updates=2, size=0.25)
    prompt = [0, 40, 41, 42, 43]
    newest = adapter.generate(prompt, max_tokens=12)
    assert (newest.version, newest.finish_reason) == (2, "length")
    assert len(newest.token_ids) == 12
    assert newest.text == reference.tokenizer.decode(newest.token_ids, skip_special_tokens=True)
    assert adapter.generate(prompt, max_tokens=12, version=2).token_ids == newest.token_ids

    base = adapter.generate(prompt, max_tokens=12, version=0)
    with torch.inference_mode():
        expected = reference.network.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert base.token_ids == tuple(expected[0, len(prompt) :].tolist())
    probe = adapter.generate(prompt, max_tokens=12, version=0, probe=Side(3, 0.5))
    assert len({base.token_ids, newest.token_ids, probe.token_ids}) == 3

    sampled = [adapter.generate(prompt, max_tokens=12, temperature=1.5, seed=seed).token_ids for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert adapter.generate(prompt, max_tokens=12, temperature=1e-40).token_ids == newest.token_ids


def test_generation_ends_before_a_stop_string(client: Client, reference: Reference) -> None:
    adapter = trained_adapter(client, size=0.25, seed=2)
    prompt = [0, 40, 41, 42, 43]
    whole = adapter.generate(prompt, max_tokens=12)
    # Whole characters of it alone: those that are cut in two are shown as U+FFFD.
    strings = {whole.text[i : i + length] for length in (1, 2, 5) for i in range(len(whole.text) - length + 1)}
    strings = {string for string in strings if "\ufffd" not in string}
    assert len(strings) > 10
    for string in sorted(strings):
        found = adapter.generate(prompt, max_tokens=12, stop=["nowhere", string])
        assert found.text == whole.text.partition(string)[0]
        assert found.finish_reason == "stop"
        tokens = found.token_ids
        assert tokens == whole.token_ids[: len(tokens)]
        texts = [reference.tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens[:-1], tokens)]
        assert [string in text for text in texts] == [False, True], "not a token more than it takes"

    assert adapter.generate(prompt, max_tokens=12, stop="nowhere") == whole
    later, sooner = whole.text[-1], whole.text[1:3]
    assert adapter.generate(prompt, max_tokens=12, stop=[later, sooner]).text == whole.text.partition(sooner)[0]
    sampled = [adapter.generate(prompt, temperature=1.0, seed=4, stop=sooner[0]).text for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert sooner[0] not in sampled[0]


def test_generation_takes_a_conversation(client: Client, reference: Reference) -> None:
    adapter = new_adapter(client)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    from_messages = adapter.generate(messages=messages, max_tokens=4)
    assert from_messages.token_ids == adapter.generate(reference.ids(text, special=False), max_tokens=4).token_ids


def test_a_conversation_is_scored_as_its_text_is(client: Client, reference: Reference) -> None:
    adapter = trained_adapter(client)
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And it was?"},
        {"role": "assistant", "content": "Great."},
    ]
    chat = reference.tokenizer.apply_chat_template
    rows, texts = [], []
    for end in (2, 4):
        before = chat(messages[: end - 1], add_generation_prompt=True, tokenize=False)
        turn = chat(messages[:end], tokenize=False).removeprefix(before)
        assert turn.strip() == messages[end - 1]["content"]
        rows.append({"messages": messages[:end]})
        texts.append({"prompt": reference.ids(before, special=False), "completion": turn})
    found, expected = adapter.scores(rows), adapter.scores(texts)
    assert [score.tokens for score in found.rows] == [score.tokens for score in expected.rows]
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert adapter.losses(rows, [], base=True).base == pytest.approx(found.loss, abs=1e-5)
    assert new_adapter(client, basis=Basis(), rows=rows).info.state == "ready"


def test_a_proxy_is_not_asked_for_loopback(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with server.client() as client:
        assert client.info().engine == server.engine
