"""A LoRA from elsewhere as an adapter: a PEFT directory in a tar archive, as ``server_ext.export`` makes them.

A LoRA adds ``s B A x`` to a layer; an adapter here adds ``C V' x``, with one orthonormal V for all layers that read one
input. So the different A's of an input are stacked and decomposed, ``[A_1' A_2' ...] = Q [R_1 R_2 ...]``, V is Q, and a
layer's C is ``s B R_i'``. The rank is that of the widest stack; where an input needs less, V is completed by further
orthonormal columns, whose coefficients are zero. All of it is computed in float64, and V and C are rounded to float32
once: what a layer adds, ``s B A``, changes by at most ``2^-24 (1 + sqrt(rank)) s |B| |A|`` (Frobenius norms).

An input whose A's are one and orthonormal already keeps it as V, bit for bit, and with a scaling of 1 its B's as C: an
export comes back as what was exported.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, RawIOBase
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from server_ext.basis import random_test_matrix
from server_ext.coefficients import LARGEST_COEFFICIENT
from server_ext.errors import invalid
from zoact_remote.errors import InvalidValue
from zoact_remote.exports import ABOUT, CONFIG, TENSORS, half_name, half_shapes
from zoact_remote.layout import Layout, Site
from zoact_remote.tensors import TensorFile

Flat = NDArray[np.float32]

BLOCK = 512
"""Bytes of a block of a tar archive."""
FLOAT_BYTES = 4
ROOM_BY_TENSOR = 256
"""Bytes beside its name, which may stand in the configuration too, by which a tensor is described."""
LARGEST_JSON = 1 << 20
"""Bytes of a JSON file."""
LONGEST_HEAD = 4 * LARGEST_JSON
"""Bytes that describe tensors, which are read as one piece of JSON."""
ROOM = 3 * LARGEST_JSON
"""Bytes of an archive that are no tensor's."""
ORTHONORMAL = 1e-5
"""The most by which V'V may be off the identity: orthonormal columns that were rounded to float32 stay far below."""
LARGEST_RANK = 1 << 16
LARGEST_ALPHA = 1e9
COMPLETION_SEED = 0
INERT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
        "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
        "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
"""Members of a configuration that are read here, or make no difference to what saved matrices compute. Any other one
that is set asks for something that an adapter here cannot do."""
CHANGE_THE_MODEL = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that take something away from the model's own weights, beginnings of their names."""


@dataclass(frozen=True)
class Imported:
    """What an adapter begins with.

    Attributes:
        layout: where it acts.
        basis: float32 ``[in_features, rank]`` by input.
        flat: its coefficients, float32 ``[layout.size]``.

    """

    layout: Layout
    basis: dict[str, Flat]
    flat: Flat


def largest_archive(sites: Iterable[Site], max_rank: int) -> int:
    """Bytes that a float32 LoRA of all sites takes at most, as an export has it: a basis for every site."""
    shapes = half_shapes(sites, max_rank)
    numbers = sum(rows * columns for rows, columns in shapes.values())
    return FLOAT_BYTES * numbers + sum(ROOM_BY_TENSOR + 2 * len(name) for name in shapes) + ROOM


def read_lora(archive: BufferedIOBase, sites: Sequence[Site], max_rank: int, model_digest: str) -> Imported:
    """Reads a LoRA.

    Args:
        archive: ``adapter_config.json`` and ``adapter_model.safetensors`` in an uncompressed tar archive, seekable. If
            there is a ``zoact.json``, it must be of this model.
        sites: the model's.
        max_rank: the most that the adapter's rank may come to.
        model_digest: of the model.

    Raises:
        ApiError: it cannot be taken (400); the message says what of it.

    """
    files = {name: BufferedReader(_Member(archive, place)) for name, place in _places(archive).items()}
    for name in (CONFIG, TENSORS):
        if name not in files:
            raise invalid(name, f"is missing: an import is a tar archive of {CONFIG} and {TENSORS}")
    rank, scaling = _rank_and_scaling(_json_object(CONFIG, files[CONFIG]))
    if ABOUT in files:
        model = _json_object(ABOUT, files[ABOUT]).get("model_digest")
        if model != model_digest:
            raise invalid(f"{ABOUT}: model_digest", f"is {model}, another model's; this one's is {model_digest}")
    try:
        halves = _halves(TensorFile(files[TENSORS], TENSORS, LONGEST_HEAD), sites, rank)
    except InvalidValue as error:
        raise invalid(error.param, error.message) from None
    return _fold(halves, scaling, max_rank)


