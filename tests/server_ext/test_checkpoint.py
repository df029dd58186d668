"""Which files a served model's digest is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from server_ext.checkpoint import checkpoint_digest
from zoact_remote.model_digest import model_digest

NAME = "acme/model"
MAIN, TAGGED = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def download(cache: Path, commit: str, revision: str, *files: Path) -> Path:
    """Files of a commit as the hub's client lays them, with what it remembers of a branch or tag."""
    folder = cache / "models--acme--model"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, snapshot)
    return snapshot


@pytest.fixture
def tagged(tiny_model: Path, tmp_path: Path) -> Path:
    """Another model of the same configuration."""
    shutil.copytree(tiny_model, tmp_path / "tagged")
    weights = bytearray((tiny_model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "tagged" / "model.safetensors").write_bytes(weights)
    return tmp_path / "tagged"


def test_a_directory_is_its_own_checkpoint(tiny_model: Path, hub: Path) -> None:
    assert checkpoint_digest(str(tiny_model), "v1", "elsewhere") == model_digest(tiny_model)


def test_a_revision_is_its_own_model(tiny_model: Path, tagged: Path, hub: Path) -> None:
    download(hub, MAIN, "main", *tiny_model.iterdir())
    download(hub, TAGGED, "v1", *tagged.iterdir())
    assert checkpoint_digest(NAME) == checkpoint_digest(NAME, MAIN) == model_digest(tiny_model)
    assert checkpoint_digest(NAME, "v1") == checkpoint_digest(NAME, TAGGED) == model_digest(tagged)
    assert model_digest(tagged) != model_digest(tiny_model)


def test_weights_that_were_downloaded_elsewhere(tiny_model: Path, tagged: Path, hub: Path, tmp_path: Path) -> None:
    """vLLM puts nothing but weights there; older weights in the hub's own cache are not those that it has read."""
    download(hub, TAGGED, "main", tagged / "config.json", tiny_model / "model.safetensors")
    download(tmp_path / "disk", TAGGED, "main", tagged / "model.safetensors")
    assert checkpoint_digest(NAME, None, str(tmp_path / "disk")) == model_digest(tagged)


def test_files_that_an_engine_does_not_need_may_be_missing(tiny_model: Path, hub: Path) -> None:
    """The hub's client knows what a commit consists of, and by itself asks for all of it."""
    snapshot = download(hub, MAIN, "main", tiny_model / "config.json", tiny_model / "model.safetensors")
    trees = snapshot.parents[1] / "trees"
    trees.mkdir()
    listed = {path.name: {"size": path.stat().st_size, "blob_id": "0" * 40} for path in tiny_model.iterdir()}
    (trees / f"{MAIN}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    assert checkpoint_digest(NAME) == model_digest(tiny_model)


def test_what_is_not_there_is_said(hub: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint_digest(NAME)
