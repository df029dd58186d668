"""Merged checkpoints: what is written, to the bit, and what is refused before anything is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.loras import random_halves
from tests.server_ext.support import Reference
from tests.support import ROWS, Server, Servers, trained_adapter
from zoact_remote import InvalidValue, merge
from zoact_remote.layout import Site
from zoact_remote.merge import INDEX, WEIGHTS

SITES = (Site(0, "a.q_proj", "a.q_proj", 24, 40), Site(1, "a.o_proj", "a.o_proj", 40, 8))
HALVES = random_halves(SITES, 3)
DTYPES = {"a.q_proj": torch.bfloat16, "a.o_proj": torch.float16, "b.q_proj": torch.float32}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two shards, with weights of every type, and files beside them."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    torch.manual_seed(0)
    shapes = {"a.q_proj": (40, 24), "a.o_proj": (8, 40), "b.q_proj": (40, 24)}
    weights = {f"{name}.weight": torch.randn(shape, dtype=DTYPES[name]) for name, shape in shapes.items()}
    others = {"a.norm": torch.randn(24), "a.q_proj.bias": torch.randn(40), "packed": torch.arange(9, dtype=torch.uint8)}
    shards = {
        "model-00001-of-00002.safetensors": {n: t for n, t in {**weights, **others}.items() if not n.startswith("b.")},
        "model-00002-of-00002.safetensors": {n: t for n, t in weights.items() if n.startswith("b.")},
    }
    for name, tensors in shards.items():
        save_file(tensors, directory / name, {"format": "pt"})
    index = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.model").write_bytes(b"\0\1")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    # Other copies of the weights, which would be those of before.
    (directory / "consolidated.safetensors").write_bytes(b"weights")
    (directory / "pytorch_model.bin").write_bytes(b"weights")
    (directory / "original").mkdir()
    return directory


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("model*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("block", [7, 1 << 22])
def test_weights_are_added_to_and_the_rest_is_copied(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("zoact_remote.merge.BLOCK", block)
    before, files = all_tensors(checkpoint), {path.name: path.stat() for path in checkpoint.iterdir()}
    made = tmp_path / "merged"
    merge.merge(checkpoint, HALVES, made)
    assert {path.name for path in made.iterdir()} == files.keys() - {
        "consolidated.safetensors", "pytorch_model.bin", "original",
    }  # fmt: skip
    for name in ("config.json", "tokenizer.model", "chat_template.jinja", INDEX):
        assert (made / name).read_bytes() == (checkpoint / name).read_bytes()
    found = all_tensors(made)
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert found[name].dtype == tensor.dtype
        layer = name.removesuffix(".weight")
        if layer not in HALVES or layer == name:
            assert torch.equal(found[name], tensor)
            continue
        half_a, half_b = (torch.from_numpy(half).double() for half in HALVES[layer])
        exact = tensor.double() + half_b @ half_a
        # Rounded once, from a float32 sum: within half a unit of the type, and a few of float32.
        unit = torch.finfo(tensor.dtype).eps * torch.exp2(torch.floor(torch.log2(exact.abs())))
        assert ((found[name].double() - exact).abs() <= unit / 2 + 2.0**-20).all()
        assert (found[name] != tensor).float().mean() > 0.5
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == {
        name: stat.st_mtime_ns for name, stat in files.items()
    }


def _without_a_layer(checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    del tensors["a.o_proj.weight"]
    save_file(tensors, shard)


def _of_another_shape(checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"a.o_proj.weight": torch.zeros(8, 41)}, shard)


def _quantised(checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"a.o_proj.weight": torch.zeros(8, 40, dtype=torch.int8)}, shard)


def _as_gptq(checkpoint: Path) -> None:
    """Without the weight that there would be in floating point."""
    _without_a_layer(checkpoint)
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')


def _as_fp8(checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"a.o_proj.weight": torch.zeros(8, 40, dtype=torch.float8_e4m3fn)}, shard)
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')


def _too_large(checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"a.o_proj.weight": torch.full((8, 40), 65504.0, dtype=torch.float16)}, shard)


def _cut_off(checkpoint: Path) -> None:
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def _leading_elsewhere(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model-00001-of-00002.safetensors", checkpoint.parent / "x.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a.q_proj.weight": "../x.safetensors"}}))


def _no_index(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text("[]")


def _no_weights(checkpoint: Path) -> None:
    (checkpoint / INDEX).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_layer, r"a\.o_proj\.weight: is not there"),
        (_of_another_shape, r"a\.o_proj\.weight: must be of the shape \[8, 40\].*is F32 \[8, 41\]"),
        (_quantised, r"a\.o_proj\.weight: must be .* is I8"),
        (_as_gptq, r"a\.o_proj\.weight: is quantised \(gptq\).*export without --merge"),
        (_as_fp8, r"a\.o_proj\.weight: is quantised \(fp8\).*serve the export as a LoRA"),
        (_too_large, r"a\.o_proj\.weight: holds numbers that are not finite in float16"),
        (_cut_off, r"model-00002-of-00002\.safetensors: b\.q_proj\.weight"),
        (_leading_elsewhere, r"'\.\./x\.safetensors', which is no safetensors file beside it"),
        (_no_index, "does not say which file"),
        (_no_weights, f"holds neither {WEIGHTS} nor {INDEX}"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    halves: Any = HALVES
    if damage is _too_large:
        halves = {**HALVES, "a.o_proj": (np.full((1, 40), 100, np.float32), np.ones((8, 1), np.float32))}
    damage(checkpoint)
    with pytest.raises(InvalidValue, match=message):
        merge.merge(checkpoint, halves, tmp_path / "merged")
    assert not list(tmp_path.glob("merged/*.safetensors*"))


def test_a_checkpoint_is_not_written_over(checkpoint: Path) -> None:
    with pytest.raises(InvalidValue, match="must not be the checkpoint itself"):
        merge.merge(checkpoint, HALVES, checkpoint / "original" / "..")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def served(
    request: pytest.FixtureRequest, servers: Servers, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A server, and the checkpoint that it serves."""
    if request.param == "float32":
        yield servers("transformers"), tiny_model
        return
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("bfloat16")
    checkpoint = directory / "model"
    shutil.copytree(tiny_model, checkpoint)
    network: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    (checkpoint / WEIGHTS).unlink()
    # In more files than one.
    network.save_pretrained(checkpoint, max_shard_size="100KB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    server = Server(checkpoint, "transformers", directory).start()
    yield server, checkpoint
    server.kill()


def test_transformers_loads_what_the_server_serves(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, checkpoint = served
    with server.client() as client:
        adapter = trained_adapter(client, updates=2, size=0.25, sites=["q_proj", "o_proj", "down_proj"])
        made = adapter.export_merged(tmp_path / "merged", checkpoint, version=1)
        scores = adapter.scores(ROWS, version=1)
        plain = adapter.scores(ROWS, version=0)
        about = json.loads((made / "zoact.json").read_text())
        assert (about["adapter"], about["version"]) == (adapter.name, 1)
        with pytest.raises(InvalidValue, match="is not the checkpoint of"):
            adapter.export_merged(tmp_path / "again", made)
        assert not (tmp_path / "again").exists()
    # The merged model in float64, tokeniser and all. Half a unit of bfloat16 in every weight is a part in 500 of it.
    merged = Reference(made)
    allowed = 1e-4 if len(list(checkpoint.glob("*.safetensors"))) == 1 else 0.05
    for row, score in zip(ROWS, scores.rows, strict=True):
        for found, expected, tokens in zip(merged.logprobs(row), score.logprobs, score.tokens, strict=True):
            assert found == pytest.approx(expected, abs=allowed * tokens)
    assert abs(scores.loss - plain.loss) > 2 * allowed, "the adapter must matter for this test"
