"""vLLM's doors for what a device does its own way: the entry points ``vllm.platform_plugins`` and
``vllm.general_plugins``.

vLLM chooses the LoRA kernels by platform, so there is a platform: CUDA, with other LoRA kernels.
"""

from __future__ import annotations


def platform() -> str | None:
    """The platform's class by name, or None where there is no CUDA device; vLLM then finds another by itself."""
    from vllm.platforms import cuda_platform_plugin

    return None if cuda_platform_plugin() is None else "server_ext.gpu.cuda_platform.ZoActCudaPlatform"


def register() -> None:
    """Puts the activation in vLLM's register, in every process, before a model is made."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        import server_ext.gpu.activation  # noqa: F401
