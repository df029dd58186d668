"""The platform is there for those who ask for it on a CUDA device, and for nobody else."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm import platforms

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
