"""Nothing computed with other coefficients is ever reused, though prompts share long prefixes and vLLM caches those."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests

from server_ext.model_names import ModelName
from tests.server_ext.support import Lora, Reference, layout_of
from tests.support import CALL_TIMEOUT_S, Server, Servers, new_name
from zoact_remote import Adapter, Basis, Client, Update
from zoact_remote.replay import direction

pytestmark = pytest.mark.vllm

PROMPT = [0, *range(40, 240)]
"""Longer than a block of the cache."""
SIZE = 0.3
"""Of updates and probes: large enough that a prefix from before shows."""
UNGUARDED = """
def unguard():
    from vllm.v1.core import kv_cache_utils

    kv_cache_utils._gen_lora_extra_hash_keys = lambda request: ["zoact"] if request.lora_request else []
"""
"""A plug-in of vLLM by which the cache tells adapters from the base model, and not from one another."""


@pytest.fixture
def unguarded(tiny_model: Path, tmp_path: Path) -> Iterator[Server]:
    """A server whose cached blocks are not named by what they were computed with."""
    installed = tmp_path / "unguarded-1.dist-info"
    installed.mkdir()
    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: unguarded\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[vllm.general_plugins]\nunguarded = unguarded:unguard\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    server = Server(tiny_model, "vllm", tmp_path, environment={"PYTHONPATH": os.pathsep.join(paths)}).start()
    yield server
    server.kill()


class Walk:
    """Changes an adapter in every way there is, and asks for the same text after each.

    Attributes:
        asked: occasions, by what had happened.
        stale: those whose answer was not that of the coefficients.

    """

    def __init__(self, server: Server, reference: Reference, directory: Path) -> None:
        self.asked: list[str] = []
        self.stale: list[str] = []
        self._server = server
        self._reference = reference
        self._directory = directory
        self._name = new_name()

    def through_every_change(self) -> None:
        with self._server.client() as client:
            adapter = self._create(client, seed=1)
            self.ask("a first update")
            adapter.update(Update(1, ((2, SIZE),)))
            self.ask("an update")
            self.ask("an update: the version before", "@1")
            self.ask("a probe", f"@1+17*{SIZE}")
            self.ask("a probe's other side", f"@1-17*{SIZE}")
            self._roll_back(base=2, to=0)
            self.ask("a rollback")
            adapter.update(Update(3, ((3, SIZE),)))
            self.ask("an update after a rollback")
            adapter.delete()
            self._create(client, seed=4)
            self.ask("a deletion, under the same name")
            self.ask("a deletion, under the same name and version", "@1")

    def ask(self, occasion: str, form: str = "") -> None:
        self.asked.append(occasion)
        # Twice, since the first answer may be what fills the cache.
        if not all(self._is_right(form) for _ in range(2)):
            self.stale.append(occasion)

    def _is_right(self, form: str) -> bool:
        """Whether generated tokens have the log-probabilities that the float64 model gives them."""
        tokens, logprobs = complete(self._server, self._name + form)
        expected = self._reference.logprobs({"prompt": PROMPT, "completion": tokens}, self._coefficients(form))
        return bool(np.isclose(sum(logprobs), expected[0], atol=1e-3))

    def _coefficients(self, form: str) -> Lora:
        model = ModelName.parse(self._name + form)
        assert model is not None
        with self._server.client() as client:
            adapter = client.adapter(self._name)
            lora = Lora.exported(adapter.export(self._directory / "export", version=model.version))
            layout = layout_of(client, adapter)
        if model.probe is None:
            return lora
        epsilon = np.float32(model.probe.sign * model.probe.epsilon)
        return lora.plus(layout, epsilon * direction(layout, "rademacher", model.probe.seed))

    def _create(self, client: Client, seed: int) -> Adapter:
        adapter = client.create_adapter(self._name, rank=3, basis=Basis(source="random"))
        adapter.calibrate()
        adapter.update(Update(0, ((seed, SIZE),)))
        return adapter

    def _roll_back(self, base: int, to: int) -> None:
        url = f"{self._server.url}/zoact/v1/adapters/{self._name}/rollback"
        body = {"base_version": base, "to_version": to}
        assert requests.post(url, json=body, timeout=CALL_TIMEOUT_S).ok


def test_no_answer_is_stale(servers: Servers, reference: Reference, tmp_path: Path) -> None:
    server = servers("vllm")
    before = cached_tokens(server)
    walk = Walk(server, reference, tmp_path)
    walk.through_every_change()
    assert cached_tokens(server) > before + len(walk.asked) * len(PROMPT) // 2, "the cache must be in use"
    server.kill()
    server.start()
    walk.ask("a restart")
    walk.ask("a restart: the base model", "@0")
    assert walk.stale == []


def test_where_blocks_are_not_named_by_their_coefficients_answers_are_stale(
    unguarded: Server, reference: Reference, tmp_path: Path
) -> None:
    walk = Walk(unguarded, reference, tmp_path)
    walk.through_every_change()
    # All but those that ask for the coefficients which the cache was filled with.
    assert set(walk.asked) - set(walk.stale) == {"a first update", "an update: the version before"}


def complete(server: Server, model: str) -> tuple[list[int], list[float]]:
    """The tokens that follow the prompt, and their log-probabilities."""
    ask = {"model": model, "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    ask |= {"logprobs": 0, "return_tokens_as_token_ids": True}
    answer = requests.post(f"{server.url}/v1/completions", json=ask, timeout=CALL_TIMEOUT_S)
    assert answer.ok, answer.text
    found = answer.json()["choices"][0]["logprobs"]
    return [int(token.removeprefix("token_id:")) for token in found["tokens"]], found["token_logprobs"]


def cached_tokens(server: Server) -> float:
    """Tokens of prompts that vLLM has taken from its cache so far."""
    text = requests.get(f"{server.url}/metrics", timeout=CALL_TIMEOUT_S).text
    (count,) = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (.*)$", text, re.MULTILINE)
    return float(count)
