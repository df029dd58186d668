"""``zoact top``."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoact_remote.cli import options
from zoact_remote.cli.figures import Between, Figures
from zoact_remote.cli.output import CommandFailed, describe, reporting

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zoact_remote.client import Client

WINDOW_S = 10.0
"""Rates and latencies are those of so many seconds, or of all since the first look if that is less."""
ANSWER_WITHIN_S = (5.0, 10.0)


def top(
    interval: Annotated[float, typer.Option(help="Seconds from one look to the next.", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, show what has happened between, and end.")] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write JSON to standard output: a line a look, but for --once.")
    ] = False,
) -> None:
    """Watch adapters train and serve, until Ctrl-C.

    With the operator's key, or where there are no keys: tenants and adapters, by /metrics and the list of adapters.

    With a tenant's key, to which /metrics is closed: the tenant's adapters, their versions and updates a second.
    """
    with reporting(as_json) as output, options.connect(url, api_key) as client:
        if not (once or as_json or sys.stdout.isatty()):
            raise CommandFailed("standard output is no terminal: give --once or --json")
        info = client.info()
        heading = f"{client.url} · {info.model} · {info.engine}"
        looks = _looks(client.with_options(timeout=ANSWER_WITHIN_S, retries=0, patience=0.0), interval)
        try:
            if once:
                look = next(looks)
                if "error" in look:
                    raise CommandFailed(look["error"]["message"])
                output.result(look, _shown(heading, look))
            elif as_json:
                for look in looks:
                    print(json.dumps(look), flush=True)
            else:
                _watch(heading, looks)
        except KeyboardInterrupt:
            # How it is meant to end.
            return


@dataclass(frozen=True)
class Sample:
    """What a server said at once.

    Attributes:
        at: when, on the monotonic clock.
        adapters: state and version by name.
        figures: of /metrics; None where it is closed.

    """

    at: float
    adapters: dict[str, tuple[str, int]]
    figures: Figures | None


class Watcher:
    """Looks at a server again and again."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._closed = False
        self._samples: deque[Sample] = deque([self._sample()])

    def look(self) -> dict[str, Any]:
        """What has happened within the window, as JSON."""
        self._samples.append(self._sample())
        while len(self._samples) > 2 and self._samples[-1].at - self._samples[0].at > WINDOW_S:
            self._samples.popleft()
        first, last = self._samples[0], self._samples[-1]
        seconds = last.at - first.at
        found: dict[str, Any] = {"seconds": seconds, "server": None, "tenants": None, "adapters": []}
        if first.figures is not None and last.figures is not None:
            between = Between(first.figures, last.figures, seconds)
            found |= {"server": _server(between), "tenants": _tenants(between)}
        for name, (state, version) in last.adapters.items():
            before = first.adapters.get(name, (state, 0))[1]
            # One whose version fell was deleted, and made again.
            rate = (version - before if version >= before else version) / seconds
            found["adapters"].append({"name": name, "state": state, "version": version, "updates_per_second": rate})
        return found

    def _sample(self) -> Sample:
        from zoact_remote.errors import AuthenticationError, NotFound, PermissionDenied

        adapters = {adapter.name: (adapter.state, adapter.version) for adapter in self._client.adapters()}
        figures = None
        if not self._closed:
            try:
                figures = Figures.parse(self._client.metrics())
            except (AuthenticationError, PermissionDenied, NotFound):
                # Not asked again: the server counts refusals.
                self._closed = True
        return Sample(monotonic(), adapters, figures)


def _looks(client: Client, interval: float) -> Iterator[dict[str, Any]]:
    """Looks without end, and while the server is away, the error in their place."""
    from zoact_remote.errors import CallFailed, ConnectionFailed
    from zoact_remote.transport import PASSING

    watcher = Watcher(client)
    while True:
        sleep(interval)
        try:
            yield watcher.look()
        except CallFailed as error:
            if not isinstance(error, ConnectionFailed) and error.status not in PASSING:
                raise
            yield {"error": describe(error)}


