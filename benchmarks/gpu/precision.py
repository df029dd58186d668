"""The estimate g = (L+ - L-) / 2 epsilon of a bfloat16 server, against float64's directional derivative.

    python benchmarks/gpu/precision.py MODEL

MODEL is a checkpoint's directory. The reference is autograd in float64 on the weights as the server rounds them, with
the basis and the coefficients in full. The coefficients' standard deviation is 0.01, as training leaves them. Each line
of the table is one epsilon: the root of the mean squared error of g over the probes, in units of the derivatives' own
root mean square, and the median of the probes' relative errors. Servers: C + epsilon Z rounded into one slot (naive),
C and epsilon Z in columns of their own under vLLM's kernels (split), and, on a GPU, the extension's own kernels. On a
machine without a GPU it runs vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import geometry
import numpy as np
import torch
from engines import apart

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KINDS = ("naive", "split", "ours") if ON_GPU else ("naive", "split")
RANK, SLOTS = 4, 32
Row = tuple[list[int], int]
"""Token ids of a prompt, and of the word that follows it."""
TERMS = tuple((1_000_000 + i, 0.001 * (-1) ** i) for i in range(100))
"""The update that makes the coefficients."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--probes", type=int, default=50)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument(
        "--exponents", type=int, nargs="+", default=list(range(-12, -3)), help="epsilons, as powers of two"
    )
    parser.add_argument("--out", help="file for the estimates and derivatives (npz)")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        estimate(options)
        return
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        reference = Reference(options.model)
        rows = token_rows(options.model, options.rows)
        (scratch / "rows.json").write_text(json.dumps(rows))
        bases = reference.bases(rows)
        torch.save(bases, scratch / "bases.pt")
        for kind in options.kinds:
            apart(__file__, [*sys.argv[1:], "--kind", kind, "--scratch", directory], ours=kind == "ours")
        sites = json.loads((scratch / "sites.json").read_text())
        derivatives, loss = reference.derivatives(rows, bases, sites, options.probes)
        found = {kind: np.load(scratch / f"{kind}.npz") for kind in options.kinds}
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(f"\n{device}, {Path(options.model).name}, bfloat16, rank {RANK}, {options.rows} rows, ", end="")
    print(f"{options.probes} probes; rms of the derivatives {rms(derivatives):.4f}")
    print(
        f"\nLoss at the coefficients: {loss:.6f} in float64, "
        + ", ".join(f"{float(found[k]['loss']):.6f} {k}" for k in options.kinds)
    )
    print(
        "\n| epsilon | "
        + " | ".join(f"{k}, rms" for k in options.kinds)
        + " | "
        + " | ".join(f"{k}, median" for k in options.kinds)
        + " |"
    )
    print("| --- " * (1 + 2 * len(options.kinds)) + "|")
    for i, exponent in enumerate(options.exponents):
        errors = {kind: found[kind]["estimates"][i] - derivatives for kind in options.kinds}
        cells = [f"{rms(errors[kind]) / rms(derivatives):.4f}" for kind in options.kinds]
        cells += [f"{np.median(np.abs(errors[kind] / derivatives)):.4f}" for kind in options.kinds]
        print(f"| 2^{exponent} | " + " | ".join(cells) + " |")
    if options.out:
        np.savez(
            options.out,
            derivatives=derivatives,
            exponents=options.exponents,
            **{k: found[k]["estimates"] for k in options.kinds},
        )


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def token_rows(model: str, count: int) -> list[Row]:
    """Prompts and completions as token ids: sentences with a word of one token to follow."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    subjects = [
        "The invoice",
        "My parcel",
        "The app",
        "Your support",
        "This film",
        "The battery",
        "Our hotel",
        "The book",
    ]
    ends = [
        ("was late again, and I am", " really disappointed."),
        ("works better than before:", " highly recommended!"),
    ]
    texts = [(f"Review: {subject} {middle}", end) for subject in subjects for middle, end in ends]
    return [(tokenizer.encode(prompt), tokenizer.encode(end)[0]) for prompt, end in texts][:count]


class Reference:
    """The model in float64 with bfloat16's weights."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.network = network.to(DEVICE, torch.float64).eval().requires_grad_(False)
        self.layers = {
            name: layer
            for name, layer in self.network.named_modules()
            if isinstance(layer, torch.nn.Linear) and name.rpartition(".")[2] in geometry.LINEAR
        }

    def bases(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Every layer's top right singular vectors of its inputs: float32 ``[in, RANK]``."""
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in self.layers}
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
            for name, layer in self.layers.items()
        ]
        with torch.inference_mode():
            for prompt, _ in rows:
                self.network(input_ids=torch.tensor([prompt], device=DEVICE))
        for handle in handles:
            handle.remove()
        found = {name: torch.linalg.svd(torch.cat(x), full_matrices=False)[2][:RANK].T for name, x in seen.items()}
        return {name: vectors.float().contiguous().cpu() for name, vectors in found.items()}

    def derivatives(
        self,
        rows: list[Row],
        bases: dict[str, torch.Tensor],
        sites: list[dict[str, Any]],
        probes: int,
    ) -> tuple[np.ndarray[Any, Any], float]:
        """The loss's derivatives along the probes, at the coefficients, and the loss."""
        from server_ext.coefficients import Coefficients
        from server_ext.noise import Noise
        from zoact_remote.layout import Layout, Site
        from zoact_remote.wire import Update

        layout = Layout(tuple(Site(**site) for site in sites), RANK)
        noise = Noise(layout, "rademacher", DEVICE)
        flat = Coefficients(noise).after(Update(0, TERMS)).flat.double().requires_grad_()
        by_input = {site.input: bases[site.name].to(DEVICE).double() for site in reversed(layout.sites)}
        for site, matrix in zip(layout.sites, layout.matrices(flat).values(), strict=True):
            v = by_input[site.input]
            self.layers[site.name].register_forward_hook(lambda _, args, y, v=v, c=matrix: y + args[0] @ v @ c.T)
        loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for prompt, completion in rows:
            logits = self.network(input_ids=torch.tensor([prompt], device=DEVICE)).logits[0, -1]
            loss = loss - logits.log_softmax(-1)[completion] / len(rows)
        (gradient,) = torch.autograd.grad(loss, flat)
        along = [float(gradient @ noise.draw(seed).double()) for seed in range(probes)]
        return np.array(along), loss.item()


