"""What takes its place in a worker of vLLM's on a GPU: how points get into slots, and how losses get out.

vLLM's LoRA manager chooses a point's slot as ever, and our kernel fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import envs
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

from server_ext.gpu.activation import deferred, pairs
from server_ext.gpu.lora import MAX_SLICES
from server_ext.gpu.packed_attention import block_of, split_rows
from server_ext.gpu.scored_rows import ScoredRows
from server_ext.gpu.slots import SlotWriter
from server_ext.gpu.wrapper import GroupedPunicaWrapper

LONE_BLOCK = 16
"""Tokens of a block where a request has one row, which shares none: any number would do."""


class PointLora(LoRAModel):
    """A LoRA in vLLM's books whose weights exist in a slot alone."""

    def __init__(self, number: int, fill: Callable[[int], None], device: torch.device) -> None:
        """``fill`` writes the slot that it is called with."""
        # vLLM looks at the first layer's weights to learn where they lie.
        none = torch.empty(0, device=device)
        super().__init__(number, 1, {"zoact": LoRALayerWeights("zoact", 1, 1, none, none)})
        self.fill = fill


def attach_slots(loras: Any, model: torch.nn.Module, parts: Callable[[str], Sequence[str]]) -> SlotWriter | None:
    """Takes over the filling of slots with points, where vLLM runs our kernels.

    Args:
        loras: the model runner's LoRA manager.
        model: the model.
        parts: the names of the sites that a LoRA layer holds, slice by slice.

    Returns:
        The writer that ``PointLora.fill`` is to use; None where points have to be LoRAs like any other.

    """
    manager = loras._adapter_manager
    wrappers = list(manager.punica_wrapper_mapping.values())
    ours = all(isinstance(m, BaseLinearLayerWithLoRA) and m.n_slices <= MAX_SLICES for m in manager.modules.values())
    if (
        len(wrappers) != 1
        or not isinstance(wrappers[0], GroupedPunicaWrapper)
        or not ours
        or loras.lora_config.fully_sharded_loras
        or envs.VLLM_LORA_ENABLE_DUAL_STREAM
    ):
        return None
    wrappers[0].alone = True
    deferred.add_layers(pairs(model, manager.modules))
    writer = SlotWriter(manager.modules, parts, wrappers[0].ranks)
    _fill_on_activation(manager, writer.release)
    return writer


def _fill_on_activation(manager: Any, release: Callable[[int], None]) -> None:
    """Has this instance of vLLM's manager leave points to their own filling, and say which slots others took.

    vLLM copies a LoRA into its slot layer by layer, in Python, and has no door for another way. Which slot, and which
    LoRA has to leave it, stays its own choice: it is made before the copying, for which it is shown no layers.
    """
    activate = manager.activate_adapter

    def activate_adapter(number: int) -> bool:
        if number in manager._active_adapters:
            return bool(activate(number))
        adapter = manager._registered_adapters[number]
        modules = manager.modules
        # A slot that vLLM has filled is none of ours any more.
        fill = release
        if isinstance(adapter, PointLora):
            fill, manager.modules = adapter.fill, {}
        try:
            try:
                activate(number)
            finally:
                manager.modules = modules
            fill(manager.lora_index_to_id.index(number))
        except BaseException:
            if number in manager.lora_index_to_id:
                release(manager.lora_index_to_id.index(number))
                manager.deactivate_adapter(number)
            raise
        return True

    manager.activate_adapter = activate_adapter


def attach_scores(runner: Any) -> dict[str, Any] | None:
    """Has continuations' log-likelihoods summed on the device, where vLLM runs its V2 model runner.

    Returns:
        The fields of ``server_ext.packing.Packing``; None where vLLM's own log-probabilities have to do.

    """
    worker = getattr(runner, "prompt_logprobs_worker", None)
    if worker is None or worker.logprobs_mode != "raw_logprobs":
        return None
    shared = block_of(runner)
    block = LONE_BLOCK if shared is None else shared
    rows = ScoredRows(runner, block)
    if shared is not None:
        split_rows(runner, rows.get)
    return {"block": block, "answers": MAX_LOGPROB_TOKEN_IDS, "many": shared is not None}
