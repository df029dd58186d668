"""The digest that tells models apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.loras import random_halves
from zoact_remote.layout import Site
from zoact_remote.merge import merge
from zoact_remote.model_digest import SAMPLE, STRIDE, model_digest
from zoact_remote.tensors import Entry, TensorFile

SITES = (
    Site(0, "0.q_proj", "0.q_proj", 768, 768),
    Site(1, "0.o_proj", "0.o_proj", 512, 1536),
    Site(2, "0.up_proj", "0.up_proj", 96, 40),
    Site(3, "1.down_proj", "1.down_proj", 1000, 1100),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with tensors below, at and above a sample and a stride, whose place in the file no stride divides."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [
        {"a_norm": torch.ones(3), "0.bias": torch.randn(SAMPLE // 4), "0.none": torch.ones(0), "scale": torch.ones(())},
        {"packed": torch.zeros(STRIDE + 1, dtype=torch.uint8), "1.bias": torch.randn(SAMPLE // 4 + 1)},
    ]
    for site, dtype in zip(SITES, DTYPES, strict=True):
        weight = torch.randn(site.out_features, site.in_features).to(dtype)
        shards[int(site.name[0])][f"{site.name}.weight"] = weight
    index = {name: shard for shard, tensors in zip(SHARDS, shards, strict=True) for name in tensors}
    for shard, tensors in zip(SHARDS, shards, strict=True):
        save_file(tensors, directory / shard)
    (directory / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    (directory / "config.json").write_text("{}")
    return directory


def tensors_of(checkpoint: Path) -> list[tuple[str, Entry]]:
    """The tensors that are not empty, each with its shard."""
    found = []
    for shard in SHARDS:
        with (checkpoint / shard).open("rb") as file:
            found += [(shard, entry) for entry in TensorFile(file, shard).entries.values() if entry.stop > entry.start]
    return found


def digest_with(checkpoint: Path, shard: str, start: int, change: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> str:
    """The digest while some bytes of a shard, from one of them on, are others: what is added to each, mod 256."""
    content = np.memmap(checkpoint / shard, np.uint8, "r+")
    place = content[start : start + len(change)]
    before = place.copy()
    place += change
    try:
        return model_digest(checkpoint)
    finally:
        place[:] = before


def test_the_tensors_of_these_tests_are_sampled_and_not_read_in_full(checkpoint: Path) -> None:
    lengths = {entry.stop - entry.start for _, entry in tensors_of(checkpoint)}
    assert min(lengths) < SAMPLE
    assert {SAMPLE, SAMPLE + 4, STRIDE + 1} <= lengths
    assert max(lengths) > 2 * STRIDE


@given(st.data(), st.integers(0, 2**32 - 1), st.sampled_from((1.0, 0.1, 0.01)))
def test_another_tensor_has_another_digest(checkpoint: Path, data: st.DataObject, seed: int, share: float) -> None:
    """Also where a step is too small to change most of the numbers of a tensor, as steps in 16 bits are."""
    shard, entry = data.draw(st.sampled_from(tensors_of(checkpoint)))
    rng = np.random.default_rng(seed)
    length = entry.stop - entry.start
    change = rng.integers(1, 256, length, np.uint8) * (rng.random(length) < share)
    if length <= SAMPLE:
        # Of so few numbers not even one may change.
        change[rng.integers(length)] |= 1
    plain = model_digest(checkpoint)
    assert digest_with(checkpoint, shard, entry.start, change) != plain
    assert model_digest(checkpoint) == plain


@given(st.data())
def test_no_change_of_a_stride_goes_unseen(checkpoint: Path, data: st.DataObject) -> None:
    shard, entry = data.draw(st.sampled_from(tensors_of(checkpoint)))
    length = min(STRIDE, entry.stop - entry.start)
    start = data.draw(st.integers(entry.start, entry.stop - length))
    change = np.full(length, data.draw(st.integers(1, 255)), np.uint8)
    assert digest_with(checkpoint, shard, start, change) != model_digest(checkpoint)


def test_the_ends_of_every_tensor_are_seen(checkpoint: Path) -> None:
    """The last rows are where embeddings of new tokens are."""
    plain, flip = model_digest(checkpoint), np.ones(1, np.uint8)
    for shard, entry in tensors_of(checkpoint):
        for at in (entry.start, entry.stop - 1):
            assert digest_with(checkpoint, shard, at, flip) != plain


@settings(max_examples=20)
@given(st.sampled_from(SITES), st.integers(1, 4), st.integers(0, 99), st.integers(-10, 0))
def test_a_merged_checkpoint_has_another_digest(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, site: Site, rank: int, seed: int, exponent: int
) -> None:
    """For a LoRA of any one layer, down to one of 2^-16 of the weights, of which 16 bits show little."""
    halves = {name: (a, b * np.float32(2**exponent)) for name, (a, b) in random_halves([site], rank, seed).items()}
    merged = tmp_path_factory.mktemp("merged")
    merge(checkpoint, halves, merged)
    assert [path.stat().st_size for path in sorted(merged.iterdir())] == [
        path.stat().st_size for path in sorted(checkpoint.iterdir())
    ]
    assert model_digest(merged) != model_digest(checkpoint)
    shutil.rmtree(merged)


def test_the_same_files_elsewhere_have_the_same_digest(checkpoint: Path, tmp_path: Path) -> None:
    plain = model_digest(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    links = tmp_path / "links"
    links.mkdir()
    for path in checkpoint.iterdir():
        (links / path.name).symlink_to(path)
    assert model_digest(tmp_path / "copy") == model_digest(links) == plain
    # What is no part of the model, and weights in a format that is not read where there are safetensors.
    (links / "README.md").write_text("of a model")
    (links / "training_args.bin").write_bytes(b"arguments")
    assert model_digest(links) == plain
    (links / "config.json").unlink()
    assert model_digest(links, checkpoint / "config.json") == plain


def _edit_config(model: Path) -> None:
    (model / "config.json").write_bytes((model / "config.json").read_bytes() + b" ")


def _edit_header(model: Path) -> None:
    content = (model / SHARDS[0]).read_bytes()
    (model / SHARDS[0]).write_bytes(content.replace(b'"a_norm"', b'"b_norm"', 1))


def _rename_weights(model: Path) -> None:
    (model / SHARDS[0]).rename(model / "first.safetensors")


def _swap_weights(model: Path) -> None:
    (model / SHARDS[0]).rename(model / "other")
    (model / SHARDS[1]).rename(model / SHARDS[0])
    (model / "other").rename(model / SHARDS[1])


def _add_weights(model: Path) -> None:
    shutil.copy(model / SHARDS[0], model / "other.safetensors")


def _cut_off(model: Path) -> None:
    content = (model / SHARDS[1]).read_bytes()
    (model / SHARDS[1]).write_bytes(content[:-1])


@pytest.mark.parametrize("edit", [_edit_config, _edit_header, _rename_weights, _swap_weights, _add_weights, _cut_off])
def test_the_digest_notices(checkpoint: Path, tmp_path: Path, edit: Callable[[Path], None]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    edit(copy)
    assert model_digest(copy) != model_digest(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf", "damaged.safetensors"])
def test_other_formats_are_sampled_as_a_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    content = np.zeros(3 * STRIDE + 7, np.uint8)
    digests = set()
    for at in (None, 0, SAMPLE - 1, STRIDE, 2 * STRIDE + SAMPLE - 1, len(content) - SAMPLE, len(content) - 1):
        if at is not None:
            content[at] ^= 255
        content.tofile(tmp_path / name)
        digests.add(model_digest(tmp_path))
    assert len(digests) == 7


def test_the_scheme_stays_what_it_is_called(tmp_path: Path) -> None:
    """State directories, exports and other releases know models by it: whoever changes it gives it another name."""
    (tmp_path / "config.json").write_text("{}")
    header = b'{"a":{"dtype":"U8","shape":[2097155],"data_offsets":[0,2097155]}}'
    numbers = np.arange(2097155).astype(np.uint8).tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + numbers)
    assert model_digest(tmp_path) == "sha256:02b57adac0a8f25662cc0b6d1737add1ada9b6cc9eca44e2f5a5cba77fef6713"


@pytest.mark.parametrize("there", ["config.json", "model.safetensors"])
def test_a_directory_without_a_model_has_none(checkpoint: Path, tmp_path: Path, there: str) -> None:
    shutil.copy(checkpoint / SHARDS[0], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert model_digest(tmp_path)
    for name in {"config.json", "model.safetensors"} - {there}:
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError):
        model_digest(tmp_path)
