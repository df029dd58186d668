"""vLLM's doors for what a device does its own way: the entry points ``vllm.platform_plugins`` and
``vllm.general_plugins``.

vLLM chooses the LoRA kernels by platform, so there is a platform: CUDA, with other LoRA kernels. Both doors open only
where ``VLLM_PLUGINS`` names ``zoact``, as the endpoint plug-in needs it too; ``ZOACT_GPU_KERNELS=0`` keeps them shut.
"""

from __future__ import annotations

import os

VARIABLE = "ZOACT_GPU_KERNELS"


def platform() -> str | None:
    """The platform's class by name, or None where it is not wanted or there is no CUDA device."""
    from vllm.platforms import cuda_platform_plugin

    found = wanted() and cuda_platform_plugin() is not None
    return "server_ext.gpu.cuda_platform.ZoActCudaPlatform" if found else None


def register() -> None:
    """Puts the activation in vLLM's register, in every process, before a model is made."""
    from vllm.platforms import current_platform

    if wanted() and current_platform.is_cuda():
        import server_ext.gpu.activation  # noqa: F401


def wanted() -> bool:
    """Whether the environment has the extension's kernels run."""
    named = "zoact" in os.environ.get("VLLM_PLUGINS", "").split(",")
    return named and turned_on()


def turned_on() -> bool:
    """Whether nobody has turned the kernels off."""
    return os.environ.get(VARIABLE, "1") == "1"
