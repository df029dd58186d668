"""The digest that tells models apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zoact_remote.model_digest import SAMPLE, model_digest


def _edit_config(model: Path) -> None:
    (model / "config.json").write_bytes((model / "config.json").read_bytes() + b" ")


def _edit_first_weight(model: Path) -> None:
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[SAMPLE // 16] ^= 1
    (model / "model.safetensors").write_bytes(weights)


def _edit_last_weight(model: Path) -> None:
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)


def _rename_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")


@pytest.mark.parametrize("edit", [_edit_config, _edit_first_weight, _edit_last_weight, _rename_weights])
def test_the_model_digest_notices(tiny_model: Path, tmp_path: Path, edit: Callable[[Path], None]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert model_digest(copy) == model_digest(tiny_model)
    (copy / "README.md").write_text("not part of the model")
    assert model_digest(copy) == model_digest(tiny_model)
    edit(copy)
    assert model_digest(copy) != model_digest(tiny_model)


def test_a_directory_without_a_model_has_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        model_digest(tmp_path)
