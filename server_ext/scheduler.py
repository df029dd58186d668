"""vLLM's scheduler, which puts no more of training into a step than its share while there is other traffic.

It comes in by vLLM's own door, ``--scheduler-cls``. Priorities alone decide who goes first, not how long a step gets:
training fills whatever foreground leaves free, and whoever comes next waits for it. Before every step the requests of
training that are beyond the share leave the queue, and come back to it afterwards.

Nor does vLLM wait for company: with nothing to do, it makes a step of the first request that comes. The sides of a
probe, which come one right after the other, would have a step each, which on a GPU takes little less than one of both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any, Protocol

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from server_ext.lanes import BACKGROUND, PREFIX, QUIET_S, training_cap, training_share

GATHER_S = 0.003
"""Seconds that the first request of training has for others to catch up, where there is nothing else to do. From one
side of a probe to the other it takes about one millisecond."""


class Request(Protocol):
    """What is read of a request of vLLM's."""

    request_id: str
    priority: int
    num_tokens: int
    num_computed_tokens: int
    is_prefill_chunk: bool


def to_do(request: Request) -> int:
    """Tokens of a request that are yet to be computed, were nothing of it in the prefix cache."""
    return max(0, request.num_tokens - request.num_computed_tokens)


def is_training(request: Request) -> bool:
    """Whether a request is training's, and in its lane."""
    return request.request_id.startswith(PREFIX) and request.priority == BACKGROUND


def beyond_share(running: Iterable[Request], waiting: Iterable[Request], cap: int) -> list[Request]:
    """The requests of training that are to wait for another step.

    One always goes, so that training does not come to a stop. Texts that are being written do not count: they add a
    token each, and what waits for the end of one would wait for long.

    Args:
        running: what goes on in the next step.
        waiting: what could join it, in order.
        cap: tokens of training's prompts that a step may hold.

    """
    taken = sum(to_do(request) for request in running if request.is_prefill_chunk and is_training(request))
    held: list[Request] = []
    for request in filter(is_training, waiting):
        if held or (taken and taken + to_do(request) > cap):
            held.append(request)
        else:
            taken += to_do(request)
    return held


class _Sharing:
    """Mixed into vLLM's schedulers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        batch: int = self.scheduler_config.max_num_batched_tokens  # type: ignore[attr-defined]
        on_cpu: bool = self.vllm_config.device_config.device_type == "cpu"  # type: ignore[attr-defined]
        self._cap = training_cap(training_share(os.environ, on_cpu=on_cpu), batch)
        self._last_foreground = -QUIET_S

    def add_request(self, request: Any) -> None:
        plain: Any = super()
        idle = not self.requests  # type: ignore[attr-defined]
        plain.add_request(request)
        if idle and request.request_id.startswith(PREFIX):
            # Whatever comes meanwhile is taken in by another thread, and put to us before the next step.
            time.sleep(GATHER_S)

    def schedule(self, *args: Any, **options: Any) -> Any:
        plain: Any = super()
        this: Any = self
        if self._cap is None:
            return plain.schedule(*args, **options)
        # vLLM's queues are heaps: to go through one in order costs far more than to look for what is ours.
        ours = [request for name, request in this.requests.items() if name.startswith(PREFIX)]
        now = time.monotonic()
        if len(ours) < len(this.requests):
            self._last_foreground = now
        if now - self._last_foreground >= QUIET_S:
            return plain.schedule(*args, **options)
        # What holds key-value blocks, or waits for any, is in the middle of something and stays where it is.
        holding = set(getattr(this, "kv_holding_waiting", ()))
        waiting = [r for r in ours if r.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) and r not in holding]
        held = beyond_share(this.running, sorted(waiting), self._cap)
        if not held:
            return plain.schedule(*args, **options)
        this.waiting.remove_requests(held)
        # vLLM 0.26 keeps those apart that an earlier step has passed over.
        if hasattr(this, "skipped_waiting"):
            this.skipped_waiting.remove_requests(held)
        try:
            return plain.schedule(*args, **options)
        finally:
            for request in held:
                this.waiting.add_request(request)


class _SharingScheduler(_Sharing, Scheduler):
    """For vLLM on the CPU, which makes one step after another."""


class _SharingAsyncScheduler(_Sharing, AsyncScheduler):
    """For vLLM on a GPU, which schedules a step while the one before it runs."""


def sharing_scheduler(vllm_config: Any, **options: Any) -> Scheduler:
    """Makes the scheduler. For vLLM's ``--scheduler-cls``, whose value is only ever called."""
    made = _SharingAsyncScheduler if vllm_config.scheduler_config.async_scheduling else _SharingScheduler
    return made(vllm_config=vllm_config, **options)
