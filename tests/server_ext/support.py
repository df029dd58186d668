"""Real servers in processes of their own, and a float64 model to check what they say."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import nn

from zoact_remote import Adapter, Basis, Client, Update
from zoact_remote.layout import Layout, select_sites
from zoact_remote.noise import Distribution

READY_WITHIN_S = 240.0
CALL_TIMEOUT_S = (5.0, 90.0)
SLOTS = 4
"""Adapters and probes that vLLM takes into one batch: few, so that tests can ask for more."""

Vectors = dict[str, NDArray[np.float32]]

ROWS: list[dict[str, Any]] = [
    {"prompt": "What a joy to watch. It was", "choices": [" terrible", " great"], "answer": 1},
    {"prompt": "The second half was dull. It was", "choices": [" bad", " good", " a waste of time"], "answer": 0},
    {"prompt": "The parcel never came.", "completion": " Please send my money back."},
    {"prompt": [0, 40, 41, 42], "choices": [[50], [51], [52]], "answer": 2},
    {"prompt": [0, 300, 7, 8, 9], "completion": [10, 11]},
]
"""Rows of every kind: text and ids, completions and choices, one token and several, choices that begin alike."""


class Server:
    """``zoact serve`` on a free port, with its state in a directory of its own."""

    def __init__(self, model: Path, engine: str, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.engine = engine
        self.state = directory / "state"
        self.log = directory / "server.log"
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        """Starts, and waits until every adapter is back."""
        self.port = _free_port()
        arguments = [str(self.model), "--engine", self.engine, "--port", str(self.port), "--state", str(self.state)]
        if self.engine == "vllm":
            arguments += ["--slots", str(SLOTS)]
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "zoact_remote.cli", "serve", *arguments],
                env={**os.environ, **environment, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        return self

    def _wait(self) -> None:
        assert self._process is not None
        for _ in range(int(READY_WITHIN_S / 0.2)):
            if self._process.poll() is not None:
                break
            try:
                if requests.get(f"{self.url}/health", timeout=2).ok:
                    return
            except requests.RequestException:
                pass
            try:
                self._process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
        raise RuntimeError(f"the server did not come up:\n{end}")

    def kill(self) -> None:
        """Ends the server as a power cut would: no handler runs."""
        if self._process is None:
            return
        # vLLM's engine is a process of its own in the server's group, which is ours alone.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"timeout": CALL_TIMEOUT_S, "retries": 0, **options})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Servers:
    """Servers by engine, each started when first asked for."""

    def __init__(self, model: Path, directory: Callable[[str], Path]) -> None:
        self._model = model
        self._directory = directory
        self._running: dict[str, Server] = {}

    def __call__(self, engine: str) -> Server:
        if engine not in self._running:
            self._running[engine] = Server(self._model, engine, self._directory(engine)).start()
        return self._running[engine]

    def kill(self) -> None:
        for server in self._running.values():
            server.kill()


_numbers = itertools.count()


def new_adapter(
    client: Client,
    *,
    rank: int = 3,
    sites: Sequence[str] | None = None,
    noise: Distribution = "rademacher",
    basis: Basis | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
) -> Adapter:
    """A calibrated adapter of a name that no other test uses; its basis is random unless told otherwise."""
    name = f"tests/adapter-{next(_numbers)}"
    adapter = client.create_adapter(name, rank=rank, sites=sites, noise=noise, basis=basis or Basis(source="random"))
    adapter.calibrate(rows)
    return adapter


def trained_adapter(client: Client, *, updates: int = 1, size: float = 0.1, **options: Any) -> Adapter:
    """An adapter some updates away from the base model, far enough that it shows in its scores."""
    adapter = new_adapter(client, **options)
    first = int(adapter.name.rpartition("-")[2]) * 1000
    for version in range(updates):
        adapter.update(Update(version, ((first + version, size),)))
    return adapter


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
