"""The plug-in says which of vLLM's settings is wrong, and how to set it."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import entry_points
from typing import Any

import pytest

from server_ext.plugin import WORKER_EXTENSION, ZoActPlugin, check_settings


def settings(**changes: Any) -> tuple[Namespace, Namespace]:
    """VLLM's configuration and arguments as the plug-in wants them, but for some changes."""
    wanted: dict[str, Any] = {
        "lora_config": Namespace(target_modules=["q_proj", "down_proj"]),
        "worker_extension_cls": WORKER_EXTENSION,
        "data_parallel_size": 1,
        "api_server_count": 1,
        "device_type": "cpu",
        "enforce_eager": True,
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
    )
    return config, Namespace(api_server_count=given.api_server_count)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device_type": "cuda", "enforce_eager": False},
        {"api_server_count": None},
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
    ],
)
def test_a_wrong_setting_is_refused_with_its_flag(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        check_settings(*settings(**changes))


def test_the_plugin_is_found_by_its_entry_point() -> None:
    (entry,) = (e for e in entry_points(group="vllm.endpoint_plugins") if e.name == "zoact")
    assert entry.load() is ZoActPlugin


@pytest.mark.vllm
def test_the_plugin_is_what_vllm_takes_for_one() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(ZoActPlugin(), EndpointPlugin)
