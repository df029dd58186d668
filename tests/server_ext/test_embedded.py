"""The extension in a user's own vLLM command, beside a plug-in, flags and LoRAs of theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.loras import lora_directory, random_halves
from tests.server_ext.test_plugin import FLAGS
from tests.support import CALL_TIMEOUT_S, ROWS, Process, trained_adapter
from zoact_remote import Adapter, Client
from zoact_remote.cli.local_server import free_port
from zoact_remote.layout import Site

pytestmark = pytest.mark.vllm

KEY = "the key that they gave vLLM"
PLUGIN = """
import os, pathlib

def register():
    pathlib.Path(os.environ["THEIR_FILE"]).touch()
"""
ENTRY_POINTS = "[vllm.general_plugins]\ntheirs = their_plugin:register\n"
DOWN = Site(0, "model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", 128, 64)


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("embedded")
    (directory / "their_plugin.py").write_text(PLUGIN)
    about = directory / "their_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    stock = lora_directory(directory / "lora", random_halves([DOWN], 4), lora_alpha=40)
    port = free_port()
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model), "--port", str(port)]
    arguments += [part for name, values in FLAGS.items() for part in (name, *values)]
    arguments += ["--host", "127.0.0.1", "--served-model-name", "theirs", "--api-key", KEY, "--max-num-seqs", "16"]
    arguments += ["--lora-modules", f"stock={stock}", "--no-enable-prefix-caching"]
    environment = {
        "VLLM_PLUGINS": "theirs,zoact",
        "ZOACT_STATE": str(directory / "state"),
        "THEIR_FILE": str(directory / "loaded"),
        "PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]),
    }
    process = Process(arguments, port, directory / "vllm.log", environment, "/zoact/v1/health/ready")
    assert (directory / "loaded").exists()
    yield process.url
    process.kill()


@pytest.fixture(scope="module")
def adapter(url: str) -> Iterator[Adapter]:
    with Client(url, KEY, timeout=CALL_TIMEOUT_S, retries=0) as client:
        yield trained_adapter(client, updates=2, size=0.3)


def test_adapters_are_trained_and_scored(adapter: Adapter) -> None:
    losses = {round(adapter.scores(ROWS, version=version).loss, 3) for version in range(3)}
    assert len(losses) == 3


def test_all_models_are_there_by_name(url: str, adapter: Adapter) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as models:
        assert {"theirs", "stock", adapter.name} <= {model.id for model in models.models.list()}
        texts = {
            name: models.completions.create(model=name, prompt=[0, 40, 41, 42], max_tokens=12, temperature=0)
            for name in ("theirs", "stock", adapter.name, f"{adapter.name}@0")
        }
    assert texts[f"{adapter.name}@0"].choices[0].text == texts["theirs"].choices[0].text
    assert len({answer.choices[0].text for answer in texts.values()}) == 3
    assert texts["theirs"].model == "theirs"


def test_a_vllm_that_everybody_reaches_wants_keys(tiny_model: Path, tmp_path: Path) -> None:
    """VLLM listens on all interfaces if it is not told where."""
    port = free_port()
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model), "--port", str(port)]
    arguments += [part for name, values in FLAGS.items() for part in (name, *values)]
    environment = {"VLLM_PLUGINS": "zoact", "ZOACT_STATE": str(tmp_path / "state")}
    with pytest.raises(RuntimeError, match=r"could read and change every adapter.*--host 127.0.0.1"):
        Process(arguments, port, tmp_path / "vllm.log", environment)
