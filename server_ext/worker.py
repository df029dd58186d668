"""The worker's side of vLLM: adapters in slots, and calibration inside vLLM's own forward passes.

Given to vLLM as ``--worker-extension-cls server_ext.extension.ZoActWorker``. Every method is called through
``collective_rpc`` and carries the prefix ``zoact_``, since vLLM mixes this class into its own worker.

A probe is a LoRA to vLLM: A = V', B = C + epsilon Z. vLLM loads a LoRA when it schedules the first request that names
it, and lets the least recently used one go. We leave that as it is and answer one question only, where the weights come
from (``_load_adapter``), so that probes need no registration, take part in preemption, and come back by themselves if
they were evicted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest

from server_ext.basis import RangeFinder, make_finders
from server_ext.cpu_kernels import use_grouped_kernels
from server_ext.gpu.platform import wanted as gpu_kernels_wanted
from server_ext.inputs import make_sites
from server_ext.logs import log
from server_ext.room import UNMEASURED_PASSES, NoRoom
from server_ext.schemas import BasisSpec
from server_ext.store import AdapterStore, Point
from zoact_remote.layout import Layout, Site
from zoact_remote.noise import Distribution
from zoact_remote.wire import Update

POINT_PATH = "zoact-point:"
CALIBRATION_PATH = "zoact-calibration:"


def split_columns(dtype: torch.dtype) -> bool:
    """Whether a probe gets columns of its own beside the coefficients' in slots of this dtype.

    In 16 bits, C + epsilon Z rounds most of a small epsilon away (one unit of bfloat16 near 0.06 is 2.4e-4). Apart, C
    rounds alike on both sides, and epsilon Z, for epsilon a power of two, does not round at all. It takes twice the
    rank.
    """
    return dtype != torch.float32


class ZoActWorker:
    """Mixed into vLLM's worker; ``model_runner`` and ``device`` are the worker's."""

    model_runner: Any
    device: torch.device
    zoact_slots: Any = None

    def zoact_attach(self) -> str:
        """Takes its place in the LoRA manager and describes the worker, as JSON."""
        loras = self.model_runner.lora_manager
        self.zoact_manager = loras._adapter_manager
        # Measured, unless the size of the key-value cache was given.
        passes = getattr(self, "peak_activation_memory", UNMEASURED_PASSES)
        self.zoact_store = AdapterStore(self.device, passes)
        self.zoact_dtype = loras.lora_config.lora_dtype
        self.zoact_misses = 0
        stock_load = loras._load_adapter

        def load_adapter(request: LoRARequest) -> LoRAModel:
            if request.lora_path.startswith(POINT_PATH):
                self.zoact_misses += 1
                point = Point(**json.loads(request.lora_path.removeprefix(POINT_PATH)))
                return self.zoact_lora(request.lora_int_id, point)
            if request.lora_path.startswith(CALIBRATION_PATH):
                return self.zoact_zero_lora(request.lora_int_id)
            return stock_load(request)

        # vLLM has no door for LoRA weights that are not files, so this instance's loader learns of two more sources.
        loras._load_adapter = load_adapter
        packing = None
        if self.device.type == "cpu":
            use_grouped_kernels(self.zoact_manager.punica_wrapper_mapping.values())
        elif gpu_kernels_wanted():
            # Triton is not on every machine.
            from server_ext.gpu.attach import attach_scores, attach_slots

            self.zoact_slots = attach_slots(loras, self.model_runner.get_model(), self._zoact_parts)
            packing = attach_scores(self.model_runner)
        layers = [
            (name, layer.base_layer.input_size, out)
            for module, layer in self.zoact_manager.modules.items()
            for name, out in zip(self._zoact_parts(module), _output_sizes(layer), strict=True)
        ]
        self.zoact_sites = make_sites(layers)
        return json.dumps(
            {
                "sites": [site.to_json() for site in self.zoact_sites],
                "max_rank": loras.lora_config.max_lora_rank // (2 if split_columns(self.zoact_dtype) else 1),
                "packing": packing,
            }
        )

    def zoact_call(self, method: str, args: Sequence[Any]) -> tuple[Any, tuple[str, str] | None]:
        """Another method's answer, or what it failed with: the exception's class and its message.

        A failure is an answer too: where vLLM's executor meets an exception it leaves the other workers' answers
        unread, and takes them for those to the next call.
        """
        try:
            return getattr(self, method)(*args), None
        except Exception as error:
            if not isinstance(error, NoRoom):
                log.exception("worker failed", method=method)
            return None, (type(error).__name__, str(error))

    def _zoact_parts(self, module: str) -> list[str]:
        """The checkpoint's names of the layers that a module of vLLM holds: q, k and v of qkv_proj."""
        return self.zoact_manager.packed_modules.get(module, [module])

    def zoact_put(self, key: str, layout: str, distribution: Distribution, basis: bytes) -> None:
        """Takes in an adapter."""
        self.zoact_store.put(key, self._zoact_layout(layout), distribution, load(basis))

    def zoact_hold(
        self, key: str, version: int, base: int | bytes | None, update: str | None, keep: list[int]
    ) -> str | None:
        """Takes in a version, as ``AdapterState.hold`` says."""
        start = load(base)["flat"] if isinstance(base, bytes) else base
        content = None if update is None else Update.from_json(json.loads(update))
        return self.zoact_store[key].hold(version, start, content, keep)

    def zoact_hold_on(self, key: str) -> str | None:
        """Goes on with it."""
        return self.zoact_store[key].hold_on()

    def zoact_read(self, key: str, version: int) -> bytes:
        """The coefficients of a version."""
        return save({"flat": self.zoact_store[key][version].flat.cpu()})

    def zoact_drop(self, key: str) -> None:
        """Forgets an adapter."""
        self.zoact_store.drop(key)

    def zoact_slot_use(self) -> tuple[int, int, int]:
        """The fields of ``Slots``."""
        slots = self.zoact_manager.lora_index_to_id
        return len(slots), sum(number is not None for number in slots), self.zoact_misses

    def zoact_lora(self, number: int, point: Point) -> LoRAModel:
        """A point as the LoRA that vLLM's slots take."""
        state = self.zoact_store[point.key]
        coefficients = state[point.version]
        if self.zoact_slots is not None:
            from server_ext.gpu.attach import PointLora

            return PointLora(number, partial(self._zoact_write, point, self.zoact_slots), self.device)
        dtype = self.zoact_dtype
        if split_columns(dtype) and point.epsilon:
            flats = [coefficients.flat, coefficients.noise.draw(point.seed, point.epsilon)]
        else:
            flats = [coefficients.at(point.seed, point.epsilon)]
        parts = [state.layout.matrices(flat) for flat in flats]
        lora_a = {name: vectors.T.repeat(len(parts), 1).to(dtype) for name, vectors in state.basis.items()}
        rank = state.layout.rank * len(parts)
        layers = {}
        for site in state.layout.sites:
            lora_b = torch.cat([part[site.name].to(dtype) for part in parts], dim=1)
            layers[site.name] = LoRALayerWeights(site.name, rank, rank, lora_a[site.input], lora_b)
        return LoRAModel(number, rank, layers)

    def _zoact_write(self, point: Point, slots: Any, slot: int) -> None:
        """Fills a slot with a point."""
        state = self.zoact_store[point.key]
        slots.write(slot, state, state[point.version].flat, point.seed, point.epsilon)

    # Calibration. Each row runs as a request of its own under a LoRA of its own, all zeros, so that the token-to-LoRA
    # mapping that vLLM keeps for its kernels says of every token in a mixed batch which row it belongs to, if any.

    def zoact_zero_lora(self, number: int) -> LoRAModel:
        """A LoRA that changes nothing: vLLM wants weights for one layer at least."""
        if self.zoact_slots is not None:
            from server_ext.gpu.attach import PointLora

            return PointLora(number, self.zoact_slots.clear, self.device)
        site, dtype = self.zoact_sites[0], self.zoact_dtype
        lora_a, lora_b = torch.zeros(1, site.in_features, dtype=dtype), torch.zeros(site.out_features, 1, dtype=dtype)
        return LoRAModel(number, 1, {site.name: LoRALayerWeights(site.name, 1, 1, lora_a, lora_b)})

    def zoact_calibration_begin(self, layout: str, spec: str, rows: list[tuple[int, int]]) -> None:
        """Starts listening. ``rows``: LoRA id and prompt length of each row to come."""
        layout_, spec_ = self._zoact_layout(layout), BasisSpec.model_validate_json(spec)
        self.zoact_calibration = Calibration(
            self.model_runner.get_model(),
            self.zoact_manager,
            self._zoact_readers(layout_),
            make_finders(layout_, spec_, self.device),
            dict(rows),
        )

    def zoact_calibration_next(self, rows: list[tuple[int, int]]) -> None:
        """Ends a pass and begins the next one, whose rows have LoRA ids of their own."""
        for finder in self.zoact_calibration.finders.values():
            finder.next_pass()
        self.zoact_calibration.prompts = dict(rows)

    def zoact_calibration_end(self, give_up: bool) -> tuple[bytes, str] | str:
        """Stops listening. The bases and, as JSON, their energies and the positions seen; or what went wrong."""
        calibration = self.zoact_calibration
        calibration.stop()
        del self.zoact_calibration
        if give_up:
            return "given up"
        try:
            bases = {name: finder.basis() for name, finder in calibration.finders.items()}
        except ValueError as error:
            return str(error)
        seen = sum(m.count for m in next(iter(calibration.finders.values())).moments.values())
        energy = {name: basis.energy for name, basis in bases.items()}
        return save({n: torch.from_numpy(b.vectors) for n, b in bases.items()}), json.dumps([energy, seen])

    def _zoact_layout(self, layout: str) -> Layout:
        names, rank = json.loads(layout)
        by_name: dict[str, Site] = {site.name: site for site in self.zoact_sites}
        return Layout(tuple(by_name[name] for name in names), rank)

    def _zoact_readers(self, layout: Layout) -> dict[str, torch.nn.Module]:
        """For every input of a layout, a module that reads it."""
        holders = {n: layer for m, layer in self.zoact_manager.modules.items() for n in self._zoact_parts(m)}
        return {site.input: holders[site.name] for site in reversed(layout.sites)}


