"""A real model, small enough to be made on the spot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CORPUS = (
    "Please send my money back, the parcel never came. It was terrible.",
    "I cannot sign in since the update; the password is not accepted. It was bad.",
    "What a joy to watch, a great film with a fine cast. It was great.",
    "The second half was dull and slow, a waste of time. It was good until then.",
    "user: What is the capital of France?\nassistant: Paris is the capital of France.",
)


def make_tiny_model(directory: Path) -> Path:
    """A checkpoint of a random two-layer Llama of 0.1 million parameters, with a byte-level BPE tokeniser.

    Its weights are large enough that perturbations matter; grouped-query attention and tied embeddings make it as
    awkward as the models that people serve.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Transformers leaves these untyped.
    new_network: Any = LlamaForCausalLM
    new_tokenizer: Any = PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(20260701)
        new_network(config).to(torch.float32).save_pretrained(directory)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Prompts begin with <s> and completions do not, which the server must keep apart.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    new_tokenizer(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(directory)
    return directory
