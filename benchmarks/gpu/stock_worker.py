"""LoRAs of random weights for stock vLLM: the baseline's worker extension."""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest


class StockWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any
    device: torch.device

    def stock_attach(self, rank: int) -> None:
        """Has every LoRA be random weights of a rank, on the device."""
        loras = self.model_runner.lora_manager
        manager = loras._adapter_manager

        def load(request: LoRARequest) -> LoRAModel:
            layers = {}
            for module, layer in manager.modules.items():
                for name, b in zip(manager.packed_modules.get(module, [module]), layer.lora_b_stacked, strict=True):
                    lora_a = torch.randn(rank, layer.lora_a_stacked[0].shape[3], device=self.device, dtype=b.dtype)
                    lora_b = torch.randn(b.shape[2], rank, device=self.device, dtype=b.dtype) * 1e-3
                    layers[name] = LoRALayerWeights(name, rank, rank, lora_a, lora_b)
            return LoRAModel(request.lora_int_id, rank, layers)

        loras._load_adapter = load
