"""The engines that benchmarks compare, each in a process of its own on the same device.

``base``: vLLM without LoRA; ``stock``: its own LoRA, adapters of random weights resident in their slots; ``ours``: the
extension, with its kernels where there is a GPU.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import geometry

from zoact_remote.cli.vllm_command import CPU_ENVIRONMENT, lora_rank

HERE = Path(__file__).parent
KINDS = ("base", "stock", "ours")
READS = ("none", "token", "completion", "prompt")
"""What of a pass is read back, see ``Engine.requests``."""
COMPLETION = 16
CANDIDATES = (100, 200)
MOST_TOKENS = 4096
"""Of a request."""
EPSILON = 2.0**-7


def apart(
    script: str, options: Sequence[str], *, ours: bool, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Runs a script in a process of its own and returns the rows that it appends to the file behind ``--out``."""
    import torch

    variables = {
        **os.environ,
        "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
        "VLLM_PLUGINS": "zoact" if ours else "none",
        # Asking whether there is a GPU must not begin with CUDA, which does not outlive vLLM's fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        **(environment or {}),
    }
    if not torch.cuda.is_available():
        variables = CPU_ENVIRONMENT | variables
    with tempfile.NamedTemporaryFile() as result:
        command = [sys.executable, script, *options, "--out", result.name]
        if subprocess.run(command, env=variables, check=False).returncode:
            print(f"failed: {' '.join(command)}", flush=True)
        return [json.loads(line) for line in Path(result.name).read_text().splitlines()]


def write_row(path: str, row: dict[str, Any]) -> None:
    """Appends a row of figures to a file of JSON lines, and prints it."""
    print(json.dumps(row), flush=True)
    with open(path, "a") as out:
        out.write(json.dumps(row) + "\n")


