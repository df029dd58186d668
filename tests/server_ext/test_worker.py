"""Points as the LoRAs that vLLM's slots take, and calls to several workers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from server_ext import store
from server_ext.basis import random_test_matrix
from server_ext.coefficients import Coefficients
from server_ext.noise import Noise
from server_ext.room import NoRoom
from server_ext.store import AdapterStore, Point
from zoact_remote import Update
from zoact_remote.layout import Layout, Site
from zoact_remote.replay import direction

pytestmark = pytest.mark.vllm

LAYOUT = Layout((Site(0, "a.q_proj", "a.q_proj", 24, 40), Site(1, "a.k_proj", "a.q_proj", 24, 16)), rank=4)
VECTORS = random_test_matrix(24, 4, seed=0, number=0).astype(np.float32)
UPDATE = Update(0, ((1, 0.06), (2, 0.0123)))
SEED, EPSILON = 5, 2.0**-12


def loras_at(dtype: torch.dtype, epsilon: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A and B by site, of an adapter after one update."""
    from server_ext.worker import ZoActWorker

    worker = ZoActWorker()
    worker.zoact_dtype = dtype
    worker.zoact_store = AdapterStore(torch.device("cpu"))
    worker.zoact_store.put("key", LAYOUT, "rademacher", {"a.q_proj": torch.from_numpy(VECTORS)})
    digest = worker.zoact_store["key"].hold(1, None, UPDATE, keep=())
    assert digest is not None
    loras = worker.zoact_lora(7, Point("key", 1, digest, SEED, epsilon)).loras
    assert all(lora.scaling == 1 for lora in loras.values())
    return {name: lora.lora_a for name, lora in loras.items()}, {name: lora.lora_b for name, lora in loras.items()}


def coefficients() -> dict[str, torch.Tensor]:
    return LAYOUT.matrices(Coefficients(Noise(LAYOUT, "rademacher")).after(UPDATE).flat)


def noise() -> dict[str, torch.Tensor]:
    return LAYOUT.matrices(torch.from_numpy(direction(LAYOUT, "rademacher", SEED)))


@pytest.mark.parametrize("sign", [1, -1])
def test_in_float32_a_probe_is_one_matrix(sign: int) -> None:
    lora_a, lora_b = loras_at(torch.float32, sign * EPSILON)
    for name, matrix in coefficients().items():
        assert torch.equal(lora_a[name], torch.from_numpy(VECTORS.T))
        assert torch.equal(lora_b[name], matrix + sign * EPSILON * noise()[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_in_16_bits_a_probe_has_columns_of_its_own_and_does_not_round(dtype: torch.dtype, sign: int) -> None:
    lora_a, lora_b = loras_at(dtype, sign * EPSILON)
    for name, matrix in coefficients().items():
        vectors = torch.from_numpy(VECTORS.T).to(dtype)
        assert torch.equal(lora_a[name], torch.cat([vectors, vectors]))
        assert torch.equal(lora_b[name][:, :4], matrix.to(dtype))
        assert torch.equal(lora_b[name][:, 4:].float(), sign * EPSILON * noise()[name])
    # In one matrix, a good part of the same probe would have been lost.
    together = {name: (matrix + EPSILON * noise()[name]).to(dtype) for name, matrix in coefficients().items()}
    if dtype == torch.bfloat16:
        lost = [(together[n] - m.to(dtype)).float() - EPSILON * noise()[n] for n, m in coefficients().items()]
        assert max(float(part.abs().max()) for part in lost) > EPSILON / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_probe_there_are_the_coefficients_alone(dtype: torch.dtype) -> None:
    lora_a, lora_b = loras_at(dtype, 0.0)
    for name, matrix in coefficients().items():
        assert lora_a[name].shape == (4, 24)
        assert torch.equal(lora_b[name], matrix.to(dtype))


class Executor:
    """Asks workers and reads their answers as vLLM's multi-process executor does: up to the first that failed."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = [(worker, deque[Any]()) for worker in workers]

    async def collective_rpc(self, method: str, args: Sequence[Any] = ()) -> list[Any]:
        for worker, answers in self._workers:
            try:
                answers.append(getattr(worker, method)(*args))
            except Exception as error:
                answers.append(error)
        found = []
        for _, answers in self._workers:
            answer = answers.popleft()
            if isinstance(answer, Exception):
                raise answer
            found.append(answer)
        return found


def engine_of(workers: Sequence[Any]) -> Any:
    """An engine of workers that hold an adapter without a version."""
    from server_ext.engines.vllm import VllmEngine

    for worker in workers:
        worker.zoact_store = AdapterStore(torch.device("cpu"))
        worker.zoact_store.put("key", LAYOUT, "rademacher", {"a.q_proj": torch.from_numpy(VECTORS)})
    engine: Any = object.__new__(VllmEngine)
    engine._client = Executor(workers)
    return engine


def test_calls_after_one_that_failed_get_their_own_answers() -> None:
    from server_ext.worker import ZoActWorker

    workers = [ZoActWorker(), ZoActWorker()]
    engine = engine_of(workers)

    async def calls() -> None:
        zero = await engine.hold("key", 0, None, None, [])
        with pytest.raises(RuntimeError, match="version 5 is not held"):
            await engine.hold("key", 6, 5, UPDATE, [])
        one = await engine.hold("key", 1, 0, UPDATE, [0])
        assert zero != one == workers[1].zoact_store["key"][1].digest()
        flat = await engine.read("key", 1)
        np.testing.assert_array_equal(flat, workers[1].zoact_store["key"][1].flat.numpy())

    asyncio.run(calls())


def test_an_engine_has_no_room_where_one_worker_has_none() -> None:
    from server_ext.worker import ZoActWorker

    workers = [ZoActWorker(), ZoActWorker()]
    engine = engine_of(workers)

    async def calls() -> None:
        zero = await engine.hold("key", 0, None, None, [])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers[1].zoact_store["key"]._room, "free", lambda: 0)
            with pytest.raises(NoRoom, match=r"^the device has 0 MiB left for adapters, 1 MiB are wanted: delete"):
                await engine.hold("key", 1, 0, UPDATE, [0])
        # The other worker has made it; it is made anew by both.
        assert workers[0].zoact_store["key"].versions.keys() == {0, 1}
        assert await engine.hold("key", 1, 0, UPDATE, [0]) != zero

    asyncio.run(calls())


def test_workers_need_not_make_a_version_in_equally_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from server_ext.worker import ZoActWorker

    class Fast(ZoActWorker):
        def zoact_hold_on(self, key: str) -> str | None:
            return super().zoact_hold_on(key) or super().zoact_hold_on(key)

    monkeypatch.setattr(store, "PIECE_S", -1.0)
    workers = [ZoActWorker(), Fast()]
    engine = engine_of(workers)
    digest = asyncio.run(engine.hold("key", 1, None, UPDATE, []))
    assert digest == Coefficients(Noise(LAYOUT, "rademacher")).after(UPDATE).digest()
    assert [list(worker.zoact_store["key"].versions) for worker in workers] == [[1], [1]]
