"""Many tenants on one vLLM: training does not stand in the way of those who are served, nor change what they get."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from server_ext.model_names import ModelName
from tests.server_ext.support import Lora, Reference
from tests.support import CALL_TIMEOUT_S, SLOTS, Server, trained_adapter
from zoact_remote import Adapter, Basis, Client, Probe, Side, Update

pytestmark = pytest.mark.vllm

TENANTS, TRAINING = 12, 2
"""More adapters than slots, and how many of them train meanwhile."""
TOKENS = 12
PROBES, LONG = 2 * SLOTS, 250
ROWS = [{"prompt": [0, *range(40, 60)], "completion": [60 + i]} for i in range(8)]


def prompt_of(number: int) -> list[int]:
    # The first block is everybody's: what is cached of it must not be shared.
    return [0, *range(40, 80), 100 + number]


def complete(server: Server, model: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True, **more}
    response = requests.post(f"{server.url}/v1/completions", json=body, timeout=CALL_TIMEOUT_S)
    assert response.ok, response.text
    answer: dict[str, Any] = response.json()
    return answer


def train(adapter: Adapter, stop: threading.Event) -> None:
    """Steps in random directions until told to stop."""
    update, version = None, adapter.refresh().version
    while not stop.is_set():
        version = adapter.losses(ROWS, [Probe(version, 0.1)], update=update).version
        update = Update(version, ((version, 0.02),))


def test_everybody_gets_the_answer_of_their_own_adapter(
    vllm_server: Server, vllm_client: Client, reference: Reference, tmp_path: Path
) -> None:
    adapters = [trained_adapter(vllm_client, size=0.2, basis=Basis(source="random", seed=i)) for i in range(TENANTS)]
    stop = threading.Event()
    answers: list[dict[str, Any]] = []
    with ThreadPoolExecutor(TENANTS + TRAINING) as pool:
        runs = [pool.submit(train, adapter, stop) for adapter in adapters[:TRAINING]]
        try:
            # There is foreground without a pause, until training has come a few steps on all the same.
            deadline = time.monotonic() + 300
            while min(adapter.refresh().version for adapter in adapters[:TRAINING]) < 3:
                assert time.monotonic() < deadline, "training has come to a stop"
                names = [adapter.name for adapter in adapters]
                answers += pool.map(lambda i, name: complete(vllm_server, name, prompt_of(i)), range(TENANTS), names)
        finally:
            stop.set()
        for run in runs:
            run.result()
    answers = answers[-2 * TENANTS :]
    tuned = 0
    for place, answer in enumerate(answers):
        number = place % TENANTS
        served = ModelName.parse(answer["model"])
        assert served is not None
        assert served.adapter == adapters[number].name
        alone = Lora.exported(adapters[number].export(tmp_path / str(place), version=served.version))
        tokens = answer["choices"][0]["token_ids"]
        assert tokens == reference.greedy(prompt_of(number), TOKENS, alone)
        tuned += tokens != reference.greedy(prompt_of(number), TOKENS)
    assert tuned > len(answers) / 2, "adapters must show for this test"


def test_probes_that_write_leave_slots_to_those_who_are_served(vllm_server: Server, vllm_client: Client) -> None:
    adapter, most = trained_adapter(vllm_client), 0.0
    with ThreadPoolExecutor(PROBES) as pool:
        # More than there are slots, and each would hold one for hundreds of steps.
        texts = [
            pool.submit(adapter.generate, [0, 40], max_tokens=LONG, probe=Side(seed, 0.5, 1)) for seed in range(PROBES)
        ]
        while not all(text.done() for text in texts):
            most = max(most, running(vllm_server))
        assert all(len(text.result().token_ids) == LONG for text in texts)
    assert 0 < most <= SLOTS // 2


def test_no_step_holds_more_of_training_than_its_share(vllm_server: Server, vllm_client: Client) -> None:
    adapter = trained_adapter(vllm_client)
    # Longer than half a share each, and nothing of them is in the prefix cache.
    rows = [{"prompt": [0, 40 + i, *range(40, 110)], "completion": [60]} for i in range(40)]
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(complete, vllm_server, adapter.name, [0, 41], max_tokens=LONG, ignore_eos=True)
        while not (running(vllm_server) or served.done()):
            time.sleep(0.01)
        before = steps(vllm_server)
        # The share holds for a while after the answer too, should it end before them.
        for seed in range(3):
            adapter.losses(rows, [Probe(seed, 0.1)])
        after = steps(vllm_server)
        served.result()
    # The share of a step is 128 tokens, beside which there is one of the answer; four times as many are under way.
    assert after["256.0"] - after["64.0"] > before["256.0"] - before["64.0"]
    assert after["+Inf"] - after["256.0"] == before["+Inf"] - before["256.0"]


def steps(server: Server) -> dict[str, float]:
    """How many steps vLLM has made, by the most tokens that they held."""
    return {bound: float(n) for bound, n in metric(server, r"iteration_tokens_total_bucket{.*le=\"(\S+?)\".*}")}


def running(server: Server) -> float:
    """How many requests vLLM works at."""
    return sum(float(value) for (value,) in metric(server, "num_requests_running{.*}"))


def metric(server: Server, pattern: str) -> list[tuple[str, ...]]:
    """What stands in a pattern's groups, and the value, of all of vLLM's metrics that it fits."""
    text = requests.get(f"{server.url}/metrics", timeout=CALL_TIMEOUT_S).text
    return [match.groups() for match in re.finditer(rf"^vllm:{pattern} (\S+)$", text, re.MULTILINE)]
