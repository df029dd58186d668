"""What a tenant does with one adapter, the same to the last bit whenever and however often it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from tests.support import ROWS
from zoact_remote import (
    Adam,
    Adapter,
    Basis,
    Client,
    ConnectionFailed,
    Losses,
    NotFound,
    Probe,
    Scores,
    Trainer,
    TwoPoint,
    Update,
    UpdateResult,
)
from zoact_remote.wire import Limits, Row, Side

VARIANTS = 2
"""Plans that differ: in seeds, and in what the basis is taken from."""
History: TypeAlias = "list[tuple[int, Update, int | None, str]]"
"""Version, change without its key, version gone back to, digest."""


@dataclass
class Watched:
    """An adapter that keeps what the server acknowledged: digests by version, and how often a change was news."""

    adapter: Adapter
    digests: dict[int, str] = field(default_factory=dict)

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        losses = self.adapter.losses(rows, probes, base=base, version=version, update=update)
        if losses.update is not None:
            self._note(losses.update)
        return losses

    def update(self, update: Update) -> UpdateResult:
        return self._note(self.adapter.update(update))

    def rollback(self, version: int, *, base_version: int | None = None, key: str | None = None) -> UpdateResult:
        return self._note(self.adapter.rollback(version, base_version=base_version, key=key))

    def scores(self, rows: Sequence[Row], *, version: int | None = None, probe: Side | None = None) -> Scores:
        return self.adapter.scores(rows, version=version, probe=probe)

    def limits(self) -> Limits:
        return self.adapter.limits()

    def _note(self, result: UpdateResult) -> UpdateResult:
        said_before = self.digests.setdefault(result.version, result.digest)
        if said_before != result.digest:
            raise AssertionError(f"version {result.version} had the digest {said_before}, and now {result.digest}")
        return result


def carry_out(client: Client, name: str, variant: int) -> Watched:
    """Creates an adapter and changes it in every way there is: carried, plain, doubled and gone back."""
    basis = Basis(source="random", seed=variant) if variant % 2 else Basis(positions="both")
    adapter = client.create_adapter(name, rank=2, basis=basis, exist_ok=True)
    adapter.calibrate(ROWS, exist_ok=True)
    watched = Watched(adapter)
    _train(watched, seed=variant, steps=16)
    for number in range(24):
        base = adapter.refresh().version
        update = Update(base, ((1000 * variant + number, 0.03),), decay=0.01, key=f"plain-{number}")
        first = watched.update(update)
        if number % 4 == 0 and watched.update(update) != replace(first, applied=False):
            raise AssertionError(f"{update.key} was applied twice")
    watched.rollback(20)
    _train(watched, seed=variant + 100, steps=8)
    watched.rollback(3)
    _train(watched, seed=variant + 200, steps=16)
    return watched


def _train(watched: Watched, seed: int, steps: int) -> None:
    Trainer(watched, TwoPoint(2.0**-6), Adam(), 0.01, ROWS, steps=steps, batch_size=2, seed=seed).run()


def history(adapter: Adapter) -> History:
    """What the journal says of an adapter."""
    return [(e.version, replace(e.update, key=None), e.rollback_to, e.digest) for e in adapter.journal()]


def delete(adapter: Adapter) -> None:
    """Deletes an adapter on a server that may die meanwhile."""
    while True:
        try:
            adapter.delete()
        except NotFound:
            return
        except ConnectionFailed:
            continue
        else:
            return
