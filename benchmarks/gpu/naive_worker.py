"""The extension's worker with C + epsilon Z rounded into one group of columns, as a plain LoRA has it."""

from __future__ import annotations

from server_ext import worker


class NaiveWorker(worker.ZoActWorker):
    """Mixed into vLLM's worker."""


worker.split_columns = lambda dtype: False
