"""What an optimiser costs the client: its state after a long run, and a step's time without the network.

    python benchmarks/optimizer_state.py

Takes 10,000 steps with a stand-in for the server that answers at once. A step's time is all that the client does: it
picks the batch, asks, writes the request's JSON, reads the answer's, and makes the estimate and the update (and, a
little too much, the stand-in's own reading and writing). Prints a table in Markdown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from zoact_remote import SGD, Adam, AdamW, Adapter, Estimator, GaussianAdam, LeaveOneOut, Optimizer, Trainer, TwoPoint
from zoact_remote.transport import Transport

STEPS, BATCH = 10_000, 16
ROWS = [{"prompt": f"Ticket {i}: the parcel never came.", "choices": [" a", " b"], "answer": i % 2} for i in range(384)]
INFO = {
    "model": {"name": "none", "digest": "", "dtype": "float32"},
    "engine": {"name": "none", "version": ""},
    "noise": {"version": 1, "distributions": ["rademacher", "gaussian"]},
    "sites": [],
    "limits": {
        "max_rank": 64,
        "max_probes": 256,
        "max_rows": 1024,
        "max_row_tokens": 2048,
        "max_call_tokens": 1 << 20,
        "max_terms": 4096,
        "max_choices": 128,
    },
}
ADAPTER = {
    "name": "bench/state",
    "version": 0,
    "rank": 4,
    "noise": {"distribution": "rademacher", "version": 1},
    "sites": [],
    "parameters": 0,
    "basis": {},
    "digest": None,
    "created": "2026-01-01T00:00:00Z",
    "state": "ready",
}
RUNS: list[tuple[str, Estimator, Optimizer]] = [
    ("SGD", TwoPoint(), SGD()),
    ("momentum 0.9", TwoPoint(), SGD(0.9)),
    ("Adam", TwoPoint(), Adam()),
    ("AdamW", TwoPoint(), AdamW()),
    ("Adam, 4 pairs a step", TwoPoint(probes=4), Adam()),
    ("Adam, leave-one-out, 8 probes", LeaveOneOut(probes=8), Adam()),
    ("Adam by coordinate (Gaussian)", TwoPoint(), GaussianAdam()),
]


class Loopback(Transport):
    """Answers calls in this process, by way of their JSON."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1")
        self.version = 0
        self.terms = 0

    def call(self, method: str, path: str, decode: Callable[[Any], Any], **options: Any) -> Any:
        if method == "GET":
            return decode(INFO if path == "/info" else ADAPTER)
        return decode(json.loads(self.answer(json.loads(json.dumps(options["json"])))))

    def answer(self, body: dict[str, Any]) -> str:
        update = body.get("update") or (body if "terms" in body else None)
        result = None
        if update is not None:
            self.version += 1
            self.terms = len(update["terms"]) + len((update["normaliser"] or {"terms": []})["terms"])
            result = {"version": self.version, "digest": "0" * 64, "applied": True}
        if "probes" not in body:
            return json.dumps(result)
        losses = [
            {
                "seed": probe["seed"],
                "epsilon": probe["epsilon"],
                "plus": 1.0 + probe["seed"] / 2**70,
                "minus": 1.0 - probe["seed"] / 2**70 if probe["sides"] == "both" else None,
            }
            for probe in body["probes"]
        ]
        return json.dumps({"version": self.version, "losses": losses, "base": None, "tokens": 512, "update": result})


def main() -> None:
    print(f"| optimiser | terms an update | state after {STEPS:,} steps, bytes | a step, median, ms |")
    print("| --- | --- | --- | --- |")
    for name, estimator, optimizer in RUNS:
        transport = Loopback()
        adapter = Adapter(transport, "bench/state")
        adapter.refresh()
        history = Trainer(adapter, estimator, optimizer, 1e-3, ROWS, steps=STEPS, batch_size=BATCH).run()
        median = statistics.median(record.seconds for record in history.steps)
        size = len(json.dumps(optimizer.state_dict()))
        print(f"| {name} | {transport.terms} | {size:,} | {median * 1e3:.2f} |", flush=True)


if __name__ == "__main__":
    main()
