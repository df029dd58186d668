"""LoRA on the CPU: our grouped kernels against vLLM's fallback, and both against the base model.

    python benchmarks/cpu_kernels.py MODEL

MODEL is a checkpoint's directory, such as the one that the quickstart prepares. One vLLM in this process takes the same
sequences through the base model and through adapters of random weights, with either kernel, all in turn; the medians
over the rounds are printed as a table in Markdown. Nothing is read back, so that the kernels are all that differs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "gpu"))

from stock_worker import StockWorker  # noqa: E402  (benchmarks/gpu is no package)

from server_ext.cpu_kernels import use_grouped_kernels  # noqa: E402
from zoact_remote.cli.vllm_command import CPU_ENVIRONMENT, LAYERS  # noqa: E402

RANK = 8
ADAPTERS = (2, 8, 32)
SEQUENCES, TOKENS = 32, 32
ROUNDS = 5


class Worker(StockWorker):
    """Mixed into vLLM's worker."""

    def use_kernels(self, grouped: bool) -> None:
        """Ours, or vLLM's own."""
        wrappers = self.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
        if grouped:
            use_grouped_kernels(wrappers)
            return
        for wrapper in wrappers:
            vars(wrapper).pop("add_lora_linear", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint")
    model = parser.parse_args().model
    os.environ |= {**CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "none"} | os.environ

    import vllm

    llm = vllm.LLM(
        model, dtype="float32", enforce_eager=True, enable_prefix_caching=False, enable_lora=True,
        max_loras=max(ADAPTERS), max_lora_rank=RANK, lora_target_modules=list(LAYERS), max_model_len=2048,
        worker_extension_cls=f"{Path(__file__).stem}.{Worker.__name__}",
    )  # fmt: skip
    llm.collective_rpc("stock_attach")
    kinds = [("base model", 0), *((kernels, n) for n in ADAPTERS for kernels in ("vLLM's", "grouped"))]
    times: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS + 1):
        for kernels, adapters in kinds:
            llm.collective_rpc("use_kernels", args=(kernels == "grouped",))
            times[kernels, adapters].append(seconds(llm, adapters))
    # The first round warms up.
    medians = {kind: statistics.median(found[1:]) for kind, found in times.items()}
    print(f"\n{SEQUENCES} sequences of {TOKENS} tokens, rank {RANK}, vLLM {vllm.__version__}, float32\n")
    print("| kernels | adapters | ms | of the base model's speed |\n| --- | --- | --- | --- |")
    for (kernels, adapters), median in medians.items():
        print(f"| {kernels} | {adapters} | {median * 1e3:,.0f} | {medians['base model', 0] / median:.2f} |")


def seconds(llm: Any, adapters: int) -> float:
    """Of a pass of all sequences, spread evenly over the adapters; 0 for the base model."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    prompts = [TokensPrompt(prompt_token_ids=list(range(100 + i, 100 + i + TOKENS))) for i in range(SEQUENCES)]
    numbers = [i % adapters + 1 for i in range(SEQUENCES)] if adapters else []
    loras = [LoRARequest(str(n), n, str(n)) for n in numbers] or None
    started = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=1), lora_request=loras, use_tqdm=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
