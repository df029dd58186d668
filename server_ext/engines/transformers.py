"""The reference engine: plain PyTorch and Transformers, for laptops, tests and systems without vLLM."""

from __future__ import annotations

import asyncio
import copy
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from server_ext.basis import Basis, RangeFinder, make_finders
from server_ext.checkpoint import checkpoint_digest
from server_ext.engines.base import CalibrationRow, GeneratedText, Model, Slots, longest_token, text_before
from server_ext.inputs import make_sites
from server_ext.rows import Context, ContextScore, Tokens
from server_ext.schemas import BasisSpec
from server_ext.store import AdapterStore, Point
from zoact_remote.layout import Layout
from zoact_remote.noise import Distribution
from zoact_remote.wire import Update

T = TypeVar("T")

TOKENS_PER_BATCH = 4096
"""Padded tokens that go through the model at once."""
SCORED_PER_BATCH = 1024
"""Positions whose logits are held at once: over a large vocabulary nothing else takes as much memory."""
COLDEST = 1e-5
"""Below this temperature the likeliest token is taken, as vLLM does: logits over it would overflow."""


class TransformersEngine:
    """Evaluates points one after another, each in padded batches, with float32 log-probabilities.

    All work runs on one thread, so calls queue up and the event loop stays free.
    """

    name: Literal["transformers"] = "transformers"
    version = transformers.__version__
    tokens_at_once = 8 * TOKENS_PER_BATCH

    def __init__(
        self,
        model: str,
        dtype: str = "float32",
        device: str = "cpu",
        max_tokens: int | None = None,
        max_rank: int = 512,
    ) -> None:
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
        self.longest_token = longest_token(self.tokenizer)
        # Fast tokenisers are not to be shared between threads.
        self._encoder: Any = copy.deepcopy(self.tokenizer)
        self.device = torch.device(device)
        # Transformers' own annotations do not describe what a loaded model can do.
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.network = network.to(self.device).eval().requires_grad_(False)
        # Where texts end is the checkpoint's to say. Its repetition penalty and the like would make them others than
        # the model's own, and generate() takes what it is not told from here.
        advice = self.network.generation_config
        self.network.generation_config = type(advice)(eos_token_id=advice.eos_token_id)
        longest = int(self.network.config.max_position_embeddings)
        self.model = Model(
            name=model,
            digest=checkpoint_digest(model),
            dtype=dtype,
            vocabulary=int(self.network.config.vocab_size),
            max_tokens=min(max_tokens or longest, longest),
        )
        head = self.network.get_output_embeddings()
        self._layers = {n: m for n, m in self.network.named_modules() if isinstance(m, nn.Linear) and m is not head}
        self.sites = make_sites((n, m.in_features, m.out_features) for n, m in self._layers.items())
        self.max_rank = max_rank
        self._store = AdapterStore(self.device)
        self._thread = ThreadPoolExecutor(1, "zoact-model")

    def encode(self, text: str, special: bool) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=special)

    def render_chat(self, messages: list[dict[str, str]], opened: bool) -> str:
        return self._encoder.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False)

    async def calibrate(
        self, rows: Sequence[CalibrationRow], layout: Layout, spec: BasisSpec
    ) -> tuple[dict[str, Basis], int]:
        return await self._run(self._calibrate, rows, layout, spec)

    async def put(
        self,
        key: str,
        layout: Layout,
        distribution: Distribution,
        basis: dict[str, NDArray[np.float32]],
    ) -> None:
        tensors = {name: torch.from_numpy(vectors) for name, vectors in basis.items()}
        await self._run(self._store.put, key, layout, distribution, tensors)

    async def hold(
        self,
        key: str,
        version: int,
        base: int | NDArray[np.float32] | None,
        update: Update | None,
        keep: Collection[int],
    ) -> str:
        start = torch.from_numpy(base) if isinstance(base, np.ndarray) else base
        digest = await self._run(lambda: self._store[key].hold(version, start, update, keep))
        while digest is None:
            digest = await self._run(lambda: self._store[key].hold_on())
        return digest

    async def read(self, key: str, version: int) -> NDArray[np.float32]:
        return await self._run(lambda: self._store[key][version].flat.cpu().numpy())

    async def drop(self, key: str) -> None:
        await self._run(self._store.drop, key)

    async def score(self, point: Point | None, contexts: Sequence[Context]) -> list[ContextScore]:
        return await self._run(self._score, point, contexts)

    async def generate(
        self,
        point: Point | None,
        tokens: Tokens,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        stop: Sequence[str],
    ) -> GeneratedText:
        return await self._run(self._generate, point, tokens, max_tokens, temperature, seed, stop)

    async def slots(self) -> Slots:
        return Slots()

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args))

    @contextmanager
    def _at(self, point: Point | None) -> Iterator[None]:
        """The model at a point: y = W x + C (V' x) at the adapter's sites."""
        if point is None:
            yield
            return
        state = self._store[point.key]
        matrices = state.layout.matrices(state[point.version].at(point.seed, point.epsilon))

        def hook(vectors: torch.Tensor, matrix: torch.Tensor, _: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            reduced = args[0].to(torch.float32) @ vectors
            return output + (reduced @ matrix.T).to(output.dtype)

        handles = [
            self._layers[site.name].register_forward_hook(partial(hook, state.basis[site.input], matrices[site.name]))
            for site in state.layout.sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _batches(
        self, sequences: Sequence[Tokens], scored: Sequence[int]
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Indices, padded token ids ``[rows, longest]`` and mask of batches of similar length, longest first.

        ``scored`` are positions of each sequence whose logits are wanted.
        """
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        while order:
            fitting = order[: TOKENS_PER_BATCH // len(sequences[order[0]])]
            count = bisect_right(list(accumulate(scored[i] for i in fitting)), SCORED_PER_BATCH) or 1
            batch, order = order[:count], order[count:]
            longest = len(sequences[batch[0]])
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[row, : len(sequences[i])] = 1
            yield batch, ids.to(self.device), mask.to(self.device)

    @torch.inference_mode()
    def _score(self, point: Point | None, contexts: Sequence[Context]) -> list[ContextScore]:
        results: dict[int, ContextScore] = {}
        counts = [len(context.tokens) - context.start + 1 for context in contexts]
        with self._at(point):
            for batch, ids, mask in self._batches([context.tokens for context in contexts], counts):
                scored = torch.zeros_like(mask, dtype=torch.bool)
                for row, i in enumerate(batch):
                    scored[row, contexts[i].start - 1 : len(contexts[i].tokens)] = True
                parts = torch.split(self._logits(ids, mask, scored), [counts[i] for i in batch])
                for i, logits in zip(batch, parts, strict=True):
                    context = contexts[i]
                    logprobs = logits.to(torch.float32).log_softmax(-1)
                    inner = logprobs[range(counts[i] - 1), list(context.tokens[context.start :])]
                    results[i] = ContextScore(
                        tuple(inner.tolist()), tuple(logprobs[-1, list(context.candidates)].tolist())
                    )
        return [results[i] for i in range(len(contexts))]

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """The model's logits ``[positions, vocabulary]`` where ``scored`` (``[rows, longest]``) says.

        No other position meets the head. What stands behind it in some models, such as a cap or a scale of the logits,
        is the model's own doing.
        """

        def select(_: Any, args: Any) -> torch.Tensor:
            return args[0][scored].unsqueeze(0)

        with self.network.get_output_embeddings().register_forward_pre_hook(select):
            logits: torch.Tensor = self.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.flatten(0, 1)

    @torch.inference_mode()
    def _calibrate(
        self, rows: Sequence[CalibrationRow], layout: Layout, spec: BasisSpec
    ) -> tuple[dict[str, Basis], int]:
        finders = make_finders(layout, spec, self.device)
        readers = {site.input: self._layers[site.name] for site in reversed(layout.sites)}
        masks: tuple[torch.Tensor, torch.Tensor]

        def hook(finder: RangeFinder, _: Any, args: Any) -> None:
            finder.add(args[0].reshape(-1, finder.width), *masks)

        seen = 0
        for number in range(spec.passes):
            if number:
                for finder in finders.values():
                    finder.next_pass()
            handles = [readers[name].register_forward_pre_hook(partial(hook, f)) for name, f in finders.items()]
            try:
                for batch, ids, mask in self._batches([row.tokens for row in rows], [0] * len(rows)):
                    lengths = torch.tensor([rows[i].prompt for i in batch], device=self.device).unsqueeze(1)
                    position = torch.arange(ids.shape[1], device=self.device).unsqueeze(0)
                    real = mask.bool()
                    masks = ((real & (position < lengths)).reshape(-1), (real & (position >= lengths - 1)).reshape(-1))
                    self.network.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            seen = sum(m.count for m in next(iter(finders.values())).moments.values())
        return {name: finder.basis() for name, finder in finders.items()}, seen

    @torch.inference_mode()
    def _generate(
        self,
        point: Point | None,
        tokens: Tokens,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        stop: Sequence[str],
    ) -> GeneratedText:
        def text(new: Sequence[int]) -> str:
            return self.tokenizer.decode(new, skip_special_tokens=True)

        def at_stop(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            found = text_before(text(ids[0, len(tokens) :].tolist()), stop) is not None
            return torch.tensor([found], device=ids.device)

        ids = torch.tensor([tokens], device=self.device)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature >= COLDEST
            else {"do_sample": False}
        )
        # A seed is for this text alone: those without one share the generators that it would set.
        devices = [] if self.device.type == "cpu" else [self.device]
        fork = torch.random.fork_rng(devices, enabled=seed is not None, device_type=self.device.type)
        with self._at(point), fork:
            if seed is not None:
                torch.manual_seed(seed)
            output = self.network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                pad_token_id=0,
                stopping_criteria=[at_stop] if stop else None,
                **sampling,
            )
        new = output[0, len(tokens) :].tolist()
        ends = self.network.generation_config.eos_token_id
        ended = bool(new) and new[-1] in (ends if isinstance(ends, list) else [ends])
        return GeneratedText.cut(tuple(new), text(new), ended, stop)
