"""What is compared: methods, runs, and what of them is still to do.

A budget is a number of forward passes of 16 rows. Every figure comes from a run of exactly that budget, so that a
learning rate that falls to zero does so at its end, and a basis's calibration rows count as passes. MeZO's rate is
constant, as its authors have it: a long run passes through the figures of the short ones, and gives them all.

A method with several learning rates is tried with each, once, at the middle budget and with the first seed; the one
with the best accuracy on the task's development rows is taken for all budgets and seeds. The figures shown are of other
rows. Ours is not tuned: it trains as ``zoact train`` does where nothing but the data and the number of steps is given.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from zoact_remote.cli.settings import DEFAULTS, LEARNING_RATE, TrainingSettings
from zoact_remote.tasks import BUILTIN, Example, load_jsonl
from zoact_remote.wire import Basis, Json, Row

TASKS = ("sst2", "trec", "agnews", "subj")
SEEDS = (0, 1, 2)
BUDGETS = (400, 1600, 6400)
TRAINING_ROWS = 1000
"""As in MeZO's experiments."""
ROWS_EVALUATED = 500
"""Of the held-out rows, and of those that a learning rate is chosen by; at most."""


@dataclass(frozen=True)
class OtherBasis(TrainingSettings):
    """Settings with a basis that ``zoact train`` has no flag for; its seed is the run's."""

    basis: Basis = field(default_factory=Basis)

    def make_basis(self) -> Basis:
        return replace(self.basis, seed=self.seed)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        title: in the table.
        rates: learning rates to choose from; none if the settings have one for every number of steps.
        settings: but for rate, steps and seed; None for MeZO, which trains all weights in a program of its own.

    """

    title: str
    rates: tuple[float, ...]
    settings: TrainingSettings | None = None

    @property
    def where(self) -> Literal["server", "mezo"]:
        """What runs it."""
        return "mezo" if self.settings is None else "server"

    def rate_for(self, budget: int) -> float:
        """Where there is nothing to choose from."""
        if self.rates:
            return self.rates[0]
        assert self.settings is not None
        rate = replace(self.settings, steps=steps_in(budget, self.settings)).resolved().learning_rate
        assert isinstance(rate, float)
        return rate


_RATE = LEARNING_RATE


def _ours_but(basis: Basis) -> TrainingSettings:
    return OtherBasis(basis=basis)


METHODS = {
    "ours": Method("ours, by default", (), DEFAULTS),
    # Rates about the best of earlier trials, a factor of three apart.
    "paper": Method(
        "ZO-Act as in the paper",
        (3e-4, 1e-3, 3e-3),
        replace(DEFAULTS, estimator="forward-difference", optimizer="gaussian-adam", positions="prompt", sites="all"),
    ),
    "random": Method("random basis, else ours", (1e-3, 3e-3, 1e-2), _ours_but(Basis(source="random"))),
    # The grid of Malladi et al., arXiv 2305.17333.
    "mezo": Method("MeZO, all weights", (1e-7, 1e-6, 1e-5)),
}
_OTHERS = {
    "scored": ("scored positions", _ours_but(Basis(positions="scored"))),
    "prompt": ("prompt positions", _ours_but(Basis(positions="prompt"))),
    "both": ("both kinds of position", _ours_but(Basis(positions="both"))),
    # Not of scored positions: in the first layer they are often one and the same token's.
    "centred": ("prompt positions, centred", _ours_but(Basis(positions="prompt", centred=True))),
    "rank-1": ("rank 1", replace(DEFAULTS, rank=1)),
}
ABLATION = {
    f"basis-{name}": Method(f"ours, {title}", (_RATE / 2, _RATE, 2 * _RATE), settings)
    for name, (title, settings) in _OTHERS.items()
}
"""Ours with other bases, each at the best of three rates."""
_FOUR_PAIRS = replace(DEFAULTS, probes=4, calibration_rows=128)
REGIMES = {
    f"regime-{name}": Method(f"ours, {title}", (rate,), settings)
    for name, title, rate, settings in (
        ("slow", "half the rate", _RATE / 2, DEFAULTS),
        ("slower", "a quarter of the rate", _RATE / 4, DEFAULTS),
        ("fast", "twice the rate", 2 * _RATE, DEFAULTS),
        ("cosine", "cosine schedule", _RATE, replace(DEFAULTS, schedule="cosine")),
        ("pairs", "four pairs a step", _RATE, _FOUR_PAIRS),
        ("pairs-fast", "four pairs a step, twice the rate", 2 * _RATE, _FOUR_PAIRS),
        ("decay", "weight decay", _RATE, replace(DEFAULTS, optimizer="adamw", weight_decay=0.3)),
        ("split-4", "four probes share the rows", _RATE, replace(DEFAULTS, probes=4, split=True)),
        ("split-16", "a probe for every row", _RATE, replace(DEFAULTS, probes=16, split=True)),
        ("split-16-fast", "a probe for every row, twice the rate", 2 * _RATE, replace(DEFAULTS, probes=16, split=True)),
        ("upper", "upper half", _RATE, replace(DEFAULTS, sites="upper")),
        ("mlp", "MLPs", _RATE, replace(DEFAULTS, sites="mlp")),
        ("upper-mlp", "MLPs of the upper half", _RATE, replace(DEFAULTS, sites="upper-mlp")),
        ("upper-mlp-fast", "MLPs of the upper half, twice the rate", 2 * _RATE, replace(DEFAULTS, sites="upper-mlp")),
    )
}
"""Ours in other ways to spend many passes: what is right for four hundred need not be for six thousand."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    method: str
    rate: float
    seed: int
    budget: int

    @property
    def name(self) -> str:
        """Fit for an adapter."""
        return f"{self.task}-{self.method}-{self.rate:g}-{self.seed}-{self.budget}"


