"""An export, served as a LoRA by vLLM without the extension, is what the server that trained it serves by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import requests

from tests.support import CALL_TIMEOUT_S, Process, Server, trained_adapter
from zoact_remote import Adapter, Client
from zoact_remote.cli.local_server import free_port

pytestmark = pytest.mark.vllm

TUNED = "tuned"
Half = Literal["float16", "bfloat16"]
HALVES: dict[Half, float] = {"float16": 2e-2, "bfloat16": 2e-1}
"""How far log-probabilities of these exports may be off, by the types' units in the last place."""
PROMPT_TOKENS = 4
SEQUENCES = ([0, 40, 41, 42, 50, 51, 52, 53], [0, 300, 7, 8, 9, 10, 11], [0, *range(100, 140)])
"""Prompts with their completions, in ids: this is about weights, not about tokenisers."""
FILMS = [
    {"prompt": "What a joy to watch. It was", "choices": [" terrible", " great"], "answer": 1},
    {"prompt": "The second half was dull. It was", "choices": [" bad", " good"], "answer": 0},
    {"prompt": "A fine cast, and a waste of time. It was", "choices": [" slow", " great"], "answer": 0},
]
TASK = """
task: films
dataset_path: json
dataset_kwargs:
  data_files: {{test: {films}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: brier_score
"""
"""A task of lm-evaluation-harness, with its documents in a file."""
ROWS = [
    {"prompt": ids[:place], "completion": [ids[place]]} for ids in SEQUENCES for place in range(PROMPT_TOKENS, len(ids))
]
"""Every token of a completion by itself, since ``/scores`` answers with sums over completions."""


@pytest.fixture(scope="module")
def adapter(vllm_client: Client) -> Adapter:
    return trained_adapter(vllm_client, updates=3, size=0.2)


@pytest.fixture(scope="module")
def stock_vllm(tiny_model: Path, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a vLLM that has loaded the adapter's export and nothing of ours."""
    directory = tmp_path_factory.mktemp("stock-vllm")
    exported, port = adapter.export(directory / "adapter"), free_port()
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model), "--port", str(port)]
    arguments += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{TUNED}={exported}"]
    for dtype in HALVES:
        arguments.append(f"{dtype}={adapter.export(directory / dtype, dtype=dtype)}")
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


@pytest.mark.parametrize("dtype", HALVES)
def test_exports_in_16_bits_are_close(stock_vllm: str, adapter: Adapter, dtype: Half) -> None:
    served = [logprob for ids in SEQUENCES for logprob in completion_logprobs(stock_vllm, dtype, ids)]
    expected = [row.logprobs[0] for row in adapter.scores(ROWS).rows]
    assert served == pytest.approx(expected, abs=HALVES[dtype])
    assert served != pytest.approx(expected, abs=1e-5), "rounding must show for this test"


def test_the_evaluation_harness_finds_the_same(
    vllm_server: Server, stock_vllm: str, adapter: Adapter, tiny_model: Path, tmp_path: Path
) -> None:
    films = tmp_path / "films.jsonl"
    films.write_text("\n".join(map(json.dumps, FILMS)))
    (tmp_path / "films.yaml").write_text(TASK.format(films=films))

    scores, logprobs = run_harness(tmp_path, vllm_server.url, adapter.name, tiny_model)
    stock_scores, stock_logprobs = run_harness(tmp_path, stock_vllm, TUNED, tiny_model)
    assert logprobs == pytest.approx(stock_logprobs, abs=1e-4)
    assert scores == pytest.approx(stock_scores, abs=1e-4)


def run_harness(directory: Path, url: str, model: str, tokenizer: Path) -> tuple[dict[str, float], list[float]]:
    """What lm-evaluation-harness makes of a model: its scores, and the log-likelihood of every choice."""
    output = directory / model.replace("/", "-")
    arguments = {"model": model, "base_url": f"{url}/v1/completions", "tokenizer": tokenizer, "num_concurrent": 1}
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--include_path", str(directory)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--tasks", "films", "--output_path", str(output), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "huggingface")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_*.jsonl")
    found = json.loads(results.read_text())["results"]["films"]
    scores = {name: found[f"{name},none"] for name in ("acc", "brier_score")}
    read = [json.loads(line) for line in samples.read_text().splitlines()]
    return scores, [float(choice[0][0]) for sample in read for choice in sample["resps"]]


def completion_logprobs(url: str, model: str, ids: list[int]) -> list[float]:
    """Log-probabilities of a sequence's tokens behind its prompt, by vLLM's OpenAI route."""
    # One sequence a call: stock vLLM (0.32) dies of several prompts whose log-probabilities are asked of a LoRA.
    ask: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 0}
    response = requests.post(f"{url}/v1/completions", json=ask, timeout=CALL_TIMEOUT_S)
    assert response.ok, response.text
    logprobs: list[float] = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    return logprobs[PROMPT_TOKENS : len(ids)]
