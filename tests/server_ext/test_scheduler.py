"""What vLLM's scheduler makes of training's requests, without a model behind it: ``test_vllm_lanes.py`` has one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

import torch
from vllm.config import CacheConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from server_ext.lanes import BACKGROUND, FOREGROUND, PREFIX
from server_ext.scheduler import GATHER_S, beyond_share, is_training, sharing_scheduler, to_do
from zoact_remote.extension import SHARE_VARIABLE


@dataclass(eq=False)
class Request:
    request_id: str
    priority: int
    num_tokens: int
    num_computed_tokens: int
    is_prefill_chunk: bool = True


REQUESTS = st.lists(
    st.builds(
        Request,
        st.sampled_from([f"{PREFIX}1", "cmpl-1"]),
        st.sampled_from([FOREGROUND, BACKGROUND]),
        st.integers(1, 12),
        st.integers(0, 14),
        st.booleans(),
    ),
    max_size=12,
)


@given(REQUESTS, REQUESTS, st.integers(1, 20))
def test_a_step_holds_no_more_of_training_than_its_share_and_training_goes_on(
    running: list[Request], waiting: list[Request], cap: int
) -> None:
    held = beyond_share(running, waiting, cap)
    assert all(is_training(request) for request in held), "who is served waits for nobody"
    training = [request for request in waiting if is_training(request)]
    joining = training[: len(training) - len(held)]
    assert joining + held == training, "first come, first served"
    before = sum(to_do(request) for request in running if is_training(request) and request.is_prefill_chunk)
    alone = not before and sum(map(to_do, joining[:-1])) == 0
    assert not joining or alone or before + sum(map(to_do, joining)) <= cap
    if not before and training:
        assert joining
    if held and before + sum(map(to_do, joining)):
        assert before + sum(map(to_do, joining)) + to_do(held[0]) > cap, "there is room for one more"


def test_training_that_was_hurried_is_not_held() -> None:
    big = [Request(f"{PREFIX}{i}", priority, 100, 0) for i, priority in enumerate((BACKGROUND, FOREGROUND, BACKGROUND))]
    assert beyond_share([], big, 10) == [big[2]]


def test_training_does_not_wait_for_the_end_of_its_own_texts() -> None:
    texts = [Request(f"{PREFIX}{i}", BACKGROUND, 8, 7, is_prefill_chunk=False) for i in range(3)]
    big = Request(f"{PREFIX}9", BACKGROUND, 100, 0)
    assert beyond_share(texts, [big], 10) == []


STEP, BLOCK, BLOCKS, SEATS, LORAS = 64, 16, 24, 4, 2
CAP = 16


class Vllm:
    """vLLM's scheduler, with nobody behind it who computes: every answer is token 7."""

    def __init__(self, model: Path, ahead: bool) -> None:
        new_config: Any = SchedulerConfig
        scheduler = new_config(
            max_num_seqs=SEATS,
            max_num_batched_tokens=STEP,
            max_model_len=256,
            is_encoder_decoder=False,
            policy="priority",
            enable_chunked_prefill=True,
            async_scheduling=False,
        )
        cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=False)
        self._config = VllmConfig(
            model_config=ModelConfig(model=str(model), dtype="float32", max_model_len=256),
            scheduler_config=scheduler,
            cache_config=cache,
            lora_config=LoRAConfig(max_loras=LORAS, max_lora_rank=8),
        )
        cache.num_gpu_blocks = BLOCKS
        # The CPU's platform would refuse it.
        scheduler.async_scheduling = ahead
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
        self._cache = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
        self._structures = StructuredOutputManager(self._config)
        self._ahead = ahead
        self.restart()

    def restart(self) -> None:
        self.scheduler: Any = sharing_scheduler(
            self._config,
            kv_cache_config=self._cache,
            structured_output_manager=self._structures,
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        assert isinstance(self.scheduler, AsyncScheduler) == self._ahead
        self.asked = 0
        self._outputs: deque[Any] = deque()

    def ask(self, training: bool, prompt: int, most: int, lora: int) -> None:
        self.asked += 1
        name = f"{PREFIX if training else 'cmpl-'}{self.asked}"
        self.scheduler.add_request(
            VllmRequest(
                name,
                [self.asked] * prompt,
                SamplingParams(max_tokens=most, ignore_eos=True),
                None,
                arrival_time=self.asked,
                lora_request=LoRARequest(f"{lora}", lora, "nowhere") if lora else None,
                priority=BACKGROUND if training else FOREGROUND,
            )
        )

    def step(self) -> dict[str, int]:
        """Makes a step, and says how many tokens of prompts it had of each request of training."""
        scheduler = self.scheduler
        written = {r.request_id for r in scheduler.running if not r.is_prefill_chunk}
        output = scheduler.schedule()
        self._outputs.append((output, {n: scheduler.requests[n].is_prefill_chunk for n in output.num_scheduled_tokens}))
        if len(self._outputs) > self._ahead:
            self._answer()
        return {n: k for n, k in output.num_scheduled_tokens.items() if n not in written and n.startswith(PREFIX)}

    def _answer(self) -> None:
        output, unfinished = self._outputs.popleft()
        names = list(unfinished)
        places = {name: place for place, name in enumerate(names)}
        tokens = [[] if unfinished[name] else [7] for name in names]
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, places, tokens))

    def check_queues(self) -> None:
        """Everybody is somewhere, and nobody twice."""
        scheduler = self.scheduler
        queues = [getattr(scheduler, name, ()) for name in ("waiting", "skipped_waiting", "kv_holding_waiting")]
        found = [r.request_id for queue in (scheduler.running, *queues) for r in queue]
        assert sorted(found) == sorted(scheduler.requests)
        assert sum(scheduler.get_request_counts()) == len(found)


