"""Throughput of perturbed forward passes against the base model's, and against stock vLLM's LoRA.

    python benchmarks/gpu/throughput.py --geometry llama-8b --ranks 4 16 64 --weights bfloat16 fp8 int4

The engines are those of ``engines.py``; filling the slots of new probes is timed. Each rank and kind of weights is a
start of its own, which takes minutes, and all cases share it: it has slots for the case with the most probes. Stock
kernels slow down with every slot there is, so ask for 128 probes in a command of its own:

    python benchmarks/gpu/throughput.py --cases 128:512:128:token

A pass sends all sequences at once, one token generated; the best of three is reported, in tokens of the prompts a
second. ``2:32:128`` is one pair on 16 rows. What is read back: see ``Engine.requests``.

FP8 weights are vLLM's own, made as it loads the model (a scale a layer, and inputs rounded as they come); int4 weights
have GPTQ's format and run through Marlin.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import geometry
from engines import KINDS, READS, Engine, apart, device_name, write_row

CASES = [
    *((32, 512, 128, read) for read in READS),
    *((probes, 512, 128, "token") for probes in (1, 4, 8)),
    *((32, 1 << 16 - tokens, 1 << tokens, "token") for tokens in (6, 9, 11)),
    (2, 32, 128, "completion"),
    (2, 32, 64, "token"),
]
"""Probes in flight, sequences, tokens of each, what is read back."""
REPEATS = 3


def case(text: str) -> tuple[int, int, int, str]:
    probes, sequences, tokens, read = text.split(":")
    if read not in READS:
        raise argparse.ArgumentTypeError(f"reads are {', '.join(READS)}")
    return int(probes), int(sequences), int(tokens), read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=geometry.GEOMETRIES, default="llama-8b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--weights", nargs="+", choices=geometry.WEIGHTS, default=["bfloat16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--cases", type=case, nargs="+", default=CASES, help="probes:sequences:tokens:read")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument(
        "--graphs", type=int, nargs="+", default=[], help="tokens of batches to capture as CUDA graphs, beyond 512"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels that took longest")
    parser.add_argument("--out", help="file for the figures, as JSON lines")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options)
        return
    starts = [
        (weights, kind, rank)
        for weights in options.weights
        for kind in options.kinds
        # The base model has no rank.
        for rank in (options.ranks if kind != "base" else options.ranks[:1])
    ]
    rows: list[dict[str, Any]] = []
    for weights, kind, rank in starts:
        one = ["--one", "--weights", weights, "--kinds", kind, "--ranks", str(rank)]
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if options.profile else {}
        found = apart(__file__, [*sys.argv[1:], *one], ours=kind == "ours", environment=environment)
        if options.out:
            with open(options.out, "a") as out:
                out.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
    print_table(rows, options)


def print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    def shape(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["weights"], row["sequences"], row["tokens"]

    base = {shape(row): row["rate"] for row in rows if row["kind"] == "base"}
    print(f"\n{rows[0]['device'] if rows else ''}, {options.geometry}, {'eager' if options.eager else 'compiled'}\n")
    print("| weights | engine | rank | probes | sequences x tokens | read back | tokens/s | sequences/s | of base |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        share = f"{row['rate'] / base[shape(row)]:.3f}" if shape(row) in base else ""
        rank = "" if row["kind"] == "base" else row["rank"]
        print(
            f"| {row['weights']} | {row['kind']} | {rank} | {row['probes']} | {row['sequences']} x {row['tokens']} "
            f"| {row['read']} | {row['rate']:,.0f} | {row['rate'] / row['tokens']:,.0f} | {share} |"
        )


def measure(options: argparse.Namespace) -> None:
    import vllm

    (weights,), (kind,), (rank,) = options.weights, options.kinds, options.ranks
    slots = max(probes for probes, *_ in options.cases)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        engine = Engine(
            kind, Path(directory), options.geometry, weights, rank, slots, enforce_eager=options.eager,
            gpu_memory_utilization=0.85, **graphs(options.graphs),
        )  # fmt: skip
        print(f"{kind}: engine up in {time.perf_counter() - started:.0f} s", flush=True)
        cases = options.cases
        if kind == "base":
            cases = list(dict.fromkeys((0, sequences, tokens, "none") for _, sequences, tokens, _ in cases))
        for probes, sequences, tokens, read in cases:
            if read == "completion" and kind == "stock":
                continue
            rate = best(engine, options, (probes, sequences, tokens, read))
            row = {
                "device": device_name(), "vllm": vllm.__version__, "kind": kind, "geometry": options.geometry,
                "weights": weights, "rank": rank, "sequences": sequences, "eager": options.eager, "tokens": tokens,
                "probes": probes, "slots": slots, "read": read, "graphs": options.graphs, "rate": rate,
            }  # fmt: skip
            write_row(options.out, row)


def graphs(sizes: list[int]) -> dict[str, Any]:
    """What has vLLM capture larger batches than by itself: a small model's take longer to launch than to run."""
    return {"compilation_config": {"cudagraph_capture_sizes": [*range(32, 513, 32), *sizes]}} if sizes else {}


def best(engine: Engine, options: argparse.Namespace, what: tuple[int, int, int, str]) -> float:
    """Tokens of the prompts a second, in one case."""
    probes, sequences, tokens, read = what
    seconds = []
    for repeat in range(REPEATS + 1):
        ask = engine.requests(sequences, tokens, probes, read)
        started = time.perf_counter()
        if options.profile and repeat == REPEATS:
            profile(engine.llm, ask)
        else:
            outputs = engine.llm.generate(**ask)
        seconds.append(time.perf_counter() - started)
    assert len(outputs) == len(ask["prompts"])
    return sequences * tokens / min(seconds[1 : REPEATS + (not options.profile)])


def profile(llm: Any, ask: dict[str, Any]) -> None:
    import cProfile
    import pstats

    import torch

    python = cProfile.Profile()
    python.runcall(llm.generate, **ask)
    pstats.Stats(python).sort_stats("tottime").print_stats(35)
    pstats.Stats(python).sort_stats("cumulative").print_stats(60)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        llm.generate(**ask)
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    for event in sorted(averages, key=lambda e: -e.self_device_time_total)[:25]:
        print(f"{event.self_device_time_total / 1e3:10.1f} ms {event.count:6d}  {event.key[:90]}", flush=True)


if __name__ == "__main__":
    main()