def _places(archive: BufferedIOBase) -> dict[str, range]:
    """Where the regular files of a tar archive lie in it, by name; members of any other kind are passed over.

    Read here and not by ``tarfile``, which follows what an archive says of links, holes and further headers.
    """
    end = archive.seek(0, os.SEEK_END)
    found: dict[str, range] = {}
    at = archive.seek(0)
    while header := archive.read(BLOCK).rstrip(b"\0"):
        digits = header[124:136].strip(b" \0")
        if header[257:262] != b"ustar" or not digits or digits.strip(b"01234567"):
            raise invalid("body", "must be an uncompressed tar archive")
        place = range(at + BLOCK, at + BLOCK + int(digits, 8))
        if place.stop > end:
            raise invalid("body", "the tar archive was cut off")
        if header[156:157] in (b"0", b"\0"):
            found[header[:100].split(b"\0")[0].decode("utf-8", "replace").removeprefix("./")] = place
        at = archive.seek(place.start + -(-len(place) // BLOCK) * BLOCK)
    return found


class _Member(RawIOBase):
    """A part of a file, to be read as a file."""

    def __init__(self, file: BufferedIOBase, place: range) -> None:
        self._file = file
        self._place = place
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._place)}
        self._at = starts[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = self._place[self._at : self._at + len(buffer)]
        self._file.seek(left.start)
        read = self._file.readinto(memoryview(buffer)[: len(left)])
        self._at += read
        return read


def _json_object(name: str, file: IO[bytes]) -> dict[str, Any]:
    content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise invalid(name, f"must be no longer than {LARGEST_JSON} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid(name, "must be a JSON object")
    return found


def _rank_and_scaling(config: Mapping[str, Any]) -> tuple[int, float]:
    """The rank of a LoRA's matrices, and what their product is multiplied by."""
    if config.get("peft_type") != "LORA":
        raise invalid(f"{CONFIG}: peft_type", f"must be LORA, is {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        raise invalid(f"{CONFIG}: bias", "must be none: an adapter has no biases")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_MODEL):
        raise invalid(
            f"{CONFIG}: init_lora_weights",
            f"{start} changes the model's own weights: save it with PEFT's path_initial_model_for_weight_conversion",
        )
    for name, value in config.items():
        if name not in INERT and value:
            raise invalid(f"{CONFIG}: {name}", "must not be set: an adapter cannot do what it stands for")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= LARGEST_RANK:
        raise invalid(f"{CONFIG}: r", f"must be a whole number from 1 to {LARGEST_RANK}, is {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= LARGEST_ALPHA:
        raise invalid(f"{CONFIG}: lora_alpha", f"must be a number above 0 and at most {LARGEST_ALPHA:g}, is {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _halves(file: TensorFile, sites: Sequence[Site], rank: int) -> dict[Site, tuple[Flat, Flat]]:
    """A ``[rank, in_features]`` and B ``[out_features, rank]`` of every site that a file has them for."""
    shapes = half_shapes(sites, rank)
    found: dict[str, Flat] = {}
    for name, entry in file.entries.items():
        if name not in shapes:
            raise invalid(f"{TENSORS}: {name}", "is no LoRA matrix of a layer that adapters of this model can act on")
        if entry.shape != shapes[name]:
            raise invalid(f"{TENSORS}: {name}", f"must have the shape {list(shapes[name])}, has {list(entry.shape)}")
        found[name] = file.read(name)
        if not np.isfinite(found[name]).all():
            raise invalid(f"{TENSORS}: {name}", "holds numbers that are not finite")
    if not found:
        raise invalid(TENSORS, "holds no tensors")
    pairs = {}
    for site in sites:
        a, b = half_name(site.name, "A"), half_name(site.name, "B")
        if (a in found) != (b in found):
            missing = b if a in found else a
            raise invalid(f"{TENSORS}: {missing}", "is missing beside the layer's other matrix")
        if a in found:
            pairs[site] = (found[a], found[b])
    return pairs


def _fold(halves: Mapping[Site, tuple[Flat, Flat]], scaling: float, max_rank: int) -> Imported:
    """Basis and coefficients."""
    stacks: dict[str, dict[bytes, Flat]] = {}
    for site, (a, _) in halves.items():
        stacks.setdefault(site.input, {})[a.tobytes()] = a
    ranks = {name: min(sum(map(len, stack.values())), _width(stack)) for name, stack in stacks.items()}
    rank = max(ranks.values())
    narrowest = min(map(_width, stacks.values()))
    if rank > min(max_rank, narrowest):
        widest = max(ranks, key=lambda name: ranks[name])
        limit = f"max_rank ({max_rank})" if rank > max_rank else f"the width of the narrowest input ({narrowest})"
        raise invalid(
            f"{CONFIG}: r",
            f"the layers that read the input of {widest} have {len(stacks[widest])} different A's, which take a basis "
            f"of rank {rank}, beyond {limit}",
        )
    layout = Layout(tuple(halves), rank)
    basis, mixes = {}, {}
    for number, (name, stack) in enumerate(stacks.items()):
        vectors, mixes[name] = _orthonormal(stack)
        basis[name] = _completed(vectors, rank, number)
    flat = np.zeros(layout.size, np.float32)
    for site, matrix in zip(layout.sites, layout.matrices(flat).values(), strict=True):
        a, b = halves[site]
        mix = mixes[site.input][a.tobytes()]
        coefficients = scaling * b.astype(np.float64)
        if mix is not None:
            coefficients = coefficients @ mix.T
        # Not negated: a coefficient that is no number is too large as well.
        if not np.abs(coefficients).max() <= LARGEST_COEFFICIENT:
            raise invalid(
                f"{TENSORS}: {half_name(site.name, 'B')}",
                f"makes coefficients of up to {np.abs(coefficients).max():.3g}, beyond the limit of "
                f"{LARGEST_COEFFICIENT:g}",
            )
        matrix[:, : coefficients.shape[1]] = coefficients
    return Imported(layout, basis, flat)


def _width(stack: Mapping[bytes, Flat]) -> int:
    return next(iter(stack.values())).shape[1]


def _orthonormal(stack: Mapping[bytes, Flat]) -> tuple[Flat, dict[bytes, NDArray[np.float64] | None]]:
    """The different A's of one input as orthonormal vectors ``[in_features, k]``, and R_i ``[k, r]`` of each of them.

    None stands for the identity, where the only A is orthonormal as it is.
    """
    stacked = np.concatenate([a.T for a in stack.values()], axis=1).astype(np.float64)
    width, columns = stacked.shape
    if len(stack) == 1 and columns <= width and np.abs(stacked.T @ stacked - np.eye(columns)).max() <= ORTHONORMAL:
        return stacked.astype(np.float32), dict.fromkeys(stack)
    vectors, mix = np.linalg.qr(stacked)
    parts = np.split(mix, np.cumsum([len(a) for a in stack.values()])[:-1], axis=1)
    return vectors.astype(np.float32), dict(zip(stack, parts, strict=True))


def _completed(vectors: Flat, rank: int, number: int) -> Flat:
    """Orthonormal vectors with further ones behind them, the same for the same number of the input."""
    width, found = vectors.shape
    if found == rank:
        return vectors
    more = random_test_matrix(width, rank - found, COMPLETION_SEED, number)
    return np.hstack([vectors, np.linalg.qr(np.hstack([vectors, more]))[0][:, found:].astype(np.float32)])
