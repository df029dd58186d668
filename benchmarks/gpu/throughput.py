"""Throughput of perturbed forward passes against the base model's, and against stock vLLM's LoRA.

    python benchmarks/gpu/throughput.py --geometry llama-8b --probes 1 8 32 --rank 16

Every engine is a process of its own on the same device: the base model without LoRA, stock vLLM (adapters resident in
their slots before the timing starts), and the extension (every probe new, so that filling its slot is timed). A pass
sends all sequences at once, one token generated; the best of three is reported, in tokens of the prompts a second.

What is read back: nothing; ``token``: log-probabilities of two candidates for the next token; ``completion``: of the
prompt's last 16 tokens; ``prompt``: of all its tokens. Stock vLLM reads all of the prompt's or none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import geometry

HERE = Path(__file__).parent
CASES = [(32, 512, 128, "none"), (32, 512, 128, "token"), (32, 512, 128, "completion"), (32, 512, 128, "prompt")]
"""Probes in flight, sequences, tokens of each, what is read back."""
COMPLETION = 16
REPEATS = 3


def case(text: str) -> tuple[int, int, int, str]:
    probes, sequences, tokens, read = text.split(":")
    return int(probes), int(sequences), int(tokens), read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=geometry.GEOMETRIES, default="llama-8b")
    parser.add_argument("--kinds", nargs="+", default=["base", "stock", "ours"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cases", type=case, nargs="+", default=CASES, help="probes:sequences:tokens:read")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels that took longest")
    parser.add_argument("--out", help="file for the figures, as JSON lines")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        measure(options)
        return
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        environment = os.environ | {"VLLM_PLUGINS": "zoact" if kind == "ours" else "none", "ZOACT_GPU_KERNELS": "1"}
        environment["PYTHONPATH"] = f"{HERE}:{environment.get('PYTHONPATH', '')}"
        if options.profile:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        with tempfile.NamedTemporaryFile() as result:
            command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind, "--out", result.name]
            subprocess.run(command, env=environment, check=False)
            rows += [json.loads(line) for line in Path(result.name).read_text().splitlines()]
    if options.out:
        with open(options.out, "a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    shapes = ("sequences", "tokens")
    base = {
        tuple(row[s] for s in shapes): row["rate"] for row in rows if (row["kind"], row["read"]) == ("base", "none")
    }
    print(f"\n{rows[0]['device'] if rows else ''}, {options.geometry}, rank {options.rank}, ", end="")
    print(f"{'eager' if options.eager else 'compiled'}\n")
    print("| engine | probes | sequences x tokens | read back | tokens/s | sequences/s | of base |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        shape = row["sequences"], row["tokens"]
        share = f"{row['rate'] / base[shape]:.3f}" if shape in base else ""
        print(
            f"| {row['kind']} | {row['probes']} | {row['sequences']} x {row['tokens']} | {row['read']} "
            f"| {row['rate']:,.0f} | {row['rate'] / row['tokens']:,.0f} | {share} |"
        )


def measure(options: argparse.Namespace) -> None:
    import torch
    import vllm

    slots = max(probes for probes, *_ in options.cases)
    lora: dict[str, Any] = {}
    if options.kind != "base":
        worker = "server_ext.worker.ZoActWorker" if options.kind == "ours" else "stock_worker.StockWorker"
        lora = {
            "enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "worker_extension_cls": worker,
            "max_lora_rank": options.rank * (2 if options.kind == "ours" else 1),
            "lora_target_modules": geometry.LINEAR,
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        llm = vllm.LLM(
            geometry.write(options.geometry, Path(directory)), load_format="dummy", skip_tokenizer_init=True,
            enforce_eager=options.eager, enable_prefix_caching=False, max_num_batched_tokens=16384,
            max_num_seqs=1024, max_model_len=4096, gpu_memory_utilization=0.85, **lora,
        )  # fmt: skip
        print(f"{options.kind}: engine up in {time.perf_counter() - started:.0f} s", flush=True)
        loras = Loras(llm, options)
        cases = options.cases
        if options.kind == "base":
            cases = list(dict.fromkeys((0, sequences, tokens, "none") for _, sequences, tokens, _ in cases))
        for probes, sequences, tokens, read in cases:
            if read == "completion" and options.kind == "stock":
                continue
            rate = best(llm, loras, options, (probes, sequences, tokens, read))
            row = {
                "device": torch.cuda.get_device_name(), "vllm": vllm.__version__, "kind": options.kind,
                "geometry": options.geometry, "rank": options.rank, "sequences": sequences, "eager": options.eager,
                "tokens": tokens, "probes": probes, "read": read, "rate": rate,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            with open(options.out, "a") as out:
                out.write(json.dumps(row) + "\n")


class Loras:
    """LoRA requests: the same adapters again for stock vLLM, new probes every time for the extension."""

    def __init__(self, llm: Any, options: argparse.Namespace) -> None:
        self._kind = options.kind
        self._next = 1
        if self._kind == "stock":
            llm.collective_rpc("stock_attach")
        elif self._kind == "ours":
            import torch
            from safetensors.torch import save

            from zoact_remote.layout import Layout, Site

            description = json.loads(llm.collective_rpc("zoact_attach")[0])
            sites = tuple(Site(**site) for site in description["sites"])
            layout = Layout(sites, options.rank)
            basis = {
                name: torch.linalg.qr(torch.randn(w, options.rank))[0].contiguous() for name, w in layout.inputs.items()
            }
            names = json.dumps([[site.name for site in sites], options.rank])
            llm.collective_rpc("zoact_put", args=("bench", names, "rademacher", save(basis)))
            llm.collective_rpc("zoact_hold", args=("bench", 0, None, None, []))

    def __call__(self, count: int) -> list[Any]:
        if not count:
            return [None]
        from vllm.lora.request import LoRARequest

        if self._kind == "stock":
            return [LoRARequest(f"random-{i}", i, f"random-{i}") for i in range(1, count + 1)]
        from server_ext.store import Point
        from server_ext.worker import point_path

        first, self._next = self._next, self._next + count
        points = [Point("bench", 0, "sha256:0", i // 2, 2.0**-7 * (-1) ** i) for i in range(first, first + count)]
        return [LoRARequest(p.name, first + i, point_path(p)) for i, p in enumerate(points)]


def best(llm: Any, loras: Loras, options: argparse.Namespace, what: tuple[int, int, int, str]) -> float:
    """Tokens of the prompts a second, in one case."""
    import random

    from vllm import SamplingParams

    probes, sequences, tokens, read = what
    choose = random.Random(0)
    prompts = [{"prompt_token_ids": choose.choices(range(10, 32000), k=tokens)} for _ in range(sequences)]
    extra: dict[str, Any] = {}
    if read == "token":
        extra["logprob_token_ids"] = [100, 200]
    if read in ("completion", "prompt") and options.kind == "ours":
        extra["logprob_token_ids"] = [100, 200]
        extra["skip_reading_prefix_cache"] = True
        extra["extra_args"] = {"zoact_score_from": tokens - COMPLETION if read == "completion" else 1}
    elif read == "prompt":
        extra["prompt_logprobs"] = 0
    parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, skip_clone=True, **extra)
    seconds = []
    for repeat in range(REPEATS + 1):
        adapters = loras(probes)
        of_each = [adapters[i * len(adapters) // len(prompts)] for i in range(len(prompts))]
        ask = {"sampling_params": parameters, "lora_request": of_each if probes else None, "use_tqdm": False}
        started = time.perf_counter()
        if options.profile and repeat == REPEATS:
            profile(llm, prompts, ask)
        else:
            outputs = llm.generate(prompts, **ask)
        seconds.append(time.perf_counter() - started)
    assert len(outputs) == len(prompts)
    return sequences * tokens / min(seconds[1 : REPEATS + (not options.profile)])


def profile(llm: Any, prompts: list[Any], ask: dict[str, Any]) -> None:
    import cProfile
    import pstats

    import torch

    python = cProfile.Profile()
    python.runcall(llm.generate, prompts, **ask)
    pstats.Stats(python).sort_stats("tottime").print_stats(35)
    pstats.Stats(python).sort_stats("cumulative").print_stats(60)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        llm.generate(prompts, **ask)
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    for event in sorted(averages, key=lambda e: -e.self_device_time_total)[:25]:
        print(f"{event.self_device_time_total / 1e3:10.1f} ms {event.count:6d}  {event.key[:90]}", flush=True)


if __name__ == "__main__":
    main()
