"""Whole training runs through real servers: the same twice, the same on both engines, and better than before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support import Servers, new_adapter
from zoact_remote import (
    Adam,
    Adapter,
    Basis,
    Client,
    ForwardDifference,
    GaussianAdam,
    Trainer,
    TwoPoint,
    evaluate,
    linear,
)

STEPS = 12
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{subject} {verb}. It was", "choices": [" terrible", " great"], "answer": int(verb == "shone")}
    for subject in ("The cast", "The plot", "The music", "The end", "A friend", "The parcel")
    for verb in ("failed", "shone")
]


def train(adapter: Adapter, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> list[float]:
    """Losses of a run's steps."""
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "seed": 5} | options
    schedule = linear(settings.pop("learning_rate", 1e-2), settings["steps"])
    estimator = settings.pop("estimator", TwoPoint(epsilon=2.0**-6))
    optimizer = settings.pop("optimizer", None) or Adam()
    history = Trainer(adapter, estimator, optimizer, schedule, rows, **settings).run()
    return [record.loss for record in history.steps]


@pytest.mark.parametrize("estimator", [TwoPoint(2.0**-6, probes=2), ForwardDifference(2.0**-6, probes=3)])
def test_the_same_run_gives_the_same_coefficients(servers: Servers, estimator: TwoPoint | ForwardDifference) -> None:
    with servers("transformers").client() as client:
        runs = []
        for _ in range(2):
            adapter = new_adapter(client, basis=Basis(positions="both"), rows=ROWS)
            losses = train(adapter, estimator=estimator)
            runs.append((losses, adapter.refresh().version, adapter.info.basis_digest, adapter.info.digest))
        assert runs[0] == runs[1]
        other = new_adapter(client, basis=Basis(positions="both"), rows=ROWS)
        train(other, estimator=estimator, seed=6)
        assert other.refresh().digest != runs[0][3]


def test_training_lowers_the_loss_on_the_rows_it_saw(client: Client) -> None:
    adapter = new_adapter(client, basis=Basis(positions="scored"), rows=ROWS)
    before = evaluate(adapter, ROWS, version=0)
    train(adapter, steps=60, batch_size=len(ROWS), estimator=TwoPoint(2.0**-6, probes=2))
    assert evaluate(adapter, ROWS).loss < 0.8 * before.loss


def test_training_as_in_the_paper_lowers_the_loss(servers: Servers) -> None:
    """Forward differences, Gaussian probes, Adam by coordinate, a basis of the prompt's positions."""
    with servers("transformers").client() as client:
        adapter = new_adapter(client, noise="gaussian", basis=Basis(positions="prompt"), rows=ROWS)
        before = evaluate(adapter, ROWS, version=0)
        estimator = ForwardDifference(2.0**-6, probes=2)
        train(adapter, steps=60, batch_size=len(ROWS), estimator=estimator, optimizer=GaussianAdam())
        assert evaluate(adapter, ROWS).loss < 0.8 * before.loss


@pytest.mark.vllm
def test_both_engines_run_alike(servers: Servers) -> None:
    with servers("transformers").client() as one, servers("vllm").client() as other:
        basis = Basis(source="random", seed=3)
        losses = [train(new_adapter(client, basis=basis)) for client in (one, other)]
        # Rounding differs, and an estimate divides it by epsilon: losses part slowly, a few digits a step.
        assert losses[0][:10] == pytest.approx(losses[1][:10], abs=2e-3)
