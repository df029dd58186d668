"""An export, served as a LoRA by vLLM without the extension, is what the server that trained it scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support import CALL_TIMEOUT_S, Process, Servers, trained_adapter
from zoact_remote import Adapter, Client
from zoact_remote.cli.local_server import free_port

pytestmark = pytest.mark.vllm

TUNED = "tuned"
PROMPT_TOKENS = 4
SEQUENCES = ([0, 40, 41, 42, 50, 51, 52, 53], [0, 300, 7, 8, 9, 10, 11], [0, *range(100, 140)])
"""Prompts with their completions, in ids: this is about weights, not about tokenisers."""
ROWS = [
    {"prompt": ids[:place], "completion": [ids[place]]} for ids in SEQUENCES for place in range(PROMPT_TOKENS, len(ids))
]
"""Every token of a completion by itself, since ``/scores`` answers with sums over completions."""


@pytest.fixture(scope="module")
def client(servers: Servers) -> Iterator[Client]:
    with servers("transformers").client() as client:
        yield client


@pytest.fixture(scope="module")
def adapter(client: Client) -> Adapter:
    return trained_adapter(client, updates=3, size=0.2)


@pytest.fixture(scope="module")
def stock_vllm(tiny_model: Path, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a vLLM that has loaded the adapter's export and nothing of ours."""
    directory = tmp_path_factory.mktemp("stock-vllm")
    exported, port = adapter.export(directory / "adapter"), free_port()
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model), "--port", str(port)]
    arguments += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{TUNED}={exported}"]
    process = Process(arguments, port, directory / "vllm.log")
    yield process.url
    process.kill()


def test_it_is_stock(stock_vllm: str) -> None:
    assert requests.get(f"{stock_vllm}/zoact/v1/info", timeout=CALL_TIMEOUT_S).status_code == 404


def test_stock_vllm_gives_an_export_the_same_logprobs(stock_vllm: str, adapter: Adapter) -> None:
    # Only the adapter is asked for: on the CPU, stock vLLM also applies it to the base model's tokens.
    served = [logprob for ids in SEQUENCES for logprob in completion_logprobs(stock_vllm, TUNED, ids)]
    tuned, base = (adapter.scores(ROWS, version=version) for version in (None, 0))
    assert served == pytest.approx([row.logprobs[0] for row in tuned.rows], abs=1e-4)
    assert served != pytest.approx([row.logprobs[0] for row in base.rows], abs=0.1), "training must show for this test"


def completion_logprobs(url: str, model: str, ids: list[int]) -> list[float]:
    """Log-probabilities of a sequence's tokens behind its prompt, by vLLM's OpenAI route."""
    # One sequence a call: stock vLLM (0.32) dies of several prompts whose log-probabilities are asked of a LoRA.
    ask: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 0}
    response = requests.post(f"{url}/v1/completions", json=ask, timeout=CALL_TIMEOUT_S)
    assert response.ok, response.text
    logprobs: list[float] = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    return logprobs[PROMPT_TOKENS : len(ids)]
