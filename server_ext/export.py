"""An adapter version as a PEFT directory, which peft and stock vLLM load as a LoRA: A = V', B = C, scaling 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from server_ext.errors import invalid
from zoact_remote.exports import ABOUT, CONFIG, TENSORS, half_name, write_tar
from zoact_remote.layout import Layout, Site


@dataclass(frozen=True)
class Exported:
    """What an export is made of.

    Attributes:
        name: tenant/adapter.
        version: the version exported.
        digest: of its coefficients.
        model_name: name of the base model.
        model_digest: digest of the base model.
        layout: the adapter's layout.
        basis: float32 ``[in_features, rank]`` by input.
        flat: float32 ``[layout.size]``.

    """

    name: str
    version: int
    digest: str
    model_name: str
    model_digest: str
    layout: Layout
    basis: dict[str, NDArray[np.float32]]
    flat: NDArray[np.float32]


def write_export(exported: Exported, all_sites: Sequence[Site], dtype: str, file: IO[bytes]) -> None:
    """Writes a tar archive of ``adapter_config.json``, ``adapter_model.safetensors`` and ``zoact.json``, uncompressed.

    Args:
        exported: the adapter.
        all_sites: the model's sites.
        dtype: ``float32``, ``float16`` or ``bfloat16``, of the tensors; values are rounded to nearest, ties to even.
        file: left at its end, with all of it written.

    Raises:
        ApiError: a coefficient is too large for the type (400).

    """
    target = getattr(torch, dtype)
    matrices = exported.layout.matrices(exported.flat)
    tensors = {}
    for site in exported.layout.sites:
        # A copy for each, since safetensors takes no two tensors that share memory.
        vectors = torch.from_numpy(exported.basis[site.input].T.copy())
        coefficients = torch.from_numpy(matrices[site.name].copy()).to(target)
        if not coefficients.isfinite().all():
            raise invalid("dtype", f"coefficients of {site.name} are too large for {dtype}; float32 holds them")
        tensors[half_name(site.name, "A")] = vectors.to(target)
        tensors[half_name(site.name, "B")] = coefficients
    files = {
        CONFIG: _json(_config(exported, all_sites)),
        TENSORS: save(tensors, metadata={"format": "pt"}),
        ABOUT: _json(
            {
                "adapter": exported.name,
                "version": exported.version,
                "coefficients_digest": exported.digest,
                "model": exported.model_name,
                "model_digest": exported.model_digest,
            }
        ),
    }
    write_tar(files, file)
    file.flush()


def _config(exported: Exported, all_sites: Sequence[Site]) -> dict[str, Any]:
    rank = exported.layout.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": exported.model_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": _target_modules(exported.layout.sites, all_sites),
    }


def _target_modules(sites: Sequence[Site], all_sites: Sequence[Site]) -> list[str]:
    """Last components where they say it all, full names where only some layers of that name are sites."""
    chosen = {site.name for site in sites}
    last = {site.name.rpartition(".")[2] for site in sites}
    complete = {site.name for site in all_sites if site.name.rpartition(".")[2] in last} == chosen
    return sorted(last if complete else chosen)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
