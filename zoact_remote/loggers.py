"""Loggers: callbacks that send every step's figures to a service, whose package is loaded when it is asked for."""

from __future__ import annotations

import importlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoact_remote.callbacks import Callback
from zoact_remote.errors import InvalidValue

if TYPE_CHECKING:
    from zoact_remote.history import History, StepRecord
    from zoact_remote.training import Trainer

PROJECT = "zoact"


def figures(record: StepRecord) -> dict[str, float]:
    """What a step is logged by."""
    found = {
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/epsilon": record.epsilon,
        "train/g": math.hypot(*(g for _, g in record.terms)),
        "train/tokens": record.tokens,
        "train/seconds": record.seconds,
        "train/version": record.version,
    }
    if record.evaluation is not None:
        found |= {f"eval/{name}": value for name, value in record.evaluation.to_json().items()}
    return {name: float(value) for name, value in found.items() if value is not None}


class Logger(Callback, ABC):
    """What sends figures somewhere, until it is closed."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left, and let go; for a run that fails, whose end no callback sees."""

    def on_end(self, trainer: Trainer, history: History) -> None:
        """Close."""
        self.close()


class TensorBoard(Logger):
    """Event files for TensorBoard, written by PyTorch's writer or, without PyTorch, by tensorboardX.

    Args:
        directory: made if it does not exist. A run that goes on there hides what it had logged beyond its state.

    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._open = _writer()
        self._directory = os.fspath(directory)
        self._file: Any = None

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Write a step's figures."""
        if self._file is None:
            # Files are named by the second: one that is opened in the same second would take the other's place.
            suffix = f".{time.time_ns()}"
            self._file = self._open(self._directory, purge_step=record.step, filename_suffix=suffix)
        for name, value in figures(record).items():
            self._file.add_scalar(name, value, record.step)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class WeightsAndBiases(Logger):
    """A run of Weights & Biases, which a resumed run goes on with.

    Args:
        name: of the run, as shown.
        config: the run's settings.
        directory: for its files.

    """

    def __init__(self, name: str, config: Mapping[str, Any], directory: str | os.PathLike[str]) -> None:
        self._wandb = _package("wandb", "wandb", "Weights & Biases")
        self._about = {"name": name, "config": dict(config), "dir": os.fspath(directory)}
        self._run: Any = None

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Send a step's figures."""
        if self._run is None:
            # One of its own, whatever other trainers of this process log to.
            once = {"id": trainer.run_id, "resume": "allow", "reinit": "create_new"}
            self._run = self._wandb.init(project=PROJECT, **once, **self._about)
        self._run.log(figures(record), step=record.step)

    def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Trackio(Logger):
    """A run of Trackio, which a resumed run goes on with.

    Args:
        name: of the run, as shown.
        config: the run's settings.

    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._trackio = _package("trackio", "trackio", "Trackio")
        self._name, self._config = name, dict(config)
        self._begun = False

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Send a step's figures."""
        if not self._begun:
            name = f"{self._name}-{trainer.run_id[:8]}"  # it knows runs by their names alone
            self._trackio.init(project=PROJECT, name=name, config=self._config, resume="allow")
            self._begun = True
        self._trackio.log(figures(record), step=record.step)

    def close(self) -> None:
        """End the run."""
        if self._begun:
            self._trackio.finish()
            self._begun = False


def make_logger(kind: str, name: str, directory: Path, config: Mapping[str, Any]) -> Logger:
    """A logger by its name.

    Args:
        kind: ``tensorboard``, ``wandb`` or ``trackio``.
        name: of the run.
        directory: of the run's results.
        config: the run's settings.

    Raises:
        InvalidValue: there is no such logger, or its package is not installed.

    """
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoard(directory / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(name, config, directory),
        "trackio": lambda: Trackio(name, config),
    }
    if kind not in makers:
        raise InvalidValue("log_to", f"must be one of {', '.join(makers)}, got {kind!r}")
    return makers[kind]()


def _writer() -> Callable[..., Any]:
    for module in ("torch.utils.tensorboard", "tensorboardX"):
        try:
            return importlib.import_module(module).SummaryWriter  # type: ignore[no-any-return]
        except ImportError:
            continue
    raise InvalidValue("log_to", "TensorBoard needs a package that is not installed: pip install tensorboardX")


def _package(module: str, package: str, service: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InvalidValue(
            "log_to", f"{service} needs a package that is not installed: pip install {package}"
        ) from None
