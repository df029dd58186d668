"""What it costs to serve every tenant from an adapter of their own, while some of these train; and who gets what.

    python benchmarks/tenants.py MODEL [FLAGS OF ZOACT SERVE]

MODEL is a checkpoint's directory. All tenants ask at once, first for the base model, then each for their own adapter,
then the same while some adapters train. Prints tokens a second in Markdown, and how answers, greedy, compare with the
tenant's exported adapter alone, in peft and float32: how many it would have written token by token, and how far their
tokens' log-probabilities are from its own.
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 0.1
"""Of every tenant's update: large enough that it changes what is written."""


@dataclass(frozen=True)
class Answer:
    """What a tenant got.

    Attributes:
        model: that answered, with its version.
        tokens: of the answer.
        logprobs: of the tokens, as the server has them.

    """

    model: str
    tokens: list[int]
    logprobs: list[float]


def ask_all(url: str, models: Sequence[str], prompts: Sequence[list[int]], count: int) -> tuple[list[Answer], float]:
    """Everybody's answer to their own prompt, and the tokens a second that all got together."""

    def ask(model: str, prompt: list[int]) -> Answer:
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "logprobs": 0}
        response = requests.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
        response.raise_for_status()
        found = response.json()
        (choice,) = found["choices"]
        return Answer(found["model"], choice["token_ids"], choice["logprobs"]["token_logprobs"])

    started = time.monotonic()
    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(ask, models, prompts))
    return answers, len(models) * count / (time.monotonic() - started)


@torch.inference_mode()
def compare(model: Any, prompt: list[int], answer: Answer) -> tuple[bool, float]:
    """Whether every token of an answer is the model's likeliest behind what comes before it, and the largest difference
    of their log-probabilities, in nats.
    """
    ids = torch.tensor([[*prompt, *answer.tokens]], device=DEVICE)
    table = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).cpu()
    own = table.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    difference = (own - torch.tensor(answer.logprobs)).abs().max()
    return table.argmax(-1).tolist() == answer.tokens, float(difference)


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
            network.to(DEVICE).eval()
            own, others = [], [compare(network, *asked) for asked in zip(prompts, before, strict=True)]
            for adapter, prompt, *answers in zip(adapters, prompts, before, during, strict=True):
                for answer in answers:
                    version = int(answer.model.rpartition("@")[2])
                    exported = adapter.export(directory / answer.model.replace("/", "-"), version=version)
                    alone = PeftModel.from_pretrained(network, str(exported))
                    own.append(compare(alone, prompt, answer))
                    network = alone.unload()
    print(f"{options.tenants} requests at once, {options.output} tokens each; {options.trainers} adapters train.\n")
    print("| served | tokens/s | of the base model |\n| --- | --- | --- |")
    for what, rate in (("base model", base), ("adapters", tuned), ("adapters, beside training", beside)):
        print(f"| {what} | {rate:,.0f} | {rate / base:.2f} |")
    print("\n| answers, against | same tokens | log-probabilities differ by at most, nats |\n| --- | --- | --- |")
    for what, found in (("the exported adapter alone", own), ("the base model", others)):
        same, differences = zip(*found, strict=True)
        print(f"| {what} | {sum(same)} of {len(same)} | {max(differences):.2g} |")


if __name__ == "__main__":
    main()
