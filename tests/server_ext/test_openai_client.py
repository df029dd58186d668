"""OpenAI's own client, unchanged, against tuned models on real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import Server, new_name, trained_adapter
from zoact_remote import Adapter, Client, Side, Update

pytestmark = pytest.mark.vllm

PROMPT = "What a joy to watch. It was"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: Any = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def adapter(vllm_client: Client) -> Adapter:
    return trained_adapter(vllm_client, updates=2, size=0.3)


@pytest.fixture(scope="module")
def models(vllm_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{vllm_server.url}/v1", api_key="none", max_retries=0) as models:
        yield models


@pytest.mark.parametrize(
    ("form", "version", "probe"),
    [("", None, None), ("@1", 1, None), ("@1+17*0.5", 1, Side(17, 0.5)), ("@1-17*0.5", 1, Side(17, 0.5, -1))],
)
def test_completions(
    models: openai.OpenAI, adapter: Adapter, form: str, version: int | None, probe: Side | None
) -> None:
    model = adapter.name + form
    whole = models.completions.create(model=model, prompt=PROMPT, extra_body={"return_token_ids": True}, **GREEDY)
    assert whole.model == adapter.name + (form or "@2")
    expected = adapter.generate(PROMPT, version=version, probe=probe, max_tokens=GREEDY["max_tokens"])
    assert token_ids(whole) == expected.token_ids
    streamed = models.completions.create(model=model, prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    base = models.completions.create(model=base_model(models), prompt=PROMPT, **GREEDY)
    assert base.choices[0].text != whole.choices[0].text, "training must show for this test to say anything"


def test_chat(models: openai.OpenAI, adapter: Adapter) -> None:
    ask: Any = {"model": adapter.name, "messages": MESSAGES, **GREEDY}
    whole = models.chat.completions.create(extra_body={"return_token_ids": True}, **ask)
    assert whole.model == f"{adapter.name}@2"
    assert token_ids(whole) == adapter.generate(messages=MESSAGES, max_tokens=GREEDY["max_tokens"]).token_ids
    streamed = models.chat.completions.create(stream=True, **ask)
    chunks = [chunk for chunk in streamed if chunk.choices]
    assert {chunk.model for chunk in chunks} == {whole.model}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_an_imported_adapter_answers_with_its_coefficients_from_version_0_on(
    models: openai.OpenAI, vllm_client: Client, adapter: Adapter, tmp_path: Path
) -> None:
    imported = vllm_client.import_adapter(new_name(), adapter.export(tmp_path))

    def ask(model: str) -> str:
        text: str = models.completions.create(model=model, prompt=PROMPT, **GREEDY).choices[0].text
        return text

    tuned, base = ask(adapter.name), ask(base_model(models))
    assert ask(f"{imported.name}@0") == ask(imported.name) == tuned != base
    imported.update(Update(0, ((99, 0.5),)))
    assert ask(f"{imported.name}@0") == tuned != ask(imported.name)


def test_responses(models: openai.OpenAI, adapter: Adapter) -> None:
    def ask(model: str) -> str:
        response = models.responses.create(model=model, input="What a joy", max_output_tokens=12, temperature=0)
        assert response.model == {adapter.name: f"{adapter.name}@2"}.get(model, model)
        return response.output_text

    base = ask(base_model(models))
    assert ask(f"{adapter.name}@0") == base
    assert ask(f"{adapter.name}@2") == ask(adapter.name) != base


def test_models(models: openai.OpenAI, adapter: Adapter) -> None:
    listed = {model.id for model in models.models.list()}
    assert {base_model(models), adapter.name} <= listed
    for form in ("", "@1", "@1+17*0.5"):
        assert models.models.retrieve(adapter.name + form).id == adapter.name + form


def test_errors_are_those_of_the_client(models: openai.OpenAI, adapter: Adapter) -> None:
    def ask(model: str) -> None:
        models.completions.create(model=model, prompt=PROMPT, **GREEDY)

    for name in (new_name(), f"{adapter.name}@3", f"{adapter.name}@3+17*0.5"):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(name)
        assert missing.value.param == "model"
        with pytest.raises(openai.NotFoundError):
            models.models.retrieve(name)
    with pytest.raises(openai.BadRequestError) as malformed:
        ask(f"{adapter.name}@1+17")
    assert malformed.value.param == "model"


def base_model(models: openai.OpenAI) -> str:
    return next(iter(models.models.list())).id


def token_ids(answer: Any) -> tuple[int, ...]:
    """The tokens of an answer, which vLLM gives beside the text when asked to."""
    return tuple(answer.choices[0].model_extra["token_ids"])
