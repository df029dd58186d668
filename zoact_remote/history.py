"""What a run did, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from zoact_remote.evaluation import Evaluation
from zoact_remote.wire import Json, Term


@dataclass(frozen=True)
class StepRecord:
    """What a step did.

    Attributes:
        step: its number, from 0.
        version: the version that it probed.
        loss: the batch's loss, in nats; nan if a loss was not finite.
        terms: the gradient estimate, ``(seed, g)``; empty if a loss was not finite.
        learning_rate: of the update that it made; 0 if it returned to a version instead.
        epsilon: distance of its probes; None if it asked for none.
        tokens: tokens that went through the model.
        seconds: wall-clock time, without evaluations.
        server_seconds: the server's share of it.
        evaluation: of the version that it made, if it was evaluated.
        returned_to: the earlier version whose coefficients it brought back, in place of an update; None for most.

    """

    step: int
    version: int
    loss: float
    terms: tuple[Term, ...]
    learning_rate: float
    epsilon: float | None
    tokens: int
    seconds: float
    server_seconds: float
    evaluation: Evaluation | None = None
    returned_to: int | None = None

    def to_json(self) -> Json:
        """The record, fit for a line of JSON, which has no nan: it is written as null."""
        evaluation = None if self.evaluation is None else self.evaluation.to_json()
        loss = self.loss if math.isfinite(self.loss) else None
        return asdict(replace(self, evaluation=None)) | {"loss": loss, "evaluation": evaluation}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepRecord:
        """The record that :meth:`to_json` wrote, without its evaluation, of which that has figures alone."""
        terms = tuple((int(seed), float(scalar)) for seed, scalar in data["terms"])
        loss = math.nan if data["loss"] is None else data["loss"]
        return cls(**{**data, "loss": loss, "terms": terms, "evaluation": None})


@dataclass
class History:
    """What a run did.

    Attributes:
        baseline: evaluation before the first step; None without evaluation rows, or for a run that was restored from
            a state, which holds none of the past but the last step.
        steps: one a step.
        stopped: why a callback stopped the run; None if it did not.
        kept: the evaluated version that the run returned to when it was over; None if it ended with its last.

    """

    baseline: Evaluation | None = None
    steps: list[StepRecord] = field(default_factory=list)
    stopped: str | None = None
    kept: int | None = None

    @property
    def evaluations(self) -> list[Evaluation]:
        """All evaluations, the baseline first."""
        found = [self.baseline, *(record.evaluation for record in self.steps)]
        return [evaluation for evaluation in found if evaluation is not None]

    @property
    def final(self) -> Evaluation | None:
        """The evaluation of the version that the run ended with; None if there is none of it."""
        if self.kept is None:
            return self.steps[-1].evaluation if self.steps else None
        return next((found for found in self.evaluations if found.version == self.kept), None)

    def to_json(self) -> Json:
        """The history, fit for JSON."""
        return {
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            "steps": [record.to_json() for record in self.steps],
            "stopped": self.stopped,
            "kept": self.kept,
        }
