"""Training for a reward: text is generated under probes, and a Python function says what it is worth.

No gradient of the reward is needed and none of the sampling: a zeroth-order estimate asks only for the mean reward of
the text that C + eps Z writes, and that of C - eps Z (evolution strategies; Salimans et al., arXiv 1703.03864). So an
adapter with a reward is trained as an adapter with losses is, by the same estimators, optimisers and trainer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeAlias

import numpy as np

from zoact_remote.errors import InvalidValue
from zoact_remote.evaluation import Progress, renamed
from zoact_remote.threads import side_by_side
from zoact_remote.wire import (
    Generation,
    Limits,
    Losses,
    Probe,
    ProbeLoss,
    Row,
    RowScore,
    Scores,
    Side,
    Update,
    UpdateResult,
)

Reward: TypeAlias = Callable[[Row, str], float]
"""What a text is worth as the answer to a row: the more, the better. It is called from several threads at once."""


class Versioned(Protocol):
    """What is known of an adapter."""

    @property
    def version(self) -> int:
        """The newest one."""
        ...


class Writer(Protocol):
    """What can be trained for a reward; an :class:`~zoact_remote.adapter.Adapter` is one."""

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        version: int | None = None,
        probe: Side | None = None,
    ) -> Generation:
        """Text from a version, or from a perturbation of it."""
        ...

    def refresh(self) -> Versioned:
        """Ask for the newest version."""
        ...

    def update(self, update: Update) -> UpdateResult:
        """Apply an update."""
        ...

    def rollback(self, version: int, *, base_version: int | None = None, key: str | None = None) -> UpdateResult:
        """Return to a version, as a new one."""
        ...

    def limits(self) -> Limits:
        """What one call may ask for."""
        ...


@dataclass(frozen=True)
class RewardEvaluation:
    """What a version writes, and what it is worth.

    Attributes:
        version: the version evaluated.
        reward: mean over the rows.
        rewards: row by row.
        texts: row by row.
        tokens: tokens generated.

    """

    version: int
    reward: float
    rewards: tuple[float, ...]
    texts: tuple[str, ...]
    tokens: int


class Rewarded:
    """An adapter whose loss is minus the mean reward of the text that it writes.

    :class:`~zoact_remote.Trainer` takes it in the adapter's place. Rows are prompts or conversations, of which the
    assistant's last turn, if they end with it, is not shown to the model; whatever else they hold, such as references,
    is for the reward, and stays here. With rows to evaluate on, an :class:`~zoact_remote.Evaluation`'s ``loss`` is
    minus the mean reward, and its other figures are None.

    A step is two round trips: the update, then all texts, side by side. Counts of tokens are of those generated.

    Args:
        adapter: what to train.
        reward: what a text is worth.
        max_tokens: most tokens of a text.
        temperature: 0 takes the likeliest token each time. Above it, a row is sampled with the same random numbers on
            all sides of a step's probes, so that their rewards differ by the coefficients and not by chance.
        seed: of the sampling; at least 0. The random numbers of a row follow from it, the version and the row's place
            in the batch, or among all that are evaluated.
        stop: texts end before any of these strings.

    """

    def __init__(
        self,
        adapter: Writer,
        reward: Reward,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> None:
        self.adapter = adapter
        self.reward = reward
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.seed = seed
        self.stop = stop

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        """Minus the mean rewards of a batch under probes. As :meth:`Adapter.losses`, with the update as a call before.

        Raises:
            InvalidValue: there are no rows, or neither probes nor ``base``; ``version`` is not the one that the update
                leads to; a row has neither a prompt nor messages to answer; a reward is not finite.
            BadRequest: a row is at fault, which :attr:`~zoact_remote.errors.CallFailed.param` names.

        """
        sides: list[tuple[Side | None, range]] = [
            (Side(probe.seed, probe.epsilon, sign), probe.rows_of(len(rows)))
            for probe in probes
            for sign in probe.signs
        ]
        if base:
            sides.append((None, range(len(rows))))
        if not sides:
            raise InvalidValue("probes", "must not be empty unless base is true")
        result = None
        if update is not None:
            if version not in (None, update.base_version + 1):
                raise InvalidValue("version", f"must be {update.base_version + 1}, to which the carried update leads")
            result = self.adapter.update(update)
            version = result.version
        judged = self._judge(rows, sides, version)
        means = iter([-each.reward for each in judged])
        losses = tuple(
            ProbeLoss(probe.seed, probe.epsilon, next(means), next(means) if probe.sides == "both" else None)
            for probe in probes
        )
        tokens = sum(each.tokens for each in judged)
        return Losses(judged[0].version, losses, next(means) if base else None, tokens, result)

    def evaluate(
        self, rows: Sequence[Row], *, version: int | None = None, progress: Progress | None = None
    ) -> RewardEvaluation:
        """What a version writes to rows of any number, and what it is worth.

        Args:
            rows: at least one.
            version: None for the newest; 0 is the base model, or what was imported.
            progress: called after each text with the texts done and the texts in all.

        Raises:
            InvalidValue: there are no rows; a row has neither a prompt nor messages to answer; a reward is not finite.
            BadRequest: a row is at fault, which :attr:`~zoact_remote.errors.CallFailed.param` names.

        """
        (found,) = self._judge(rows, [(None, range(len(rows)))], version, progress)
        return found

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        """Minus each row's reward as its loss; there are no likelihoods."""
        return self.scores_from(0, rows, version=version)

    def scores_from(self, start: int, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        """As :meth:`scores`, of a part of the rows: it is sampled as if all were evaluated at once."""
        (found,) = self._judge(rows, [(None, range(len(rows)))], version, start=start)
        scores = tuple(RowScore((), (), -reward) for reward in found.rewards)
        return Scores(found.version, scores, -found.reward, found.tokens)

    def refresh(self) -> Versioned:
        """Ask about the adapter."""
        return self.adapter.refresh()

    def update(self, update: Update) -> UpdateResult:
        """Apply an update to the adapter."""
        return self.adapter.update(update)

    def rollback(self, version: int, *, base_version: int | None = None, key: str | None = None) -> UpdateResult:
        """Return the adapter to a version."""
        return self.adapter.rollback(version, base_version=base_version, key=key)

    def limits(self) -> Limits:
        """Those of the adapter, but that any number of probes will do: every text is a call of its own."""
        return replace(self.adapter.limits(), max_probes=sys.maxsize)

    def _judge(
        self,
        rows: Sequence[Row],
        sides: Sequence[tuple[Side | None, range]],
        version: int | None,
        progress: Progress | None = None,
        start: int = 0,
    ) -> list[RewardEvaluation]:
        """By side: what it writes to the rows that are its own, and what that is worth."""
        if not rows:
            raise InvalidValue("rows", "at least one row is needed")
        questions = [_question(row, f"rows[{i}]") for i, row in enumerate(rows)]
        at = self.adapter.refresh().version if version is None else version

        def write(place: tuple[Side | None, int]) -> tuple[str, float, int]:
            side, i = place
            with renamed(f"rows[{i}].{{}}".format):
                written = self.adapter.generate(
                    **questions[i],
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                    seed=self._sampling_seed(at, start + i) if self.temperature else None,
                    stop=self.stop,
                    version=at,
                    probe=side,
                )
            reward = float(self.reward(rows[i], written.text))
            if not math.isfinite(reward):
                raise InvalidValue(f"rows[{i}]", f"the reward must be finite, got {reward} for {written.text!r}")
            return written.text, reward, len(written.token_ids)

        written = []
        asked = [(side, i) for side, part in sides for i in part]
        # Closed at once if the progress raises: what has not begun is left out.
        with closing(side_by_side(write, asked)) as texts:
            for each in texts:
                written.append(each)
                if progress is not None:
                    progress(len(written), len(asked))
        found = iter(written)
        return [_evaluation(at, list(islice(found, len(part)))) for _, part in sides]

    def _sampling_seed(self, version: int, row: int) -> int:
        """The seed, of 63 bits, that a row is sampled with at a version and around it."""
        stream = np.random.SeedSequence(self.seed, spawn_key=(version, row))
        return int(stream.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _evaluation(version: int, written: Sequence[tuple[str, float, int]]) -> RewardEvaluation:
    texts, rewards, tokens = zip(*written, strict=True)
    return RewardEvaluation(version, math.fsum(rewards) / len(rewards), rewards, texts, sum(tokens))


def _question(row: Row, param: str) -> dict[str, Any]:
    """What the model is shown of a row. Raises InvalidValue if there is nothing."""
    if (messages := row.get("messages")) is None:
        if row.get("prompt") is None:
            raise InvalidValue(f"{param}.prompt", "is missing: a row needs a prompt or messages")
        return {"prompt": row["prompt"]}
    shown = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    if not shown:
        raise InvalidValue(f"{param}.messages", "must hold a turn for the assistant to answer")
    return {"messages": shown}
