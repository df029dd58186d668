"""What bases are worth before any step is taken, from exact gradients: which variants are worth a training run.

    python benchmarks/bases.py MODEL DATA --tasks sst2 trec agnews

MODEL is a checkpoint's directory. DATA holds a directory for each task with train.jsonl and test.jsonl, and the task's
answers are one token each. PyTorch on the CPU, in float32; nothing is trained but for the table's second half.

A basis V ``[in, r]``, its columns scaled by D, makes a layer y = W x + C D V' x. With G the gradient of the expected
loss in W, the coefficients' gradient at C = 0 is G V D. All of a basis's coefficients together, d of them, have the
gradient g and the Hessian H. For held-out rows the table has:

gradient
    share of the layers' squared gradient that lies in the basis, ``|G V|^2 / |G|^2``.
slope
    ``|g| / sqrt(d)``, against the default's: what a two-point step of unit length gains to first order, on average. It
    goes along a random direction, with the slope along it for its sign and size.
gain
    ``|g|^4 / (B tr H)``, against the default's, with B the mean of ``|g|^2`` over batches: twice what the step
    ``-t (b'z) z`` of the best length t gains on average, b being a batch's gradient and E z z' = I. It changes the
    loss by ``-t |g|^2 + t^2/2 B tr H``, but for a share of about 1/d. This is the figure to go by: a basis may have its
    large slope from directions along which the loss bends as much, and the learning rate sees to the rest. Scaling a
    basis as a whole leaves it as it is.

The squares of G are means over pairs of different batches, so that the rows' noise does not count as gradient. For H
stands the Gauss-Newton matrix, which for a cross-entropy is Fisher's: its trace is the mean over rows of ``|g|^2`` for
answers drawn by the model itself. The table's second half is taken after some first-order steps within the default
basis, with bases from before them, and with one from after them ("refreshed", as a second adapter on the first one's
version would have it).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gradients import Activations, Bases, Batch, Model

from server_ext.basis import Positions, RangeFinder, random_test_matrix
from zoact_remote.cli.data import subset
from zoact_remote.cli.settings import DEFAULTS, SitesName
from zoact_remote.layout import choose_sites
from zoact_remote.tasks import BUILTIN, load_jsonl

OVERSAMPLING = 8
HIGHEST_RANK = 16
TRAINING_ROWS = 1000
LEAST_SHARE = 1e-4
"""Of an input's energy: columns that hold less are scaled as if they held as much."""


@dataclass(frozen=True)
class Variant:
    """How a basis is taken.

    Attributes:
        source: of the vectors.
        positions: of the activations.
        rows: that are calibrated on.
        rank: of every site, or that which all sites come to together.
        centred: whether the mean activation is taken away.
        passes: over the rows.
        by_energy: sites get ranks such that all keep about the same share of their activations' energy, with about as
            many coefficients in all as ``rank`` makes.
        sites: which layers it acts on, see ``zoact_remote.layout.choose_sites``.
        power: an input's columns are scaled by the activations' root mean square along them, to this power, and then
            all alike, so that together they are as large as before.

    """

    source: Literal["activations", "random", "gradient"] = "activations"
    positions: Positions = "scored"
    rows: int = 64
    rank: int = 4
    centred: bool = False
    passes: int = 1
    by_energy: bool = False
    sites: SitesName = "all"
    power: float = 0.0


DEFAULT = Variant(positions=DEFAULTS.positions, rows=DEFAULTS.calibration_rows, rank=DEFAULTS.rank)
VARIANTS = {
    "default": DEFAULT,
    "random": replace(DEFAULT, source="random"),
    "prompt positions": replace(DEFAULT, positions="prompt"),
    "both": replace(DEFAULT, positions="both"),
    "16 rows": replace(DEFAULT, rows=16),
    "256 rows": replace(DEFAULT, rows=256),
    "centred": replace(DEFAULT, centred=True),
    "two passes": replace(DEFAULT, passes=2),
    "rank 1": replace(DEFAULT, rank=1),
    "rank 2": replace(DEFAULT, rank=2),
    "rank 8": replace(DEFAULT, rank=8),
    "rank 16": replace(DEFAULT, rank=16),
    "rank by energy": replace(DEFAULT, by_energy=True),
    "columns by s^1/2": replace(DEFAULT, power=0.5),
    "columns by s": replace(DEFAULT, power=1.0),
    "columns by s^-1/2": replace(DEFAULT, power=-0.5),
    "MLPs": replace(DEFAULT, sites="mlp"),
    "upper half": replace(DEFAULT, sites="upper"),
    "MLPs of the upper half": replace(DEFAULT, sites="upper-mlp"),
    "of the gradient": replace(DEFAULT, source="gradient"),
}
"""The last is out of reach: the training rows' gradient's own leading directions, as a measure of what there is."""


