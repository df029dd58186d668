"""What an adapter is made of, a float64 model to check what servers say of it, and what servers count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file
from torch import nn

from server_ext.schemas import TenantLimits
from server_ext.tenants import Caller
from tests.support import CALL_TIMEOUT_S, Server
from zoact_remote import Adapter, Client
from zoact_remote.layout import Layout, select_sites

OPERATOR = Caller(None, TenantLimits.operators())
"""Who may do everything."""


def layout_of(client: Client, adapter: Adapter) -> Layout:
    return Layout(select_sites(client.info().sites, adapter.info.sites), adapter.info.rank)


@dataclass(frozen=True)
class Lora:
    """An adapter's matrices by layer, float64: A ``[rank, in]`` and B ``[out, rank]``."""

    a: dict[str, NDArray[np.float64]]
    b: dict[str, NDArray[np.float64]]

    @classmethod
    def exported(cls, directory: Path) -> Lora:
        """What ``Adapter.export`` wrote."""
        tensors = load_file(directory / "adapter_model.safetensors")
        halves: list[dict[str, NDArray[np.float64]]] = []
        for letter in "AB":
            suffix = f".lora_{letter}.weight"
            found = {n.removeprefix("base_model.model."): t for n, t in tensors.items() if n.endswith(suffix)}
            halves.append({name.removesuffix(suffix): t.astype(np.float64) for name, t in found.items()})
        return cls(*halves)

    def plus(self, layout: Layout, flat: NDArray[np.float32]) -> Lora:
        """The adapter with something added to its coefficients."""
        return Lora(self.a, {name: self.b[name] + matrix for name, matrix in layout.matrices(flat).items()})


@dataclass
class Reference:
    """The model in float64, with an adapter's product spelled out."""

    directory: Path
    network: Any = field(init=False)
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        network: Any = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float64)
        self.network = network.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        self.layers = {name: m for name, m in self.network.named_modules() if isinstance(m, nn.Linear)}

    def ids(self, text: str | Sequence[int], special: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special) if isinstance(text, str) else list(text)

    def continuations(self, row: Mapping[str, Any]) -> list[list[int]]:
        texts = row["choices"] if "choices" in row else [row["completion"]]
        return [self.ids(text, special=False) for text in texts]

    def logprobs(self, row: Mapping[str, Any], lora: Lora | None = None) -> list[float]:
        """Summed log-likelihood of each of a row's continuations."""
        prompt = self.ids(row["prompt"], special=True)
        found = []
        for continuation in self.continuations(row):
            ids = torch.tensor([[*prompt, *continuation]])
            with torch.inference_mode(), self._with(lora):
                table = self.network(input_ids=ids).logits[0].log_softmax(-1)
            chosen = [table[len(prompt) + i - 1, token] for i, token in enumerate(continuation)]
            found.append(float(sum(chosen)))
        return found

    def greedy(self, prompt: Sequence[int], count: int, lora: Lora | None = None) -> list[int]:
        """The likeliest tokens behind a prompt, one after another, to a number or to the end of the text."""
        ids = list(prompt)
        with torch.inference_mode(), self._with(lora):
            while len(ids) < len(prompt) + count and ids[-1] != self.tokenizer.eos_token_id:
                ids.append(int(self.network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    def loss(self, rows: Sequence[Mapping[str, Any]], lora: Lora | None = None) -> float:
        """A batch's loss, as the wire defines it."""
        losses = []
        for row in rows:
            scores = np.array(self.logprobs(row, lora))
            if "choices" in row:
                losses.append(np.log(np.exp(scores).sum()) - scores[row["answer"]])
            else:
                losses.append(-scores[0] / len(self.continuations(row)[0]))
        return float(np.mean(losses))

    def activations(self, rows: Sequence[Mapping[str, Any]], layer: str) -> dict[str, NDArray[np.float64]]:
        """A layer's inputs ``[positions, in]`` by kind of position: those of the prompt, and those that are scored."""
        seen: list[NDArray[np.float64]] = []
        handle = self.layers[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].numpy()))
        kinds: dict[str, list[NDArray[np.float64]]] = {"prompt": [], "scored": []}
        with handle, torch.inference_mode():
            for row in rows:
                prompt = self.ids(row["prompt"], special=True)
                target = self.continuations(row)[row.get("answer", 0)]
                self.network(input_ids=torch.tensor([[*prompt, *target[:-1]]]))
                inputs = seen.pop()
                kinds["prompt"].append(inputs[: len(prompt)])
                kinds["scored"].append(inputs[len(prompt) - 1 :])
        return {kind: np.concatenate(parts) for kind, parts in kinds.items()}

    def covariance(
        self, rows: Sequence[Mapping[str, Any]], layer: str, kinds: Sequence[str], centred: bool = False
    ) -> NDArray[np.float64]:
        """Second moments ``[in, in]`` of a layer's inputs, each kind of position counting alike; their trace is 1."""
        found = self.activations(rows, layer)
        inputs = [found[kind] - found[kind].mean(0) if centred else found[kind] for kind in kinds]
        moments = [x.T @ x / np.square(x).sum() for x in inputs]
        return np.asarray(np.mean(moments, axis=0))

    @contextmanager
    def _with(self, lora: Lora | None) -> Iterator[None]:
        def add(a: torch.Tensor, b: torch.Tensor, _: Any, args: Any, output: Any) -> Any:
            return output + args[0] @ a.T @ b.T

        handles = []
        for name in lora.a if lora is not None else ():
            assert lora is not None
            hook = partial(add, torch.from_numpy(lora.a[name]), torch.from_numpy(lora.b[name]))
            handles.append(self.layers[name].register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Figures(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """What ``/metrics`` says, by a series' name and labels; 0 for what is not there."""

    @classmethod
    def read(cls, text: str) -> Figures:
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return cls({(s.name, frozenset(s.labels.items())): s.value for s in samples})

    @classmethod
    def of(cls, server: Server, key: str | None = None) -> Figures:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        answer = requests.get(f"{server.url}/metrics", headers=headers, timeout=CALL_TIMEOUT_S)
        answer.raise_for_status()
        return cls.read(answer.text)

    def __call__(self, name: str, **labels: str) -> float:
        return self.get((name, frozenset(labels.items())), 0.0)

    def labels(self, name: str) -> set[str]:
        """Values of one label, whatever the series."""
        return {value for _, labels in self for label, value in labels if label == name}
