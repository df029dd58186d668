"""Training with two steps under way at once, for servers that are far away.

A :class:`~zoact_remote.Trainer` waits for the losses of one step before it asks for those of the next. Here the next
step's are asked for meanwhile, of the version before: every gradient is one step stale. Call k carries the update made
from the losses of step k - 2, and probes the version which that leads to; it is sent as soon as those losses are there,
while call k - 1 is under way. So the link and the server are busy at the same time, and a step takes half a round trip
where the link is what it waits for.

A version once made never changes and every call names its own, so that a run is the same to the bit however the calls
are timed: ``C_{k+1} = C_k - a_k g_k(C_{k-1})``, the delayed gradient method (Agarwal and Duchi, arXiv 1104.5525) with a
delay of one step. A run that goes back to a version starts anew there: what was asked for ahead is dropped, and the
next two steps probe that version, as the first two do the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import replace
from typing import Any, ClassVar

from zoact_remote.errors import StaleVersion
from zoact_remote.estimators import Ask
from zoact_remote.history import History
from zoact_remote.threads import pool
from zoact_remote.training import Trainer
from zoact_remote.wire import Json, Losses, Rollback, Update


class PipelinedTrainer(Trainer):
    """A :class:`~zoact_remote.Trainer` that accepts one step of staleness to hide the way to the server.

    The second step probes the same version as the first, and from then on every step probes the version that the
    update before the last one made. Batches and probes are those of a plain run with the same seed. Steps overlap from
    the second on; before an evaluation, and at the end, both updates that are then under way are waited for.

    Nothing else may change the adapter meanwhile.
    """

    kind: ClassVar[str] = "pipelined"

    def _prepare(self) -> None:
        self._threads: Executor
        self._calls: dict[int, Future[Losses]] = {}
        """The steps whose losses have been asked for and not been used."""
        self._earlier: Update | None = None
        """The update before the pending one, until it is known to be applied."""
        self._start = 0
        """The version that steps have overlapped from: the first one, or that which a rollback made."""

    def run(self) -> History:
        """See :meth:`Trainer.run`."""
        try:
            with pool(2, "zoact-step") as self._threads:
                return super().run()
        finally:
            # What was still asked for can be asked for again: an update is applied once.
            self._calls.clear()

    def return_to(self, version: int) -> None:
        """See :meth:`Trainer.return_to`."""
        super().return_to(version)
        # The next step has been asked for, of a version that no longer leads anywhere.
        wait(self._calls.values())
        self._calls.clear()

    def flush(self) -> None:
        """Send the updates that wait for later steps, after the calls under way, one of which may carry the first."""
        wait(self._calls.values())
        if self._earlier is not None:
            self.adapter.update(self._earlier)
            self._earlier = None
        if isinstance(self._pending, Rollback):
            self._start = self._pending.base_version + 1
        super().flush()

    def state_dict(self) -> Json:
        """See :meth:`Trainer.state_dict`."""
        earlier = None if self._earlier is None else self._earlier.to_json()
        return super().state_dict() | {"earlier": earlier, "start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Trainer.load_state_dict`."""
        super().load_state_dict(state)
        self._earlier = None if state["earlier"] is None else Update.from_json(state["earlier"])
        self._start = state["start"]

    def _losses(self, ask: Ask) -> Losses:
        assert not isinstance(self._pending, Rollback)
        self._begin(self.step, ask)
        if self.version is not None and self.step + 1 < self.steps:
            self._begin(self.step + 1, self.estimator.ask(self._draw(self.step + 1)))
        losses = self._calls[self.step].result()
        del self._calls[self.step]
        if self._pending is not None:
            self._earlier, self._pending = self._pending, None
        self.probed = losses.version
        if self.version is None:
            self.version = self._start = losses.version
        # To the trainer, a step's losses are of the version that its update will apply to.
        return replace(losses, version=self.version)

    def _begin(self, step: int, ask: Ask) -> None:
        """Ask for a step's losses, unless that has been done: those of the version before the one that is due."""
        if step in self._calls:
            return
        version = None if self.version is None else max(self._start, self.version + (step - self.step) - 1)
        waiting = [u for u in (self._earlier, self._pending) if isinstance(u, Update)]
        update = next((u for u in waiting if u.base_version + 1 == version), None)
        places = self._places(step)
        before = self._calls.get(step - 1)

        def send() -> Losses:
            return self._call(places, ask, version, update)

        def call() -> Losses:
            try:
                return send()
            except StaleVersion as stale:
                overtook = update is not None and (stale.current_version or 0) < update.base_version
                if before is None or not overtook:
                    raise
            # It was faster than the call before it, whose update its own builds on.
            wait([before])
            return send()

        self._calls[step] = self._threads.submit(call)
