"""The platform is there for those who ask for it on a CUDA device, and for nobody else."""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import platforms
from vllm.config import VllmConfig
from vllm.platforms.interface import Platform

from server_ext.gpu.platform import VARIABLE, platform

NAME = "server_ext.gpu.cuda_platform.ZoActCudaPlatform"


@pytest.mark.parametrize(
    ("plugins", "cuda", "expected"),
    [
        ("zoact", True, NAME),
        ("other,zoact", True, NAME),
        ("zoact", False, None),
        ("other", True, None),
        ("zoactive", True, None),
        (None, True, None),
    ],
)
def test_platform_comes_with_the_plug_in_unless_the_kernels_are_turned_off(
    monkeypatch: pytest.MonkeyPatch, plugins: str | None, cuda: bool, expected: str | None
) -> None:
    monkeypatch.setattr(platforms, "cuda_platform_plugin", lambda: "vllm.platforms.cuda.CudaPlatform" if cuda else None)
    monkeypatch.delenv(VARIABLE, raising=False)
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert platform() == expected
    monkeypatch.setenv(VARIABLE, "0")
    assert platform() is None


def test_models_that_were_compiled_without_the_kernels_are_not_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's CPU build cannot import its platform for CUDA.
    monkeypatch.setitem(sys.modules, "vllm.platforms.cuda", SimpleNamespace(CudaPlatform=Platform))
    ours = runpy.run_module("server_ext.gpu.cuda_platform")["ZoActCudaPlatform"]
    config: Any = VllmConfig(additional_config={"theirs": 1})
    before = config.compute_hash()
    ours.check_and_update_config(config)
    assert config.additional_config["theirs"] == 1
    assert config.compute_hash() != before
