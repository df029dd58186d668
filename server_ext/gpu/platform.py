"""vLLM's doors for what a device does its own way: the entry points ``vllm.platform_plugins`` and
``vllm.general_plugins``.

vLLM chooses the LoRA kernels by platform, so there is a platform: CUDA, with other LoRA kernels. Both doors open only
where ``VLLM_PLUGINS`` names ``zoact``, as the endpoint plug-in wants it too: beside a vLLM that serves without the
extension, an installed package changes nothing.
"""

from __future__ import annotations

import os


def platform() -> str | None:
    """The platform's class by name, or None where it is not asked for or there is no CUDA device."""
    from vllm.platforms import cuda_platform_plugin

    wanted = _named() and cuda_platform_plugin() is not None
    return "server_ext.gpu.cuda_platform.ZoActCudaPlatform" if wanted else None


def register() -> None:
    """Puts the activation in vLLM's register, in every process, before a model is made."""
    from vllm.platforms import current_platform

    if _named() and current_platform.is_cuda():
        import server_ext.gpu.activation  # noqa: F401


def _named() -> bool:
    return "zoact" in os.environ.get("VLLM_PLUGINS", "").split(",")
