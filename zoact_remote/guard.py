"""Sees a run diverge, and takes it back to where it was best, to go on at a lower rate.

The reference is the best stretch so far: of all stretches of ``window`` losses in a row the one with the least mean, or
all losses from the start while there are fewer. A run has diverged when ``patience`` losses in a row lie further above
*every* loss of the reference than its highest lies above its mean, or at once when a loss is not finite.

Without the margin that is a rank test, which needs neither scale nor shape of the losses: if nothing has changed since
a stretch of n losses, the next p lie all above it with the probability ``1 / C(n + p, p)``, whatever their
distribution. With the defaults that is 1e-10 for a full window, and over all the shorter references at the start, of
which the first has ``patience`` losses, 1.2e-5 together. A loss that falls, as it should, makes it less. The margin is
for losses that wander as a run goes on, as they do where the noise of the steps and their gain are in balance.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoact_remote.callbacks import Callback
from zoact_remote.errors import InvalidValue, TrainingDiverged

if TYPE_CHECKING:
    from zoact_remote.training import Trainer
    from zoact_remote.wire import Json


@dataclass(frozen=True)
class Stretch:
    """Losses in a row.

    Attributes:
        version: that the last of them is of.
        length: how many they are.
        mean: of them, in nats.
        ceiling: as far above the highest of them as that is above their mean, in nats.

    """

    version: int
    length: int
    mean: float
    ceiling: float


class Guard(Callback):
    """Returns a run that has diverged to its best version, lowers its rate and clears the optimiser's moments.

    The best version is the last one of the reference stretch: by the training loss, which is measured at every step,
    where evaluations are rare and may be none. A loss that is not finite before anything was learnt is no divergence,
    and is left to the trainer.

    Args:
        window: losses of a full reference, at least ``patience``.
        patience: losses in a row above it, at least 2.
        factor: that the learning rate is multiplied by each time, greater than 0 and below 1.
        limit: times that a run is taken back; the next time it ends with
            :class:`~zoact_remote.errors.TrainingDiverged`.

    """

    kind: ClassVar[str] = "guard"

    def __init__(self, *, window: int = 40, patience: int = 10, factor: float = 0.5, limit: int = 5) -> None:
        if patience < 2:
            raise InvalidValue("patience", f"must be at least 2, got {patience}")
        if window < patience:
            raise InvalidValue("window", f"must be at least the patience, {patience}, got {window}")
        if not 0.0 < factor < 1.0:
            raise InvalidValue("factor", f"must be greater than 0 and below 1, got {factor:g}")
        if limit < 0:
            raise InvalidValue("limit", f"must be at least 0, got {limit}")
        self.patience = patience
        self.factor = factor
        self.limit = limit
        self._recent: deque[float] = deque(maxlen=window)
        self._best: Stretch | None = None
        self._above = 0
        self._returns = 0
        self._home: int | None = None
        """The version to return to: that of the reference, or the first one."""

    def on_loss(self, trainer: Trainer, loss: float) -> None:
        """Note a loss, and act on it if the run has diverged."""
        assert trainer.version is not None
        assert trainer.probed is not None
        if self._home is None:
            self._home = trainer.probed
        if math.isfinite(loss):
            self._note(loss, trainer.probed)
            if self._above < self.patience:
                return
            seen = f"{self.patience} losses in a row lie far above all of the best {self._reference.length}"
        elif trainer.probed == self._home:
            return
        else:
            seen = "a loss is not finite"
        if self._returns == self.limit:
            raise TrainingDiverged(
                f"step {trainer.step}: {seen}, though the run was taken back {self.limit} times and its learning rate "
                f"is {trainer.rate_scale:g} of what it was to be. The newest version, {trainer.version}, is not its "
                f"best, {self._home}. Start at a lower learning rate, or with fewer steps to go."
            )
        trainer.rate_scale *= self.factor
        trainer.return_to(self._home)
        # The version that this step makes is the same one over again.
        self._home = trainer.version + 1
        self._recent.clear()
        self._above = 0
        self._returns += 1

    @property
    def _reference(self) -> Stretch:
        assert self._best is not None
        return self._best

    def _note(self, loss: float, version: int) -> None:
        best = self._best
        self._recent.append(loss)
        self._above = self._above + 1 if best is not None and loss > best.ceiling else 0
        if self._above or len(self._recent) < self.patience:
            return
        mean = math.fsum(self._recent) / len(self._recent)
        found = Stretch(version, len(self._recent), mean, 2.0 * max(self._recent) - mean)
        full = found.length == self._recent.maxlen
        if best is None or found.length > best.length or (full and found.mean < best.mean):
            self._best, self._home = found, version

    def state_dict(self) -> Json:
        """See :meth:`Callback.state_dict`."""
        return {
            "recent": list(self._recent),
            "best": None if self._best is None else asdict(self._best),
            "above": self._above,
            "returns": self._returns,
            "home": self._home,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self._recent = deque(state["recent"], self._recent.maxlen)
        self._best = None if state["best"] is None else Stretch(**state["best"])
        self._above = state["above"]
        self._returns = state["returns"]
        self._home = state["home"]
