"""A device's memory: what adapters may have of it without taking it from the model's passes."""

from __future__ import annotations

from collections.abc import Callable

import torch

UNMEASURED_PASSES = 1 << 30
"""Bytes that are left to passes which the engine has not measured."""
MIB = 1 << 20


class NoRoom(Exception):
    """The device has no memory left for what an adapter wants. Nothing has changed."""


class Room:
    """What adapters may have of a GPU. A pass that finds no memory takes the engine down for everybody.

    Elsewhere memory is not counted.

    Args:
        device: its memory is looked at now, when there is no adapter yet, and compared with later on.
        passes: bytes that a pass of the model takes at most, beside what is there between passes.
        let_go: empties what is kept for speed alone.

    """

    def __init__(self, device: torch.device, passes: int, let_go: Callable[[], None] = lambda: None) -> None:
        self._device = device
        self._passes = passes
        self._let_go = let_go
        self._reserve = 0
        if device.type == "cuda":
            # What is still reserved after this belongs to CUDA graphs, and to nobody else.
            torch.cuda.empty_cache()
            self._reserve = _idle(device)

    def free(self) -> int | None:
        """Bytes; None where they are not counted."""
        if self._device.type != "cuda":
            return None
        idle = _idle(self._device) - self._reserve
        return max(0, torch.cuda.mem_get_info(self._device)[0] + idle - self._passes)

    def check(self, wanted: int) -> None:
        """Raises NoRoom if there are fewer bytes than are wanted."""
        free = self.free()
        if free is not None and free < wanted:
            self._let_go()
            free = self.free()
        if free is not None and free < wanted:
            raise NoRoom(
                f"the device has {free // MIB:,} MiB left for adapters, {-(-wanted // MIB):,} MiB are wanted: delete "
                "adapters, or leave more to them (vLLM's --gpu-memory-utilization)"
            )


def _idle(device: torch.device) -> int:
    """Bytes that PyTorch has taken from the device and not given to anybody."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
