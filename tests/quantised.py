"""Checkpoints whose blocks hold quantised weights, each beside one of the same numbers in floating point.

Scales have 8 significant bits, so that every number that a quantised weight stands for is a float16 or a float32
exactly, and the two checkpoints are one model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from zoact_remote.cli.vllm_command import LAYERS
from zoact_remote.merge import WEIGHTS

GROUP = 32
"""Inputs that share an int4 scale."""
ZERO = 8
"""The level of 16 that stands for zero."""
PACKED = 8
"""Levels in an int32."""
INT4 = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
FLOAT8 = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FLOAT8).max
_FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FP8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_FP8, "strategy": "token", "dynamic": True},
        }
    },
}
CONFIGS: dict[str, dict[str, Any]] = {"int4": INT4, "fp8": FP8}


class Quantised(NamedTuple):
    """Two directories: the checkpoint to serve, and the one that a reference computes with."""

    served: Path
    plain: Path


def quantise(source: Path, directory: Path, kind: str) -> Quantised:
    """Writes a float checkpoint of one file as two, of the same numbers.

    Args:
        source: the checkpoint.
        directory: where to write; one that does not exist.
        kind: ``int4``: GPTQ's format, symmetric, a scale for every ``GROUP`` inputs of an output; ``fp8``: a scale for
            every output, and inputs that are to be rounded to FP8 as they come, with a scale for every token.

    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / WEIGHTS).items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in LAYERS:
            found, numbers[name] = (_int4 if kind == "int4" else _fp8)(weight)
            tensors |= {f"{layer}.{part}": tensor for part, tensor in found.items()}
        else:
            tensors[name] = weight.half()
            numbers[name] = tensors[name].float()
    config = json.loads((source / "config.json").read_text())
    made = Quantised(directory / kind, directory / "float32")
    for path, content, more in (
        (made.served, tensors, {"dtype": "float16", "quantization_config": CONFIGS[kind]}),
        (made.plain, numbers, {"dtype": "float32"}),
    ):
        shutil.copytree(source, path)
        save_file(content, path / WEIGHTS, {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | more))
    return made


def _scales(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """Scales by which the last dimension's numbers come to some largest one."""
    return (weight.abs().amax(-1, keepdim=True) / largest).bfloat16().float()


def _int4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """GPTQ's tensors of a weight ``[out, in]``, inputs first, and the weight that they stand for."""
    outputs, inputs = weight.shape
    groups = weight.view(outputs, -1, GROUP)
    scales = _scales(groups, ZERO - 1)
    steps = (groups / scales).round().clamp(-ZERO, ZERO - 1)
    levels = (steps + ZERO).flatten(1).T
    tensors = {
        "qweight": _pack(levels.reshape(-1, PACKED, outputs).transpose(1, 2)),
        # The format stores one less.
        "qzeros": _pack(torch.full((inputs // GROUP, outputs // PACKED, PACKED), ZERO - 1)),
        "scales": scales[..., 0].T.half().contiguous(),
        "g_idx": (torch.arange(inputs) // GROUP).to(torch.int32),
    }
    return tensors, (steps * scales).flatten(1)


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """Levels ``[..., PACKED]`` as int32 ``[...]``, the first in the lowest bits."""
    words = (levels.to(torch.int64) << (4 * torch.arange(PACKED))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """compressed-tensors' tensors of a weight ``[out, in]``, and the weight that they stand for."""
    scales = _scales(weight, FP8_LARGEST)
    rounded = (weight / scales).clamp(-FP8_LARGEST, FP8_LARGEST).to(FLOAT8)
    return {"weight": rounded, "weight_scale": scales}, rounded.float() * scales


def round_inputs(x: torch.Tensor) -> torch.Tensor:
    """Inputs ``[..., in]`` as ``fp8`` layers see them: rounded to FP8, with a scale for every token."""
    scales = x.abs().amax(-1, keepdim=True) / FP8_LARGEST
    return (x / scales).to(FLOAT8).to(x.dtype) * scales
