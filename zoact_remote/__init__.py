"""Fine-tune a served language model from a laptop, with forward passes alone.

The server keeps weights, activations, bases and coefficients; the client sends data, seeds and scalars. A run is::

    from zoact_remote import Adam, Client, Trainer, TwoPoint, load_records, tasks

    task = tasks.BUILTIN["sst2"]
    rows = task.rows(load_records("train.jsonl"))
    with Client() as client:
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
    from zoact_remote.early_stopping import EarlyStopping
    from zoact_remote.epsilon import EpsilonChoice, choose_epsilon
    from zoact_remote.errors import (
        AuthenticationError,
        BadRequest,
        CallFailed,
        Conflict,
        ConnectionFailed,
        Inconclusive,
        InvalidValue,
        LimitExceeded,
        NotFound,
        PermissionDenied,
        RateLimited,
        ServerError,
        StaleVersion,
        TooLarge,
        TrainingDiverged,
        ZoActError,
    )
    from zoact_remote.estimators import FZOO, Estimate, Estimator, ForwardDifference, LeaveOneOut, TwoPoint
    from zoact_remote.evaluation import Evaluation, evaluate, evaluate_task
    from zoact_remote.guard import Guard
    from zoact_remote.history import History, StepRecord
    from zoact_remote.learning_rate import RangeTest, find_learning_rate
    from zoact_remote.notebook import LiveCurve
    from zoact_remote.optimizers import SGD, Adam, AdamW, GaussianAdam, Optimizer
    from zoact_remote.pipeline import PipelinedTrainer
    from zoact_remote.rewarded import Reward, Rewarded, RewardEvaluation
    from zoact_remote.schedules import constant, cosine, linear
    from zoact_remote.tasks import Example, Record, RecordError, Task, load_jsonl, load_records
    from zoact_remote.tenants import Tenant
    from zoact_remote.together import train_together
    from zoact_remote.training import Trainer
    from zoact_remote.wire import (
        AdapterInfo,
        Basis,
        ChatRow,
        ChoicesRow,
        CompletionRow,
        Info,
        Limits,
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
    "early_stopping": ("EarlyStopping",),
    "epsilon": ("EpsilonChoice", "choose_epsilon"),
    "errors": (
        "AuthenticationError",
        "BadRequest",
        "CallFailed",
        "Conflict",
        "ConnectionFailed",
        "Inconclusive",
        "InvalidValue",
        "LimitExceeded",
        "NotFound",
        "PermissionDenied",
        "RateLimited",
        "ServerError",
        "StaleVersion",
        "TooLarge",
        "TrainingDiverged",
        "ZoActError",
    ),
    "estimators": ("Estimate", "Estimator", "FZOO", "ForwardDifference", "LeaveOneOut", "TwoPoint"),
    "evaluation": ("Evaluation", "evaluate", "evaluate_task"),
    "guard": ("Guard",),
    "history": ("History", "StepRecord"),
    "learning_rate": ("RangeTest", "find_learning_rate"),
    "notebook": ("LiveCurve",),
    "optimizers": ("Adam", "AdamW", "GaussianAdam", "Optimizer", "SGD"),
    "pipeline": ("PipelinedTrainer",),
    "rewarded": ("Reward", "RewardEvaluation", "Rewarded"),
    "schedules": ("constant", "cosine", "linear"),
    "tasks": ("Example", "Record", "RecordError", "Task", "load_jsonl", "load_records"),
    "tenants": ("Tenant",),
    "together": ("train_together",),
    "training": ("Trainer",),
    "wire": (
        "AdapterInfo",
        "Basis",
        "ChatRow",
        "ChoicesRow",
        "CompletionRow",
        "Info",
        "Limits",
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
    "FZOO",
    "SGD",
    "Adam",
    "AdamW",
    "Adapter",
    "AdapterInfo",
    "Audit",
    "AuthenticationError",
    "BadRequest",
    "Basis",
    "CallFailed",
    "Callback",
    "ChatRow",
    "ChoicesRow",
    "Client",
    "CompletionRow",
    "Conflict",
    "ConnectionFailed",
    "EarlyStopping",
    "EpsilonChoice",
    "Estimate",
    "Estimator",
    "Evaluation",
    "Example",
    "ForwardDifference",
    "GaussianAdam",
    "Guard",
    "History",
    "Inconclusive",
    "Info",
    "InvalidValue",
    "LeaveOneOut",
    "LimitExceeded",
    "Limits",
    "LiveCurve",
    "Losses",
    "Normaliser",
    "NotFound",
    "Optimizer",
    "PermissionDenied",
    "PipelinedTrainer",
    "Probe",
    "RangeTest",
    "RateLimited",
    "Record",
    "RecordError",
    "Reward",
    "RewardEvaluation",
    "Rewarded",
    "Row",
    "Scores",
    "ServerError",
    "Side",
    "StaleVersion",
    "StepRecord",
    "Task",
    "Tenant",
    "TooLarge",
    "Trainer",
    "TrainingDiverged",
    "TwoPoint",
    "Update",
    "UpdateResult",
    "ZoActError",
    "__version__",
    "choose_epsilon",
    "constant",
    "cosine",
    "evaluate",
    "evaluate_task",
    "find_learning_rate",
    "linear",
    "load_jsonl",
    "load_records",
    "train_together",
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
