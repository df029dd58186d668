"""``zoact runs``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoact_remote.cli import options
from zoact_remote.cli.output import CommandFailed, reporting

if TYPE_CHECKING:
    from rich.table import Table

    from zoact_remote.tasks import Task


def runs(
    directory: Annotated[Path, typer.Argument(help="Where the runs' directories are.", metavar="DIRECTORY")] = Path(
        "runs"
    ),
    as_json: options.AsJson = False,
) -> None:
    """List the runs in a directory, and compare what they brought."""
    with reporting(as_json) as output:
        from zoact_remote.cli.run_files import CHECKPOINT

        if not directory.is_dir():
            raise CommandFailed(f"there is no directory {directory}")
        found = [_described_if_readable(path.parent, directory) for path in sorted(directory.glob(f"**/{CHECKPOINT}"))]
        output.result({"runs": found}, _table(found) if found else f"no runs in {directory}")


def _described_if_readable(run: Path, directory: Path) -> dict[str, Any]:
    """A run; one whose files are damaged, or somebody else's, does not keep the others from being listed."""
    try:
        return _described(run, directory)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        nothing = dict.fromkeys(("adapter", "task", "steps", "of", "loss", "before", "after", "best", "seconds"))
        return {"name": str(run.relative_to(directory)), "state": "unreadable", "metric": "accuracy", **nothing}


def _described(run: Path, directory: Path) -> dict[str, Any]:
    from zoact_remote.cli.run_files import CHECKPOINT, EVALUATIONS, METRICS, RESULT, TASK
    from zoact_remote.locks import is_locked
    from zoact_remote.metrics import LESS_IS_BETTER
    from zoact_remote.report import running_mean

    about = json.loads((run / CHECKPOINT).read_bytes())
    steps = list(_json_lines(run / METRICS))
    evaluations = list(_json_lines(run / EVALUATIONS))
    losses = [step["loss"] for step in steps if step["loss"] is not None]
    task = _task(run / TASK)
    metric = task.metric if task is not None and task.metric is not None else "accuracy"
    # Version 0's, where a run begins at a later one, is not the run's own.
    figures = [line[metric] for line in evaluations if line["step"] is not None and line[metric] is not None]
    under_way = is_locked(run)
    result = json.loads((run / RESULT).read_bytes()) if (run / RESULT).is_file() else {}
    return {
        "name": str(run.relative_to(directory)),
        "adapter": about["name"],
        "task": task and _task_name(task),
        "state": "running" if under_way else "done" if result else "cut off",
        "steps": len(steps),
        "of": about["settings"]["steps"],
        "loss": running_mean(losses)[-1] if losses else None,
        "metric": metric,
        "before": figures[0] if figures else None,
        "after": result.get("results", {}).get("tuned", {}).get(metric),
        "best": (min if metric in LESS_IS_BETTER else max)(figures, default=None),
        "seconds": sum(step["seconds"] for step in steps),
    }


def _task(path: Path) -> Task | None:
    from zoact_remote.tasks import Task

    return Task.from_file(path) if path.is_file() else None


def _task_name(task: Task) -> str:
    """A built-in task's name, or the kind of answers that a task has."""
    from zoact_remote.tasks import BUILTIN

    return next((name for name, known in BUILTIN.items() if known == task), task.kind)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file that may be written to meanwhile."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        if line.endswith(b"\n"):
            yield json.loads(line)


def _table(found: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    from zoact_remote.metrics import FIGURES, spelt
    from zoact_remote.report import NONE

    def shown(value: float | None, form: str) -> str:
        return NONE if value is None else format(value, form)

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # Where the terminal is narrow, names give way: figures that are cut off say nothing.
    for heading in ("run", "adapter", "task"):
        table.add_column(heading, overflow="fold")
    table.add_column("state", no_wrap=True)
    for heading in ("steps", "loss", "metric", "before", "after", "best", "seconds"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=heading != "metric")
    for run in found:
        table.add_row(
            run["name"],
            run["adapter"] or NONE,
            run["task"] or NONE,
            run["state"],
            NONE if run["steps"] is None else f"{run['steps']}/{run['of']}",
            shown(run["loss"], ".3f"),
            spelt(run["metric"]),
            *(shown(run[name], FIGURES[run["metric"]]) for name in ("before", "after", "best")),
            shown(run["seconds"], ",.0f"),
        )
    return table
