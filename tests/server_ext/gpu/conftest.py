"""Kernels run on a GPU where there is one, else in Triton's interpreter. Without Triton there is nothing to test."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

collect_ignore = [] if find_spec("triton") else ["test_slots.py", "test_lora.py", "test_updates.py"]

if not torch.cuda.is_available():
    # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
