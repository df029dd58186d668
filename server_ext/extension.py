"""What vLLM's ``--worker-extension-cls`` names: the worker's side, and a check that it can be reached.

vLLM imports this module in every worker, whether it loads the plug-in or not, and warns of a plug-in that it does not
load at most. A server without it would start, and have none of the routes.
"""

from __future__ import annotations

import os

from server_ext.worker import ZoActWorker
from zoact_remote.extension import PLUGIN

__all__ = ["ZoActWorker", "check_plugins"]


def check_plugins(allowed: str | None) -> None:
    """Raises ValueError if ``VLLM_PLUGINS``, None where it is not set, keeps the plug-in out."""
    if PLUGIN not in (allowed or "").split(","):
        others = f"{allowed},{PLUGIN}" if allowed else PLUGIN
        raise ValueError(
            f"vLLM loads ZO-Act's routes only where VLLM_PLUGINS names {PLUGIN}: set VLLM_PLUGINS={others}. It is the "
            "list of all plug-ins that vLLM loads, so name your others in it, too"
        )


check_plugins(os.environ.get("VLLM_PLUGINS"))