def device_name() -> str:
    """The GPU's name, or CPU. It may take memory on the device."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def slot_rank(kind: str, rank: int) -> int:
    """Columns of a slot for adapters of a rank: in 16 bits, ours takes twice as many."""
    return lora_rank(rank, "bfloat16" if kind == "ours" else "float32")


class Engine:
    """A started engine.

    Args:
        kind: one of ``KINDS``.
        directory: where to write the model's configuration.
        geometry_name: of ``geometry.GEOMETRIES``; the weights are random.
        weights: of ``geometry.WEIGHTS``.
        rank: of the adapters.
        slots: adapters and probes in a batch.
        arguments: vLLM's, beside those that all benchmarks give it.

    """

    def __init__(
        self, kind: str, directory: Path, geometry_name: str, weights: str, rank: int, slots: int, **arguments: Any
    ) -> None:
        import torch
        import vllm

        self.kind = kind
        self._rank = rank
        self._next = 1
        self._packing: Any = None
        given: dict[str, Any] = {
            "load_format": "dummy", "dtype": "bfloat16", "skip_tokenizer_init": True, "enable_prefix_caching": False,
            "max_num_batched_tokens": 16384, "max_num_seqs": 1024, "max_model_len": MOST_TOKENS,
        }  # fmt: skip
        if weights == "fp8":
            given["quantization"] = "fp8"
        elif weights == "int4" and torch.cuda.is_available():
            # On Hopper vLLM would take another kernel.
            given["linear_backend"] = "marlin"
        if kind != "base":
            worker = "server_ext.worker.ZoActWorker" if kind == "ours" else "stock_worker.StockWorker"
            given |= {
                "enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "worker_extension_cls": worker,
                "max_lora_rank": slot_rank(kind, rank), "lora_target_modules": geometry.LINEAR,
            }  # fmt: skip
        model = geometry.write(geometry_name, directory, weights)
        self.llm = vllm.LLM(model, **given, **arguments)
        if kind == "stock":
            self.llm.collective_rpc("stock_attach", args=(rank,))
        elif kind == "ours":
            self._attach()

    def requests(self, sequences: int, tokens: int, probes: int, read: str) -> dict[str, Any]:
        """Arguments of ``LLM.generate`` for one pass over random prompts, which the probes share evenly.

        Stock vLLM is asked for the same adapters again, the extension for new probes every time, with as many prompts
        to a request as it packs.

        Args:
            sequences: how many.
            tokens: of each.
            probes: in flight; 0 for the base model.
            read: ``none``; ``token``: log-probabilities of two candidates for the next token; ``completion``: of the
                prompt's last 16 tokens as well; ``prompt``: of all its tokens. vLLM reads all of the prompt's or none.

        """
        from vllm import SamplingParams

        choose = random.Random(0)
        prompts: list[list[int]] = [choose.choices(range(10, 32000), k=tokens) for _ in range(sequences)]
        adapters = self._adapters(probes)
        loras = [adapters[i * probes // sequences] if probes else None for i in range(sequences)]
        asked: list[dict[str, Any]] = [{}] * sequences
        if read != "none" and self._packing is not None:
            start = {"token": tokens, "completion": tokens - COMPLETION, "prompt": 1}[read]
            prompts, loras, asked = self._packs(prompts, loras, start)
        elif read != "none":
            asked = [{"logprob_token_ids": list(CANDIDATES)} | ({} if read == "token" else {"prompt_logprobs": 0})]
            asked *= sequences
        return {
            "prompts": [{"prompt_token_ids": prompt} for prompt in prompts],
            "sampling_params": [
                SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, skip_clone=True, **more)
                for more in asked
            ],
            "lora_request": loras if probes else None,
            "use_tqdm": False,
        }

    def _packs(
        self, prompts: list[list[int]], loras: list[Any], start: int
    ) -> tuple[list[list[int]], list[Any], list[dict[str, Any]]]:
        """Prompts, LoRAs and what is asked of the requests that hold prompts scored from some token on."""
        from server_ext.packing import SCORED_ROWS
        from server_ext.rows import Context

        packs = [
            (pack, lora)
            for lora, group in groupby(zip(loras, prompts, strict=True), key=itemgetter(0))
            for pack in self._packing.pack([Context(tuple(p), start, CANDIDATES) for _, p in group], MOST_TOKENS - 1)
        ]
        asked = [
            {
                "logprob_token_ids": list(range(pack.answers)),
                "extra_args": {SCORED_ROWS: pack.rows},
                "skip_reading_prefix_cache": True,
            }
            for pack, _ in packs
        ]
        return [pack.tokens for pack, _ in packs], [lora for _, lora in packs], asked

    def update(self, terms: int) -> None:
        """Applies an update of as many terms, and keeps the version before it."""
        from zoact_remote.wire import Update

        update = Update(0, tuple((seed, 1e-4) for seed in range(terms)))
        self.llm.collective_rpc("zoact_hold", args=("bench", 1, 0, json.dumps(update.to_json()), [0]))

    def _attach(self) -> None:
        """One adapter on all sites, at version 0."""
        import torch
        from safetensors.torch import save

        from server_ext.packing import Packing
        from zoact_remote.layout import Layout, Site

        description = json.loads(self.llm.collective_rpc("zoact_attach")[0])
        sites = tuple(Site(**site) for site in description["sites"])
        self._packing = Packing(**description["packing"]) if description["packing"] else None
        inputs = Layout(sites, self._rank).inputs
        basis = {name: torch.linalg.qr(torch.randn(width, self._rank))[0] for name, width in inputs.items()}
        names = json.dumps([[site.name for site in sites], self._rank])
        content = save({name: vectors.contiguous() for name, vectors in basis.items()})
        self.llm.collective_rpc("zoact_put", args=("bench", names, "rademacher", content))
        self.llm.collective_rpc("zoact_hold", args=("bench", 0, None, None, []))

    def _adapters(self, count: int) -> list[Any]:
        from vllm.lora.request import LoRARequest

        if self.kind != "ours":
            return [LoRARequest(f"random-{i}", i, f"random-{i}") for i in range(1, count + 1)]
        from server_ext.store import Point
        from server_ext.worker import point_path

        first, self._next = self._next, self._next + count
        points = [Point("bench", 0, "sha256:0", i // 2, EPSILON * (-1) ** i) for i in range(first, first + count)]
        return [LoRARequest(p.name, first + i, point_path(p)) for i, p in enumerate(points)]
