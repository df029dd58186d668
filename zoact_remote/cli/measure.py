"""What a run measures before its first step, where a setting is ``auto``.

The search for a learning rate trains, and returns to where it began. That it is under way stands in the checkpoint, so
that a run that was killed meanwhile returns there too, and measures anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from zoact_remote.cli.data import subset
from zoact_remote.cli.output import CommandFailed
from zoact_remote.epsilon import choose_epsilon
from zoact_remote.errors import Inconclusive
from zoact_remote.learning_rate import find_learning_rate

if TYPE_CHECKING:
    from zoact_remote.adapter import Adapter
    from zoact_remote.cli.output import Output
    from zoact_remote.cli.run_files import RunFiles
    from zoact_remote.cli.settings import TrainingSettings
    from zoact_remote.wire import Json, Row

AUTO = "auto"
BATCHES = 2
"""That the search for a learning rate takes its rows from."""


def measured(
    adapter: Adapter, rows: Sequence[Row], settings: TrainingSettings, files: RunFiles, output: Output
) -> TrainingSettings:
    """The settings with numbers in the place of ``auto``: those that the run's files hold, if they do.

    Raises:
        CommandFailed: there are too few rows for the directions that share them.
        Inconclusive: nothing could be measured.

    """
    if AUTO not in (settings.epsilon, settings.learning_rate):
        return settings
    if len(rows) < settings.sharing:
        raise CommandFailed(f"{settings.sharing} directions cannot share {len(rows)} rows: ask for fewer (--probes)")
    if not files.measured:
        if files.measured is not None and adapter.refresh().version != files.start_version:
            adapter.rollback(files.start_version)
        files.keep_measured({})
        try:
            files.keep_measured(_measure(adapter, rows, settings, output))
        except Inconclusive:
            # The adapter is back at what it was, and another run may train it.
            files.keep_measured(None)
            raise
    assert files.measured
    return _with(settings, files.measured)


def _measure(adapter: Adapter, rows: Sequence[Row], settings: TrainingSettings, output: Output) -> Json:
    found: Json = {}
    try:
        if settings.epsilon == AUTO:
            with output.waiting("measuring the losses' noise, to choose epsilon"):
                choice = choose_epsilon(adapter, subset(rows, settings.batch_size // settings.sharing))
            found |= {"epsilon": choice.epsilon, "noise": choice.noise, "slope": choice.slope}
            output.note(f"epsilon {choice.epsilon:g}: the losses' noise is {choice.noise:.2g} nats")
        if settings.learning_rate == AUTO:
            numbers = _with(settings, {"learning_rate": 1.0, **found})
            few = min(BATCHES * settings.batch_size, len(rows))
            few -= few % settings.sharing
            with output.waiting("looking for a learning rate"):
                test = find_learning_rate(
                    adapter,
                    numbers.make_estimator(),
                    numbers.make_optimizer(),
                    subset(rows, few),
                    seed=settings.seed,
                )
            found |= {"learning_rate": test.learning_rate, "range_test": [test.learning_rates, test.losses]}
            output.note(f"learning rate {test.learning_rate:.2g}: a step breaks even at {test.break_even:.2g}")
    except Inconclusive as error:
        # The adapter is back at what it was, but by a rollback, which is a version like any other.
        further = " and --continue" if adapter.refresh().version else ""
        raise Inconclusive(f"{error}; or give --epsilon and --learning-rate as numbers{further}") from None
    return found


def _with(settings: TrainingSettings, found: Json) -> TrainingSettings:
    return replace(settings, **{name: found[name] for name in ("epsilon", "learning_rate") if name in found})
