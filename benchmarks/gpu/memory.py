"""Device memory over the base model's, by rank and probes in flight: ours, and stock vLLM with as many adapters.

    python benchmarks/gpu/memory.py --geometry llama-8b --ranks 4 16 64 --probes 1 8 32 128 --eager

Every figure is a start of its own, with slots for as many adapters as there are probes and a key-value cache of one
fixed size; the engines are those of ``engines.py``. A pass has all probes in flight, with losses read back; ours also
applies an update of a term a pair, as a training step does. What does not fit is left empty.

Figures are what the device lost to the worker at the worst moment of its life: what is gone now, by the driver's count,
with the allocator's reserve as large as it ever was. The driver alone sees the context, loaded kernels and what
libraries take; the allocator alone knows its own highest reserve. Polling would see both, but not every moment. Nobody
else may use the device meanwhile. ``slots`` is what the slots must take by count: rank x (in + out) numbers of 16 bits
for every layer and slot, where ours has twice the rank. Without a GPU, the worker's highest resident memory is taken.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import geometry
import torch
from engines import KINDS, Engine, apart, device_name, slot_rank, write_row

MIB = 1 << 20
CACHE_BYTES = 4 << 30
SEQUENCES, TOKENS = 512, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=geometry.GEOMETRIES, default="llama-8b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS[1:])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each sequence")
    parser.add_argument("--eager", action="store_true", help="without compilation and CUDA graphs: shorter starts")
    parser.add_argument("--out", help="file for the figures, as JSON lines")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options)
        return
    cells = [(kind, rank, probes) for kind in options.kinds for rank in options.ranks for probes in options.probes]
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    # vLLM takes functions as remote calls only where it is told that it may.
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    for kind, rank, probes in [("base", 0, 0), *cells]:
        one = ["--one", kind, "--ranks", str(rank), "--probes", str(probes)]
        rows = apart(__file__, [*sys.argv[1:], *one], ours=kind == "ours", environment=environment)
        if options.out:
            with open(options.out, "a") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            found[kind, rank, probes] = row
    print_table(found, options)


def print_table(found: dict[tuple[str, int, int], dict[str, Any]], options: argparse.Namespace) -> None:
    base, compiled = found["base", 0, 0], "eager" if options.eager else "compiled"
    print(f"\n{base['device']}, {options.geometry}, {compiled}; MiB over the base model's, which takes ", end="")
    print(f"{base['bytes'] / MIB:,.0f}, its cache of {CACHE_BYTES / MIB:,.0f} included\n")
    print("| rank | probes | " + " | ".join(f"{kind} | slots" for kind in options.kinds) + " |")
    print("| --- " * (2 + 2 * len(options.kinds)) + "|")
    for rank in options.ranks:
        for probes in options.probes:
            cells = []
            for kind in options.kinds:
                row = found.get((kind, rank, probes))
                cells.append(f"{(row['bytes'] - base['bytes']) / MIB:,.0f}" if row else "")
                cells.append(f"{slot_bytes(options.geometry, kind, rank, probes) / MIB:,.0f}")
            print(f"| {rank} | {probes} | " + " | ".join(cells) + " |")


def slot_bytes(name: str, kind: str, rank: int, slots: int) -> int:
    """What vLLM's buffers for adapters must take."""
    widths = sum(out + inputs for out, inputs in geometry.linear_shapes(name).values())
    return 2 * slot_rank(kind, rank) * widths * slots


def measure(options: argparse.Namespace) -> None:
    import vllm

    kind, (rank,), (probes,) = options.one, options.ranks, options.probes
    with tempfile.TemporaryDirectory() as directory:
        engine = Engine(
            kind, Path(directory), options.geometry, "bfloat16", rank, probes, enforce_eager=options.eager,
            kv_cache_memory_bytes=CACHE_BYTES,
        )  # fmt: skip
        engine.llm.generate(**engine.requests(options.sequences, options.tokens, probes, "token"))
        if kind == "ours":
            engine.llm.generate(**engine.requests(options.sequences, options.tokens, probes, "completion"))
            engine.update(terms=max(1, probes // 2))
        (most,) = engine.llm.collective_rpc(lost)
        row = {
            "device": device_name(), "vllm": vllm.__version__, "kind": kind, "geometry": options.geometry, "rank": rank,
            "probes": probes, "sequences": options.sequences, "tokens": options.tokens, "eager": options.eager,
            "bytes": most,
        }  # fmt: skip
        write_row(options.out, row)


def lost(_: Any) -> int:
    """Bytes of the device that a worker took at most; it runs in the worker."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()


if __name__ == "__main__":
    main()