Result = Mapping[str, Any]
"""A line of the results file: a run's fields, the forward passes that it made, and its figures."""


def run_of(result: Result) -> Run:
    return Run(**{name: result[name] for name in Run.__dataclass_fields__})


def read(path: Path) -> dict[Run, Result]:
    """Finished runs."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {run_of(result): result for result in results}


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        methods: by name.
        tasks: names.
        seeds: of every method.
        budgets: forward passes, rising.

    """

    methods: Mapping[str, Method]
    tasks: Sequence[str]
    seeds: Sequence[int]
    budgets: Sequence[int]

    @property
    def trial_budget(self) -> int:
        """Of the runs that a learning rate is chosen by."""
        return self.budgets[len(self.budgets) // 2]

    def trials(self, method: str, task: str) -> list[Run]:
        """Runs that the method's learning rate for a task is chosen by; none if there is no choice."""
        rates = self.methods[method].rates
        return [Run(task, method, r, self.seeds[0], self.trial_budget) for r in rates] if len(rates) > 1 else []

    def is_trial(self, run: Run) -> bool:
        return run in self.trials(run.method, run.task)

    def rate(self, method: str, task: str, budget: int, results: Mapping[Run, Result]) -> float | None:
        """The learning rate that was chosen; None as long as trials are missing."""
        trials = self.trials(method, task)
        if not trials:
            return self.methods[method].rate_for(budget)
        if not all(trial in results for trial in trials):
            return None
        return max(trials, key=lambda trial: float(results[trial]["choice_accuracy"])).rate

    def missing(self, results: Mapping[Run, Result], *, guess: bool = False) -> Iterator[Run]:
        """Runs that are not finished, trials and then long ones first.

        Args:
            results: of finished runs.
            guess: also of methods whose learning rate is not yet chosen, as if it were the first.

        """
        pairs = list(itertools.product(self.methods, self.tasks))
        for method, task in pairs:
            yield from (trial for trial in self.trials(method, task) if trial not in results)
        for budget in reversed(self.budgets):
            for seed, (method, task) in itertools.product(self.seeds, pairs):
                rate = self.rate(method, task, budget, results)
                if rate is None and guess:
                    rate = self.methods[method].rate_for(budget)
                if rate is None:
                    continue
                run = Run(task, method, rate, seed, budget)
                if run not in results and not self.is_trial(run):
                    yield run

    def marks(self, run: Run) -> list[int]:
        """Budgets whose figures a run gives."""
        several = self.methods[run.method].where == "mezo"
        return [budget for budget in self.budgets if budget <= run.budget] if several else [run.budget]

    def covers(self, run: Run, other: Run) -> bool:
        """Whether a run gives another one's figures too. A trial is made by itself."""
        return not self.is_trial(other) and replace(other, budget=run.budget) == run and other.budget in self.marks(run)


def passes_a_step(settings: TrainingSettings) -> int:
    """Forward passes of a batch: each probe's sides, on its part of the rows, and the unperturbed loss if asked for."""
    ask = settings.make_estimator().ask(itertools.count().__next__)
    rows = settings.batch_size
    return sum(len(probe.signs) * len(probe.rows_of(rows)) for probe in ask.probes) // rows + ask.base


def calibration_passes(settings: TrainingSettings) -> int:
    """Forward passes of as many rows that the basis takes."""
    basis = settings.make_basis()
    return -(-settings.calibration_rows // settings.batch_size) * basis.passes if basis.source == "activations" else 0


def steps_in(budget: int, settings: TrainingSettings) -> int:
    """As many as there is room for.

    Raises:
        ValueError: the budget does not come out even.

    """
    steps, left = divmod(budget - calibration_passes(settings), passes_a_step(settings))
    if left or steps < 1:
        raise ValueError(f"a budget of {budget} passes is not a whole number of steps")
    return steps


def settings_of(method: Method, run: Run) -> TrainingSettings:
    """A run's settings."""
    assert method.settings is not None
    settings = replace(method.settings, learning_rate=run.rate, seed=run.seed, eval_rows=ROWS_EVALUATED)
    return replace(settings, steps=steps_in(run.budget, settings))


def data_of(task: str, data: Path) -> tuple[Sequence[Row], Sequence[Row], list[Example]]:
    """Rows to train on, rows to choose a learning rate by, and what to evaluate on."""
    made = BUILTIN[task]
    train, dev, test = (load_jsonl(data / task / f"{part}.jsonl") for part in ("train", "dev", "test"))
    return (
        made.rows(train[:TRAINING_ROWS]),
        made.rows(_evaluated(dev)),
        made.examples(_evaluated(test)),
    )


def _evaluated(records: Sequence[Json]) -> Sequence[Json]:
    """At most so many, evenly spaced: as the runs on record had them."""
    count = min(len(records), ROWS_EVALUATED)
    return [records[i * len(records) // count] for i in range(count)]


def select(names: Iterable[str]) -> dict[str, Method]:
    return {name: (METHODS | ABLATION | REGIMES)[name] for name in names}
