"""Two tenants on one vLLM: every route of it, and every form of a model name, with each other's keys and with none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from server_ext.openai_routes import OPEN, TEXT
from tests.server_ext.support import Figures
from tests.support import CALL_TIMEOUT_S, KEY, Server
from zoact_remote import Basis, Client, Update

pytestmark = pytest.mark.vllm

MESSAGES = [{"role": "user", "content": "What a joy"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "What a joy", "max_tokens": 3, "temperature": 0},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3, "temperature": 0},
    "/v1/chat/completions/batch": {"messages": [MESSAGES], "max_tokens": 3, "temperature": 0},
    "/v1/responses": {"input": "What a joy", "max_output_tokens": 3, "temperature": 0},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3, "temperature": 0},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/generative_scoring": {"query": "It was", "items": ["bad", "good"], "label_token_ids": [40, 41]},
    "/tokenize": {"prompt": "What a joy"},
    "/detokenize": {"tokens": [40, 41]},
}
ELSEWHERE = ("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/pooling", "/inference/v1/generate", "/x")
"""Paths beside those that the server describes."""
FORMS = ("", "@0", "@1", "@7", "@1+17*0.01", "@1-17*0.01", "@7+17*0.01")
MALFORMED = ("@", "@x", "+17*0.01", "@1+17", "@1+17*2", "@1+17*0")


@dataclass(frozen=True)
class House:
    """A server with the tenants ``acme`` and ``umbra``, each of which has a tuned adapter and a new one."""

    url: str
    keys: dict[str, str]

    def ask(self, method: str, path: str, who: str | None, body: Any = None) -> requests.Response:
        headers = {} if who is None else {"authorization": f"Bearer {self.keys.get(who, who)}"}
        return requests.request(method, f"{self.url}{path}", json=body, headers=headers, timeout=CALL_TIMEOUT_S)

    def models(self, who: str) -> list[dict[str, Any]]:
        cards: list[dict[str, Any]] = self.ask("GET", "/v1/models", who).json()["data"]
        return cards


@pytest.fixture(scope="module")
def house(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    server = Server(tiny_model, "vllm", tmp_path_factory.mktemp("tenants"), KEY).start()
    try:
        house = House(server.url, {"operator": KEY})
        for tenant in ("acme", "umbra"):
            added = house.ask("POST", "/zoact/v1/tenants", "operator", {"name": tenant})
            house.keys[tenant] = added.json()["key"]
            with Client(server.url, api_key=house.keys[tenant]) as client:
                client.create_adapter(f"{tenant}/new")
                adapter = client.create_adapter(f"{tenant}/tuned", rank=3, basis=Basis(source="random"))
                adapter.calibrate([])
                for version in range(2):
                    adapter.update(Update(version, ((version, 0.3),)))
        yield house
    finally:
        server.kill()


@pytest.fixture(scope="module")
def operations(house: House) -> list[tuple[str, str]]:
    """Method and path of everything that vLLM serves."""
    paths = house.ask("GET", "/openapi.json", None).json()["paths"]
    found = [(method.upper(), re.sub("{.*?}", "x", path)) for path, methods in paths.items() for method in methods]
    assert len(found) > len(TEXT)
    return [*found, *((method, path) for path in ELSEWHERE for method in ("GET", "POST"))]


def test_nobody_without_a_key_gets_anywhere(house: House, operations: list[tuple[str, str]]) -> None:
    for method, path in operations:
        if path in OPEN or path.startswith("/zoact/v1/health/"):
            continue
        for who in (None, "wrong"):
            answer = house.ask(method, path, who, {})
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_tenants_get_to_the_routes_of_text_alone(house: House, operations: list[tuple[str, str]]) -> None:
    for method, path in operations:
        if path in OPEN or path in TEXT or path.startswith(("/zoact/", "/v1/models")):
            continue
        answer = house.ask(method, path, "acme", {})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "operator_only"), (method, path)
    assert house.ask("GET", "/metrics", "operator").ok


@pytest.mark.parametrize("path", BODIES)
def test_every_route_of_text_takes_names(house: House, path: str) -> None:
    base = house.models("operator")[0]["id"]
    for who in ("acme", "operator"):
        for name, served in (
            (base, base),
            ("acme/tuned", "acme/tuned@2"),
            ("acme/tuned@1-17*1e-2", "acme/tuned@1-17*0.01"),
        ):
            answer = house.ask("POST", path, who, {"model": name, **BODIES[path]})
            assert answer.ok, answer.text
            assert answer.json().get("model", served) == served


def test_the_point_is_the_one_that_is_named(house: House) -> None:
    with Client(house.url, api_key=house.keys["acme"]) as client:
        adapter = client.adapter("acme/tuned")
        seen = set()
        for version in range(3):
            answer = house.ask(
                "POST",
                "/v1/completions",
                "acme",
                {
                    "model": f"acme/tuned@{version}",
                    "prompt": [0, 40, 41, 42],
                    "max_tokens": 1,
                    "temperature": 0,
                    "echo": True,
                    "logprobs": 0,
                },
            )
            logprobs = answer.json()["choices"][0]["logprobs"]["token_logprobs"][3:4]
            scores = adapter.scores([{"prompt": [0, 40, 41], "completion": [42]}], version=version)
            assert logprobs == pytest.approx(scores.rows[0].logprobs, abs=1e-4)
            seen.add(round(logprobs[0], 3))
        assert len(seen) == 3


@pytest.mark.parametrize("path", BODIES)
def test_what_is_anothers_is_said_not_to_be_there_in_the_same_words(house: House, path: str) -> None:
    for form in FORMS:
        answers = []
        for name in ("umbra/tuned", "umbra/new", "umbra/none", "nobody/none"):
            answer = house.ask("POST", path, "acme", {"model": name + form, **BODIES[path]})
            answers.append((answer.status_code, answer.text.replace(name, "NAME")))
        assert answers == [answers[0]] * len(answers)
        assert answers[0][0] == 404


def test_one_model_by_name(house: House) -> None:
    for form in ("", "@1", "@1+17*0.5"):
        card = house.ask("GET", f"/v1/models/acme/tuned{form}", "acme").json()
        assert (card["id"], card["root"]) == (f"acme/tuned{form}", f"acme/tuned{form or '@2'}")
        answers = []
        for name in ("umbra/tuned", "umbra/none"):
            answer = house.ask("GET", f"/v1/models/{name}{form}", "acme")
            answers.append((answer.status_code, answer.json()["error"]["message"].replace(name, "NAME")))
        assert answers[0] == answers[1]
        assert answers[0][0] == 404
    base = house.models("acme")[0]["id"]
    assert house.ask("GET", f"/v1/models/{base}", "acme").json()["id"] == base


def test_malformed_names_and_versions_that_never_were(house: House) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        for form in MALFORMED:
            answers = [
                house.ask("POST", path, "acme", {"model": name + form, **BODIES[path]})
                for name in ("acme/tuned", "umbra/tuned", "acme/none")
            ]
            assert {answer.status_code for answer in answers} == {400}
            assert [answer.json()["error"]["param"] for answer in answers] == ["model"] * 3
        answer = house.ask("POST", path, "acme", {"model": "acme/tuned@3", **BODIES[path]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_everybody_sees_their_own_models(house: House) -> None:
    base = house.models("operator")[0]
    cards = {who: house.models(who) for who in house.keys}
    assert [card["id"] for card in cards["acme"]] == [base["id"], "acme/tuned"]
    assert [card["id"] for card in cards["umbra"]] == [base["id"], "umbra/tuned"]
    assert [card["id"] for card in cards["operator"]] == [base["id"], "acme/tuned", "umbra/tuned"]
    tuned = cards["acme"][1]
    assert tuned.keys() == base.keys()
    assert (tuned["parent"], tuned["root"]) == (base["id"], "acme/tuned@2")


def test_responses_are_not_stored_for_tenants(house: House) -> None:
    for member, value in (("background", True), ("previous_response_id", "resp_1")):
        body = {"model": "acme/tuned", **BODIES["/v1/responses"], member: value}
        answer = house.ask("POST", "/v1/responses", "acme", body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, member)


def test_limits_hold_on_vllms_routes(house: House) -> None:
    limits = {"requests_per_minute": 2, "max_request_bytes": 1000}
    added = house.ask("POST", "/zoact/v1/tenants", "operator", {"name": "small", "limits": limits})
    key = added.json()["key"]
    body = {"model": house.models("operator")[0]["id"], **BODIES["/v1/completions"]}
    assert house.ask("POST", "/v1/completions", key, {**body, "prompt": 1000 * "x"}).status_code == 413
    assert house.ask("POST", "/v1/completions", key, body).ok
    assert house.ask("POST", "/v1/completions", key, body).status_code == 429


def test_metrics_name_no_adapter_and_do_not_grow_with_names(house: House) -> None:
    def series() -> set[str]:
        text = house.ask("GET", "/metrics", "operator").text
        lines = {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
        # Gauges of the LoRAs that run come and go.
        return {line for line in lines if "lora_requests_info" not in line}

    def ask(seed: int) -> None:
        for form in ("", f"@1+{seed}*0.5"):
            assert house.ask(
                "POST", "/v1/completions", "acme", {"model": f"acme/tuned{form}", **BODIES["/v1/completions"]}
            ).ok
            house.ask("GET", f"/v1/models/acme/tuned{form}", "acme")

    ask(1)
    before = series()
    for seed in range(2, 8):
        ask(seed)
    assert series() == before
    lines = house.ask("GET", "/metrics", "operator").text.splitlines()
    assert not any("tuned" in line for line in lines)
    # Tenants stand in our own lines alone, under a label that is known to be theirs.
    for line in lines:
        if "acme" in line or "umbra" in line:
            assert re.match(r'zoact_\w+\{(.*,)?tenant="(acme|umbra)"', line)


def test_what_is_cached_of_the_base_model_is_each_tenants_own(house: House) -> None:
    base = house.models("operator")[0]["id"]

    def hits() -> float:
        return Figures.read(house.ask("GET", "/metrics", "operator").text)(
            "vllm:prefix_cache_hits_total", model_name=base, engine="0"
        )

    def complete(who: str, salt: str | None = None) -> requests.Response:
        body = {"model": base, "prompt": [0, *range(40, 239)], "max_tokens": 1, "cache_salt": salt}
        return house.ask("POST", "/v1/completions", who, body)

    def say(who: str) -> requests.Response:
        text = 40 * "What a joy to watch. "
        body = {"model": base, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        return house.ask("POST", "/v1/messages", who, body)

    def score(who: str) -> requests.Response:
        row = {"prompt": [0, *range(140, 339)], "completion": [40]}
        return house.ask("POST", f"/zoact/v1/adapters/{who}/tuned/scores", who, {"version": 0, "rows": [row]})

    def is_cached(ask: Callable[..., requests.Response], *arguments: Any) -> bool:
        before = hits()
        answer = ask(*arguments)
        assert answer.ok, answer.text
        return hits() > before

    for ask in (complete, say, score):
        for who in ("acme", "umbra"):
            assert [is_cached(ask, who) for _ in range(2)] == [False, True], (ask, who)
    for who in ("acme", "umbra"):
        assert [is_cached(complete, who, "salt") for _ in range(2)] == [False, True], who
    assert not is_cached(complete, "operator")
