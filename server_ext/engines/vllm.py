"""The engine that serves: vLLM. Everything is evaluated as ordinary requests in its scheduler's batches."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import secrets
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal

import numpy as np
import torch
import vllm
from numpy.typing import NDArray
from safetensors.torch import load, save
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server_ext.basis import Basis
from server_ext.checkpoint import checkpoint_digest
from server_ext.engines.base import CalibrationRow, GeneratedText, Model, Slots, longest_token
from server_ext.key_limit import KeyLimit
from server_ext.lanes import PREFIX, Lanes, Turn, training_cap
from server_ext.packing import SCORED_ROWS, Pack, Packing
from server_ext.room import NoRoom
from server_ext.rows import Context, ContextScore, Tokens
from server_ext.schemas import BasisSpec
from server_ext.store import Point
from server_ext.together import together
from server_ext.traffic import watch
from server_ext.worker import CALIBRATION_PATH, point_path
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import Distribution
from zoact_remote.wire import Update

FIRST_LORA_ID = 1 << 24
"""vLLM numbers the adapters that it loads itself from 1; ours start far above."""
METRICS_NAME = "zoact"
STEPS_AHEAD = 2
"""Steps of the scheduler that training may fill: the one under way, and the one after it."""
LORA_IDS_KEPT = 4096
"""Points whose number is remembered, so that asking again finds the slot filled."""


class VllmEngine:
    """Drives a running vLLM through its ``EngineClient``. Make one with ``await VllmEngine.attach(...)``."""

    name: Literal["vllm"] = "vllm"
    version = vllm.__version__

    def __init__(self, client: Any, description: dict[str, Any], share: float) -> None:
        config = client.vllm_config.model_config
        self._client = client
        self._tokenizer = client.get_tokenizer()
        self.longest_token = longest_token(self._tokenizer)
        # Fast tokenisers are not to be shared between threads.
        self._encoder = copy.deepcopy(self._tokenizer)
        self.sites = tuple(Site(**site) for site in description["sites"])
        self.max_rank = int(description["max_rank"])
        self._packing = Packing(**description["packing"]) if description["packing"] else None
        self.model = Model(
            name=config.served_model_name or config.model,
            digest=checkpoint_digest(config.model, config.revision, client.vllm_config.load_config.download_dir),
            dtype=str(config.dtype).removeprefix("torch."),
            vocabulary=config.get_vocab_size(),
            max_tokens=config.max_model_len,
        )
        step: int = client.vllm_config.scheduler_config.max_num_batched_tokens
        # As long as a request may be, with the one token that vLLM wants to add, and no longer than a step.
        self._pack_tokens = min(self.model.max_tokens - 1, step)
        # A pack is no text: nobody may find what it leaves in the prefix cache.
        self._salt = secrets.token_hex(16)
        cache = client.vllm_config.cache_config
        # A quarter of the cache is for what is scored and one for texts, and half for others: what waits for room in it
        # is never given that of what runs.
        self.tokens_at_once = min(STEPS_AHEAD * step, cache.num_gpu_blocks * cache.block_size // 4)
        self.lanes = Lanes(training_cap(share, step))
        self._generate = watch(client, self.lanes)
        self._generating = KeyLimit(max(1, client.vllm_config.lora_config.max_loras // 2))
        self._lora_ids: OrderedDict[str, int] = OrderedDict()
        self._next_lora_id = itertools.count(FIRST_LORA_ID)
        self._next_request = itertools.count()
        self._calibration = asyncio.Lock()

    @classmethod
    async def attach(cls, client: Any, share: float) -> VllmEngine:
        """Attaches the workers' extension.

        Args:
            client: vLLM's ``EngineClient``.
            share: of a step's tokens that training may take while there is other traffic; 1 treats all alike, and less
                needs vLLM's priority scheduling.

        """
        descriptions = await client.collective_rpc("zoact_attach")
        _count_as_one(client.output_processor.lora_states)
        return cls(client, json.loads(descriptions[0]), share)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self._encoder.encode(text, add_special_tokens=special))

    def render_chat(self, messages: list[dict[str, str]], opened: bool) -> str:
        return str(self._encoder.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False))

    async def calibrate(
        self, rows: Sequence[CalibrationRow], layout: Layout, spec: BasisSpec
    ) -> tuple[dict[str, Basis], int]:
        # One calibration at a time: a worker listens for one.
        async with self._calibration:
            prompts = self._calibration_ids(rows)
            await self._call("zoact_calibration_begin", _layout(layout), spec.model_dump_json(), prompts)
            try:
                await self._calibrate_rows(prompts, rows)
                for _ in range(1, spec.passes):
                    prompts = self._calibration_ids(rows)
                    await self._call("zoact_calibration_next", prompts)
                    await self._calibrate_rows(prompts, rows)
            except BaseException:
                await self._call("zoact_calibration_end", True)
                raise
            result = await self._call("zoact_calibration_end", False)
        if isinstance(result, str):
            raise ValueError(result)
        vectors, (energy, seen) = load(result[0]), json.loads(result[1])
        return {name: Basis(vectors[name].numpy(), energy[name]) for name in energy}, seen

    def _calibration_ids(self, rows: Sequence[CalibrationRow]) -> list[tuple[int, int]]:
        """A new LoRA id for each row, with its prompt's length."""
        return [(next(self._next_lora_id), row.prompt) for row in rows]

    async def _calibrate_rows(self, prompts: Sequence[tuple[int, int]], rows: Sequence[CalibrationRow]) -> None:
        parameters = SamplingParams(max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        loras = [LoRARequest(f"{CALIBRATION_PATH}{i}", i, f"{CALIBRATION_PATH}{i}") for i, _ in prompts]
        await together(*(self._request(row.tokens, parameters, lora) for row, lora in zip(rows, loras, strict=True)))

    async def put(
        self,
        key: str,
        layout: Layout,
        distribution: Distribution,
        basis: dict[str, NDArray[np.float32]],
    ) -> None:
        tensors = save({name: torch.from_numpy(vectors) for name, vectors in basis.items()})
        await self._call("zoact_put", key, _layout(layout), distribution, tensors)

    async def hold(
        self,
        key: str,
        version: int,
        base: int | NDArray[np.float32] | None,
        update: Update | None,
        keep: Collection[int],
    ) -> str:
        start = save({"flat": torch.from_numpy(base)}) if isinstance(base, np.ndarray) else base
        content = None if update is None else json.dumps(update.to_json())
        digests = await self._call_all("zoact_hold", key, version, start, content, list(keep))
        # A worker that is in a call takes no step: between two of them vLLM goes on.
        while None in digests:
            digests = await self._call_all("zoact_hold_on", key)
        if len(set(digests)) != 1:
            raise RuntimeError(f"vLLM's workers disagree on version {version} of {key}: {digests}")
        return str(digests[0])

    async def read(self, key: str, version: int) -> NDArray[np.float32]:
        return load(await self._call("zoact_read", key, version))["flat"].numpy()

    async def drop(self, key: str) -> None:
        await self._call("zoact_drop", key)

    async def score(self, point: Point | None, contexts: Sequence[Context]) -> list[ContextScore]:
        lora = self.lora_request(point)
        if self._packing is None:
            return await together(*(self._score(lora, context) for context in contexts))
        packs = self._packing.pack(contexts, min(self._pack_tokens, self.lanes.most or self._pack_tokens))
        scores = await together(*(self._score_pack(lora, pack) for pack in packs))
        return [score for of_pack in scores for score in of_pack]

    async def _score(self, lora: LoRARequest | None, context: Context) -> ContextScore:
        inner = context.tokens[context.start :]
        options = {"prompt_logprobs": 0} if inner else {}
        parameters = _scoring(logprob_token_ids=list(context.candidates), **options)
        output: Any = await self._request(context.tokens, parameters, lora)
        # Lists by position of log-probabilities by token; vLLM leaves them out where none were asked for.
        after: Any = output.outputs[0].logprobs
        before: Any = output.prompt_logprobs
        return ContextScore(
            tuple(before[i][token].logprob for i, token in enumerate(inner, context.start)),
            tuple(after[0][token].logprob for token in context.candidates),
        )

    async def _score_pack(self, lora: LoRARequest | None, pack: Pack) -> list[ContextScore]:
        answers = range(pack.answers)
        parameters = _scoring(
            logprob_token_ids=list(answers), extra_args={SCORED_ROWS: pack.rows}, skip_reading_prefix_cache=True
        )
        output: Any = await self._request(pack.tokens, parameters, lora, self._salt)
        found: Any = output.outputs[0].logprobs
        return pack.scores([found[0][answer].logprob for answer in answers])

    async def generate(
        self,
        point: Point | None,
        tokens: Tokens,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        stop: Sequence[str],
    ) -> GeneratedText:
        # Text is made here from all tokens, as the reference engine does: vLLM, which streams, holds back a character
        # that is cut off at the end. It looks for stop strings in the text that it makes itself.
        parameters = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=list(stop),
            detokenize=bool(stop),
            # Every token is a sign that the request is not stuck.
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        async with AsyncExitStack() as stack:
            if point is not None:
                # It holds its LoRA's slot for as long as it runs, and vLLM takes no slot away.
                await stack.enter_async_context(self._generating.use(point.name))
            completion = (await self._request(tokens, parameters, self.lora_request(point))).outputs[0]
        text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return GeneratedText.cut(tuple(completion.token_ids), text, completion.finish_reason == "stop", stop)

    async def slots(self) -> Slots:
        return Slots(*await self._call("zoact_slot_use"))

    async def _request(
        self, tokens: Sequence[int], parameters: SamplingParams, lora: LoRARequest | None, salt: str | None = None
    ) -> RequestOutput:
        """The last output of a request that goes behind those that vLLM's own routes make.

        ``salt`` keeps what it leaves in the prefix cache to those that have the same.
        """
        prompt = TokensPrompt(prompt_token_ids=list(tokens))
        if salt is not None:
            prompt["cache_salt"] = salt

        async def ask(turn: Turn) -> RequestOutput:
            name = f"{PREFIX}{next(self._next_request)}"
            outputs = self._generate(prompt, parameters, name, lora_request=lora, priority=turn.priority)
            async for output in outputs:
                self.lanes.answered(turn)
                last = output
            return last

        return await self.lanes.background(len(tokens), ask)

    def lora_request(self, point: Point | None) -> LoRARequest | None:
        """A request's LoRA. Name and path say all that its weights depend on, so nothing cached can be stale."""
        if point is None:
            return None
        number = self._lora_ids.pop(point.name, None) or next(self._next_lora_id)
        self._lora_ids[point.name] = number
        if len(self._lora_ids) > LORA_IDS_KEPT:
            self._lora_ids.popitem(last=False)
        return LoRARequest(point.name, number, point_path(point))

    async def _call(self, method: str, *args: Any) -> Any:
        """Calls every worker and returns the first one's answer, which stands for all."""
        return (await self._call_all(method, *args))[0]

    async def _call_all(self, method: str, *args: Any) -> list[Any]:
        """Calls every worker and returns their answers. Raises NoRoom if one had none, RuntimeError if one failed."""
        answers = await self._client.collective_rpc("zoact_call", args=(method, args))
        failures = sorted({tuple(failure) for _, failure in answers if failure is not None})
        if failures and all(kind == NoRoom.__name__ for kind, _ in failures):
            raise NoRoom(failures[0][1])
        if failures:
            said = ", ".join(f"{kind}: {message}" for kind, message in failures)
            raise RuntimeError(f"{method} failed in vLLM's workers: {said}")
        return [answer for answer, _ in answers]


def _scoring(**options: Any) -> SamplingParams:
    """What asks for log-probabilities and no text."""
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        # These parameters are one request's alone; vLLM's deep copy of them costs as much as scheduling it.
        skip_clone=True,
        **options,
    )


def _layout(layout: Layout) -> str:
    return json.dumps([[site.name for site in layout.sites], layout.rank])


def _count_as_one(states: Any) -> None:
    """Counts all of our LoRAs under one name in vLLM's metrics.

    vLLM labels a gauge with the names of the LoRAs that run, and keeps every combination that ever was. Each probe has
    a name of its own, so a server that trains would grow without end. There is no door for this, so the one instance
    that keeps the names is told ours differently.
    """
    count = states._request_update

    def update(request: str, lora: str | None, *args: Any, **options: Any) -> None:
        count(request, METRICS_NAME if lora is not None and lora.startswith("zoact") else lora, *args, **options)

    states._request_update = update
