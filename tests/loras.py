"""LoRAs as PEFT keeps them: the files of a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from zoact_remote.exports import CONFIG, TENSORS, half_name, tar_of
from zoact_remote.layout import Site

Halves = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""A ``[rank, in]`` and B ``[out, rank]`` by layer."""


def random_halves(sites: Sequence[Site], rank: int, seed: int = 0) -> Halves:
    """Matrices of which every layer has its own."""
    rng = np.random.default_rng(seed)

    def draw(rows: int, columns: int) -> NDArray[np.float32]:
        return (rng.normal(size=(rows, columns)) / 8).astype(np.float32)

    return {site.name: (draw(rank, site.in_features), draw(site.out_features, rank)) for site in sites}


def lora_files(halves: Halves, dtype: torch.dtype = torch.float32, **config: Any) -> dict[str, bytes]:
    """The files of a LoRA whose alpha is its rank, unless its configuration says otherwise."""
    rank = len(next(iter(halves.values()))[0])
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a model",
        "bias": "none",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.1,
        "init_lora_weights": True,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in halves}),
    }
    tensors = {
        name: torch.from_numpy(matrix.copy()).to(dtype)
        for layer, (half_a, half_b) in halves.items()
        for name, matrix in ((half_name(layer, "A"), half_a), (half_name(layer, "B"), half_b))
    }
    return {CONFIG: json.dumps(about | config).encode(), TENSORS: save(tensors)}


def lora_archive(halves: Halves, **options: Any) -> bytes:
    """The files in a tar archive."""
    return tar_of(lora_files(halves, **options))


def lora_directory(directory: Path, halves: Halves, **options: Any) -> Path:
    """The files in a directory."""
    directory.mkdir(exist_ok=True)
    for name, content in lora_files(halves, **options).items():
        (directory / name).write_bytes(content)
    return directory
