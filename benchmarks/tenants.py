"""What it costs to serve every tenant from an adapter of their own, while some of these train; and who gets what.

    python benchmarks/tenants.py MODEL [FLAGS OF ZOACT SERVE]

MODEL is a checkpoint's directory. All tenants ask at once, first for the base model, then each for their own adapter,
then the same while some adapters train. Prints tokens a second in Markdown; and for how many answers, greedy, peft
finds the same tokens with the tenant's exported adapter alone (in float32: on a GPU, give ``--dtype float32``).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from peft import PeftModel
from serving import TICKETS, TIMEOUT_S, new_adapter, training
from transformers import AutoModelForCausalLM, AutoTokenizer

from zoact_remote import Client, Update
from zoact_remote.cli.local_server import serving
from zoact_remote.tasks import BUILTIN, load_jsonl

SIZE = 0.1
"""Of every tenant's update: large enough that it changes what is written."""


@dataclass(frozen=True)
class Answer:
    """What a tenant got.

    Attributes:
        model: that answered, with its version.
        tokens: of the answer.

    """

    model: str
    tokens: list[int]


def ask_all(url: str, models: Sequence[str], prompts: Sequence[list[int]], count: int) -> tuple[list[Answer], float]:
    """Everybody's answer to their own prompt, and the tokens a second that all got together."""

    def ask(model: str, prompt: list[int]) -> Answer:
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        body["return_token_ids"] = True
        response = requests.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
        response.raise_for_status()
        found = response.json()
        return Answer(found["model"], found["choices"][0]["token_ids"])

    started = time.monotonic()
    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(ask, models, prompts))
    return answers, len(models) * count / (time.monotonic() - started)


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens behind a prompt, one after another."""
    tokens: list[int] = []
    ids, cache = torch.tensor([prompt]), None
    while len(tokens) < count:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids = output.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tenants", type=int, default=64)
    parser.add_argument("--trainers", type=int, default=4, help="tenants whose adapters train")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    options, flags = parser.parse_known_args()
    rows = BUILTIN["tickets"].rows(load_jsonl(TICKETS))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [tokenizer.encode(row["prompt"]) for row in rows[: options.tenants]]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        arguments = [options.model, "--state", str(directory / "state"), *flags]
        with serving(arguments, directory / "log") as running, Client(running.url, timeout=TIMEOUT_S) as client:
            running.wait_until_ready(client)
            adapters = [new_adapter(client, f"tenant-{i}/adapter") for i in range(options.tenants)]
            for number, adapter in enumerate(adapters):
                adapter.update(Update(0, ((number, SIZE),)))
            names = [adapter.name for adapter in adapters]
            # Kernels are warm from here on.
            ask_all(running.url, names[:8], [[3] * 8] * 8, 8)
            _, base = ask_all(running.url, [options.model] * options.tenants, prompts, options.output)
            before, tuned = ask_all(running.url, names, prompts, options.output)
            with training(adapters[: options.trainers], rows):
                during, beside = ask_all(running.url, names, prompts, options.output)
            network: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
            network.eval()
            same = []
            for adapter, prompt, *answers in zip(adapters, prompts, before, during, strict=True):
                for answer in answers:
                    version = int(answer.model.rpartition("@")[2])
                    exported = adapter.export(directory / answer.model.replace("/", "-"), version=version)
                    alone = PeftModel.from_pretrained(network, str(exported))
                    same.append(answer.tokens == greedy(alone, prompt, options.output))
                    network = alone.unload()
            unlike = sum(a.tokens != greedy(network, p, options.output) for a, p in zip(before, prompts, strict=True))
    print(f"{options.tenants} requests at once, {options.output} tokens each; {options.trainers} adapters train.\n")
    print("| served | tokens/s | of the base model |\n| --- | --- | --- |")
    for what, rate in (("base model", base), ("adapters", tuned), ("adapters, beside training", beside)):
        print(f"| {what} | {rate:,.0f} | {rate / base:.2f} |")
    print(
        f"\n{sum(same)} of {len(same)} answers are those of the exported adapter alone; {unlike} of "
        f"{options.tenants} adapters do not write what the base model writes."
    )


if __name__ == "__main__":
    main()
