"""A whole training step, client included, against what else people do with forward passes alone.

    python benchmarks/gpu/training_step.py --geometry llama-8b --pairs 1 8 --tenants 1 4 16 64

A step is the losses of some ± pairs on one batch, and the update that follows from them. Random weights of the given
geometry, token ids, the last token scored. Each method is a process of its own on the same device:

- ``mezo``: all weights perturbed in place, in plain Transformers (MeZO, arXiv 2305.17333);
- ``in-place``: the same through vLLM, prefix caching off;
- ``hot-swap``: LoRA adapters written to files and loaded into stock vLLM's server, one for each side of a pair;
- ``ours``: ``zoact serve`` and a Trainer, over loopback; a PipelinedTrainer, whose probes are one step stale; and
  several tenants that train at once;
- ``ours-fp8``: the same over FP8 weights, which cannot be perturbed in place. On a GPU.

Prints two tables in Markdown: seconds a step, of all steps together, since those of two that overlap cannot be told
apart; and the tenants'. Runs on the CPU too, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import geometry
import torch
from engines import apart, slot_rank, write_row

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE: Literal["bfloat16", "float32"] = "bfloat16" if ON_GPU else "float32"
EPSILON, RATE = 2.0**-7, 1e-6
SCORED = 0
"""The token whose log-probability is the loss: one that the tokenizer of three words has."""
WARM_UP = 2
METHODS = ("ours", "in-place", "mezo", "hot-swap")
"""The slowest last."""
FP8 = "ours-fp8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=geometry.GEOMETRIES, default="llama-8b")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, FP8], default=METHODS)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tenants", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", help="file for the figures, as JSON lines")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        measure(options)
        return
    found: list[dict[str, Any]] = []
    for method in options.methods:
        found += apart(__file__, [*sys.argv[1:], "--method", method], ours=method in ("ours", FP8))
    if options.out:
        with open(options.out, "a") as out:
            out.writelines(json.dumps(row) + "\n" for row in found)
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(
        f"\n{device}, {options.geometry}, {DTYPE}, rank {options.rank}, {options.rows} rows of {options.tokens} tokens"
    )
    print("\n| pairs a step | method | s a step | of ours |\n| --- | --- | --- | --- |")
    steps = [row for row in found if "tenants" not in row]
    ours = {row["pairs"]: row["seconds"] for row in steps if (row["method"], row.get("trainer")) == ("ours", "plain")}
    for row in steps:
        share = f"{row['seconds'] / ours[row['pairs']]:.2f}" if row["pairs"] in ours else ""
        stale = ", one step stale" if row.get("trainer") == "pipelined" else ""
        print(f"| {row['pairs']} | {row['method']}{stale} | {row['seconds']:.3f} | {share} |")
    several = [row for row in found if "tenants" in row]
    if several:
        print("\n| tenants that train at once | method | sequences/s | of one's |\n| --- | --- | --- | --- |")
    for method, rows in groupby(several, itemgetter("method")):
        rates = {row["tenants"]: row["sequences_per_s"] for row in rows}
        for tenants, rate in rates.items():
            print(f"| {tenants} | {method} | {rate:,.0f} | {rate / next(iter(rates.values())):.2f} |")


def measure(options: argparse.Namespace) -> None:
    choose = random.Random(0)
    prompts = [choose.choices(range(200, 32000), k=options.tokens) for _ in range(options.rows)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        model = geometry.write(options.geometry, directory / "model")
        methods: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
            "mezo": mezo, "in-place": in_place, "hot-swap": hot_swap, "ours": ours,
            FP8: partial(ours, flags=["--quantization", "fp8"]),
        }  # fmt: skip
        for row in methods[options.method](options, model, prompts, directory):
            write_row(options.out, {"method": options.method, **row})


def seconds_a_step(step: Callable[[int], None], steps: int, warm_up: int = WARM_UP) -> float:
    for number in range(warm_up):
        step(number)
    started = time.perf_counter()
    for number in range(warm_up, warm_up + steps):
        step(number)
    return (time.perf_counter() - started) / steps


def spsa(loss: Callable[[], float], perturb: Callable[[int, float], object], pairs: int) -> Callable[[int], None]:
    """A step that perturbs all weights in place: both sides of every pair, back again, and the update."""

    def step(number: int) -> None:
        slopes = {}
        for seed in range(number * pairs, (number + 1) * pairs):
            perturb(seed, EPSILON)
            plus = loss()
            perturb(seed, -2 * EPSILON)
            slopes[seed] = (plus - loss()) / (2 * EPSILON)
            perturb(seed, EPSILON)
        for seed, slope in slopes.items():
            perturb(seed, -RATE * slope / pairs)

    return step


def mezo(options: argparse.Namespace, model: str, prompts: list[list[int]], _: Path) -> Iterator[dict[str, Any]]:
    from in_place_worker import perturb
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(DEVICE):
        config = AutoConfig.from_pretrained(model)
        new_network: Any = AutoModelForCausalLM.from_config
        network = new_network(config, dtype=getattr(torch, DTYPE)).eval()
    ids = torch.tensor(prompts, device=DEVICE)

    def loss() -> float:
        with torch.inference_mode():
            logits = network(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            return -float(logits.log_softmax(-1)[:, SCORED].mean())

    for pairs in options.pairs:
        step = spsa(loss, lambda seed, scale: perturb(network, seed, scale), pairs)
        yield {"pairs": pairs, "seconds": seconds_a_step(step, options.steps)}


def in_place(options: argparse.Namespace, model: str, prompts: list[list[int]], _: Path) -> Iterator[dict[str, Any]]:
    import vllm
    from vllm.inputs import TokensPrompt

    llm = vllm.LLM(
        model, load_format="dummy", dtype=DTYPE, enforce_eager=options.eager or not ON_GPU, enable_prefix_caching=False,
        max_num_batched_tokens=16384, max_model_len=4096, worker_extension_cls="in_place_worker.InPlaceWorker",
    )  # fmt: skip
    parameters = vllm.SamplingParams(max_tokens=1, logprob_token_ids=[SCORED], detokenize=False, skip_clone=True)
    batch = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]

    def loss() -> float:
        outputs: list[Any] = llm.generate(batch, parameters, use_tqdm=False)
        return -statistics.fmean(output.outputs[0].logprobs[0][SCORED].logprob for output in outputs)

    for pairs in options.pairs:
        step = spsa(loss, lambda seed, scale: llm.collective_rpc("perturb", args=(seed, scale)), pairs)
        yield {"pairs": pairs, "seconds": seconds_a_step(step, options.steps)}


def hot_swap(
    options: argparse.Namespace, model: str, prompts: list[list[int]], directory: Path
) -> Iterator[dict[str, Any]]:
    import requests
    from safetensors.torch import save_file

    shapes = geometry.linear_shapes(options.geometry)
    coefficients = {name: torch.zeros(out, options.rank, device=DEVICE) for name, (out, _) in shapes.items()}
    dtype = getattr(torch, DTYPE)
    basis = {
        f"base_model.model.{name}.lora_A.weight": torch.linalg.qr(torch.randn(width, options.rank))[0].T.to(dtype)
        for name, (_, width) in shapes.items()
    }
    basis = {name: matrix.contiguous() for name, matrix in basis.items()}
    config = {"peft_type": "LORA", "r": options.rank, "lora_alpha": options.rank, "target_modules": geometry.LINEAR}

    def noise(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for name, matrix in coefficients.items():
            yield name, torch.empty_like(matrix).bernoulli_(generator=generator).mul_(2).sub_(1)

    def write(seed: int, epsilon: float) -> Path:
        path = directory / f"{seed}{epsilon:+}"
        path.mkdir()
        found = {
            f"base_model.model.{name}.lora_B.weight": (coefficients[name] + epsilon * z).to(dtype).cpu()
            for name, z in noise(seed)
        }
        save_file(basis | found, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path

    def loss(seed: int, epsilon: float) -> float:
        path = write(seed, epsilon)
        adapter = {"lora_name": path.name, "lora_path": str(path)}
        post("/v1/load_lora_adapter", adapter)
        # One token allowed, whose log-probability is taken before the others are masked.
        body = {"model": path.name, "prompt": prompts, "max_tokens": 1, "allowed_token_ids": [SCORED], "logprobs": 0}
        answer = post("/v1/completions", body).json()
        post("/v1/unload_lora_adapter", {"lora_name": path.name})
        shutil.rmtree(path)
        return -statistics.fmean(choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"])

    most = 2 * max(options.pairs)
    flags = ["--enable-lora", "--max-loras", str(most), "--max-lora-rank", str(slot_rank("stock", options.rank))]
    flags += ["--lora-target-modules", *geometry.LINEAR]
    with stock_server(options, model, directory, flags) as url, ThreadPoolExecutor(most) as threads:

        def post(route: str, body: dict[str, Any]) -> requests.Response:
            answer = requests.post(url + route, json=body, timeout=600)
            if not answer.ok:
                sys.exit(f"{route}: {answer.text}")
            return answer

        for pairs in options.pairs:

            def step(number: int, pairs: int = pairs) -> None:
                seeds = range(number * pairs, (number + 1) * pairs)
                sides = [(seed, sign * EPSILON) for seed in seeds for sign in (1, -1)]
                losses = list(threads.map(lambda side: loss(*side), sides))
                for seed, plus, minus in zip(seeds, losses[::2], losses[1::2], strict=True):
                    for name, z in noise(seed):
                        coefficients[name].add_(z, alpha=-RATE * (plus - minus) / (2 * EPSILON * pairs))

            # A step takes so long that two must do.
            yield {"pairs": pairs, "seconds": seconds_a_step(step, steps=1, warm_up=1)}


def server_flags(options: argparse.Namespace) -> list[str]:
    """What both servers are given."""
    flags = ["--load-format", "dummy", "--max-model-len", "4096", "--max-num-batched-tokens", "16384"]
    return [*flags, "--no-enable-prefix-caching", *(["--enforce-eager"] if options.eager or not ON_GPU else [])]


@contextmanager
def stock_server(options: argparse.Namespace, model: str, directory: Path, flags: list[str]) -> Iterator[str]:
    """vLLM's own server, without the extension."""
    import requests

    from zoact_remote.cli.local_server import free_port

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--dtype", DTYPE, *server_flags(options), *flags]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_PLUGINS": "none"}
    with (directory / "stock.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        while True:
            if process.poll() is not None:
                sys.exit((directory / "stock.log").read_text()[-4000:])
            try:
                if requests.get(f"{url}/health", timeout=2).ok:
                    break
            except requests.RequestException:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def ours(
    options: argparse.Namespace, model: str, prompts: list[list[int]], directory: Path, flags: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    from zoact_remote import Client, PipelinedTrainer, Trainer
    from zoact_remote.cli.local_server import serving

    slots = 2 * max([*options.pairs, *options.tenants])
    arguments = [model, "--dtype", DTYPE, "--max-rank", str(options.rank), "--slots", str(slots)]
    arguments += ["--state", str(directory / "state"), "--", *server_flags(options), *flags]
    # An adapter of the 8B geometry takes some 150 MiB of what vLLM leaves.
    arguments += ["--gpu-memory-utilization", "0.7"] if ON_GPU else []
    rows = [{"prompt": prompt, "completion": [SCORED]} for prompt in prompts]
    with serving(arguments, directory / "ours.log") as server, Client(server.url, patience=0) as client:
        server.wait_until_ready(client)
        adapters = [new_adapter(client, options, tenant) for tenant in range(max([1, *options.tenants]))]
        for pairs in options.pairs:
            for name, trainer in (("plain", Trainer), ("pipelined", PipelinedTrainer)):
                yield {"pairs": pairs, "trainer": name, "seconds": train(adapters[:1], options, rows, pairs, trainer)}
        for tenants in options.tenants:
            seconds = train(adapters[:tenants], options, rows, 1, Trainer)
            sequences = 2 * options.rows * tenants
            yield {"pairs": 1, "tenants": tenants, "seconds": seconds, "sequences_per_s": sequences / seconds}


def new_adapter(client: Any, options: argparse.Namespace, tenant: int) -> Any:
    from zoact_remote import Basis

    adapter = client.create_adapter(f"tenant-{tenant}/adapter", rank=options.rank, basis=Basis("random"))
    adapter.calibrate()
    return adapter


def train(adapters: list[Any], options: argparse.Namespace, rows: list[Any], pairs: int, trainer: Any) -> float:
    """Seconds a step of adapters that train at once, their last updates included."""
    from zoact_remote import Adam, TwoPoint, train_together

    def run(steps: int) -> float:
        trainers = [
            trainer(adapter, TwoPoint(EPSILON, pairs), Adam(), RATE, rows, steps=steps, batch_size=len(rows))
            for adapter in adapters
        ]
        started = time.perf_counter()
        for done in train_together(trainers):
            done.result()
        return (time.perf_counter() - started) / steps

    run(WARM_UP)
    return run(options.steps)


if __name__ == "__main__":
    main()
