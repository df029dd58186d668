"""Several adapters trained side by side from one process.

A run is a conversation with its server and waits nearly all of the time, so threads are enough; the server puts into
one batch what the runs ask for together.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from zoact_remote.errors import InvalidValue
from zoact_remote.threads import pool

if TYPE_CHECKING:
    from zoact_remote.history import History
    from zoact_remote.training import Trainer

STOP_EVERY_S = 0.05


def train_together(trainers: Sequence[Trainer]) -> list[Future[History]]:
    """Run trainers side by side, each in a thread of its own, until all are done.

    A run that fails leaves the others alone. Every run does what it would do by itself, to the bit. They may share a
    :class:`~zoact_remote.Client`, rows and an estimator; a callback that they share is called from all threads.

    If the wait is interrupted (KeyboardInterrupt), every run is told to :meth:`~zoact_remote.Trainer.stop` after its
    step, and is waited for; its update is then applied, and its callbacks have seen the end. Interrupted once more, it
    no longer waits for a server that is gone: runs that do so fail.

    Args:
        trainers: each with an adapter and an optimiser of its own.

    Returns:
        In the trainers' order, futures that are done: ``result()`` is the run's history, or raises what the run raised.

    Raises:
        InvalidValue: two trainers are one, or share an adapter or an optimiser.

    """
    if not trainers:
        return []
    owners: dict[int, str] = {}
    for i, trainer in enumerate(trainers):
        for name, part in (("", trainer), (".adapter", trainer.adapter), (".optimizer", trainer.optimizer)):
            place = f"trainers[{i}]{name}"
            if owners.setdefault(id(part), place) != place:
                raise InvalidValue(place, f"is the same object as {owners[id(part)]}; each needs its own")
    with pool(len(trainers), "zoact-training") as threads:
        runs = [threads.submit(trainer.run) for trainer in trainers]
        try:
            wait(runs)
        except BaseException:
            _stop(trainers, runs)
            raise
    return runs


def _stop(trainers: Sequence[Trainer], runs: Sequence[Future[History]]) -> None:
    # Again and again, since a run that only just begins forgets what it was told before.
    while wait(runs, STOP_EVERY_S).not_done:
        for trainer, run in zip(trainers, runs, strict=True):
            if not run.done():
                trainer.stop("interrupted")
