"""One model on two GPUs against the same model on one: losses, digests, bases and the time of a call.

    python benchmarks/gpu/two_gpus.py --geometry llama-1b -- --disable-custom-all-reduce
    ZOACT_GPU_KERNELS=0 python benchmarks/gpu/two_gpus.py --model CHECKPOINT

Two servers, one after the other, are asked the same: ``zoact serve`` with ``--tensor-parallel-size`` 1 and 2. Rows are
random token ids. A geometry gets random weights, from one seed. vLLM shards whole attention heads: a CHECKPOINT with an
odd number of them, as SmolLM2-135M with its 9, does not go onto two. Without GPUs, two workers share the CPU.

Sums over shards are rounded apart, so losses differ; what the differences are to be held against is printed beside
them. Coefficients must not differ at all.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import geometry
import numpy as np
import torch

from server_ext.gpu.platform import turned_on
from zoact_remote import Basis, Client, Probe, Update
from zoact_remote.cli.local_server import serving

ON_GPU = torch.cuda.is_available()
DTYPE = "bfloat16" if ON_GPU else "float32"
EPSILON = 2.0**-7
COMPLETION = 16
UPDATES = (Update(0, ((1, 0.02), (2, -0.01))), Update(1, ((3, 0.01),), decay=0.1))
WARM_UP, REPEATS = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=geometry.GEOMETRIES, default="llama-1b")
    parser.add_argument("--model", help="a checkpoint's directory, instead of a geometry")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each row")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--logs", type=Path, help="where to leave the servers' logs")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="for vLLM")
    options = parser.parse_args()
    # By default vLLM's CPU build wants a NUMA node for each of its workers.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        model = options.model
        if model is None:
            model = geometry.write(options.geometry, directory / "model")
            geometry.write_weights(model, DTYPE)
        one, two = (serve(options, model, gpus, directory) for gpus in (1, 2))
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    kernels = "our kernels" if turned_on() and ON_GPU else "vLLM's kernels"
    print(f"\n{device}, {options.model or options.geometry}, {DTYPE}, rank {options.rank}, {kernels}, ", end="")
    print(f"{options.rows} rows of {options.tokens} tokens, the last {COMPLETION} scored, {options.probes} probes\n")
    print_table(one, two)


def serve(options: argparse.Namespace, model: str, gpus: int, directory: Path) -> dict[str, Any]:
    """What a server over some GPUs answers."""
    arguments = [model, "--dtype", DTYPE, "--max-rank", str(options.rank), "--slots", str(2 * options.probes)]
    arguments += ["--state", str(directory / f"state-{gpus}"), "--", "--tensor-parallel-size", str(gpus)]
    arguments += ["--max-model-len", "4096", *(["--enforce-eager"] if options.eager else []), *options.flags]
    log = (options.logs or directory) / f"server-{gpus}.log"
    # A server that hangs or dies is not waited for.
    with serving(arguments, log) as server, Client(server.url, timeout=(5.0, 120.0), patience=0) as client:
        server.wait_until_ready(client)
        return answers(client, options)


def answers(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    choose = random.Random(0)
    tokens = [choose.choices(range(10, 30000), k=options.tokens) for _ in range(options.rows)]
    rows = [{"prompt": row[:-COMPLETION], "completion": row[-COMPLETION:]} for row in tokens]
    adapter = client.create_adapter("benchmark/random", rank=options.rank, basis=Basis("random", seed=11))
    adapter.calibrate()
    digests = [adapter.update(update).digest for update in UPDATES]
    scores = {version: adapter.scores(rows, version=version) for version in (0, len(UPDATES))}
    found = adapter.losses(rows, [Probe(seed, EPSILON) for seed in range(options.probes)], base=True)
    learnt = client.create_adapter("benchmark/learnt", rank=options.rank, basis=Basis(positions="both", passes=2))
    learnt.calibrate(rows)
    seconds = []
    for call in range(WARM_UP + REPEATS):
        probes = [Probe((call + 1) * options.probes + i, EPSILON) for i in range(options.probes)]
        started = time.perf_counter()
        adapter.losses(rows, probes)
        seconds.append(time.perf_counter() - started)
    return {
        "digests": digests,
        "base": np.array([scores[0].loss]),
        "tuned": np.array([scores[len(UPDATES)].loss]),
        "sides": np.array([(pair.plus, pair.minus) for pair in found.losses]),
        "a token": np.array([row.logprobs[0] / COMPLETION for answer in scores.values() for row in answer.rows]),
        "energy": np.array([energy for _, energy in sorted((learnt.info.energy or {}).items())]),
        "seconds": statistics.median(seconds[WARM_UP:]),
    }


def print_table(one: dict[str, Any], two: dict[str, Any]) -> None:
    def row(what: str, name: str) -> None:
        difference = np.abs(one[name] - two[name]).max()
        print(f"| {what} | {one[name].mean():.6f} | {two[name].mean():.6f} | {difference:.2e} |")

    print("| | one GPU | two GPUs | largest difference |\n| --- | --- | --- | --- |")
    row("loss, base model", "base")
    row("loss, adapter", "tuned")
    row("losses, both sides of the probes (mean)", "sides")
    row("a row's log-likelihood, a token (mean)", "a token")
    row("energy of the learnt bases (mean)", "energy")
    for answer in (one, two):
        answer["slopes"] = (answer["sides"][:, 0] - answer["sides"][:, 1]) / (2 * EPSILON)
        answer["size"] = np.sqrt(np.mean(answer["slopes"] ** 2, keepdims=True))
    row("slopes (L+ - L-) / 2 epsilon (mean)", "slopes")
    row("slopes, root mean square", "size")
    equal = "equal" if one["digests"] == two["digests"] else f"NOT EQUAL: {one['digests']}, {two['digests']}"
    print(f"| digests of {len(UPDATES)} versions | | | {equal} |")
    faster = one["seconds"] / two["seconds"]
    print(
        f"| a losses call, ms | {one['seconds'] * 1e3:.0f} | {two['seconds'] * 1e3:.0f} | {faster:.2f} times as fast |"
    )


if __name__ == "__main__":
    main()
