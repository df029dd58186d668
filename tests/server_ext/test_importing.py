"""What an import makes of a LoRA, and what it refuses."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from server_ext.coefficients import LARGEST_COEFFICIENT
from server_ext.errors import ApiError
from server_ext.export import Exported, write_export
from server_ext.importing import LARGEST_JSON, Imported, largest_archive, read_lora
from server_ext.inputs import make_sites
from tests.loras import Halves, lora_archive, lora_files, random_halves
from zoact_remote.digest import coefficients_digest
from zoact_remote.exports import ABOUT, CONFIG, TENSORS, tar_of
from zoact_remote.layout import Layout, Site
from zoact_remote.tensors import encode

WIDTH, WIDE = 24, 40
LAYERS = {"q_proj": (WIDTH, 20), "k_proj": (WIDTH, 10), "v_proj": (WIDTH, 10), "o_proj": (20, WIDTH),
          "gate_proj": (WIDTH, WIDE), "up_proj": (WIDTH, WIDE), "down_proj": (WIDE, WIDTH)}  # fmt: skip
SITES = make_sites((f"model.layers.{i}.{name}", *shape) for i in range(2) for name, shape in LAYERS.items())
MODEL = "sha256:model"
MAX_RANK = 8


def taken(archive: bytes, max_rank: int = MAX_RANK) -> Imported:
    return read_lora(BytesIO(archive), SITES, max_rank, MODEL)


def written(exported: Exported, sites: Sequence[Site], dtype: str) -> bytes:
    file = BytesIO()
    write_export(exported, sites, dtype, file)
    return file.getvalue()


def served(found: Imported) -> dict[str, NDArray[np.float64]]:
    """C V' by layer."""
    matrices = found.layout.matrices(found.flat.astype(np.float64))
    return {
        site.name: matrices[site.name] @ found.basis[site.input].T.astype(np.float64) for site in found.layout.sites
    }


