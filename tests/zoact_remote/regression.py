"""An adapter that keeps the protocol's promises, small enough for exact tests: a regression in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoact_remote import (
    Adam,
    Callback,
    ConnectionFailed,
    Losses,
    Probe,
    Row,
    Scores,
    StaleVersion,
    StepRecord,
    Trainer,
    TwoPoint,
    Update,
    UpdateResult,
)
from zoact_remote.noise import draw
from zoact_remote.wire import Limits, ProbeLoss, RowScore

Vector = NDArray[np.float64]
SIZE = 6
LIMITS = Limits(
    max_rank=8, max_probes=64, max_rows=256, max_row_tokens=256, max_call_tokens=65536, max_terms=4096, max_choices=128
)
"""Those of a server, but for the number of tokens."""
TARGET = np.linspace(-1.0, 1.0, SIZE)
ROWS: list[Row] = [
    {"prompt": list(map(float, x)), "completion": float(x @ TARGET)}
    for x in np.random.default_rng(0).normal(size=(40, SIZE))
]


class Regression:
    """Least squares with the semantics of an adapter: versions, keyed updates, losses after a carried update."""

    def __init__(self, distribution: Any = "rademacher") -> None:
        self.distribution = distribution
        self.versions = [np.zeros(SIZE)]
        self.keys: dict[str, tuple[int, object]] = {}
        self.calls: list[str] = []
        self.fail: set[int] = set()

    @cache  # noqa: B019  (an adapter lives as long as its test)
    def z(self, seed: int) -> Vector:
        return draw(self.distribution, seed, 0, SIZE).astype(np.float64)

    def loss(self, rows: Sequence[Row], c: Vector) -> float:
        inputs, outputs = np.array([row["prompt"] for row in rows]), np.array([row["completion"] for row in rows])
        return float(np.mean((inputs @ c - outputs) ** 2))

    def _apply(self, update: Update) -> UpdateResult:
        assert update.key is not None
        if update.key in self.keys:
            version, known = self.keys[update.key]
            assert known == update
            return UpdateResult(version, "", False)
        if update.base_version != len(self.versions) - 1:
            raise StaleVersion("stale", current_version=len(self.versions) - 1)
        change = sum((a * self.z(seed) for seed, a in update.terms), np.zeros(SIZE))
        if update.normaliser is not None:
            squares = sum((b * self.z(seed) ** 2 for seed, b in update.normaliser.terms), np.zeros(SIZE))
            change = change / (np.sqrt(update.normaliser.offset + squares) + update.normaliser.epsilon)
        self.versions.append((1.0 - update.decay) * self.versions[-1] + change)
        self.keys[update.key] = (len(self.versions) - 1, update)
        return UpdateResult(len(self.versions) - 1, "", True)

    def update(self, update: Update) -> UpdateResult:
        self.calls.append("update")
        return self._apply(update)

    def rollback(self, version: int, *, base_version: int | None = None, key: str | None = None) -> UpdateResult:
        self.calls.append("rollback")
        assert key is not None
        if key in self.keys:
            made, known = self.keys[key]
            assert known == (base_version, version)
            return UpdateResult(made, "", False)
        if base_version != len(self.versions) - 1:
            raise StaleVersion("stale", current_version=len(self.versions) - 1)
        self.versions.append(self.versions[version])
        self.keys[key] = (len(self.versions) - 1, (base_version, version))
        return UpdateResult(len(self.versions) - 1, "", True)

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        self.calls.append("losses")
        result = None if update is None else self._apply(update)
        if len(self.calls) in self.fail:
            raise ConnectionFailed("cut off", sent=True)
        at = len(self.versions) - 1 if version is None else version
        c = self.versions[at]
        found = [
            ProbeLoss(
                p.seed,
                p.epsilon,
                self.loss(rows, c + p.epsilon * self.z(p.seed)),
                self.loss(rows, c - p.epsilon * self.z(p.seed)) if p.sides == "both" else None,
            )
            for p in probes
        ]
        return Losses(at, tuple(found), self.loss(rows, c) if base else None, len(rows), result)

    def limits(self) -> Limits:
        return LIMITS

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        self.calls.append("scores")
        at = len(self.versions) - 1 if version is None else version
        losses = [self.loss([row], self.versions[at]) for row in rows]
        return Scores(at, tuple(RowScore((-x,), (1,), x) for x in losses), float(np.mean(losses)), len(rows))


def trainer(adapter: Regression, **changes: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "estimator": TwoPoint(epsilon=0.25),
        "optimizer": Adam(),
        "schedule": 0.03,
        "rows": ROWS,
        "steps": 30,
        "batch_size": 8,
    }
    return Trainer(adapter, **(defaults | changes))


class Killed(BaseException):
    """Stands for SIGKILL: nothing runs after it."""


class Disk(Callback):
    """Keeps the state at every checkpoint, as JSON, and every step that was finished."""

    def __init__(self) -> None:
        self.state: str | None = None
        self.finished: dict[int, StepRecord] = {}

    def on_checkpoint(self, trainer: Trainer) -> None:
        self.state = json.dumps(trainer.state_dict())

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.finished[record.step] = record


class Mortal(Regression):
    """An adapter under which the client dies, before or after the server has acted on a call."""

    def __init__(self) -> None:
        super().__init__()
        self.deadly: list[tuple[int, bool]] = []

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        at = len(self.calls) + 1
        if (at, False) in self.deadly:
            self.calls.append("killed")
            raise Killed
        answer = getattr(super(), name)(*args, **kwargs)
        if (at, True) in self.deadly:
            raise Killed
        return answer

    def losses(self, *args: Any, **kwargs: Any) -> Losses:
        found: Losses = self._call("losses", *args, **kwargs)
        return found

    def update(self, update: Update) -> UpdateResult:
        found: UpdateResult = self._call("update", update)
        return found

    def rollback(self, *args: Any, **kwargs: Any) -> UpdateResult:
        found: UpdateResult = self._call("rollback", *args, **kwargs)
        return found

    def scores(self, *args: Any, **kwargs: Any) -> Scores:
        found: Scores = self._call("scores", *args, **kwargs)
        return found
