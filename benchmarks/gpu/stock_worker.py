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

    def stock_attach(self, rank: int) -> None:
        """Has every LoRA be the same random weights of a rank, in the host's memory, as vLLM keeps those it loads."""
        loras = self.model_runner.lora_manager
        manager, pinned = loras._adapter_manager, torch.cuda.is_available()

        def matrix(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
            found = torch.randn(rows, columns, dtype=like.dtype, pin_memory=pinned)
            return found.mul_(1e-2)

        weights = {
            name: (matrix(rank, a.shape[3], a), matrix(b.shape[2], rank, b))
            for module, layer in manager.modules.items()
            for name, a, b in zip(
                manager.packed_modules.get(module, [module]), layer.lora_a_stacked, layer.lora_b_stacked, strict=True
            )
        }

        def load(request: LoRARequest) -> LoRAModel:
            # Layers of their own, since vLLM packs them, of tensors in common, since it copies these into slots.
            layers = {name: LoRALayerWeights(name, rank, rank, a, b) for name, (a, b) in weights.items()}
            return LoRAModel(request.lora_int_id, rank, layers)

        loras._load_adapter = load
