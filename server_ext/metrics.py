"""What a server counts, for Prometheus.

A label is a tenant, a route or a word of ours: never an adapter's name. Tenants beyond ``TENANTS_SHOWN`` share one
label, since on a server without keys anybody can name them. Counting never fails a call.

Where vLLM runs in Prometheus' multiprocess mode, values are kept in files: whatever is counted has to be one of the
client library's own metrics, gauges are the newest value, and no series can be taken away again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Literal, ParamSpec

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry

from server_ext.adapters import BYTES_PER_COEFFICIENT, Adapter
from server_ext.engines.base import Slots
from server_ext.logs import log
from zoact_remote.wire import Change, Rollback

P = ParamSpec("P")

TENANTS_SHOWN = 100
"""Tenants with a label of their own."""
# No tenant's name begins with an underscore.
OTHER = "_other"
"""Label of all further tenants, and of routes that are not worth telling apart."""
OPERATOR = "_operator"
"""Label of calls with the operator's key, or on a server without keys."""
NOBODY = "_nobody"
"""Label of calls whose key is wrong, and of those that need none."""

CALL_SECONDS = tuple(0.005 * 2**i for i in range(16))
"""Buckets: 5 ms to 164 s."""
DISK_SECONDS = tuple(0.0005 * 2**i for i in range(13))
"""Buckets: 0.5 ms to 2 s."""


def _harmless(count: Callable[P, None]) -> Callable[P, None]:
    """Logs what goes wrong with counting, such as a full disk in multiprocess mode, and no more."""

    @wraps(count)
    def guarded(*args: P.args, **options: P.kwargs) -> None:
        try:
            count(*args, **options)
        except Exception:
            log.warning("not counted", exc_info=True)

    return guarded