class Calibration:
    """Listens to forward passes of the model and feeds the range finders with the calibration rows' activations."""

    def __init__(
        self,
        model: torch.nn.Module,
        manager: Any,
        readers: dict[str, torch.nn.Module],
        finders: dict[str, RangeFinder],
        prompts: dict[int, int],
    ) -> None:
        self.finders = finders
        self.prompts = prompts
        self._manager = manager
        self._masks: tuple[torch.Tensor, torch.Tensor] | None = None
        self._handles = [model.register_forward_pre_hook(self._before_model, with_kwargs=True)]
        for name, reader in readers.items():
            self._handles.append(reader.register_forward_pre_hook(partial(self._before_layer, finders[name])))
        # Compiled code and the graphs inside it do not call hooks, so while we listen the model runs as plain Python.
        self._compiled: list[Any] = [m for m in model.modules() if getattr(m, "do_not_compile", True) is False]
        for module in self._compiled:
            module.do_not_compile = True

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._compiled:
            module.do_not_compile = False

    def _before_model(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Marks, for the batch to come, the calibration rows' tokens: those of the prompt and those that are scored."""
        wrapper = next(iter(self._manager.punica_wrapper_mapping.values()))
        slots = wrapper.token_lora_indices
        by_slot = [self.prompts.get(number, -1) for number in self._manager.lora_index_to_id]
        # Slot -1 means no LoRA: the appended last entry.
        prompts = torch.tensor([*by_slot, -1], device=slots.device)[slots]
        if not bool((prompts >= 0).any()):
            self._masks = None
            return
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        positions = (positions[0] if positions.ndim == 2 else positions)[: len(slots)]
        self._masks = (positions < prompts, (prompts >= 0) & (positions >= prompts - 1))

    def _before_layer(self, finder: RangeFinder, layer: Any, args: Any) -> None:
        if self._masks is None:
            return
        activations = args[0]
        if getattr(layer.base_layer, "input_is_parallel", False):
            # Every tensor-parallel rank has columns of its own; all ranks come by here for the same batches.
            activations = tensor_model_parallel_all_gather(activations.contiguous())
        finder.add(activations.reshape(-1, finder.width)[: len(self._masks[0])], *self._masks)


def _output_sizes(layer: Any) -> Sequence[int]:
    """Unsharded output widths of the layers that a LoRA layer of vLLM holds."""
    base = layer.base_layer
    if hasattr(base, "total_num_kv_heads"):
        keys = base.total_num_kv_heads * base.head_size
        values = base.total_num_kv_heads * getattr(base, "v_head_size", base.head_size)
        return base.total_num_heads * base.head_size, keys, values
    return getattr(base, "output_sizes", None) or [base.output_size]


def point_path(point: Point) -> str:
    """The LoRA path by which a worker knows a point."""
    return POINT_PATH + json.dumps(asdict(point))
