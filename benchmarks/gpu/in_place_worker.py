"""All weights perturbed in place, as evolution strategies do it through vLLM: a baseline's worker extension."""

from __future__ import annotations

from typing import Any

import torch


def perturb(model: torch.nn.Module, seed: int, scale: float) -> None:
    """``W += scale Z(seed)`` for every weight, Gaussian, drawn tensor by tensor on the weights' device."""
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator(parameter.device).manual_seed(seed)
            noise = torch.empty_like(parameter).normal_(generator=generator)
            parameter.add_(noise, alpha=scale)


class InPlaceWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def perturb(self, seed: int, scale: float) -> None:
        """See :func:`perturb`."""
        perturb(self.model_runner.get_model(), seed, scale)