class Calibration:
    """Makes bases from a model's activations on some rows, as a server does."""

    def __init__(self, model: Model, rows: Sequence[dict[str, Any]], batch_size: int) -> None:
        self.model = model
        self._rows, self._batch_size = rows, batch_size
        self._seen: dict[tuple[int, bool], list[Activations]] = {}

    def basis(self, variant: Variant, gradient: dict[str, torch.Tensor]) -> Bases:
        model = self.model
        if variant.source == "random":
            return {
                name: torch.from_numpy(random_test_matrix(width, variant.rank, 0, i)).float()
                for i, (name, width) in enumerate(model.widths.items())
            }
        if variant.source == "gradient":
            found = {}
            for name in model.widths:
                stacked = torch.cat([gradient[site.name] for site in model.sites if site.input == name])
                found[name] = torch.linalg.eigh(stacked.T @ stacked).eigenvectors[:, -variant.rank :]
            return found
        rank = HIGHEST_RANK if variant.by_energy else variant.rank
        chosen = set(choose_sites(model.sites, variant.sites))
        inputs = {site.input for site in model.sites if site.name in chosen}
        basis = {name: self._vectors(variant, name, rank, i) for i, name in enumerate(model.widths) if name in inputs}
        if variant.by_energy:
            basis = self._cut(variant, basis)
        return self._scaled(variant, basis) if variant.power else basis

    def _activations(self, variant: Variant) -> list[Activations]:
        key = variant.rows, variant.positions == "scored"
        if key not in self._seen:
            batches = self.model.batches(subset(self._rows, variant.rows), self._batch_size)
            self._seen[key] = self.model.activations(batches, only_scored=key[1])
        return self._seen[key]

    def _vectors(self, variant: Variant, name: str, rank: int, number: int) -> torch.Tensor:
        width = self.model.widths[name]
        omega = random_test_matrix(width, rank + OVERSAMPLING, 0, number)
        finder = RangeFinder(width, rank, variant.positions, variant.centred, omega, torch.device("cpu"))
        for i in range(variant.passes):
            if i:
                finder.next_pass()
            for batch in self._activations(variant):
                finder.add(batch.of[name], torch.ones_like(batch.scored), batch.scored)
        return torch.from_numpy(finder.basis().vectors)

    def _squares(self, variant: Variant, name: str, basis: Bases) -> tuple[torch.Tensor, float]:
        """Mean square of the scored activations along each column, and over all directions."""
        x = torch.cat([batch.of[name][batch.scored] for batch in self._activations(variant)])
        return (x @ basis[name]).square().mean(0), float(x.square().sum(1).mean())

    def _cut(self, variant: Variant, basis: Bases) -> Bases:
        model = self.model
        outputs = {n: sum(s.out_features for s in model.sites if s.input == n) for n in basis}
        kept = {}
        for name in basis:
            squares, total = self._squares(variant, name, basis)
            kept[name] = (squares.cumsum(0) / total).numpy()
        budget = variant.rank * sum(outputs.values())

        def ranks(share: float) -> dict[str, int]:
            return {n: min(int(np.searchsorted(k, share)) + 1, len(k)) for n, k in kept.items()}

        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            fits = sum(rank * outputs[n] for n, rank in ranks(share).items()) <= budget
            low, high = (share, high) if fits else (low, share)
        return {n: basis[n][:, :rank] for n, rank in ranks(low).items()}

    def _scaled(self, variant: Variant, basis: Bases) -> Bases:
        found = {}
        for name, vectors in basis.items():
            squares, total = self._squares(variant, name, basis)
            # Some inputs have fewer directions than columns.
            scales = squares.clamp_min(LEAST_SHARE * total) ** (variant.power / 2)
            found[name] = vectors * (scales / scales.square().mean().sqrt())
        return found


@dataclass
class Square:
    """The square of a gradient, from batches' gradients.

    Attributes:
        batches: sum of the batches' squares.
        total: square of the batches' sum.

    """

    batches: float = 0.0
    total: float = 0.0

    def without_noise(self, count: int) -> float:
        """The mean inner product of two different batches' gradients."""
        return max((self.total - self.batches) / (count * (count - 1)), 0.0)


@dataclass(frozen=True)
class Worth:
    """A line of the table; slope and gain as they are."""

    coefficients: int
    share: float
    slope: float
    gain: float


