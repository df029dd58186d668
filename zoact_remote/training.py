"""The training loop: one round trip a step.

A step asks for the losses of a batch under probes and turns them into an update. The update travels with the *next*
step's losses, so that a step is one call; the last one is sent by itself. A callback may have a step return to an
earlier version in place of its update, so that every step makes one version, whatever happens.

Everything random follows from ``(seed, step)``: the batch of a step and the seeds of its probes are functions of the
two and of nothing drawn before. So a run's state is small, a step that failed can be done again, and two runs with the
same seed send the same calls.

An update, or a rollback, leaves only after the callbacks have seen the state that holds it, and its key follows from
run and step. So a run that is killed at any moment and resumed from the last state kept sends nothing else under a key
that is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from zoact_remote.callbacks import AfterStep, Callback
from zoact_remote.errors import InvalidValue, TrainingDiverged
from zoact_remote.estimators import Ask, Draw, Estimate, Estimator
from zoact_remote.evaluation import Evaluation, Scorer, evaluate, rows_at
from zoact_remote.history import History, StepRecord
from zoact_remote.limits import check_limits
from zoact_remote.optimizers import Optimizer
from zoact_remote.schedules import Schedule, constant
from zoact_remote.wire import Change, Json, Limits, Losses, Probe, Rollback, Row, Update, UpdateResult, change_from_json
from zoact_remote.wire.values import whole_number

BATCHES, PROBES = 0, 1
"""Streams of randomness: the children of a run's seed (``np.random.SeedSequence.spawn``)."""

Evaluator: TypeAlias = Callable[[int | None], Evaluation]
"""Evaluates a version; None stands for the newest."""


class Trainable(Scorer, Protocol):
    """What can be trained; an :class:`~zoact_remote.adapter.Adapter` is one."""

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        """Mean losses of a batch under probes, after a carried update."""
        ...

    def update(self, update: Update) -> UpdateResult:
        """Apply an update."""
        ...

    def rollback(self, version: int, *, base_version: int | None = None, key: str | None = None) -> UpdateResult:
        """Make a new version with an earlier one's coefficients."""
        ...

    def limits(self) -> Limits:
        """What a step may ask for."""
        ...


