"""Models that have a geometry and no weights: enough to measure throughput."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(name: str, directory: Path) -> str:
    """Writes a geometry's config.json, for ``load_format="dummy"``, and returns the directory.

    A tokenizer of three words lies beside it, and weights of no tensor, since servers want both.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(COMMON | GEOMETRIES[name]))
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    words = {word: number for number, word in enumerate(("<unk>", "<s>", "</s>"))}
    Tokenizer(WordLevel(words, "<unk>")).save(str(directory / "tokenizer.json"))
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fast))
    return str(directory)
