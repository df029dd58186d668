"""CUDA with the LoRA kernels of ``server_ext.gpu``."""

from __future__ import annotations

from vllm.platforms.cuda import CudaPlatform


class ZoActCudaPlatform(CudaPlatform):  # type: ignore[misc, valid-type]
    """vLLM's platform for NVIDIA GPUs; see ``server_ext.gpu.platform``."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "server_ext.gpu.wrapper.GroupedPunicaWrapper"