def projected(model: Model, gradient: dict[str, torch.Tensor], basis: Bases | None) -> float:
    """``|G V D|^2`` over the basis's sites; of G itself for None."""
    if basis is None:
        return float(sum(g.square().sum() for g in gradient.values()))
    return float(sum((gradient[s.name] @ basis[s.input]).square().sum() for s in model.reading(basis)))


def measure(model: Model, bases: dict[str, Bases], batches: Sequence[Batch]) -> dict[str, Worth]:
    everything: dict[str, Bases | None] = {"": None, **bases}
    squares = {name: Square() for name in everything}
    traces = dict.fromkeys(bases, 0.0)
    total: dict[str, torch.Tensor] = {}
    losses = []
    draw = torch.Generator().manual_seed(0)
    for batch in batches:
        loss, gradient = model.gradient(batch)
        losses.append(loss)
        for name, basis in everything.items():
            squares[name].batches += projected(model, gradient, basis)
        for site, g in gradient.items():
            total[site] = total[site].add_(g) if site in total else g.clone()
        for name, trace in model.traces(batch, bases, draw).items():
            traces[name] += trace / len(batches)
    for name, basis in everything.items():
        squares[name].total = projected(model, total, basis)
    print(f"loss {np.mean(losses):.3f} nats on {sum(len(b.ids) for b in batches)} held-out rows\n", flush=True)
    count = len(batches)
    whole = squares[""].without_noise(count)
    found = {}
    for name, basis in bases.items():
        sites = model.reading(basis)
        d = sum(site.out_features * basis[site.input].shape[1] for site in sites)
        # Of a random unit step in the coefficients, as a step in the weights.
        length = sum(site.out_features * float(basis[site.input].square().sum()) for site in sites) / d
        square = squares[name].without_noise(count)
        found[name] = Worth(
            coefficients=d,
            share=square / whole,
            slope=(square / (d * length)) ** 0.5,
            gain=square**2 / (squares[name].batches / count * traces[name]),
        )
    return found


def first_order(model: Model, basis: Bases, batches: Sequence[Batch], steps: int, rate: float) -> None:
    """Adam on the coefficients of a basis, which then stand in the weights."""
    moments = {s.name: [torch.zeros(s.out_features, basis[s.input].shape[1]) for _ in range(2)] for s in model.sites}
    for step in range(1, steps + 1):
        _, gradient = model.gradient(batches[step % len(batches)])
        with torch.no_grad():
            for site in model.sites:
                g = gradient[site.name] @ basis[site.input]
                first, second = moments[site.name]
                first.lerp_(g, 0.1)
                second.lerp_(g.square(), 0.001)
                change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                model.layers[site.name].weight -= rate * change @ basis[site.input].T


def show(found: dict[str, Worth]) -> None:
    print("| basis | coefficients | gradient | slope | gain |\n| --- | --- | --- | --- | --- |")
    default = found["default"]
    for name, worth in found.items():
        scaled = name in VARIANTS and VARIANTS[name].power
        ratios = f"{worth.slope / default.slope:.2f} | {worth.gain / default.gain:.2f}"
        print(f"| {name} | {worth.coefficients:,} | {'' if scaled else f'{worth.share:.3f}'} | {ratios} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec", "agnews"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--batches", type=int, default=16, help="of held-out rows")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="first-order steps before the second half; 0 for none")
    parser.add_argument("--rate", type=float, default=1e-3, help="of these steps")
    options = parser.parse_args()
    for task in options.tasks:
        model = Model(options.model)
        training, held_out = (
            BUILTIN[task].rows(load_jsonl(options.data / task / f"{part}.jsonl")) for part in ("train", "test")
        )
        training = training[:TRAINING_ROWS]
        started = time.perf_counter()
        batches = model.batches(held_out[: options.batches * options.batch_size], options.batch_size)
        steps = model.batches(training, options.batch_size)
        calibration = Calibration(model, training, options.batch_size)
        gradient = model.gradient(steps[-1])[1]
        bases = {name: calibration.basis(VARIANTS[name], gradient) for name in options.variants}
        print(f"{task}, at the start, {Path(options.model).name}: ", end="")
        show(measure(model, bases, batches))
        if options.steps:
            first_order(model, bases["default"], steps, options.steps, options.rate)
            bases["refreshed"] = Calibration(model, training, options.batch_size).basis(DEFAULT, gradient)
            print(f"{task}, after {options.steps} first-order steps: ", end="")
            show(measure(model, bases, batches))
        print(f"{task}: {time.perf_counter() - started:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
