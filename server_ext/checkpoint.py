"""Where the files of a model lie."""

from __future__ import annotations

from pathlib import Path


def checkpoint_directory(model: str) -> Path:
    """Where a model's files lie: the directory itself, or the hub's local copy of that name."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))
