"""What is left to do, and what came of what was done, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import plan
from plan import Plan, Result, Run

from zoact_remote.cli.settings import DEFAULTS

SEQUENCES_PER_S = {"vllm": 2000.0, "transformers": 500.0}
"""About what a server does on an H100, for SmolLM2's geometry: measured for vLLM, guessed from launches otherwise."""
MEZO_PASS_S = 0.0125
"""About what a pass of 16 rows takes in plain PyTorch there: guessed from launches."""


def show_plan(todo: Plan, results: Mapping[Run, Result], engine: str, servers: int, mezo: int) -> None:
    """What is missing, and about how long it takes on an H100.

    Args:
        todo: the plan.
        results: of finished runs.
        engine: of the servers.
        servers: their number.
        mezo: MeZO's runs at once.

    """
    missing = list(todo.missing(results, guess=True))
    print("| method | runs | of them trials | forward passes | sequences | minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, method in todo.methods.items():
        of_it = [run for run in missing if run.method == name]
        made = [run for run in of_it if not any(run != other and todo.covers(other, run) for other in of_it)]
        passes = sum(run.budget for run in made)
        sequences = passes * DEFAULTS.batch_size + 2 * plan.ROWS_EVALUATED * len(of_it)
        if method.where == "mezo":
            minutes = sequences / DEFAULTS.batch_size * MEZO_PASS_S / mezo / 60
        else:
            minutes = sequences / SEQUENCES_PER_S[engine] / servers / 60
        trials = sum(map(todo.is_trial, made))
        print(f"| {method.title} | {len(made)} | {trials} | {passes:,} | {sequences:,} | {minutes:.0f} |")
    print(
        f"\nMinutes on one H100, by {SEQUENCES_PER_S[engine]:,.0f} sequences a second and server "
        f"({servers}), and {MEZO_PASS_S * 1e3:g} ms a pass of MeZO's ({mezo} at once). MeZO runs beside "
        "the servers."
    )


def show_table(todo: Plan, results: Mapping[Run, Result]) -> None:
    """Mean and standard deviation over seeds."""
    print(f"| task | method | rate | {' | '.join(f'{b:,}' for b in todo.budgets)} |")
    print("| --- " * (3 + len(todo.budgets)) + "|")
    for task in todo.tasks:
        some = next((result for run, result in results.items() if run.task == task), None)
        if some is not None:
            for title, name in (("zero-shot", "zero_shot"), ("zero-shot, label-calibrated", "label_calibrated")):
                print(f"| {task} | {title} | | {some[name]:.3f} |{' |' * (len(todo.budgets) - 1)}")
        for name, method in todo.methods.items():
            cells, rates = [], []
            for budget in todo.budgets:
                rate = todo.rate(name, task, budget, results)
                if rate is None:
                    break
                rates.append(rate)
                runs = [Run(task, name, rate, seed, budget) for seed in todo.seeds]
                cells.append(cell([float(results[run]["accuracy"]) for run in runs if run in results], len(runs)))
            if rates:
                shown_rates = ", ".join(f"{rate:.2g}" for rate in dict.fromkeys(rates))
                print(f"| {task} | {method.title} | {shown_rates} | {' | '.join(cells)} |")
    shown = {(r["model"], r["engine"], r["dtype"], r["device"], r["commit"]) for r in results.values()}
    for model, engine, dtype, where, at in sorted(shown):
        print(f"\n{model}, {engine}, {dtype}, {where}, commit {at}.")


def cell(accuracies: Sequence[float], wanted: int) -> str:
    if not accuracies:
        return ""
    spread = f" ± {statistics.stdev(accuracies):.3f}" if len(accuracies) > 1 else ""
    few = f" ({len(accuracies)} of {wanted})" if len(accuracies) < wanted else ""
    return f"{statistics.mean(accuracies):.3f}{spread}{few}"