class Trainer:
    """Trains an adapter.

    Args:
        adapter: what to train. Nobody else may update it meanwhile.
        estimator: which probes to ask for.
        optimizer: what to make of their losses.
        schedule: learning rate by step; a number for a constant one.
        rows: training rows, at least one. Every epoch takes them in a new order; batches run on across epochs.
        batch_size: rows a step.
        steps: of the whole run.
        seed: of the data's order and the probes; at least 0. A run that trains an adapter further needs one of its own:
            with the same, it meets every batch with the same probes, and their noise adds up. ``adapter.version`` will
            do.
        eval_rows: evaluated before the first step, every ``eval_every`` steps and at the end.
        eval_every: None for only the first and last.
        evaluator: evaluates a version, in the place of ``eval_rows``: with
            ``lambda version: evaluate_task(adapter, task, records, version=version)`` a run is followed by its task's
            own metric. None stands for the newest version.
        callbacks: :class:`~zoact_remote.Callback` objects, or functions of the trainer and a step's record, called
            after every step.

    """

    kind: ClassVar[str] = "plain"
    """Names the loop in a saved state."""

    def __init__(
        self,
        adapter: Trainable,
        estimator: Estimator,
        optimizer: Optimizer,
        schedule: Schedule | float,
        rows: Sequence[Row],
        *,
        steps: int,
        batch_size: int = 16,
        seed: int = 0,
        eval_rows: Sequence[Row] = (),
        eval_every: int | None = None,
        evaluator: Evaluator | None = None,
        callbacks: Sequence[Callback | Callable[[Trainer, StepRecord], None]] = (),
    ) -> None:
        if not rows:
            raise InvalidValue("rows", "at least one row is needed")
        if eval_rows and evaluator is not None:
            raise InvalidValue("evaluator", "takes the place of eval_rows: give one of the two")
        counts = {"steps": steps, "batch_size": batch_size, "eval_every": 1 if eval_every is None else eval_every}
        for name, count in counts.items():
            if count < 1:
                raise InvalidValue(name, f"must be at least 1, got {count}")
        whole_number(seed, "seed")
        self.adapter = adapter
        self.estimator = estimator
        self.optimizer = optimizer
        self.schedule = schedule if callable(schedule) else constant(schedule)
        self.rows = rows
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed
        self.eval_rows = eval_rows
        self.eval_every = eval_every
        self.evaluator = evaluator
        self.callbacks = callbacks
        self.history = History()
        self.step = 0
        """Steps done."""
        self.version: int | None = None
        """The version that the next call expects, once a carried update is applied; None before the first."""
        self.probed: int | None = None
        """The version that the newest losses are of; for :meth:`Callback.on_loss`."""
        self.rate_scale = 1.0
        """What the schedule's learning rates are multiplied by."""
        self.run_id = uuid.uuid4().hex
        """Names the run; a resumed one keeps it."""
        self._pending: Change | None = None
        self._unfinished = False
        """Whether the last step in the history still lacks its evaluation, if one is due, and its callbacks."""
        self._unheard: Iterator[Callback] = iter(())
        """The callbacks that the last step is still to be told to."""
        self._fresh = optimizer.state_dict()
        self._prepare()

    def _prepare(self) -> None:
        """Set up what another loop keeps beside; this one keeps nothing more."""

    def run(self) -> History:
        """Train until all steps are done or a callback stops the run.

        May be called again after an error, or an interrupt: it goes on where it failed. A step from whose losses no
        update was made is done again, and every callback hears once that a step is done, though it raises.

        Raises:
            InvalidValue: the server's limits do not allow all of the steps to come; none of them is begun.
            TrainingDiverged: a loss is not finite, and no callback made anything of it.
            CallFailed: a call failed. A :class:`~zoact_remote.errors.StaleVersion` says that someone else has updated
                the adapter. A :class:`~zoact_remote.errors.BadRequest` names a row at fault by its place in ``rows``.

        """
        self.history.stopped = None
        if self.step < self.steps:
            check_limits(self.adapter.limits(), self.estimator, self.optimizer, self.steps - self.step)
        if self.step == 0 and self._is_evaluated and self.history.baseline is None:
            self.history.baseline = self._evaluate()
        self._finish_step()
        while self.step < self.steps and self.history.stopped is None:
            for callback in self._callbacks():
                callback.before_step(self)
            self._step()
            self._finish_step()
        self.flush()
        for callback in self._callbacks():
            callback.on_end(self, self.history)
            self.flush()
        return self.history

    def _callbacks(self) -> Iterator[Callback]:
        for callback in self.callbacks:
            yield callback if isinstance(callback, Callback) else AfterStep(callback)

    def _finish_step(self) -> None:
        """What comes after a step, from where it failed: its evaluation, if one is due, and the callbacks."""
        if self._unfinished:
            if self._pending is not None:  # it leaves only after all have seen the state that holds it
                for callback in self._callbacks():
                    callback.on_checkpoint(self)
            record = self.history.steps[-1]
            if record.evaluation is None and self._evaluation_is_due():
                self.flush()
                self.history.steps[-1] = replace(record, evaluation=self._evaluate())
            self._unfinished, self._unheard = False, iter([*self._callbacks()])
        for callback in self._unheard:
            callback.after_step(self, self.history.steps[-1])

    def _evaluate(self) -> Evaluation:
        if self.evaluator is None:
            evaluation = evaluate(self.adapter, self.eval_rows, version=self.version)
        else:
            evaluation = self.evaluator(self.version)
        for callback in self._callbacks():
            callback.on_eval(self, evaluation)
        return evaluation

    def _step(self) -> None:
        """Do a step, all of it or nothing: one that fails, or is interrupted, is done again."""
        started = time.perf_counter()
        if isinstance(self._pending, Rollback):  # losses carry updates alone
            self.flush()
        ask = self.estimator.ask(self._draw(self.step))
        losses = self._losses(ask)
        problem = _not_finite(ask, losses)
        estimate = self.estimator.tell(losses) if problem is None else Estimate((), math.nan)
        done, rate_scale = len(self.history.steps), self.rate_scale
        parts: list[Optimizer | Callback] = [self.optimizer, *self._stateful().values()]
        states = [json.dumps(part.state_dict()) for part in parts]
        try:
            for callback in self._callbacks():
                callback.on_loss(self, estimate.loss)
            change, learning_rate, returned_to = self._pending, 0.0, None
            if isinstance(change, Rollback):
                returned_to = change.to_version
            elif problem is not None:
                raise TrainingDiverged(f"step {self.step}: {problem}, at version {self.probed}. {_ADVICE}")
            else:
                learning_rate = self.rate_scale * self.schedule(self.step)
                update = self.optimizer.step(estimate, learning_rate, losses.version)
                change = replace(update, key=self._key("update"))
            assert self.probed is not None
            record = StepRecord(
                step=self.step,
                version=self.probed,
                loss=estimate.loss,
                terms=estimate.terms,
                learning_rate=learning_rate,
                epsilon=ask.probes[0].epsilon if ask.probes else None,
                tokens=losses.tokens,
                seconds=time.perf_counter() - started,
                server_seconds=losses.timing.total_s,
                returned_to=returned_to,
            )
            self.history.steps.append(record)
            # Nothing is called from here on, so that no interrupt comes in between.
            self._pending, self.version, self.step, self._unfinished = change, losses.version + 1, self.step + 1, True
        except BaseException:
            del self.history.steps[done:]
            self._pending, self.rate_scale = None, rate_scale
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(json.loads(state))
            raise

    def _losses(self, ask: Ask) -> Losses:
        """The losses of the step's batch; the update that waits for them goes along."""
        assert not isinstance(self._pending, Rollback)
        losses = self._call(self._places(self.step), ask, self.version, self._pending)
        self.version = self.probed = losses.version
        self._pending = None
        return losses

    def _call(self, places: Sequence[int], ask: Ask, version: int | None, update: Update | None) -> Losses:
        """The losses of training rows, by whose places one at fault is named."""
        with rows_at(places):
            return self.adapter.losses(
                [self.rows[place] for place in places], ask.probes, base=ask.base, version=version, update=update
            )

    def flush(self) -> None:
        """Send the update or the rollback that waits for the next step, if there is one."""
        match self._pending:
            case Update():
                self.version = self.adapter.update(self._pending).version
            case Rollback(base_version, to_version, key):
                self.version = self.adapter.rollback(to_version, base_version=base_version, key=key).version
        self._pending = None

    def return_to(self, version: int) -> None:
        """Go back to an earlier version, with the optimiser as it was at the start.

        For :meth:`Callback.on_loss`, where it takes the place of the step's update, and :meth:`Callback.on_end`.
        """
        if isinstance(self._pending, Update) or self.version is None:
            raise RuntimeError("return_to may be called from on_loss and on_end alone")
        self._pending = Rollback(self.version, version, self._key("rollback"))
        self.optimizer.load_state_dict(self._fresh)

    def stop(self, reason: str) -> None:
        """End the run after this step; for callbacks."""
        self.history.stopped = reason

    def batch(self, step: int) -> list[Row]:
        """The rows of a step."""
        return [self.rows[place] for place in self._places(step)]

    def _places(self, step: int) -> list[int]:
        """Where the rows of a step stand in the training rows."""
        first = step * self.batch_size
        orders: dict[int, NDArray[np.int64]] = {}
        places = []
        for epoch, place in (divmod(first + i, len(self.rows)) for i in range(self.batch_size)):
            if epoch not in orders:
                stream = np.random.SeedSequence(self.seed, spawn_key=(BATCHES, epoch))
                orders[epoch] = np.random.default_rng(stream).permutation(len(self.rows))
            places.append(int(orders[epoch][place]))
        return places

    def state_dict(self) -> Json:
        """All that the next step depends on, but for the data and the adapter, fit for JSON; a few kilobytes.

        In :meth:`Callback.on_checkpoint` it holds the step's record too, whose evaluation and callbacks are still to
        come.
        """
        return {
            **self._identity,
            "run": self.run_id,
            "schedule": self._rates_ahead(),
            "step": self.step,
            "version": self.version,
            "pending": None if self._pending is None else self._pending.to_json(),
            "optimizer": self.optimizer.state_dict(),
            "rate_scale": self.rate_scale,
            "callbacks": {name: callback.state_dict() for name, callback in self._stateful().items()},
            "unfinished": self.history.steps[-1].to_json() if self._unfinished else None,
            "kept": self.history.kept,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, on the same data.

        Raises:
            InvalidValue: the state belongs to a run of another kind, or with another seed, batch size, data, estimator,
                schedule, optimiser or callbacks; the field that differs is named.

        """
        stateful = self._stateful()
        for name, value in (self._identity | {"callbacks": [*stateful]}).items():
            was = list(state[name]) if name == "callbacks" else state.get(name)
            if was != value:
                raise InvalidValue(name, f"was {was} in the saved state, is {value} here")
        for step, rate in state["schedule"]:
            if self.schedule(step) != rate:
                raise InvalidValue(
                    "schedule", f"was {rate:g} at step {step} in the saved state, is {self.schedule(step):g} here"
                )
        self.optimizer.load_state_dict(state["optimizer"])
        for name, callback in stateful.items():
            callback.load_state_dict(state["callbacks"][name])
        self.run_id = state["run"]
        self.rate_scale = state["rate_scale"]
        self.step = state["step"]
        self.version = state["version"]
        self._pending = None if state["pending"] is None else change_from_json(state["pending"])
        self._unfinished, self._unheard = state["unfinished"] is not None, iter(())
        unfinished = [StepRecord.from_json(state["unfinished"])] if self._unfinished else []
        # States of earlier releases do not say.
        self.history = History(steps=unfinished, kept=state.get("kept"))

    def _stateful(self) -> dict[str, Callback]:
        """Callbacks with a state to keep, by kind; further ones of a kind have a number behind it."""
        found: dict[str, Callback] = {}
        for callback in self._callbacks():
            if callback.kind is not None:
                count = sum(other.kind == callback.kind for other in found.values())
                found[f"{callback.kind} {count + 1}" if count else callback.kind] = callback
        return found

    @cached_property
    def _identity(self) -> Json:
        """What a run is of, beside its optimiser, schedule and callbacks; fit for JSON."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": rows_digest(self.rows),
            "estimator": type(self.estimator).__name__,
            **{f"estimator.{name}": value for name, value in _settings(self.estimator).items()},
        }

    def _rates_ahead(self) -> list[tuple[int, float]]:
        """The schedule, which may be any function, where it can be told from others: steps and their rates."""
        last = self.steps - 1
        following = min(self.step, last)
        return [(step, self.schedule(step)) for step in sorted({following, (following + last) // 2, last})]

    def _draw(self, step: int) -> Draw:
        # Raw words of the bit generator, whose stream NumPy keeps from version to version.
        words = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(PROBES, step)))
        return lambda: int(words.random_raw())

    def _evaluation_is_due(self) -> bool:
        due = self.step == self.steps or (self.eval_every is not None and self.step % self.eval_every == 0)
        return due and self._is_evaluated

    @property
    def _is_evaluated(self) -> bool:
        return bool(self.eval_rows) or self.evaluator is not None

    def _key(self, kind: str) -> str:
        # A key that follows from run and step: a run resumed from an earlier state repeats itself without effect.
        return f"{self.run_id}-{self.step}-{kind}"


_ADVICE = (
    "No update was made from it. A lower learning rate helps if training losses rose before; a smaller epsilon if not."
)


def _settings(estimator: Estimator) -> Json:
    """An estimator's fields, if it is a dataclass: those that JSON keeps as they are."""
    if not is_dataclass(estimator):
        return {}
    found = {field.name: getattr(estimator, field.name) for field in fields(estimator)}
    return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str | None)}


def rows_digest(rows: Iterable[Row]) -> str:
    """Tells data apart: SHA-256 over the rows as lines of JSON, in order."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(_canonical(dict(row)).encode() + b"\n")
    return "sha256:" + sha.hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_plainer)


def _plainer(value: Any) -> Any:
    """What stands for a value that JSON cannot hold, such as a reward may ask for: the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=_canonical)
    if hasattr(value, "tolist"):  # NumPy's
        return value.tolist()
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _not_finite(ask: Ask, losses: Losses) -> str | None:
    """Says which of the losses asked for is not finite, if one is."""
    for place, loss in _losses_of(ask, losses):
        if loss is None or not math.isfinite(loss):
            return f"the loss {place} is {loss}"
    return None


def _losses_of(ask: Ask, losses: Losses) -> Iterator[tuple[str, float | None]]:
    """Every loss asked for, with where it was taken."""
    if ask.base:
        yield "without a probe", losses.base
    for probe, loss in zip(ask.probes, losses.losses, strict=True):
        yield f"at +{probe.epsilon:g} Z({probe.seed})", loss.plus
        if probe.sides == "both":
            yield f"at -{probe.epsilon:g} Z({probe.seed})", loss.minus
