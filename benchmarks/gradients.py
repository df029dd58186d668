"""A model's exact gradients, curvature and activations on rows whose answers are one token each, in PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from server_ext.inputs import make_sites
from zoact_remote.layout import Layout, Site

Bases = dict[str, torch.Tensor]
"""A basis, its columns scaled, by input: float32 ``[in, r]``. Sites whose input it does not have are left alone."""


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    Attributes:
        ids: ``[rows, longest]``, padded on the right, where causal attention lets nothing see it.
        ends: each row's last position.
        answers: the right choice's number.

    """

    ids: torch.Tensor
    ends: torch.Tensor
    answers: torch.Tensor


@dataclass(frozen=True)
class Activations:
    """A batch's: by input ``[positions, in]``, and which positions are scored; all are the prompt's."""

    of: dict[str, torch.Tensor]
    scored: torch.Tensor


class Model:
    """The network, and a task's rows for it."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.network = network.eval().requires_grad_(False)
        head = network.get_output_embeddings()
        self.layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and m is not head}
        for layer in self.layers.values():
            layer.weight.requires_grad_(True)
        self.sites = make_sites((n, m.in_features, m.out_features) for n, m in self.layers.items())
        self.widths = Layout(self.sites, 1).inputs
        self.candidates = torch.zeros(0, dtype=torch.long)

    def reading(self, inputs: Collection[str]) -> list[Site]:
        """The sites that read one of these inputs."""
        return [site for site in self.sites if site.input in inputs]

    def batches(self, rows: Sequence[dict[str, Any]], size: int) -> list[Batch]:
        """Rows in batches, which from here on are answered with these rows' choices."""
        words = [self.tokenizer.encode(word, add_special_tokens=False) for word in rows[0]["choices"]]
        assert all(len(word) == 1 for word in words), "the answers must be one token each"
        self.candidates = torch.tensor(words)[:, 0]
        made = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            tokens = [torch.tensor(self.tokenizer.encode(row["prompt"])) for row in part]
            ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
            ends = torch.tensor([len(t) - 1 for t in tokens])
            made.append(Batch(ids, ends, torch.tensor([row["answer"] for row in part])))
        return made

    def logits(self, batch: Batch) -> torch.Tensor:
        """Of the choices: ``[rows, choices]``."""
        hidden = self.network.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(batch.ids)), batch.ends]
        weights: torch.Tensor = self.network.get_output_embeddings().weight
        scores: torch.Tensor = last @ weights[self.candidates].T
        return scores

    def gradient(self, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss, and its gradient in every layer's weight: ``[out, in]`` by site."""
        loss = nn.functional.cross_entropy(self.logits(batch), batch.answers)
        names = [site.name for site in self.sites]
        found = torch.autograd.grad(loss, [self.layers[name].weight for name in names])
        return loss.item(), dict(zip(names, found, strict=True))

    @torch.no_grad()
    def activations(self, batches: Sequence[Batch], only_scored: bool) -> list[Activations]:
        """Every input's activations, by batch."""
        readers = {site.input: self.layers[site.name] for site in reversed(self.sites)}
        found = []
        for batch in batches:
            position = torch.arange(batch.ids.shape[1])
            scored = (position == batch.ends[:, None]).reshape(-1)
            kept = scored if only_scored else (position <= batch.ends[:, None]).reshape(-1)
            seen: dict[str, torch.Tensor] = {}

            def keep(name: str, _: Any, args: Any, seen: Any = seen, kept: Any = kept) -> None:
                seen[name] = args[0].reshape(-1, args[0].shape[-1])[kept]

            handles = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in readers.items()]
            self.network.base_model(input_ids=batch.ids, use_cache=False)
            for handle in handles:
                handle.remove()
            found.append(Activations(seen, scored[kept]))
        return found

    def traces(self, batch: Batch, bases: dict[str, Bases], draw: torch.Generator) -> dict[str, float]:
        """The trace of Fisher's matrix in every basis's coefficients, as one answer a row has it."""
        passing: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(name: str, _: Any, args: Any, output: torch.Tensor) -> None:
            passing[name] = args[0].detach(), output

        handles = [self.layers[site.name].register_forward_hook(partial(keep, site.name)) for site in self.sites]
        logits = self.logits(batch)
        for handle in handles:
            handle.remove()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        slopes = torch.autograd.grad(loss, [passing[site.name][1] for site in self.sites])
        found = dict.fromkeys(bases, 0.0)
        for site, slope in zip(self.sites, slopes, strict=True):
            for name, basis in bases.items():
                if site.input not in basis:
                    continue
                of_row = torch.einsum("npo,npr->nor", slope, passing[site.name][0] @ basis[site.input])
                found[name] += float(of_row.square().sum()) / len(batch.ids)
        return found
