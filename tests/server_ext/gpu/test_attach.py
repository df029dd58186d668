"""vLLM's LoRA manager chooses slots as ever; points reach theirs by the writer, other LoRAs by vLLM's own copying."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager

from server_ext.gpu.attach import PointLora, _fill_on_activation

SLOTS = 2


class Layer:
    def __init__(self) -> None:
        self.written: list[int] = []

    def reset_lora(self, slot: int) -> None:
        self.written.append(slot)


@pytest.fixture
def manager() -> Any:
    """vLLM's manager, without a model to manage."""
    manager: Any = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    manager.lora_config = SimpleNamespace(max_loras=SLOTS, max_cpu_loras=8)
    manager.modules = {"layer": Layer()}
    manager.is_pooling_model = manager._enable_mixed_moe_lora_format = False
    manager.packed_modules = {}
    manager.lora_index_to_id = [None] * SLOTS
    manager._registered_adapters = AdapterLRUCache(8, manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(SLOTS, manager._deactivate_adapter)
    return manager


def _point(number: int, fill: Callable[[int], None]) -> PointLora:
    return PointLora(number, fill, torch.device("cpu"))


def test_points_are_written_where_the_manager_puts_them(manager: Any) -> None:
    filled: list[tuple[int, int]] = []
    released: list[int] = []
    _fill_on_activation(manager, released.append)

    def filler(number: int) -> Callable[[int], None]:
        return lambda slot: filled.append((number, slot))

    for number in (1, 2, 3):
        manager.add_adapter(_point(number, filler(number)))
    for number in (1, 2, 2, 1, 3):
        manager.activate_adapter(number)
    # Points 1 and 2 find free slots; the least recently used of them, 2, makes room for 3.
    assert filled == [(1, 0), (2, 1), (3, 1)]
    assert manager.lora_index_to_id == [1, 3]
    assert manager.modules["layer"].written == []
    manager.add_adapter(LoRAModel(4, 1, {"elsewhere": manager._registered_adapters[1].loras["zoact"]}))
    manager.activate_adapter(4)
    assert released == [0]
    assert manager.modules["layer"].written == [0]


def test_a_point_that_cannot_be_written_takes_no_slot(manager: Any) -> None:
    def fail(slot: int) -> None:
        raise RuntimeError("no such version")

    _fill_on_activation(manager, lambda slot: None)
    manager.add_adapter(_point(1, fail))
    with pytest.raises(RuntimeError, match="no such version"):
        manager.activate_adapter(1)
    assert list(manager.modules) == ["layer"]
    assert manager.lora_index_to_id == [None] * SLOTS
