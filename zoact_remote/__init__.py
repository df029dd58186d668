"""Fine-tune a served language model from a laptop, with forward passes alone.

The server keeps weights, activations, bases and coefficients; the client sends data, seeds and scalars. A run is::

    from zoact_remote import Adam, Client, Trainer, TwoPoint, load_jsonl, tasks

    task = tasks.BUILTIN["sst2"]
    rows = task.rows(load_jsonl("train.jsonl"))
    with Client("http://127.0.0.1:8000") as client:
        adapter = client.create_adapter("acme/sentiment", rank=4)
        adapter.calibrate(rows[:64])
        Trainer(adapter, TwoPoint(), Adam(), schedule=2e-3, rows=rows, steps=400).run()
        adapter.export("sentiment")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoact_remote.adapter import Adapter
    from zoact_remote.audit import Audit
    from zoact_remote.callbacks import Callback
    from zoact_remote.client import Client
    from zoact_remote.errors import (
        AuthenticationError,
        BadRequest,
        Conflict,
        ConnectionFailed,
        InvalidValue,
        NotFound,
        RateLimited,
        ServerError,
        StaleVersion,
        TooLarge,
        ZoActError,
    )
    from zoact_remote.estimators import Estimate, Estimator, ForwardDifference, TwoPoint
    from zoact_remote.evaluation import Evaluation, evaluate
    from zoact_remote.optimizers import SGD, Adam, GaussianAdam, Optimizer
    from zoact_remote.schedules import constant, cosine, linear
    from zoact_remote.tasks import Task, load_jsonl
    from zoact_remote.training import History, StepRecord, Trainer, TrainingDiverged
    from zoact_remote.wire import (
        AdapterInfo,
        Basis,
        Info,
        Losses,
        Normaliser,
        Probe,
        Row,
        Scores,
        Side,
        Update,
        UpdateResult,
    )

_NAMES = {
    "adapter": ("Adapter",),
    "audit": ("Audit",),
    "callbacks": ("Callback",),
    "client": ("Client",),
    "errors": (
        "AuthenticationError",
        "BadRequest",
        "Conflict",
        "ConnectionFailed",
        "InvalidValue",
        "NotFound",
        "RateLimited",
        "ServerError",
        "StaleVersion",
        "TooLarge",
        "ZoActError",
    ),
    "estimators": ("Estimate", "Estimator", "ForwardDifference", "TwoPoint"),
    "evaluation": ("Evaluation", "evaluate"),
    "optimizers": ("Adam", "GaussianAdam", "Optimizer", "SGD"),
    "schedules": ("constant", "cosine", "linear"),
    "tasks": ("Task", "load_jsonl"),
    "training": ("History", "StepRecord", "Trainer", "TrainingDiverged"),
    "wire": (
        "AdapterInfo",
        "Basis",
        "Info",
        "Losses",
        "Normaliser",
        "Probe",
        "Row",
        "Scores",
        "Side",
        "Update",
        "UpdateResult",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "SGD",
    "Adam",
    "Adapter",
    "AdapterInfo",
    "Audit",
    "AuthenticationError",
    "BadRequest",
    "Basis",
    "Callback",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "Estimate",
    "Estimator",
    "Evaluation",
    "ForwardDifference",
    "GaussianAdam",
    "History",
    "Info",
    "InvalidValue",
    "Losses",
    "Normaliser",
    "NotFound",
    "Optimizer",
    "Probe",
    "RateLimited",
    "Row",
    "Scores",
    "ServerError",
    "Side",
    "StaleVersion",
    "StepRecord",
    "Task",
    "TooLarge",
    "Trainer",
    "TrainingDiverged",
    "TwoPoint",
    "Update",
    "UpdateResult",
    "ZoActError",
    "__version__",
    "constant",
    "cosine",
    "evaluate",
    "linear",
    "load_jsonl",
]


def __getattr__(name: str) -> Any:
    # Loaded when first used (PEP 562): requests and numpy take a third of a second that `--help` should not pay.
    if name == "__version__":
        return _version()
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("zoact-remote")
    except PackageNotFoundError:  # a source tree that was not installed
        return "0.0.0"
