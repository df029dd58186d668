"""Who makes which run, and where what came of it is kept."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import plan
from plan import Plan, Result, Run


class Board:
    """Which runs are to be made, are under way, and are done.

    Args:
        todo: the plan.
        results: the file of finished runs.
        about: what lines say beside run and figures, by where the run is made.
        homes: the servers' directories. A run that was begun goes on in its own, whose server has its adapter.

    """

    def __init__(
        self, todo: Plan, results: Path, about: Mapping[str, Mapping[str, object]], homes: Sequence[Path]
    ) -> None:
        self.plan = todo
        self._path = results
        self._about = about
        self._homes = homes
        self._results = plan.read(results)
        self._under_way: set[Run] = set()
        self._failed: set[Run] = set()
        self._lock = threading.Lock()

    def take(self, where: str, server: int) -> tuple[Run | None, bool]:
        """The next run for a lane, and whether there may be another one later."""
        with self._lock:
            missing = [run for run in self.plan.missing(self._results) if run not in self._failed]
            mine = [
                run
                for run in missing
                if self.plan.methods[run.method].where == where and (where == "mezo" or self._may_make(server, run))
            ]
            for run in mine:
                if run not in self._under_way and not any(self.plan.covers(r, run) for r in self._under_way):
                    self._under_way.add(run)
                    return run, True
            # Trials that are under way elsewhere decide on further runs.
            return None, any(self.plan.methods[run.method].where == where for run in self._under_way)

    def _may_make(self, server: int, run: Run) -> bool:
        begun = [i for i, home in enumerate(self._homes) if (home / run.name).exists()]
        return not begun or server in begun

    def done(self, run: Run, found: Sequence[Result]) -> None:
        with self._lock:
            self._under_way.discard(run)
            for budget, figures in zip(self.plan.marks(run), found, strict=True):
                of = Run(run.task, run.method, run.rate, run.seed, budget)
                if of in self._results:
                    continue
                line = {**asdict(of), **figures, **self._about[self.plan.methods[run.method].where]}
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                self._results[of] = line
                print(f"{of.name}: {figures['accuracy']:.3f}", file=sys.stderr, flush=True)

    def failed(self, run: Run, why: str) -> None:
        """It is not tried again before the next start."""
        with self._lock:
            self._under_way.discard(run)
            self._failed.add(run)
            print(f"{run.name} failed: {why}", file=sys.stderr, flush=True)


class Deadline:
    """When to end."""

    def __init__(self, minutes: float | None) -> None:
        self._at = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        """Seconds; infinite if there is no end."""
        return self._at - time.monotonic()

    def now(self) -> None:
        """Makes it pass."""
        self._at = time.monotonic()

    def passed(self) -> bool:
        return self.left_s <= 0