def estimate(options: argparse.Namespace) -> None:
    """One server's estimates, ``[epsilons, probes]``."""
    scratch: Path = options.scratch
    import vllm
    from safetensors.torch import save
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    from server_ext.store import Point
    from server_ext.worker import point_path
    from zoact_remote.wire import Update

    worker = "naive_worker.NaiveWorker" if options.kind == "naive" else "server_ext.worker.ZoActWorker"
    llm = vllm.LLM(
        options.model, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False, max_model_len=512,
        gpu_memory_utilization=0.4, enable_lora=True, max_loras=SLOTS, max_cpu_loras=SLOTS, max_lora_rank=8,
        lora_target_modules=geometry.LINEAR, worker_extension_cls=worker, max_num_seqs=SLOTS * options.rows,
        max_num_batched_tokens=16384,
    )  # fmt: skip
    description = json.loads(llm.collective_rpc("zoact_attach")[0])
    (scratch / "sites.json").write_text(json.dumps(description["sites"]))
    bases = torch.load(scratch / "bases.pt")
    by_input = {site["input"]: bases[site["name"]] for site in reversed(description["sites"])}
    names = json.dumps([[site["name"] for site in description["sites"]], RANK])
    llm.collective_rpc("zoact_put", args=("bench", names, "rademacher", save(by_input)))
    update = json.dumps(Update(0, TERMS).to_json())
    (digest,) = llm.collective_rpc("zoact_hold", args=("bench", 1, None, update, []))
    rows = json.loads((scratch / "rows.json").read_text())
    numbers = iter(range(1, 1 << 20))

    def losses(points: list[Point]) -> np.ndarray[Any, Any]:
        prompts, parameters, loras = [], [], []
        for point in points:
            lora = LoRARequest(point.name, next(numbers), point_path(point))
            for prompt, completion in rows:
                prompts.append(TokensPrompt(prompt_token_ids=prompt))
                parameters.append(
                    vllm.SamplingParams(
                        max_tokens=1, temperature=0.0, detokenize=False, logprob_token_ids=[completion], skip_clone=True
                    )
                )
                loras.append(lora)
        outputs: list[Any] = llm.generate(prompts, parameters, lora_request=loras, use_tqdm=False)
        found = [
            -output.outputs[0].logprobs[0][completion].logprob
            for output, (_, completion) in zip(outputs, rows * len(points), strict=True)
        ]
        of_rows = np.array(found, np.float64).reshape(len(points), len(rows))
        return np.asarray(of_rows.mean(axis=1))

    loss = losses([Point("bench", 1, digest)])[0]
    estimates = []
    for exponent in options.exponents:
        epsilon = 2.0**exponent
        points = [Point("bench", 1, digest, seed, s * epsilon) for seed in range(options.probes) for s in (1, -1)]
        found = np.concatenate([losses(points[i : i + SLOTS]) for i in range(0, len(points), SLOTS)]).reshape(-1, 2)
        estimates.append((found[:, 0] - found[:, 1]) / (2 * epsilon))
    np.savez(scratch / f"{options.kind}.npz", estimates=np.array(estimates), loss=loss)


if __name__ == "__main__":
    main()
