"""CUDA with the LoRA kernels of ``server_ext.gpu``."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cuda import CudaPlatform


class ZoActCudaPlatform(CudaPlatform):  # type: ignore[misc, valid-type]
    """vLLM's platform for NVIDIA GPUs; see ``server_ext.gpu.platform``."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "server_ext.gpu.wrapper.GroupedPunicaWrapper"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Tells vLLM's configuration of the kernels.

        vLLM keeps compiled models by their configurations, and takes one up without looking at what it calls. A model
        that was compiled with vLLM's own LoRA kernels would find no LoRA in what ours leave for it.
        """
        super().check_and_update_config(vllm_config)
        vllm_config.additional_config = {**vllm_config.additional_config, "zoact_kernels": True}
