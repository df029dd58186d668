"""The plug-in says which of vLLM's settings is wrong, and how to set it."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import entry_points
from typing import Any

import pytest

from server_ext.plugin import (
    DEFAULT_SHARE,
    SHARE_VARIABLE,
    WORKER_EXTENSION,
    ZoActPlugin,
    check_settings,
    training_share,
)
from zoact_remote.cli.serve import DEFAULT_TRAINING_SHARE


def settings(**changes: Any) -> tuple[Namespace, Namespace, float]:
    """VLLM's configuration and arguments, and training's share, as the plug-in wants them but for some changes."""
    wanted: dict[str, Any] = {
        "lora_config": Namespace(target_modules=["q_proj", "down_proj"]),
        "worker_extension_cls": WORKER_EXTENSION,
        "data_parallel_size": 1,
        "api_server_count": 1,
        "device_type": "cpu",
        "enforce_eager": True,
        "policy": "priority",
        "share": 0.5,
    }
    assert set(changes) <= set(wanted)
    given = Namespace(**(wanted | changes))
    config = Namespace(
        lora_config=given.lora_config,
        parallel_config=Namespace(
            worker_extension_cls=given.worker_extension_cls, data_parallel_size=given.data_parallel_size
        ),
        device_config=Namespace(device_type=given.device_type),
        model_config=Namespace(enforce_eager=given.enforce_eager),
        scheduler_config=Namespace(policy=given.policy),
    )
    return config, Namespace(api_server_count=given.api_server_count), given.share


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device_type": "cuda", "enforce_eager": False},
        {"api_server_count": None},
        {"share": 1.0},
        {"share": 1.0, "policy": "fcfs"},
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
        ({"lora_config": Namespace(target_modules=None)}, "--lora-target-modules q_proj"),
        ({"lora_config": Namespace(target_modules=["q_proj", "lm_head"])}, "--lora-target-modules q_proj"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        ({"api_server_count": 2}, "--api-server-count 1"),
        ({"enforce_eager": False}, "--enforce-eager"),
        ({"policy": "fcfs"}, f"--scheduling-policy priority, or set {SHARE_VARIABLE}=1"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_flag(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        check_settings(*settings(**changes))


def test_the_share_of_training_is_the_environments() -> None:
    assert training_share({}) == DEFAULT_SHARE == DEFAULT_TRAINING_SHARE
    assert training_share({SHARE_VARIABLE: "0.25"}) == 0.25
    assert training_share({SHARE_VARIABLE: "1"}) == 1


@pytest.mark.parametrize("text", ["", "0", "-0.5", "1.01", "nan", "inf", "much"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=SHARE_VARIABLE):
        training_share({SHARE_VARIABLE: text})


def test_the_plugin_is_found_by_its_entry_point() -> None:
    (entry,) = (e for e in entry_points(group="vllm.endpoint_plugins") if e.name == "zoact")
    assert entry.load() is ZoActPlugin


@pytest.mark.vllm
def test_the_plugin_is_what_vllm_takes_for_one() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(ZoActPlugin(), EndpointPlugin)
