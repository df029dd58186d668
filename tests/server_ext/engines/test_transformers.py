"""The reference engine says what the model itself says, whatever model it is and whatever its files advise."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from server_ext.engines import transformers as engine_module
from server_ext.engines.transformers import TransformersEngine
from server_ext.rows import Context, ContextScore
from tests.server_ext.support import Reference

CLOSE = 2e-5
"""Float32 against float64, over logits of up to 30."""
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
BEHIND_THE_HEAD: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 32, "final_logit_softcapping": 5.0},
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.0625},
}
"""What models do to their logits, by kind of model."""


def checkpoint_of(kind: str, tiny_model: Path, directory: Path) -> Path:
    """A random model of some kind, with the tiny model's tokeniser."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES, **BEHIND_THE_HEAD[kind])
    with torch.random.fork_rng():
        torch.manual_seed(20260701)
        getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.float32).save_pretrained(directory)
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, directory)
    return directory


def with_advice(tiny_model: Path, directory: Path, **advice: Any) -> Path:
    """The tiny model, with advice on how to generate from it."""
    shutil.copytree(tiny_model, directory)
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1} | advice))
    return directory


def contexts() -> list[Context]:
    """Of all lengths, scored from their second token on, in part, or at their end alone."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (2, 7, 3, 30, 7, 12):
        tokens = tuple(torch.randint(2, 512, (length,), generator=generator).tolist())
        found += [Context(tokens, start, (5, 3, 400)) for start in {1, length // 2 + 1, length}]
    return found


def expected(reference: Reference, context: Context) -> ContextScore:
    with torch.inference_mode():
        table = reference.network(input_ids=torch.tensor([context.tokens])).logits[0].log_softmax(-1)
    inner = [float(table[i - 1, context.tokens[i]]) for i in range(context.start, len(context.tokens))]
    return ContextScore(tuple(inner), tuple(table[-1, list(context.candidates)].tolist()))


def check(found: Sequence[ContextScore], reference: Reference) -> None:
    for context, score in zip(contexts(), found, strict=True):
        wanted = expected(reference, context)
        assert score.tokens == pytest.approx(wanted.tokens, abs=CLOSE)
        assert score.candidates == pytest.approx(wanted.candidates, abs=CLOSE)


@pytest.mark.parametrize("kind", BEHIND_THE_HEAD)
def test_scores_are_of_the_logits_that_the_model_makes(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    directory = checkpoint_of(kind, tiny_model, tmp_path)
    check(asyncio.run(TransformersEngine(str(directory)).score(None, contexts())), Reference(directory))


@pytest.mark.parametrize("at_once", [1, 7, 1024])
def test_only_scored_positions_meet_the_head_and_few_at_once(
    at_once: int, tiny_model: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SCORED_PER_BATCH", at_once)
    engine = TransformersEngine(str(tiny_model))
    met: list[int] = []
    head = engine.network.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: met.append(args[0][..., 0].numel()))
    check(asyncio.run(engine.score(None, contexts())), reference)
    counts = [len(context.tokens) - context.start + 1 for context in contexts()]
    assert sum(met) == sum(counts)
    assert max(met) <= max(at_once, *counts)


def writer(engine: TransformersEngine) -> Callable[..., tuple[int, ...]]:
    """Has an engine continue a prompt."""

    def write(prompt: Sequence[int], count: int, temperature: float = 0.0, seed: int | None = None) -> tuple[int, ...]:
        return asyncio.run(engine.generate(None, tuple(prompt), count, temperature, seed, ())).tokens

    return write


def test_texts_are_the_model_s_own_whatever_its_files_advise(
    tiny_model: Path, tmp_path: Path, reference: Reference
) -> None:
    advice = {"do_sample": True, "repetition_penalty": 1.5, "temperature": 0.7, "top_p": 0.2, "top_k": 2}
    advised = writer(TransformersEngine(str(with_advice(tiny_model, tmp_path / "advised", **advice))))
    plain = writer(TransformersEngine(str(tiny_model)))
    for first in range(2, 12):
        prompt = [0, first, first + 7]
        assert list(advised(prompt, 12)) == reference.greedy(prompt, 12)
        assert advised(prompt, 4, 1.0, seed=first) == plain(prompt, 4, 1.0, seed=first)


def test_texts_end_where_the_files_say(tiny_model: Path, tmp_path: Path, reference: Reference) -> None:
    prompt = [0, 5, 12]
    last = reference.greedy(prompt, 12)[3]
    engine = TransformersEngine(str(with_advice(tiny_model, tmp_path / "ending", eos_token_id=[1, last])))
    text = asyncio.run(engine.generate(None, tuple(prompt), 12, 0.0, None, ()))
    assert text.stopped
    assert text.tokens[-1] == last
    assert len(text.tokens) <= 4


def test_a_seed_is_for_its_own_text_alone(tiny_model: Path) -> None:
    write = writer(TransformersEngine(str(tiny_model)))
    with torch.random.fork_rng():
        seeded, unseeded = set(), set()
        for _ in range(4):
            seeded.add(write([0, 5], 8, 1.0, seed=7))
            unseeded.add(write([0, 5], 8, 1.0))
    assert len(seeded) == 1
    assert len(unseeded) == 4