@settings(max_examples=60)
@given(
    chosen=st.sets(st.sampled_from(SITES), min_size=1),
    rank=st.integers(1, 6),
    shared=st.booleans(),
    rslora=st.booleans(),
    alpha=st.integers(1, 64) | st.floats(0.01, 64),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_layer_adds_what_the_lora_adds(
    chosen: set[Any], rank: int, shared: bool, rslora: bool, alpha: float, dtype: torch.dtype
) -> None:
    sites = [site for site in SITES if site in chosen]
    halves = {
        name: (torch.from_numpy(a).to(dtype).float().numpy(), torch.from_numpy(b).to(dtype).float().numpy())
        for name, (a, b) in random_halves(sites, rank).items()
    }
    if shared:
        first: dict[str, Any] = {}
        halves = {s.name: (first.setdefault(s.input, halves[s.name][0]), halves[s.name][1]) for s in sites}
    found = taken(lora_archive(halves, dtype=dtype, lora_alpha=alpha, use_rslora=rslora), max_rank=WIDTH)

    assert found.layout.sites == tuple(sites)
    stacks = {s.input: sum(t.input == s.input for t in sites) for s in sites}
    needed = {s.input: min(rank * (1 if shared else stacks[s.input]), s.in_features) for s in sites}
    assert found.layout.rank == max(needed.values())
    scaling = alpha / (np.sqrt(rank) if rslora else rank)
    for name, product in served(found).items():
        a, b = (matrix.astype(np.float64) for matrix in halves[name])
        bound = 2.0**-24 * (1 + np.sqrt(found.layout.rank)) * scaling * np.linalg.norm(a) * np.linalg.norm(b)
        # 2^-40 for float64's own rounding.
        assert np.linalg.norm(product - scaling * b @ a) <= bound * (1 + 2.0**-20) + 2.0**-40
    for vectors in found.basis.values():
        assert vectors.shape[1] == found.layout.rank
        gram = vectors.astype(np.float64).T @ vectors
        np.testing.assert_allclose(gram, np.eye(found.layout.rank), rtol=0, atol=1e-6)
    for start, stop in found.layout.gaps:
        assert not found.flat[start:stop].any()


@settings(max_examples=30)
@given(
    rank=st.integers(1, 6),
    patterns=st.none() | st.sets(st.sampled_from(list(LAYERS)), min_size=1),
    seed=st.integers(0, 99),
)
def test_an_export_comes_back_bit_for_bit(rank: int, patterns: set[str] | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sites = tuple(s for s in SITES if patterns is None or s.name.rpartition(".")[2] in patterns)
    layout = Layout(sites, rank)
    basis = {
        name: np.linalg.qr(rng.normal(size=(width, rank)))[0].astype(np.float32)
        for name, width in layout.inputs.items()
    }
    flat = np.zeros(layout.size, np.float32)
    for matrix in layout.matrices(flat).values():
        matrix[:] = rng.normal(size=matrix.shape)
        matrix[0] = -0.0
    digest = coefficients_digest(flat, layout)
    exported = Exported("acme/a", 3, digest, "a model", MODEL, layout, basis, flat)
    found = taken(written(exported, SITES, "float32"))
    assert found.layout == layout
    assert found.basis.keys() == basis.keys()
    assert all(found.basis[name].tobytes() == vectors.tobytes() for name, vectors in basis.items())
    assert coefficients_digest(found.flat, layout) == digest
    # One that was rounded is a LoRA like any other.
    rounded = taken(written(exported, SITES, "bfloat16"))
    assert rounded.layout == layout
    for name, product in served(rounded).items():
        np.testing.assert_allclose(product, served(found)[name], rtol=0, atol=0.2)


def test_an_archive_that_tar_makes_is_taken(tmp_path: Path) -> None:
    files = lora_files(random_halves(SITES[:3], 1))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("not needed")
    (tmp_path / "link").symlink_to(CONFIG)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "lora.tar", "w", format=form) as tar:
            for name in ("README.md", "link", *files):
                tar.add(tmp_path / name, arcname=f"./{name}")
        found = taken((tmp_path / "lora.tar").read_bytes())
        assert served(found).keys() == {site.name for site in SITES[:3]}


Q_LAYER, K_LAYER, V_LAYER, O_LAYER = (f"model.layers.0.{name}_proj" for name in "qkvo")
GOOD = random_halves([s for s in SITES if s.input in (Q_LAYER, O_LAYER)], 2)


def with_config(**config: Any) -> bytes:
    return lora_archive(GOOD, **config)


def with_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    files = lora_files(GOOD)
    return tar_of(files | {TENSORS: save(change(load(files[TENSORS])))})


def with_files(**files: bytes | None) -> bytes:
    return tar_of({n: c for n, c in {**lora_files(GOOD), **files}.items() if c is not None})


def tensor(name: str, half: str, change: Callable[[Any], Any]) -> bytes:
    full = f"base_model.model.{name}.lora_{half}.weight"
    return with_tensors(lambda tensors: tensors | {full: change(tensors[full])})


def holed(array: NDArray[np.float32], value: float) -> NDArray[np.float32]:
    array = array.copy()
    array[-1, 0] = value
    return array


BAD: list[tuple[bytes, str]] = [
    # What is no archive of these files.
    (b"", CONFIG),
    (b"not a tar archive", "body"),
    (tar_of(lora_files(GOOD))[:2000], "body"),
    (with_files(**{CONFIG: None}), CONFIG),
    (with_files(**{TENSORS: None}), TENSORS),
    (with_files(**{CONFIG: b"{"}), CONFIG),
    (with_files(**{CONFIG: b"[" * 100_000}), CONFIG),
    (with_files(**{CONFIG: b"[]"}), CONFIG),
    (with_files(**{TENSORS: lora_files(GOOD)[TENSORS][:-1]}), f"{TENSORS}: base_model.model.{V_LAYER}.lora_B.weight"),
    (with_files(**{TENSORS: b""}), TENSORS),
    (with_files(**{ABOUT: b'{"model_digest": "sha256:other"}'}), f"{ABOUT}: model_digest"),
    # Configurations.
    (with_config(peft_type="IA3"), f"{CONFIG}: peft_type"),
    (with_config(use_dora=True), f"{CONFIG}: use_dora"),
    (with_config(bias="all"), f"{CONFIG}: bias"),
    (with_config(bias=None), f"{CONFIG}: bias"),
    (with_config(lora_bias=True), f"{CONFIG}: lora_bias"),
    (with_config(modules_to_save=["lm_head"]), f"{CONFIG}: modules_to_save"),
    (with_config(rank_pattern={"q_proj": 4}), f"{CONFIG}: rank_pattern"),
    (with_config(alpha_pattern={"q_proj": 4}), f"{CONFIG}: alpha_pattern"),
    (with_config(fan_in_fan_out=True), f"{CONFIG}: fan_in_fan_out"),
    (with_config(layer_replication=[[0, 2]]), f"{CONFIG}: layer_replication"),
    (with_config(alora_invocation_tokens=[1]), f"{CONFIG}: alora_invocation_tokens"),
    (with_config(what_comes_next=True), f"{CONFIG}: what_comes_next"),
    (with_config(init_lora_weights="pissa_niter_16"), f"{CONFIG}: init_lora_weights"),
    *((with_config(r=r), f"{CONFIG}: r") for r in (0, -1, 2.0, "2", True, None, 10**400)),
    *((with_config(lora_alpha=a), f"{CONFIG}: lora_alpha") for a in (0, -1, "2", True, float("nan"), 1e300, 10**400)),
    # Tensors.
    (with_config(r=3), f"{TENSORS}: base_model.model.{K_LAYER}.lora_A.weight"),
    (tensor(Q_LAYER, "A", lambda a: a[:, 1:].copy()), f"{TENSORS}: base_model.model.{Q_LAYER}.lora_A.weight"),
    (tensor(Q_LAYER, "B", lambda b: b[1:].copy()), f"{TENSORS}: base_model.model.{Q_LAYER}.lora_B.weight"),
    (tensor(Q_LAYER, "B", lambda b: holed(b, np.nan)), f"{TENSORS}: base_model.model.{Q_LAYER}.lora_B.weight"),
    (tensor(O_LAYER, "A", lambda a: holed(a, np.inf)), f"{TENSORS}: base_model.model.{O_LAYER}.lora_A.weight"),
    (tensor(O_LAYER, "B", lambda b: holed(b, 1e30)), f"{TENSORS}: base_model.model.{O_LAYER}.lora_B.weight"),
    (tensor(Q_LAYER, "A", lambda a: a.astype(np.float64)), f"{TENSORS}: base_model.model.{Q_LAYER}.lora_A.weight"),
    (tensor(Q_LAYER, "A", lambda a: a.astype(np.int32)), f"{TENSORS}: base_model.model.{Q_LAYER}.lora_A.weight"),
    (with_tensors(lambda _: {}), TENSORS),
    (with_tensors(lambda t: t | {"lm_head.weight": np.zeros((2, 2), np.float32)}), f"{TENSORS}: lm_head.weight"),
    (
        with_tensors(lambda t: {name: t[name] for name in t if not name.endswith(f"{Q_LAYER}.lora_B.weight")}),
        f"{TENSORS}: base_model.model.{Q_LAYER}.lora_B.weight",
    ),
    (lora_archive({"layers.9.q_proj": GOOD[Q_LAYER]}), f"{TENSORS}: base_model.model.layers.9.q_proj.lora_A.weight"),
    # A basis that is too wide: for the limit, and for the narrowest input.
    (lora_archive(random_halves(SITES, 3)), f"{CONFIG}: r"),
]  # fmt: skip


@pytest.mark.parametrize(("archive", "param"), BAD)
def test_what_cannot_be_taken_is_refused_by_field(archive: bytes, param: str) -> None:
    assert taken(lora_archive(GOOD)).layout.rank == 6, "without the fault it would be taken"
    with pytest.raises(ApiError) as refused:
        taken(archive)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.message.startswith(param)


def test_a_basis_is_no_wider_than_the_narrowest_input() -> None:
    taken(lora_archive(random_halves(SITES, 6)), max_rank=20)
    with pytest.raises(ApiError, match=r"a basis of rank 21, beyond the width of the narrowest input \(20\)"):
        taken(lora_archive(random_halves(SITES, 7)), max_rank=512)


def test_coefficients_may_be_as_large_as_updates_make_them() -> None:
    identity = np.eye(2, WIDTH, dtype=np.float32)
    largest = np.full((20, 2), LARGEST_COEFFICIENT, np.float32)
    halves: Halves = {Q_LAYER: (identity, largest)}
    assert taken(lora_archive(halves)).flat.max() == LARGEST_COEFFICIENT
    with pytest.raises(ApiError, match="beyond the limit of 100"):
        taken(lora_archive(halves, lora_alpha=2.001))


@settings(max_examples=200)
@given(place=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_a_damaged_archive_is_refused_or_taken_but_nothing_else(place: int, bits: int) -> None:
    archive = bytearray(lora_archive(GOOD))
    archive[place % len(archive)] ^= bits
    with suppress(ApiError):
        assert np.abs(taken(bytes(archive)).flat).max() <= LARGEST_COEFFICIENT


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_export_rounds_to_nearest_even(dtype: str) -> None:
    layout = Layout(SITES[:1], 1)
    rng = np.random.default_rng(0)
    flat = np.zeros(layout.size, np.float32)
    (matrix,) = layout.matrices(flat).values()
    # Numbers half way between two of the type, on either side of it, and any.
    near = np.ldexp(1 + np.arange(10) * 2.0 ** -(9 if dtype == "bfloat16" else 12), -3)
    matrix[:, 0] = np.concatenate([near, rng.normal(size=len(matrix) - len(near))])
    basis = {SITES[0].input: np.eye(WIDTH, 1, dtype=np.float32)}
    exported = Exported("acme/a", 3, "", "a model", MODEL, layout, basis, flat)
    stored = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert encode(matrix, stored) in written(exported, SITES, dtype)
    if dtype == "float16":
        matrix[3] = 65520
        with pytest.raises(ApiError, match=r"dtype: coefficients of .* are too large for float16"):
            written(exported, SITES, dtype)


@given(chosen=st.sets(st.sampled_from(SITES), min_size=1), rank=st.integers(1, 10), name=st.text(max_size=300))
def test_no_export_is_longer_than_an_import_may_be(chosen: set[Any], rank: int, name: str) -> None:
    """Not even one of all sites, whose names all stand in its configuration."""
    layout = Layout(tuple(site for site in SITES if site in chosen), rank)
    basis = {name: np.zeros((width, rank), np.float32) for name, width in layout.inputs.items()}
    exported = Exported("a/b", 1, "sha256:0", name, MODEL, layout, basis, np.zeros(layout.size, np.float32))
    everywhere = [*SITES, *make_sites([("model.layers.9." + layer, 1, 1) for layer in LAYERS])]
    length = len(written(exported, everywhere, "float32"))
    room = largest_archive(layout.sites, rank)
    assert length <= room <= length + 4 * LARGEST_JSON


@pytest.mark.parametrize("file", [CONFIG, ABOUT])
def test_a_json_file_is_not_as_long_as_an_adapter(file: str) -> None:
    files = lora_files(random_halves(SITES[:1], 1))
    files.setdefault(file, json.dumps({"model_digest": MODEL}).encode())
    read_lora(BytesIO(tar_of(files)), SITES, MAX_RANK, MODEL)
    files[file] += b" " * LARGEST_JSON
    with pytest.raises(ApiError, match=f"{file}: must be no longer"):
        taken(tar_of(files))
