"""Kills a server again and again while three tenants train on it, and compares what is left with what they were told.

    python -m tests.soak.server_kills --kills 200
    python -m tests.soak.server_kills --kills 200 --damage torn snapshot full

Every tenant carries out plans whose histories are known from a run that nothing disturbed. The server is killed
(SIGKILL) at random moments, most of them right after one of its files was touched, and may find its files damaged when
it starts again. At the end every adapter must have the history of its plan, digest by digest: nothing that was
acknowledged is lost, and nothing is there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import requests

from tests.soak import damage, plan
from tests.soak.moments import PLACES, Moments
from tests.soak.supervisor import Supervisor
from tests.tiny_model import make_tiny_model
from zoact_remote import Client
from zoact_remote.cli.local_server import LOOPBACK, free_port

TENANTS = ("acme", "umbra", "wayne")
OPERATOR_KEY = "the operator's key, of which nobody else knows"
LONGEST_PAUSE_S = 0.05
"""Between attempts of a client: the pauses that the transport asks for are tested with it."""
LONGEST_LIFE_S = 0.8
"""Of a server, before the moment for it is chosen; starting takes about a third of it."""
WINDOW_S = 0.004
"""After a file was touched: about as long as a change takes from the journal to the answer."""
DAMAGE = ("torn", "snapshot", "full")
KEPT = 3
"""Adapters of each tenant; older ones are deleted on the way."""


@dataclass
class Tally:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    damages: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    killed_before_digest: int = 0
    killed_in_write: int = 0
    plans: int = 0
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    differing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class Victim:
    """A server that is there to be killed, with three tenants who each have a key."""

    def __init__(self, supervisor: Supervisor, state: Path) -> None:
        self.state = state
        self._supervisor = supervisor
        self._port = free_port()
        self.start()
        with self.client(OPERATOR_KEY) as operator:
            operator.wait_until_ready()
            self.keys = {tenant: operator.tenants.add(tenant, {"requests_per_minute": None}) for tenant in TENANTS}

    def start(self) -> None:
        self.pid = self._supervisor.start(self.state, self._port, {"ZOACT_API_KEY": OPERATOR_KEY})

    def end(self, number: signal.Signals) -> int:
        os.kill(self.pid, number)
        return self._supervisor.wait(self.pid)

    def client(self, key: str, refusals: Counter[str] | None = None) -> Client:
        """A client that goes on for as long as it takes."""
        client = Client(f"http://{LOOPBACK}:{self._port}", key, timeout=(5.0, 60.0), patience=1e9)
        client._transport._sleep = lambda seconds: time.sleep(min(seconds, LONGEST_PAUSE_S))

        def note(response: requests.Response, **_: Any) -> None:
            if refusals is not None and not response.ok:
                code = re.search(r'"code":"(\w+)"', response.text)
                refusals[f"{response.status_code} {code[1] if code else response.text}"] += 1

        client._transport._session.hooks["response"].append(note)
        return client


class Tenant(threading.Thread):
    """One tenant: carries out plans until it is told to stop, and checks each."""

    def __init__(self, name: str, client: Client, expected: Sequence[plan.History], stop: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self._client = client
        self._expected = expected
        self._stop_soon = stop
        self._done: list[tuple[plan.Watched, int]] = []
        self.plans = self.acknowledged = self.lost = self.doubled = 0
        self.differing: list[str] = []
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            with self._client as client:
                client.wait_until_ready()
                while not self._stop_soon.is_set():
                    variant = self.plans % plan.VARIANTS
                    watched = plan.carry_out(client, f"{self.name}/{self.plans}", variant)
                    self.plans += 1
                    self._done.append((watched, variant))
                    if len(self._done) > KEPT:
                        self._check(*self._done.pop(0))
                while self._done:
                    self._check(*self._done.pop(0))
        except Exception as error:
            self.failure = error

    def _check(self, watched: plan.Watched, variant: int) -> None:
        """Compares an adapter's history with its plan's, long after it was made, and deletes it."""
        expected, found = self._expected[variant], plan.history(watched.adapter)
        digests = {version: digest for version, _, _, digest in found}
        self.acknowledged += len(watched.digests)
        self.lost += sum(digests.get(version) != digest for version, digest in watched.digests.items())
        self.doubled += max(0, len(found) - len(expected))
        audit = watched.adapter.audit()
        wrong = [f"{a} is not {b}" for a, b in zip_longest(found, expected) if a != b] or audit.failures
        if wrong:
            self.differing.append(f"{watched.adapter.name}: {wrong[0]}")
        plan.delete(watched.adapter)


def undisturbed(supervisor: Supervisor, state: Path) -> list[plan.History]:
    """The histories of all plans on a server that nobody kills."""
    victim = Victim(supervisor, state)
    with victim.client(victim.keys[TENANTS[0]]) as client:
        names = [f"{TENANTS[0]}/{variant}" for variant in range(plan.VARIANTS)]
        found = [plan.history(plan.carry_out(client, name, i).adapter) for i, name in enumerate(names)]
    victim.end(signal.SIGTERM)
    return found


def soak(
    directory: Path,
    model: Path,
    kills: int,
    damages: Sequence[str] = (),
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Tally:
    """Kills a server a number of times.

    Args:
        directory: for state and logs.
        model: directory of a checkpoint.
        kills: how often.
        damages: what happens besides (``DAMAGE``), one of them at every kill.
        seed: of the moments.
        report: is told of progress.

    """
    started = time.monotonic()
    rng = random.Random(seed)
    tally = Tally()
    supervisor = Supervisor(model, directory / "server.log")
    try:
        expected = undisturbed(supervisor, directory / "undisturbed")
        report(f"undisturbed: {[len(history) for history in expected]} versions in {time.monotonic() - started:.0f} s")
        victim = Victim(supervisor, directory / "state")
        moments = Moments(victim.state)
        stop = threading.Event()
        tenants = [Tenant(n, victim.client(k, tally.refusals), expected, stop) for n, k in victim.keys.items()]
        for tenant in tenants:
            tenant.start()
        while tally.kills.total() < kills and all(tenant.is_alive() for tenant in tenants):
            _kill(victim, moments, rng, tally, rng.choice(damages) if damages else None)
            if tally.kills.total() % 20 == 0:
                done = sum(tenant.plans for tenant in tenants)
                report(f"{tally.kills.total()} kills, {done} plans, {time.monotonic() - started:.0f} s")
        stop.set()
        for tenant in tenants:
            tenant.join(600)
            if tenant.failure is not None:
                raise RuntimeError(f"{tenant.name} could not go on") from tenant.failure
            if tenant.is_alive():
                raise RuntimeError(f"{tenant.name} hangs")
            for name in ("plans", "acknowledged", "lost", "doubled", "differing"):
                setattr(tally, name, getattr(tally, name) + getattr(tenant, name))
        victim.end(signal.SIGTERM)
    finally:
        supervisor.close()
    tally.seconds = round(time.monotonic() - started, 1)
    return tally


def _kill(victim: Victim, moments: Moments, rng: random.Random, tally: Tally, kind: str | None) -> None:
    """Lets a server live for a while, kills it at a moment, does some damage, and starts it again."""
    time.sleep(rng.uniform(0.0, LONGEST_LIFE_S))
    if kind == "full":
        damage.fill_disk(victim.pid, victim.state, rng)
        tally.damages[kind] += 1
        time.sleep(rng.uniform(0.0, LONGEST_LIFE_S))
        if rng.random() < 0.5:
            # It must go on by itself once there is room.
            damage.make_room(victim.pid)
            time.sleep(rng.uniform(0.0, LONGEST_LIFE_S))
    moment = rng.choice(["any", *PLACES])
    if moment != "any":
        if not moments.wait(moment, 2.0):
            moment = "any"
        time.sleep(rng.uniform(0.0, WINDOW_S))
    victim.end(signal.SIGKILL)
    tally.kills[moment] += 1
    changes, files = damage.unfinished(victim.state)
    tally.killed_before_digest += changes > 0
    tally.killed_in_write += files > 0
    if (kind == "torn" and damage.tear_journal(victim.state, rng)) or (
        kind == "snapshot" and damage.spoil_snapshot(victim.state, rng)
    ):
        tally.damages[kind] += 1
    victim.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damage", nargs="*", choices=DAMAGE, default=[], help="one of these at every kill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zoact-soak-") as name:
        directory = Path(name)
        model = make_tiny_model(directory / "model")

        def report(line: str) -> None:
            print(line, flush=True)

        tally = soak(directory, model, arguments.kills, arguments.damage, arguments.seed, report)
    print(json.dumps(tally.to_json(), indent=2))
    if tally.lost or tally.doubled or tally.differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
