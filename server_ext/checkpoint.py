"""The digest of the checkpoint that an engine has read, wherever it lies."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from zoact_remote.model_digest import CONFIG, model_digest


def checkpoint_digest(model: str, revision: str | None = None, download_dir: str | None = None) -> str:
    """Digest of a checkpoint, see :func:`model_digest`.

    Args:
        model: a directory, or a name on the hub, whose files are local by now.
        revision: of a name on the hub; None for its main branch.
        download_dir: where vLLM keeps a name's weights, and nothing else; None for the hub's own cache, where the
            configuration lies in any case.

    Raises:
        FileNotFoundError: the files are not there.

    """
    if Path(model).is_dir():
        return model_digest(model)
    from huggingface_hub import snapshot_download

    # Ignoring every file asks where they are, and not whether all of them are there: engines fetch what they need.
    snapshot = partial(snapshot_download, model, revision=revision, local_files_only=True, ignore_patterns="*")
    return model_digest(snapshot(cache_dir=download_dir), Path(snapshot(), CONFIG))
