"""Commands in this process, data for them, and what their figures should be."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from zoact_remote import Adapter, Row
from zoact_remote.cli.app import app
from zoact_remote.cli.data import split
from zoact_remote.tasks import Task

ServeScript = Callable[[str], None]
"""Puts a shell script in the place of ``zoact serve``; what the fixture ``serve_script`` is."""

RECORDS = [{"text": f"ticket {i}", "label": ("billing", "bug")[i % 2]} for i in range(20)]
TASK = Task("{text}\nCategory:", {"billing": " billing", "bug": " bug"})
"""The task that commands make of the records where no option says otherwise."""
HELD_OUT = split(RECORDS, 0.2)[1]
"""The fifth that commands hold out by default."""


def run(*arguments: str, code: int = 0, answer: str = "") -> Result:
    """What ``zoact`` says.

    Args:
        arguments: of the command.
        code: that it is to exit with.
        answer: on its standard input.

    """
    result = CliRunner().invoke(app, arguments, input=answer, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: str, code: int = 0) -> Any:
    """What ``zoact`` says with ``--json``."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def figures(adapter: Adapter, rows: Sequence[Row], version: int) -> dict[str, Any]:
    """What a command should say of a version, by the server's scores."""
    scores = adapter.scores(rows, version=version)
    assert math.isfinite(scores.loss)
    hits = [
        int(np.argmax(score.logprobs)) == row["answer"]
        for row, score in zip(rows, scores.rows, strict=True)
        if "answer" in row
    ]
    found = {"loss": pytest.approx(scores.loss, abs=1e-4), "rows": len(rows)}
    if hits:
        return {"accuracy": float(np.mean(hits)), **found}
    per_token = sum(score.logprobs[0] for score in scores.rows) / sum(score.tokens[0] for score in scores.rows)
    return {"accuracy": None, "perplexity": pytest.approx(math.exp(-per_token), rel=1e-4), **found}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def results_of(adapter: str) -> Path:
    """Where ``zoact train`` leaves an adapter's results."""
    return Path("runs", adapter.replace("/", "-"))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
