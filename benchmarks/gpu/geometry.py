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
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32000, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""``tiny`` is there to try the benchmarks with."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = ("bfloat16", "fp8", "int4")
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
    # vLLM otherwise looks into the checkpoint for what is quantised.
    "modules_in_block_to_quantize": LINEAR,
}  # fmt: skip


def write(name: str, directory: Path, weights: str = "bfloat16") -> str:
    """Writes a geometry's config.json, for ``load_format="dummy"``, and returns the directory.

    A tokenizer of three words lies beside it, and weights of no tensor, since servers want both.

    Args:
        name: of the geometry.
        directory: where to write.
        weights: one of ``WEIGHTS``; ``fp8`` is said to vLLM by ``quantization="fp8"``, not here.

    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    directory.mkdir(parents=True, exist_ok=True)
    config = COMMON | GEOMETRIES[name] | ({"quantization_config": GPTQ} if weights == "int4" else {})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    words = {word: number for number, word in enumerate(("<unk>", "<s>", "</s>"))}
    Tokenizer(WordLevel(words, "<unk>")).save(str(directory / "tokenizer.json"))
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fast))
    return str(directory)


def write_weights(directory: str, dtype: str) -> None:
    """Puts random weights beside a geometry's config.json, the same ones every time: ``dummy`` differs by shard."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    new_network: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng():
        torch.manual_seed(20260701)
        network = new_network(AutoConfig.from_pretrained(directory), dtype=getattr(torch, dtype))
    network.save_pretrained(directory)


def linear_shapes(name: str) -> dict[str, tuple[int, int]]:
    """Output and input width of every linear layer of a geometry."""
    shape = GEOMETRIES[name]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layers = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return {
        f"model.layers.{block}.{layer}": widths
        for block in range(shape["num_hidden_layers"])
        for layer, widths in layers.items()
    }