@pytest.fixture(scope="module", params=[False, True], ids=["step by step", "a step ahead"])
def scheduled(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Vllm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARE_VARIABLE, str(CAP / STEP))
        yield Vllm(tiny_model, request.param)


def test_only_training_that_comes_to_an_idle_engine_has_its_step_wait_for_others(
    scheduled: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    scheduled.restart()
    scheduled.ask(True, 5, 1, 0)
    assert pauses == [GATHER_S]
    scheduled.ask(True, 5, 1, 0)
    scheduled.ask(False, 5, 1, 0)
    assert pauses == [GATHER_S], "there is something to do already"
    scheduled.restart()
    scheduled.ask(False, 5, 1, 0)
    scheduled.ask(True, 5, 1, 0)
    assert pauses == [GATHER_S], "whoever is served does not wait"


ASKED = st.tuples(st.booleans(), st.integers(1, 120), st.sampled_from([1, 1, 40]), st.integers(0, LORAS + 1))


@settings(max_examples=40)
@given(st.data())
def test_nobody_is_lost_whatever_happens_and_the_cap_holds(scheduled: Vllm, data: st.DataObject) -> None:
    """There is more than the seats, the slots and the cache hold, so vLLM passes over and preempts some."""
    scheduled.restart()
    foreground = False

    def step() -> None:
        nonlocal foreground
        foreground |= any(not name.startswith(PREFIX) for name in scheduled.scheduler.requests)
        training = scheduled.step()
        scheduled.check_queues()
        assert not foreground or len(training) <= 1 or sum(training.values()) <= CAP

    for _ in range(data.draw(st.integers(0, 30))):
        there = sorted(scheduled.scheduler.requests)
        doing = data.draw(st.sampled_from(["ask", "ask", "step", "abort"]))
        if doing == "ask":
            scheduled.ask(*data.draw(ASKED))
        elif doing == "step":
            step()
        elif there:
            scheduled.scheduler.finish_requests(data.draw(st.sampled_from(there)), RequestStatus.FINISHED_ABORTED)
        scheduled.check_queues()
    # More steps than there are tokens: nothing stands still.
    for _ in range(30 * 160):
        if not scheduled.scheduler.requests:
            break
        step()
    assert not scheduled.scheduler.requests
