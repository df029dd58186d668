"""The interface of optimisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from zoact_remote.errors import InvalidValue
from zoact_remote.estimators.base import Estimate
from zoact_remote.wire import Json, Update


@dataclass(eq=False)
class Optimizer(ABC):
    """Turns gradient estimates into updates. Settings are dataclass fields; they are fixed for a run."""

    kind: ClassVar[str]
    """Names the algorithm in a saved state."""

    @abstractmethod
    def step(self, estimate: Estimate, learning_rate: float, base_version: int) -> Update:
        """The update that follows an estimate.

        Args:
            estimate: the gradient at ``base_version``.
            learning_rate: of this step, at least 0.
            base_version: the version that the update will apply to.

        Returns:
            An update whose terms stand oldest first and name no seed twice. It has no key.

        """

    @abstractmethod
    def most_terms(self, probes: int, steps: int) -> int:
        """How many terms an update lists at most, or its normaliser, in the next steps.

        Args:
            probes: terms of each step's estimate.
            steps: to come, at least 1.

        """

    @abstractmethod
    def _state(self) -> Json:
        """What changes from step to step, fit for JSON."""

    @abstractmethod
    def _load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`_state` returned."""

    def state_dict(self) -> Json:
        """All that the next step depends on, fit for JSON, which keeps every float exactly."""
        return {"kind": self.kind, "settings": asdict(self), **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            InvalidValue: it was saved by another algorithm, or under other settings.

        """
        if state.get("kind") != self.kind:
            raise InvalidValue("kind", f"this state is of {state.get('kind')!r}, not of {self.kind!r}")
        saved = state["settings"]
        for name, value in asdict(self).items():
            if saved.get(name) != value:
                raise InvalidValue(f"settings.{name}", f"was {saved.get(name)!r} in the saved state, is {value!r} here")
        self._load(state)