class Metrics:
    """One server's figures.

    Args:
        registry: where they are registered; one of their own if None.

    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._tenants: set[str] = set()
        self._shown: dict[prometheus.Gauge, set[tuple[str, ...]]] = {}
        self._misses_seen = 0
        self._phase: Literal["start", "serving"] = "start"

        self._calls = self._counter("calls", "Calls answered, by route and class of status.", "route", "status")
        self._refusals = self._counter("refusals", "Calls refused, by the error's code.", "tenant", "code")
        self._under_way = self._gauge("calls_under_way", "Calls that have been let in and not yet answered.", "tenant")

        self._updates = self._counter("updates", "Updates applied.", "tenant")
        self._rollbacks = self._counter("rollbacks", "Rollbacks applied.", "tenant")
        self._probes = self._counter("probes", "Probes of calls for losses, both sides as one.", "tenant")
        self._tokens = self._counter("training_tokens", "Tokens through the model for losses.", "tenant")
        self._losses = self._histogram("losses", "Whole calls for losses, a carried update included.", "tenant")
        self._queueing = self._histogram("queueing", "Waits of pieces of losses and scores for their turn.", "tenant")
        self._evaluation = self._histogram("evaluation", "Pieces of losses and scores inside the engine.", "tenant")

        self._adapters = self._gauge("adapters", "Adapters, by state.", "tenant", "state")
        self._versions = self._gauge("versions_held", "Versions of adapters that the engine holds.", "tenant")
        self._coefficients = self._gauge("coefficient_bytes", "Coefficients that the engine holds.", "tenant")
        self._slots = self._gauge("slots", "Places for points in a batch of vLLM's.")
        self._slots_filled = self._gauge("slots_filled", "Of these, those that hold a point or another LoRA.")
        self._misses = self._counter("slot_misses", "Points whose weights were made, as vLLM held none for a request.")

        about = "Until a change was on disk, the wait for the journal's thread included."
        self._append = self._histogram("journal_append", about, buckets=DISK_SECONDS)
        self._replayed = self._counter("replayed_entries", "Journal entries replayed, at start and after.", "when")
        self._restore = self._gauge("restore_seconds", "What bringing every adapter back took at the last start.")

    @_harmless
    def answered(self, route: str, status: int, tenant: str, code: str | None) -> None:
        """Counts a call.

        Args:
            route: its path, with names left open.
            status: HTTP status code.
            tenant: who called, or ``OPERATOR`` or ``NOBODY``.
            code: of the error, if it was refused.

        """
        self._calls.labels(route, f"{status // 100}xx").inc()
        if code is not None:
            self._refusals.labels(self._label(tenant), code).inc()

    @_harmless
    def changed(self, tenant: str, change: Change) -> None:
        """Counts an update or a rollback of an adapter of a tenant's."""
        counter = self._rollbacks if isinstance(change, Rollback) else self._updates
        counter.labels(self._label(tenant)).inc()

    @_harmless
    def evaluated(self, tenant: str, probes: int, tokens: int, seconds: float) -> None:
        """Counts a call for losses."""
        label = self._label(tenant)
        self._probes.labels(label).inc(probes)
        self._tokens.labels(label).inc(tokens)
        self._losses.labels(label).observe(seconds)

    @_harmless
    def piece(self, tenant: str, queued: float, evaluated: float) -> None:
        """Counts a piece of work by the seconds until its turn, and those inside the engine."""
        label = self._label(tenant)
        self._queueing.labels(label).observe(queued)
        self._evaluation.labels(label).observe(evaluated)

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Times the way of a change to disk."""
        started = time.perf_counter()
        yield
        self._appended(time.perf_counter() - started)

    @_harmless
    def _appended(self, seconds: float) -> None:
        self._append.observe(seconds)

    @_harmless
    def replayed(self, entries: int) -> None:
        """Counts journal entries that a version was made from."""
        self._replayed.labels(self._phase).inc(entries)

    @_harmless
    def restored(self, seconds: float) -> None:
        """Notes the end of the start: every adapter is back."""
        self._restore.set(seconds)
        self._phase = "serving"

    @_harmless
    def measure(self, adapters: Iterable[Adapter], calls: Mapping[str, int]) -> None:
        """Sets the gauges.

        Args:
            adapters: all of them.
            calls: under way, by tenant or ``OPERATOR``.

        """
        states: Counter[tuple[str, ...]] = Counter()
        versions: Counter[tuple[str, ...]] = Counter()
        coefficients: Counter[tuple[str, ...]] = Counter()
        under_way: Counter[tuple[str, ...]] = Counter()
        for adapter in adapters:
            label = self._label(adapter.row.tenant)
            states[label, adapter.state] += 1
            versions[label,] += len(adapter.digests)
            coefficients[label,] += len(adapter.digests) * adapter.layout.size * BYTES_PER_COEFFICIENT
        for tenant, number in calls.items():
            under_way[self._label(tenant),] += number
        self._show(self._adapters, states)
        self._show(self._versions, versions)
        self._show(self._coefficients, coefficients)
        self._show(self._under_way, under_way)

    @_harmless
    def measure_slots(self, slots: Slots) -> None:
        """Sets what the engine says of its slots."""
        self._slots.set(slots.number)
        self._slots_filled.set(slots.filled)
        self._misses.inc(slots.misses - self._misses_seen)
        self._misses_seen = slots.misses

    def _label(self, tenant: str) -> str:
        """A tenant's label."""
        if tenant in (OPERATOR, NOBODY) or tenant in self._tenants:
            return tenant
        if len(self._tenants) >= TENANTS_SHOWN:
            return OTHER
        self._tenants.add(tenant)
        return tenant

    def _show(self, gauge: prometheus.Gauge, found: Counter[tuple[str, ...]]) -> None:
        """Sets all of a gauge's series; those of what is gone to zero."""
        shown = self._shown.setdefault(gauge, set())
        shown.update(found)
        for labels in shown:
            gauge.labels(*labels).set(found[labels])

    def _counter(self, name: str, about: str, *labels: str) -> prometheus.Counter:
        return prometheus.Counter(f"zoact_{name}_total", about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str, *labels: str) -> prometheus.Gauge:
        return prometheus.Gauge(f"zoact_{name}", about, labels, registry=self.registry, multiprocess_mode="mostrecent")

    def _histogram(
        self, name: str, about: str, *labels: str, buckets: Sequence[float] = CALL_SECONDS
    ) -> prometheus.Histogram:
        return prometheus.Histogram(f"zoact_{name}_seconds", about, labels, registry=self.registry, buckets=buckets)