def _server(between: Between) -> dict[str, Any]:
    last = between.last
    return {
        "calls_per_second": between.rate("zoact_calls_total"),
        "refusals_per_second": between.rate("zoact_refusals_total"),
        "slots": last.sum("zoact_slots"),
        "slots_filled": last.sum("zoact_slots_filled"),
        "slot_misses_per_second": between.rate("zoact_slot_misses_total"),
        # vLLM's own.
        "requests_running": last.sum("vllm:num_requests_running"),
        "requests_waiting": last.sum("vllm:num_requests_waiting"),
    }


def _tenants(between: Between) -> list[dict[str, Any]]:
    last = between.last
    names = last.label("zoact_adapters", "tenant") | last.label("zoact_calls_under_way", "tenant")
    return [
        {
            "name": name,
            "updates_per_second": between.rate("zoact_updates_total", tenant=name),
            "probes_per_second": between.rate("zoact_probes_total", tenant=name),
            "tokens_per_second": between.rate("zoact_training_tokens_total", tenant=name),
            "losses_p50_seconds": between.quantile("zoact_losses_seconds", 0.5, tenant=name),
            "losses_p95_seconds": between.quantile("zoact_losses_seconds", 0.95, tenant=name),
            "calls_under_way": last.sum("zoact_calls_under_way", tenant=name),
        }
        for name in sorted(names)
    ]


def _watch(heading: str, looks: Iterator[dict[str, Any]]) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    shown: RenderableType = Text(heading)
    with Live(shown, console=Console(markup=False, highlight=False), auto_refresh=False) as live:
        for look in looks:
            if "error" in look:
                # What was seen last stays.
                live.update(Group(shown, Text(look["error"]["message"], style="red")), refresh=True)
            else:
                shown = _shown(heading, look)
                live.update(shown, refresh=True)


def _shown(heading: str, look: dict[str, Any]) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    by_tenant: dict[str, list[dict[str, Any]]] = {}
    for adapter in sorted(look["adapters"], key=lambda found: (-found["updates_per_second"], found["name"])):
        by_tenant.setdefault(adapter["name"].partition("/")[0], []).append(adapter)

    def add_adapters(tenant: str) -> None:
        for adapter in by_tenant.pop(tenant, ()):
            table.add_row(
                adapter["name"], adapter["state"], str(adapter["version"]), _number(adapter["updates_per_second"])
            )

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # Where the terminal is narrow, names go on in the next line: figures that are cut off say nothing.
    table.add_column("adapter", overflow="fold")
    table.add_column("state", no_wrap=True)
    columns = ["version", "updates/s"]
    lines = [heading]
    if look["server"] is not None:
        columns += ["probes/s", "tokens/s", "losses p50", "p95", "under way"]
        lines.append(_summary(look["server"]))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for tenant in sorted(look["tenants"] or (), key=lambda found: (-(found["tokens_per_second"] or 0), found["name"])):
        table.add_row(
            tenant["name"],
            "",
            "",
            _number(tenant["updates_per_second"]),
            _number(tenant["probes_per_second"]),
            _number(tenant["tokens_per_second"], ",.0f"),
            _duration(tenant["losses_p50_seconds"]),
            _duration(tenant["losses_p95_seconds"]),
            _number(tenant["calls_under_way"], ".0f"),
            style="bold",
        )
        add_adapters(tenant["name"])
    # A tenant's own, and those of tenants that share a label.
    for name in sorted(by_tenant):
        add_adapters(name)
    return Group(Text("\n".join(lines)), table)


def _summary(server: dict[str, Any]) -> str:
    parts = [f"{_number(server['calls_per_second'])} calls/s", f"{_number(server['refusals_per_second'])} refused/s"]
    if server["slots"]:
        parts.append(f"{server['slots_filled']:.0f} of {server['slots']:.0f} slots filled")
        parts.append(f"{_number(server['slot_misses_per_second'])} misses/s")
    if server["requests_running"] is not None:
        running, waiting = (_number(server[f"requests_{which}"], ".0f") for which in ("running", "waiting"))
        parts.append(f"vLLM: {running} running, {waiting} waiting")
    return " · ".join(parts)


def _number(value: float | None, form: str = ",.1f") -> str:
    from zoact_remote.report import NONE

    return NONE if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _number(None)
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"
