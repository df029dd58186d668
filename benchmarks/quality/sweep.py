"""Many recipes for training at once, in one forward pass: which of them are worth runs through a server.

    python benchmarks/quality/sweep.py MODEL --data DIRECTORY --task sst2 --budget 6400 --recipes rate=0.001 rate=0.002,pairs=4

The model and DATA are those of ``run.py``, and so are the rows. Every recipe and seed has coefficients of its own;
batches of all of them go through the network together, as adapters of many tenants would, in plain PyTorch. Noise is
PyTorch's own instead of the specification's, and coefficients are kept rather than the terms of updates: for what is
asked here that is the same. The table has the loss and accuracy on rows to choose by (dev) and on held-out ones (test),
and the training loss of the last steps; *averaged* is the mean of the coefficients over the second half of the steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import plan
import torch
from torch import nn

from server_ext.inputs import make_sites
from zoact_remote.cli.settings import DEFAULTS, SitesName
from zoact_remote.layout import Layout, choose_sites
from zoact_remote.wire import Row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = DEFAULTS.batch_size
EVALUATED_AT_ONCE = 64
"""Rows for each recipe."""
LAST = 60
BETA2 = 0.999


@dataclass(frozen=True)
class Recipe:
    """How to train; all but the rate is as ``zoact train`` has it unless said.

    Attributes:
        rate: the highest.
        pairs: a step.
        rank: columns.
        schedule: linear (to zero), constant, or cosine.
        decay: weight decay, decoupled.
        beta1: of the first moment.
        epsilon: distance of a probe.
        sites: which layers.
        basis: of scored positions, prompt positions, or random.
        clip: slopes are cut at so many times their root mean square; 0 for never.

    """

    rate: float = 2e-3
    pairs: int = 1
    rank: int = DEFAULTS.rank
    schedule: str = "linear"
    decay: float = 0.0
    beta1: float = 0.9
    epsilon: float = 2.0**-7
    sites: SitesName = "all"
    basis: str = "scored"
    clip: float = 0.0

    def rate_at(self, step: int, steps: int) -> float:
        left = 1.0 - step / steps
        shape = {"linear": left, "constant": 1.0, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        return self.rate * shape[self.schedule]

    def __str__(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(said) or "default"


def recipe(text: str) -> Recipe:
    kinds = {f.name: type(f.default) for f in fields(Recipe)}
    pairs = (part.split("=") for part in text.split(",") if part != "default")
    return Recipe(**{name: kinds[name](value) for name, value in pairs})


@dataclass(frozen=True)
class Rows:
    """A task's rows: ``ids`` [rows, longest], padded on the right; each one's last position; the right answers."""

    ids: torch.Tensor
    ends: torch.Tensor
    answers: torch.Tensor

    def take(self, which: Any) -> Rows:
        """Some of them, with no more padding than they need."""
        ends = self.ends[which]
        return Rows(self.ids[which][..., : int(ends.max()) + 1], ends, self.answers[which])


class Network:
    """The model with a low-rank term at every site, of as many adapters as there are."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_float32_matmul_precision("high")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.network = network.to(DEVICE).eval().requires_grad_(False)
        head = network.get_output_embeddings()
        self.layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and m is not head}
        self.sites = make_sites((n, m.in_features, m.out_features) for n, m in self.layers.items())
        self.layout = Layout(self.sites, DEFAULTS.rank)
        self.dtype = dtype
        self.candidates = torch.zeros(0, dtype=torch.long)
        self._terms: dict[str, torch.Tensor] = {}
        self._bases: dict[str, torch.Tensor] = {}
        self._inner: tuple[Any, torch.Tensor] | None = None
        for site in self.sites:
            self.layers[site.name].register_forward_hook(self._adding(site.name, site.input))

    def rows(self, rows: Sequence[Row]) -> Rows:
        """Tokenises rows of choices that are one token each."""
        words = [self.tokenizer.encode(word, add_special_tokens=False) for word in rows[0]["choices"]]
        assert all(len(word) == 1 for word in words), "the answers must be one token each"
        self.candidates = torch.tensor(words, device=DEVICE)[:, 0]
        tokens = [torch.tensor(self.tokenizer.encode(row["prompt"])) for row in rows]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(DEVICE)
        ends = torch.tensor([len(t) - 1 for t in tokens], device=DEVICE)
        return Rows(ids, ends, torch.tensor([row["answer"] for row in rows], device=DEVICE))

    def basis(self, rows: Rows, positions: str) -> dict[str, torch.Tensor]:
        """By input ``[in, rank]``: of the activations' uncentred covariance, or random."""
        if positions == "random":
            draw = {name: torch.randn(width, DEFAULTS.rank) for name, width in self.layout.inputs.items()}
            return {name: torch.linalg.qr(matrix)[0].to(DEVICE) for name, matrix in draw.items()}
        place = torch.arange(rows.ids.shape[1], device=DEVICE)
        kept = place == rows.ends[:, None] if positions == "scored" else place <= rows.ends[:, None]
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_: Any, args: Any) -> None:
                seen[name] = args[0][kept].float()

            return hook

        readers = {site.input: self.layers[site.name] for site in self.sites}
        handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in readers.items()]
        self.network.base_model(input_ids=rows.ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return {name: torch.linalg.eigh(a.T @ a)[1][:, -DEFAULTS.rank :].flip(1) for name, a in seen.items()}

    def use(self, bases: Sequence[dict[str, torch.Tensor]]) -> None:
        """Takes every adapter's basis."""
        self._bases = {name: torch.stack([b[name] for b in bases]).to(self.dtype) for name in bases[0]}

    def logits(self, rows: Rows, coefficients: torch.Tensor) -> torch.Tensor:
        """Of the choices.

        Args:
            rows: ``[adapters, sides, rows]``.
            coefficients: float32 ``[adapters, sides, d]``.

        """
        adapters, sides, count, length = rows.ids.shape
        cast = coefficients.to(self.dtype).view(adapters * sides, -1)
        for site, start in self._starts():
            part = cast[:, start : start + site.out_features * DEFAULTS.rank]
            self._terms[site.name] = part.view(-1, site.out_features, DEFAULTS.rank).mT
        hidden = self.network.base_model(input_ids=rows.ids.reshape(-1, length), use_cache=False).last_hidden_state
        self._terms.clear()
        self._inner = None
        flat = torch.arange(len(hidden), device=DEVICE)
        last = hidden[flat, rows.ends.reshape(-1)].float()
        weights = self.network.get_output_embeddings().weight[self.candidates].float()
        return (last @ weights.T).view(adapters, sides, count, -1)

    @property
    def size(self) -> int:
        """Numbers that an adapter has."""
        return sum(site.out_features for site in self.sites) * DEFAULTS.rank

    def mask(self, recipe: Recipe) -> torch.Tensor:
        """Which of them a recipe trains."""
        chosen = choose_sites(self.sites, recipe.sites)
        found = torch.zeros(self.size, device=DEVICE)
        for site, start in self._starts():
            if site.name in chosen:
                part = found[start : start + site.out_features * DEFAULTS.rank]
                part.view(site.out_features, DEFAULTS.rank)[:, : recipe.rank] = 1.0
        return found

    def _starts(self) -> Iterator[tuple[Any, int]]:
        start = 0
        for site in self.sites:
            yield site, start
            start += site.out_features * DEFAULTS.rank

    def _adding(self, name: str, of: str) -> Any:
        def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            term = self._terms.get(name)
            if term is None:
                return None
            if self._inner is None or self._inner[0] is not args[0]:
                basis = self._bases[of]
                self._inner = args[0], args[0].view(len(basis), -1, args[0].shape[-1]) @ basis
            inner = self._inner[1].view(len(term), -1, DEFAULTS.rank)
            return torch.baddbmm(output.view(len(term), -1, output.shape[-1]), inner, term).view_as(output)

        return hook


class Order:
    """A seed's rows, in batches: every row once before any comes again."""

    def __init__(self, rows: int, seed: int) -> None:
        self._draw, self._rows, self._batches, self._left = np.random.default_rng(seed), rows, list[Any](), list[int]()

    def batch(self, step: int) -> list[int]:
        while len(self._batches) <= step:
            if len(self._left) < BATCH:
                self._left += self._draw.permutation(self._rows).tolist()
            self._batches.append(self._left[:BATCH])
            del self._left[:BATCH]
        found: list[int] = self._batches[step]
        return found


@torch.inference_mode()
def train(network: Network, runs: Sequence[tuple[Recipe, int]], data: Any, budget: int, minutes: float) -> Any:
    """Trains all of them; returns coefficients, their averages, and the last steps' training losses."""
    column = lambda values: torch.tensor(list(values), device=DEVICE)[:, None]  # noqa: E731
    training, count = data, len(runs)
    seeds = sorted({seed for _, seed in runs})
    bases = {}
    for kind, seed in {(r.basis, seed) for r, seed in runs}:
        torch.manual_seed(seed)
        rows = np.random.default_rng(seed).permutation(len(training.ids))[: DEFAULTS.calibration_rows]
        bases[kind, seed] = network.basis(training.take(rows), kind)
    network.use([bases[r.basis, seed] for r, seed in runs])
    orders = {seed: Order(len(training.ids), seed) for seed in seeds}
    masks = torch.stack([network.mask(r) for r, _ in runs])
    coefficients, first, moment = (torch.zeros(count, network.size, device=DEVICE) for _ in range(3))
    averaged = torch.zeros_like(coefficients)
    second = torch.zeros(count, 1, device=DEVICE)
    beta1, epsilon = column(r.beta1 for r, _ in runs), column(r.epsilon for r, _ in runs)
    pairs = [r.pairs for r, _ in runs]
    micro = (budget - DEFAULTS.calibration_rows // BATCH) // 2
    totals = [micro // p for p in pairs]
    squares = torch.zeros(count, 1, device=DEVICE)
    trace = torch.zeros(micro, count, device=DEVICE)
    torch.manual_seed(1)
    started = time.monotonic()
    for t in range(micro):
        index = torch.tensor([orders[seed].batch(t // r.pairs) for r, seed in runs], device=DEVICE)
        both = training.take(index[:, None].expand(-1, 2, -1))
        z = torch.randint(0, 2, coefficients.shape, device=DEVICE, dtype=torch.int8).float().mul_(2).sub_(1).mul_(masks)
        step = epsilon * z
        sides = torch.stack([coefficients + step, coefficients - step], dim=1)
        logits = network.logits(both, sides)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 2), both.answers.reshape(-1), reduction="none"
        ).view(count, 2, BATCH).mean(-1)
        trace[t] = losses.mean(-1)
        slope = ((losses[:, 0] - losses[:, 1])[:, None] / (2 * epsilon)).nan_to_num(0.0, 0.0, 0.0)
        slope = slope / column(pairs)
        moment += slope * z
        squares += slope**2
        ends = [(t + 1) % p == 0 for p in pairs]
        steps = [(t + 1) // p for p in pairs]
        now = column(ends).float()
        rate = column(
            r.rate_at(s - 1, total) if end and s <= total else 0.0
            for (r, _), s, end, total in zip(runs, steps, ends, totals, strict=True)
        )
        first = torch.where(now > 0, beta1 * first + (1 - beta1) * moment, first)
        second = torch.where(now > 0, BETA2 * second + (1 - BETA2) * squares, second)
        moment *= 1 - now
        squares *= 1 - now
        made = column(max(s, 1) for s in steps).float()
        deviation = (second / (1 - BETA2**made)).sqrt() + 1e-8
        decay = column(r.decay for r, _ in runs)
        coefficients = (1 - rate * decay) * coefficients - rate / (1 - beta1**made) / deviation * first
        if t >= micro // 2:
            averaged += (coefficients - averaged) / (t - micro // 2 + 1)
        if t % 100 == 0:
            print(f"{t} of {micro}, {time.monotonic() - started:.0f} s", flush=True)
        if time.monotonic() - started > 60 * minutes:
            print(f"cut off at step {t}", flush=True)
            break
    return coefficients, averaged, trace[: t + 1]


@torch.inference_mode()
def figures(network: Network, rows: Rows, coefficients: torch.Tensor) -> tuple[list[float], list[float]]:
    """Every run's accuracy and loss."""
    runs = len(coefficients)
    right = loss = torch.zeros(runs, device=DEVICE)
    for part in torch.arange(len(rows.ids), device=DEVICE).split(EVALUATED_AT_ONCE):
        some = rows.take(part[None, None].expand(runs, 1, -1))
        logits = network.logits(some, coefficients[:, None])[:, 0]
        answers = some.answers[:, 0]
        right = right + (logits.argmax(-1) == answers).sum(-1)
        each = nn.functional.cross_entropy(logits.flatten(0, 1), answers.reshape(-1), reduction="none")
        loss = loss + each.view(runs, -1).sum(-1)
    return (right / len(rows.ids)).tolist(), (loss / len(rows.ids)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=plan.TASKS, default="sst2")
    parser.add_argument("--budget", type=int, default=6400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--recipes", type=recipe, nargs="+", default=[Recipe()])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON lines")
    options = parser.parse_args()
    network = Network(options.model, getattr(torch, options.dtype))
    training, choice, held_out = plan.data_of(options.task, options.data)
    made = [network.rows(rows) for rows in (training, choice, [example.row for example in held_out])]
    runs = list(itertools.product(options.recipes, options.seeds))
    coefficients, averaged, trace = train(network, runs, made[0], options.budget, options.minutes)
    found = {}
    for name, which in (("", coefficients), ("averaged_", averaged)):
        for part, rows in zip(("train", "dev", "test"), made, strict=True):
            found[f"{name}{part}_accuracy"], found[f"{name}{part}_loss"] = figures(network, rows, which)
    found["size"] = coefficients.square().mean(-1).sqrt().tolist()
    eighths = [part.mean(0).tolist() for part in trace.split(-(-len(trace) // 8))]
    print(f"\n{options.task}, {options.budget} passes, {options.dtype}, {DEVICE}; mean of {len(options.seeds)} seeds\n")
    columns = ["train_loss", "dev_accuracy", "dev_loss", "test_accuracy", "test_loss"]
    columns += ["averaged_dev_accuracy", "averaged_dev_loss", "averaged_test_accuracy", "averaged_test_loss", "size"]
    print(f"| recipe | {' | '.join(columns)} |\n{'| --- ' * (1 + len(columns))}|")
    for i, one in enumerate(options.recipes):
        of = slice(i * len(options.seeds), (i + 1) * len(options.seeds))
        cells = [f"{np.mean(found[name][of]):.3f}" for name in columns]
        print(f"| {one} | {' | '.join(cells)} |")
    if options.out:
        with options.out.open("a") as out:
            for i, (one, seed) in enumerate(runs):
                row = {"task": options.task, "budget": options.budget, "dtype": options.dtype, "recipe": str(one)}
                row |= {"seed": seed, "steps": len(trace), "eighths": [e[i] for e in eighths]}
                out.write(json.dumps(row | {name: values[i] for name, values in found.items()}) + "\n")


if __name__ == "__main__":
    main()
