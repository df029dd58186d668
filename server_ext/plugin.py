"""The entry point ``vllm.endpoint_plugins``: the routes inside vLLM's own API server.

vLLM loads it when ``VLLM_PLUGINS`` names ``zoact``, and needs besides::

    --enable-lora --worker-extension-cls server_ext.extension.ZoActWorker --lora-target-modules q_proj ...
    --max-loras 8 --scheduling-policy priority --scheduler-cls server_ext.scheduler.sharing_scheduler

``zoact serve`` sets all of this, and ``check_settings`` checks it. The environment may set ``ZOACT_STATE``, the
directory of the journal, ``ZOACT_TRAINING_SHARE``, the most of a step's tokens that training takes while there is other
traffic, and the keys that ``server_ext.tenants.open_tenants`` speaks of; vLLM's own keys open everything too. Where
there are keys, vLLM's own routes ask for one (``server_ext.openai_routes``).
"""

from __future__ import annotations

import asyncio
import os
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import prometheus_client
import torch
from fastapi import FastAPI

from server_ext import openai_routes
from server_ext.gate import Gate
from server_ext.lanes import training_share
from server_ext.metrics import Metrics
from server_ext.routes import health, router
from server_ext.service import Service
from server_ext.tenants import open_tenants
from zoact_remote.extension import (
    DEFAULT_STATE,
    PLUGIN,
    SCHEDULER,
    SHARE_VARIABLE,
    STATE_VARIABLE,
    WORKER_EXTENSION,
)

LOOPBACK = "127.0.0.1"


class ZoActPlugin:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes."""
        self._app = app
        app.include_router(router)
        app.include_router(health)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Attaches to the engine and begins to bring every adapter back; calls are refused until that is done.

        Raises:
            ValueError: vLLM was started without a setting that is needed, the state is another model's or in use, the
                keys file cannot be read, or there are no keys and vLLM listens beyond loopback; the message says which.

        """
        # Imported here: the module needs vLLM, and this one must load without.
        from server_ext.engines.vllm import VllmEngine

        config = engine_client.vllm_config
        share = training_share(os.environ, on_cpu=config.device_config.device_type == "cpu")
        check_settings(config, args, share)
        directory = Path(os.environ.get(STATE_VARIABLE, DEFAULT_STATE))
        keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
        tenants = open_tenants(directory, LOOPBACK if args.uds else args.host, keys)
        engine = await VllmEngine.attach(engine_client, share)
        # vLLM's /metrics shows what this registry holds, in multiprocess mode too.
        service = Service(engine, directory, metrics=Metrics(prometheus_client.REGISTRY))
        gate = Gate(service, tenants)
        state.zoact = gate
        openai_routes.install(self._app, gate, engine, state.openai_serving_models, keys[0] if keys else None)
        gate.begin()
        drain_first(engine_client, gate)


def drain_first(engine_client: Any, gate: Gate) -> None:
    """Sees to it that calls end, and adapters are on disk, before vLLM stops its engine.

    vLLM tells nobody that it is about to stop: upon a signal it stops the engine client, on a thread beside the event
    loop, and then the web server. So this client's ``shutdown`` drains first.
    """
    loop = asyncio.get_running_loop()
    stop = engine_client.shutdown

    def shutdown(*args: Any, **options: Any) -> Any:
        # On the loop's own thread, where vLLM cleans up at last, there is no waiting for the loop.
        if loop.is_running() and threading.get_ident() != owner:
            asyncio.run_coroutine_threadsafe(gate.drain(), loop).result()
        return stop(*args, **options)

    owner = threading.get_ident()
    engine_client.shutdown = shutdown


def check_settings(config: Any, args: Namespace, share: float) -> None:
    """Checks what vLLM was started with.

    Args:
        config: its ``VllmConfig``.
        args: the API server's arguments.
        share: of a step's tokens that training may take, see :func:`server_ext.lanes.training_share`.

    Raises:
        ValueError: the extension cannot work with a setting; the message names the flag that mends it.

    """
    loras, parallel = config.lora_config, config.parallel_config
    if loras is None:
        raise ValueError("ZO-Act evaluates probes as LoRA adapters: start vLLM with --enable-lora")
    if parallel.worker_extension_cls != WORKER_EXTENSION:
        raise ValueError(
            f"ZO-Act needs its worker extension: start vLLM with --worker-extension-cls {WORKER_EXTENSION}"
        )
    if not loras.target_modules or any(name.rpartition(".")[2] == "lm_head" for name in loras.target_modules):
        raise ValueError(
            "LoRA on lm_head breaks prompt log-probabilities: name the blocks' linear layers alone, such as "
            "--lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
        )
    if loras.max_loras < 2:
        raise ValueError(
            "ZO-Act evaluates the two sides of a probe side by side, and many tenants' probes: start vLLM with "
            "--max-loras 8, and at least 2"
        )
    if loras.max_lora_rank < 2 and loras.lora_dtype != torch.float32:
        raise ValueError(
            "in 16 bits a probe takes twice an adapter's rank, and there is room for none: start vLLM with "
            "--max-lora-rank 16, which is enough for adapters of rank 8"
        )
    if config.model_config.logprobs_mode != "raw_logprobs":
        raise ValueError(
            f"ZO-Act reads losses from log-probabilities, and {config.model_config.logprobs_mode} are others: start "
            "vLLM with --logprobs-mode raw_logprobs, or without that flag"
        )
    if config.speculative_config is not None:
        raise ValueError(
            "ZO-Act reads losses from log-probabilities of given tokens, which vLLM leaves out of batches with drafts: "
            "start vLLM without --speculative-config"
        )
    if config.cache_config.kv_sharing_fast_prefill:
        raise ValueError(
            "ZO-Act reads losses from all of a prompt's hidden states: start vLLM without --kv-sharing-fast-prefill"
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError("ZO-Act needs all layers in every worker: start vLLM without --pipeline-parallel-size")
    if parallel.data_parallel_size > 1:
        raise ValueError("ZO-Act keeps its state in one engine: start vLLM without --data-parallel-size")
    if getattr(args, "api_server_count", None) not in (None, 1):
        raise ValueError("ZO-Act keeps its state in one API server: start vLLM with --api-server-count 1")
    if share < 1 and config.scheduler_config.policy != "priority":
        raise ValueError(
            "ZO-Act's training goes behind other requests by their priorities: start vLLM with --scheduling-policy "
            f"priority, or set {SHARE_VARIABLE}=1 to treat all alike"
        )
    if share < 1 and config.scheduler_config.scheduler_cls != SCHEDULER:
        raise ValueError(
            f"ZO-Act's training takes a share of every step: start vLLM with --scheduler-cls {SCHEDULER}, or set "
            f"{SHARE_VARIABLE}=1 to treat all alike"
        )
    if config.device_config.device_type == "cpu" and not config.model_config.enforce_eager:
        raise ValueError(
            "on the CPU, compiled code would bypass the grouped LoRA kernels: start vLLM with --enforce-eager"
        )
