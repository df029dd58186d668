"""The entry point ``vllm.endpoint_plugins``: the routes inside vLLM's own API server.

vLLM loads it when ``VLLM_PLUGINS`` names ``zoact``, and needs besides::

    --enable-lora --worker-extension-cls server_ext.worker.ZoActWorker --lora-target-modules q_proj ...

``zoact serve`` sets all of this. The environment may set ``ZOACT_STATE``, the directory of the journal.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from server_ext.routes import KeyCheck, router

WORKER_EXTENSION = "server_ext.worker.ZoActWorker"
STATE_VARIABLE = "ZOACT_STATE"
DEFAULT_STATE = "zoact-state"


class ZoActPlugin:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "zoact"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Attaches to the engine and brings every adapter back, before the server answers.

        Raises:
            ValueError: vLLM was started without a setting that is needed; the message names the flag.

        """
        # Imported here: the module needs vLLM, and this one must load without.
        from server_ext.engines.vllm import VllmEngine
        from server_ext.service import Service

        check_settings(engine_client.vllm_config, args)
        state.zoact_keys = KeyCheck([key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key])
        engine = await VllmEngine.attach(engine_client)
        service = Service(engine, Path(os.environ.get(STATE_VARIABLE, DEFAULT_STATE)))
        await service.registry.restore()
        state.zoact = service


def check_settings(config: Any, args: Namespace) -> None:
    """Raises ValueError for a setting of vLLM that the extension cannot work with."""
    if config.lora_config is None:
        raise ValueError("ZO-Act evaluates probes as LoRA adapters: start vLLM with --enable-lora")
    if config.parallel_config.worker_extension_cls != WORKER_EXTENSION:
        raise ValueError(
            f"ZO-Act needs its worker extension: start vLLM with --worker-extension-cls {WORKER_EXTENSION}"
        )
    targets = config.lora_config.target_modules
    if not targets or "lm_head" in targets:
        raise ValueError(
            "LoRA on lm_head breaks prompt log-probabilities: name the blocks' linear layers alone, such as "
            "--lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
        )
    if config.parallel_config.data_parallel_size > 1:
        raise ValueError("ZO-Act keeps its state in one engine: start vLLM without --data-parallel-size")
    if getattr(args, "api_server_count", None) not in (None, 1):
        raise ValueError("ZO-Act keeps its state in one API server: start vLLM with --api-server-count 1")
    if config.device_config.device_type == "cpu" and not config.model_config.enforce_eager:
        raise ValueError(
            "on the CPU, compiled code would bypass the grouped LoRA kernels: start vLLM with --enforce-eager"
        )
