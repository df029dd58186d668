"""silu(gate) * up that adds the low-rank term of gate and up as it reads them.

vLLM's LoRA layers add their term to an output that the activation reads next, and so move gate and up, the widest
tensors of a block, through memory twice more. The layer may instead leave the term to the activation. It says so here
because nothing else passes between two modules: the layer's operator leaves a note, and the activation's, which
follows it on the same tensor, takes it up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.library import Library
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.utils.torch_utils import direct_register_custom_op

from server_ext.gpu import lora


class Note(NamedTuple):
    """What ``lora.activate`` needs beside the tensors that the activation has."""

    y: torch.Tensor
    reduced: torch.Tensor
    lora_b: list[torch.Tensor]
    batch: lora.Batch


class Deferred:
    """The layers that leave their term to the activation, and the note of the one that did so last."""

    def __init__(self) -> None:
        self._layers: set[int] = set()
        self._note: Note | None = None

    def add_layers(self, modules: Iterable[tuple[Any, torch.nn.Module]]) -> None:
        """Takes in LoRA layers, each with the module that reads its output next."""
        for layer, reader in modules:
            if isinstance(reader, TermedSiluAndMul) and len(layer.lora_b_stacked) == 2:
                self._layers.add(layer.lora_b_stacked[0].data_ptr())

    def take_in(
        self,
        y: torch.Tensor,
        reduced: torch.Tensor,
        lora_b: list[torch.Tensor],
        batch: lora.Batch,
        tokens: int,
    ) -> bool:
        """Notes a layer's term, if it is one of these layers; the answer says whether."""
        # A graph replays kernels without their notes, and the padding that it adds to a batch belongs to no tile.
        if lora_b[0].data_ptr() not in self._layers or y.shape[0] != tokens or torch.cuda.is_current_stream_capturing():
            return False
        self._note = Note(y, reduced, lora_b, batch)
        return True

    def give_out(self, y: torch.Tensor) -> Note | None:
        """The term that is still to be added to ``y``."""
        note, self._note = self._note, None
        if note is None or note.y.data_ptr() == y.data_ptr():
            return note
        raise RuntimeError("a LoRA layer left its term to an activation that did not follow")


deferred = Deferred()


@SiluAndMul.register_oot(name="SiluAndMul")
class TermedSiluAndMul(SiluAndMul):
    """Takes the place of vLLM's in models made after this module is imported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.zoact.silu_and_mul(x)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """The operator."""
    h = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    note = deferred.give_out(x)
    if note is None:
        torch.ops._C.silu_and_mul(h, x)
    else:
        lora.activate(x, h, note.reduced, note.lora_b, note.batch)
    return h


def _silu_and_mul_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


_library = Library("zoact", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("silu_and_mul", silu_and_mul, fake_impl=_silu_and_mul_fake, target_lib=_library)


PLAIN = {"gate_up_proj", "act_fn", "down_proj", "maybe_fused_act_quant"}
"""All that a block names in its ``forward`` if nothing comes between ``gate_up_proj`` and ``act_fn``."""


def pairs(model: torch.nn.Module, layers: dict[str, Any]) -> Iterable[tuple[Any, torch.nn.Module]]:
    """LoRA layers named ``gate_up_proj`` with the ``act_fn`` that reads their output next, as Llama has them.

    Falcon-H1 scales the gate in between, and would not scale a term that comes later.
    """
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        act = modules.get(f"{parent}.act_fn")
        if last == "gate_up_proj" and act is not None and set(modules[parent].forward.__code__.co_names) <= PLAIN:
            yield layer, act
