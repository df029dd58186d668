"""The plug-in says which of vLLM's settings is wrong, and how to set it."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from server_ext.lanes import training_share
from server_ext.plugin import ZoActPlugin, check_settings
from zoact_remote.extension import PLUGIN, SCHEDULER, SHARE_VARIABLE, WORKER_EXTENSION, default_share

SHARE = 1 / 32
FLAGS: dict[str, list[str]] = {
    "--enable-lora": [],
    "--max-loras": ["4"],
    "--max-lora-rank": ["8"],
    "--lora-target-modules": ["q_proj", "down_proj"],
    "--worker-extension-cls": [WORKER_EXTENSION],
    "--dtype": ["float32"],
    "--enforce-eager": [],
    "--scheduling-policy": ["priority"],
    "--scheduler-cls": [SCHEDULER],
}
"""What a user's own command line needs beside the model."""


def loras(**changes: Any) -> Namespace:
    wanted = {
        "target_modules": ["q_proj", "down_proj"],
        "max_loras": 2,
        "max_lora_rank": 8,
        "lora_dtype": torch.float32,
    }
    return Namespace(**(wanted | changes))


def settings(**changes: Any) -> tuple[Namespace, Namespace, float]:
    """VLLM's configuration and arguments, and training's share, as the plug-in wants them but for some changes."""
    wanted: dict[str, Any] = {
        "lora_config": loras(),
        "worker_extension_cls": WORKER_EXTENSION,
        "data_parallel_size": 1,
        "api_server_count": 1,
        "device_type": "cpu",
        "enforce_eager": True,
        "pipeline_parallel_size": 1,
        "logprobs_mode": "raw_logprobs",
        "speculative_config": None,
        "kv_sharing_fast_prefill": False,
        "policy": "priority",
        "scheduler_cls": SCHEDULER,
        "share": 0.5,
    }
    assert set(changes) <= set(wanted)
    given = Namespace(**(wanted | changes))
    config = Namespace(
        lora_config=given.lora_config,
        parallel_config=Namespace(
            worker_extension_cls=given.worker_extension_cls,
            data_parallel_size=given.data_parallel_size,
            pipeline_parallel_size=given.pipeline_parallel_size,
        ),
        device_config=Namespace(device_type=given.device_type),
        model_config=Namespace(enforce_eager=given.enforce_eager, logprobs_mode=given.logprobs_mode),
        scheduler_config=Namespace(policy=given.policy, scheduler_cls=given.scheduler_cls),
        speculative_config=given.speculative_config,
        cache_config=Namespace(kv_sharing_fast_prefill=given.kv_sharing_fast_prefill),
    )
    return config, Namespace(api_server_count=given.api_server_count), given.share


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device_type": "cuda", "enforce_eager": False},
        {"api_server_count": None},
        {"lora_config": loras(max_lora_rank=1)},
        {"share": 1.0},
        {"share": 1.0, "policy": "fcfs", "scheduler_cls": None},
    ],
)
def test_settings_that_work_pass(changes: dict[str, Any]) -> None:
    check_settings(*settings(**changes))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"lora_config": None}, "--enable-lora"),
        ({"worker_extension_cls": ""}, f"--worker-extension-cls {WORKER_EXTENSION}"),
        ({"worker_extension_cls": "other.Worker"}, f"--worker-extension-cls {WORKER_EXTENSION}"),
        ({"lora_config": loras(target_modules=None)}, "--lora-target-modules q_proj"),
        ({"lora_config": loras(target_modules=["q_proj", "lm_head"])}, "--lora-target-modules q_proj"),
        ({"lora_config": loras(max_loras=1)}, "--max-loras 8"),
        ({"lora_config": loras(max_lora_rank=1, lora_dtype=torch.bfloat16)}, "--max-lora-rank 16"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"logprobs_mode": "processed_logits"}, "--logprobs-mode raw_logprobs"),
        ({"speculative_config": Namespace(method="ngram")}, "--speculative-config"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        ({"api_server_count": 2}, "--api-server-count 1"),
        ({"enforce_eager": False}, "--enforce-eager"),
        ({"scheduler_cls": None}, f"--scheduler-cls {SCHEDULER}, or set {SHARE_VARIABLE}=1"),
        ({"policy": "fcfs"}, f"--scheduling-policy priority, or set {SHARE_VARIABLE}=1"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_flag(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        check_settings(*settings(**changes))


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({}, None),
        ({"--max-logprobs": ["0"], "--served-model-name": ["theirs", "too"]}, None),
        ({"--dtype": ["bfloat16"]}, None),
        ({"--enable-lora": None}, "--enable-lora"),
        ({"--worker-extension-cls": None}, f"--worker-extension-cls {WORKER_EXTENSION}"),
        ({"--max-loras": None}, "--max-loras 8"),
        ({"--max-lora-rank": ["1"], "--dtype": ["bfloat16"]}, "--max-lora-rank 16"),
        ({"--lora-target-modules": None}, "--lora-target-modules q_proj"),
        ({"--lora-target-modules": ["q_proj", "lm_head"]}, "--lora-target-modules q_proj"),
        ({"--logprobs-mode": ["processed_logprobs"]}, "--logprobs-mode raw_logprobs"),
        ({"--logprobs-mode": ["raw_logits"]}, "--logprobs-mode raw_logprobs"),
        ({"--data-parallel-size": ["2"]}, "--data-parallel-size"),
        ({"--pipeline-parallel-size": ["2"]}, "--pipeline-parallel-size"),
        ({"--scheduling-policy": None}, "--scheduling-policy priority"),
        ({"--scheduler-cls": None}, f"--scheduler-cls {SCHEDULER}"),
    ],
)
def test_flags_of_vllm_are_checked(changes: dict[str, list[str] | None], flag: str | None, tiny_model: Path) -> None:
    """With the configuration that vLLM itself makes of a command line."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = {name: values for name, values in (FLAGS | changes).items() if values is not None}
    line = [part for name, values in given.items() for part in (name, *values)]
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    args = parser.parse_args(["--model", str(tiny_model), *line])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    if flag is None:
        check_settings(config, args, SHARE)
        return
    with pytest.raises(ValueError, match=flag):
        check_settings(config, args, SHARE)


@pytest.mark.vllm
@pytest.mark.parametrize(("allowed", "said"), [(None, "zoact"), ("", "zoact"), ("a,b", "a,b,zoact")])
def test_a_worker_says_that_the_plugin_is_kept_out(allowed: str | None, said: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    if allowed is not None:
        environment["VLLM_PLUGINS"] = allowed
    code = f"from {WORKER_EXTENSION.rpartition('.')[0]} import ZoActWorker"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"set VLLM_PLUGINS={said}. " in done.stderr


def test_the_share_of_training_is_the_environments() -> None:
    assert training_share({}, on_cpu=True) == default_share(True) == 1 / 32
    assert training_share({}, on_cpu=False) == default_share(False) == 1 / 20
    assert training_share({SHARE_VARIABLE: "0.25"}, on_cpu=True) == 0.25
    assert training_share({SHARE_VARIABLE: "1"}, on_cpu=True) == 1


@pytest.mark.parametrize("text", ["", "0", "-0.5", "1.01", "nan", "inf", "much"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=SHARE_VARIABLE):
        training_share({SHARE_VARIABLE: text}, on_cpu=True)


def test_the_plugin_is_found_by_its_entry_point() -> None:
    (entry,) = (e for e in entry_points(group="vllm.endpoint_plugins") if e.name == PLUGIN)
    assert entry.load() is ZoActPlugin


@pytest.mark.vllm
def test_the_plugin_is_what_vllm_takes_for_one() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(ZoActPlugin(), EndpointPlugin)
