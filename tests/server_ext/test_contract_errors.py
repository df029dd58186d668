"""Calls at fault: each gets a 4xx in OpenAI's shape that names the field, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.support import KEY, ROWS, Server, new_adapter, trained_adapter
from zoact_remote import Adapter, AuthenticationError, BadRequest, Basis, Client, Update

TIMEOUT = (5, 60)
JSON = {"content-type": "application/json"}
ROW: dict[str, Any] = ROWS[0]
TERM = [1, 0.5]
PROBE = {"seed": 1, "epsilon": 0.1}


@pytest.fixture(scope="module")
def adapter(server: Server) -> Iterator[Adapter]:
    with server.client() as client:
        yield trained_adapter(client)


def losses(**changes: Any) -> dict[str, Any]:
    return {"probes": [PROBE], "rows": [ROW]} | changes


def update(**changes: Any) -> dict[str, Any]:
    return {"base_version": 1, "terms": [TERM]} | changes


def row(**changes: Any) -> dict[str, Any]:
    return losses(rows=[ROW, ROW | changes])


def completion(**changes: Any) -> dict[str, Any]:
    return losses(rows=[{"prompt": "It was", "completion": " good"} | changes])


def chat(*roles: str, content: str = "It was") -> dict[str, Any]:
    return losses(rows=[ROW, {"messages": [{"role": role, "content": content} for role in roles]}])


def normalised(**changes: Any) -> dict[str, Any]:
    return update(normaliser={"terms": [TERM], "offset": 0.0, "epsilon": 1e-8} | changes)


LONG = [5] * 256
TOO_MANY_PROBES, TOO_MANY_ROWS = losses(probes=[PROBE] * 257), losses(rows=[ROW] * 1025)
NAN, INF = float("nan"), float("inf")
BAD: list[tuple[str, Any, str | None]] = [
    # Probes.
    ("losses", losses(probes=[]), "probes"),
    ("losses", losses(probes=[PROBE, PROBE | {"epsilon": 0}]), "probes[1].epsilon"),
    ("losses", losses(probes=[PROBE | {"epsilon": -0.1}]), "probes[0].epsilon"),
    ("losses", losses(probes=[PROBE | {"epsilon": NAN}]), "probes[0].epsilon"),
    ("losses", losses(probes=[PROBE | {"epsilon": "small"}]), "probes[0].epsilon"),
    ("losses", losses(probes=[PROBE | {"seed": 2**64}]), "probes[0].seed"),
    ("losses", losses(probes=[PROBE | {"seed": -1}]), "probes[0].seed"),
    ("losses", losses(probes=[PROBE | {"seed": 1.5}]), "probes[0].seed"),
    ("losses", losses(probes=[PROBE | {"sides": "minus"}]), "probes[0].sides"),
    ("losses", losses(probes=[PROBE, PROBE | {"part": [2, 2]}]), "probes[1].part"),
    ("losses", losses(probes=[PROBE | {"part": [-1, 2]}]), "probes[0].part[0]"),
    ("losses", losses(probes=[PROBE | {"part": [0]}]), "probes[0].part[1]"),
    ("losses", losses(probes=[PROBE, PROBE | {"part": [1, 2]}]), "probes[1].part"),
    ("losses", TOO_MANY_PROBES, "probes"),
    ("losses", losses(version=-1), "version"),
    ("losses", losses(version=1.5), "version"),
    ("losses", losses(verison=1), "verison"),
    ("scores", {"rows": [ROW], "probe": PROBE | {"sign": 0}}, "probe.sign"),
    # Rows.
    ("losses", losses(rows=[]), "rows"),
    ("losses", {"probes": [PROBE]}, "rows"),
    ("losses", TOO_MANY_ROWS, "rows"),
    ("losses", losses(rows=ROW), "rows"),
    ("losses", losses(rows=["It was"]), "rows[0]"),
    ("losses", losses(rows=[{"prompt": "It was"}]), "rows[0].completion"),
    ("losses", row(prompt=None), "rows[1].prompt"),
    ("losses", row(prompt=[]), "rows[1].prompt"),
    ("losses", row(prompt=[1, 512]), "rows[1].prompt"),
    ("losses", row(prompt=[-1]), "rows[1].prompt"),
    ("losses", row(prompt=[1.5]), "rows[1].prompt"),
    ("losses", row(prompt=LONG), "rows[1].prompt"),
    ("losses", row(prompt="It was \ud800"), "rows[1].prompt"),
    ("losses", row(answer=2), "rows[1].answer"),
    ("losses", row(answer=-1), "rows[1].answer"),
    ("losses", row(answer="great"), "rows[1].answer"),
    ("losses", row(choices=[" good"]), "rows[1].choices"),
    ("losses", row(choices=[" good", ""]), "rows[1].choices[1]"),
    ("losses", row(choices=[" good", [2, 700]]), "rows[1].choices[1]"),
    ("losses", row(choices=[[i] for i in range(129)]), "rows[1].choices"),
    ("losses", row(weight=2), "rows[1].weight"),
    ("losses", completion(completion=""), "rows[0].completion"),
    ("losses", completion(completion=[]), "rows[0].completion"),
    ("losses", completion(completion=[2**70]), "rows[0].completion"),
    ("losses", completion(label=" good"), "rows[0].label"),
    ("scores", {"rows": [ROW | {"prompt": LONG}]}, "rows[0].prompt"),
    ("losses", chat("user", "assistant", "user"), "rows[1].messages"),
    ("losses", chat("assistant"), "rows[1].messages"),
    ("losses", chat("wizard", "assistant"), "rows[1].messages"),
    ("losses", chat("user", "assistant", content="It was \ud800"), "rows[1].messages[0].content"),
    ("losses", losses(rows=[{"messages": [{"role": "user"}, {"role": "assistant"}]}]), "rows[0].messages[0].content"),
    ("losses", losses(rows=[ROW | {"messages": []}]), "rows[0].messages"),
    # Updates, alone and carried.
    ("updates", update(terms=[TERM, [2**64, 0.1]]), "terms[1][0]"),
    ("updates", update(terms=[[1, NAN]]), "terms[0][1]"),
    ("updates", update(terms=[[1, INF]]), "terms[0][1]"),
    ("updates", update(terms=[[1, 1e31]]), "terms[0][1]"),
    ("updates", update(terms=[[1]]), "terms[0][1]"),
    ("updates", update(terms=[TERM] * 4097), "terms"),
    ("updates", update(decay=1.5), "decay"),
    ("updates", update(decay=-0.1), "decay"),
    ("updates", update(decay=NAN), "decay"),
    ("updates", update(key=""), "key"),
    ("updates", update(momentum=0.9), "momentum"),
    ("updates", {"terms": [TERM]}, "base_version"),
    ("updates", normalised(epsilon=0), "normaliser.epsilon"),
    ("updates", normalised(epsilon=1e-60), "normaliser.epsilon"),
    ("updates", normalised(offset=-1), "normaliser.offset"),
    ("updates", normalised(terms=[TERM, [2, -0.5]]), "normaliser.terms[1][1]"),
    ("losses", losses(update=update(terms=[[1, NAN]])), "update.terms[0][1]"),
    ("losses", losses(update=update(), version=1), "version"),
    # Generation.
    ("generate", {}, "prompt"),
    ("generate", {"prompt": "It", "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
    ("generate", {"prompt": []}, "prompt"),
    ("generate", {"prompt": [512]}, "prompt"),
    ("generate", {"prompt": LONG, "max_tokens": 1}, "max_tokens"),
    ("generate", {"prompt": LONG}, "max_tokens"),
    ("generate", {"prompt": "It", "max_tokens": 0}, "max_tokens"),
    ("generate", {"prompt": "It", "temperature": -1}, "temperature"),
    ("generate", {"prompt": "It", "stop": "\n"}, "stop"),
    ("generate", {"prompt": "It", "stop": ["."] * 17}, "stop"),
    ("generate", {"prompt": "It", "stop": [".", ""]}, "stop[1]"),
    ("generate", {"prompt": "It", "stop": ["." * 257]}, "stop[0]"),
    ("generate", {"prompt": "It", "stop": ["\ud800"]}, "stop[0]"),
    ("generate", {"messages": []}, "messages"),
    ("generate", {"messages": [{"role": "wizard", "content": "Hi"}]}, "messages"),
    ("generate", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("generate", {"messages": [{"role": "user", "content": "It was \ud800"}]}, "messages[0].content"),
]


@pytest.mark.parametrize(("call", "body", "param"), BAD, ids=[f"{i}-{c}-{p}" for i, (c, _, p) in enumerate(BAD)])
def test_a_bad_field_is_named(server: Server, adapter: Adapter, call: str, body: Any, param: str | None) -> None:
    before = adapter.refresh()
    # Not through requests' own encoder, which refuses NaN.
    url = f"{server.url}/zoact/v1/adapters/{adapter.name}/{call}"
    response = requests.post(url, json.dumps(body), headers=JSON, timeout=TIMEOUT)
    error = checked(response, 400)
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    too_long, too_many = LONG in _values(body), any(body is each for each in (TOO_MANY_PROBES, TOO_MANY_ROWS))
    expected = "context_length_exceeded" if too_long else "batch_too_large" if too_many else "invalid_value"
    assert error["code"] == expected
    assert adapter.refresh() == before


def _values(body: Any) -> list[Any]:
    """A body and all that is in it."""
    inner = body.values() if isinstance(body, dict) else body if isinstance(body, list) else ()
    return [body, *(value for part in inner for value in _values(part))]


def checked(response: requests.Response, status: int) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert body["request_id"] == response.headers["x-request-id"] != ""
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"name": "acme"}, "name"),
        ({"name": "acme/../etc"}, "name"),
        ({"name": "Acme/Triage"}, "name"),
        ({"rank": 0}, "rank"),
        ({"rank": 100}, "rank"),
        ({"rank": 10**6}, "rank"),
        ({"sites": []}, "sites"),
        ({"sites": ["lm_head"]}, "sites"),
        ({"sites": ["down_proj", "bogus"]}, "sites"),
        ({"noise": "uniform"}, "noise"),
        ({"basis": {"source": "gradients"}}, "basis.source"),
        ({"basis": {"passes": 3}}, "basis.passes"),
        ({"basis": {"seed": 2**64}}, "basis.seed"),
        ({"basis": {"digest": "sha256:0"}}, "basis.digest"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_adapter_is_not_made(server: Server, client: Client, changes: dict[str, Any], param: str) -> None:
    before = client.adapters()
    response = requests.post(f"{server.url}/zoact/v1/adapters", json={"name": "tests/bad"} | changes, timeout=TIMEOUT)
    error = checked(response, 400)
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert client.adapters() == before


@pytest.mark.parametrize(
    ("method", "call", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/basis", {"rows": [ROW]}),
        ("POST", "/losses", losses()),
        ("POST", "/scores", {"rows": [ROW]}),
        ("POST", "/updates", update()),
        ("POST", "/generate", {"prompt": "It"}),
        ("GET", "/journal", None),
        ("GET", "/export", None),
    ],
)
def test_an_unknown_adapter_is_not_found(server: Server, method: str, call: str, body: Any) -> None:
    url = f"{server.url}/zoact/v1/adapters/tests/nobody{call}"
    error = checked(requests.request(method, url, json=body, timeout=TIMEOUT), 404)
    assert (error["param"], error["code"]) == ("adapter", "adapter_not_found")


@pytest.mark.parametrize(
    ("method", "call", "body"),
    [
        ("POST", "/losses", losses(version=7)),
        ("POST", "/scores", {"rows": [ROW], "version": 2}),
        ("POST", "/generate", {"prompt": "It", "version": 2}),
        ("GET", "/export?version=2", None),
    ],
)
def test_an_unknown_version_is_not_found(server: Server, adapter: Adapter, method: str, call: str, body: Any) -> None:
    url = f"{server.url}/zoact/v1/adapters/{adapter.name}{call}"
    error = checked(requests.request(method, url, json=body, timeout=TIMEOUT), 404)
    assert (error["param"], error["code"]) == ("version", "version_not_found")


def test_nothing_is_evaluated_before_there_is_a_basis(server: Server, client: Client) -> None:
    fresh = client.create_adapter("tests/no-basis")
    url = f"{server.url}/zoact/v1/adapters/{fresh.name}"
    calls = [("losses", losses()), ("updates", update(base_version=0)), ("scores", {"rows": [ROW]})]
    for call, body in [*calls, ("generate", {"prompt": "It"})]:
        error = checked(requests.post(f"{url}/{call}", json=body, timeout=TIMEOUT), 409)
        assert error["code"] == "basis_missing"
    for call in ("journal", "export"):
        assert checked(requests.get(f"{url}/{call}", timeout=TIMEOUT), 409)["code"] == "basis_missing"
    error = checked(requests.post(f"{url}/basis", json={"rows": []}, timeout=TIMEOUT), 400)
    assert error["param"] == "rows"
    assert fresh.refresh().state == "new"
    fresh.delete()


def test_a_basis_is_taken_once(server: Server, client: Client) -> None:
    spec = Basis(positions="prompt")
    adapter = new_adapter(client, basis=spec, rows=ROWS)
    before = adapter.info
    url = f"{server.url}/zoact/v1/adapters/{adapter.name}/basis"
    error = checked(requests.post(url, json={"rows": ROWS[:1]}, timeout=TIMEOUT), 409)
    assert error["code"] == "basis_exists"
    assert adapter.refresh() == before


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"losses"', b"\xff\xfe"])
def test_a_body_that_is_no_object_is_refused(server: Server, adapter: Adapter, body: bytes) -> None:
    url = f"{server.url}/zoact/v1/adapters/{adapter.name}/losses"
    error = checked(requests.post(url, body, headers=JSON, timeout=TIMEOUT), 400)
    assert (error["param"], error["code"]) == (None, "invalid_value")


def test_bad_queries_are_named(server: Server, adapter: Adapter) -> None:
    url = f"{server.url}/zoact/v1/adapters/{adapter.name}"
    for query, param in [
        ("journal?after=-1", "after"),
        ("journal?limit=0", "limit"),
        ("journal?limit=x", "limit"),
        (f"journal?after={2**63}", "after"),
        ("export?dtype=int8", "dtype"),
        ("export?version=-1", "version"),
    ]:
        assert checked(requests.get(f"{url}/{query}", timeout=TIMEOUT), 400)["param"] == param


def test_a_callers_request_id_comes_back(server: Server) -> None:
    for path, status in (("info", 200), ("adapters/tests/nobody", 404)):
        url, headers = f"{server.url}/zoact/v1/{path}", {"x-request-id": "mine-1"}
        response = requests.get(url, headers=headers, timeout=TIMEOUT)
        assert (response.status_code, response.headers["x-request-id"]) == (status, "mine-1")
    cut = requests.get(f"{server.url}/zoact/v1/info", headers={"x-request-id": "m" * 127 + " ine"}, timeout=TIMEOUT)
    assert cut.headers["x-request-id"] == "m" * 127
    ids = {requests.get(f"{server.url}/zoact/v1/info", timeout=TIMEOUT).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


def test_coefficients_stay_bounded(client: Client) -> None:
    # Overflow in one tenant's adapter could reach the others through what vLLM caches.
    adapter = new_adapter(client)
    before = adapter.refresh().digest
    large = Update(0, ((1, 60.0), (2, 60.0)))
    with pytest.raises(BadRequest) as refused:
        adapter.update(large)
    assert refused.value.param == "terms"
    with pytest.raises(BadRequest) as refused:
        adapter.losses(ROWS, [], base=True, update=large)
    assert refused.value.param == "update.terms"
    assert (adapter.refresh().version, adapter.info.digest) == (0, before)
    # Steps that cancel do not add up: together these could come to 180.
    for version in range(6):
        adapter.update(Update(version, ((1, 30.0 if version % 2 == 0 else -30.0),)))
    assert adapter.refresh().version == 6


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "nothing", 404, "not_found"),
        ("GET", "adapters/acme", 404, "not_found"),
        ("PUT", "adapters/acme/a", 405, "method_not_allowed"),
    ],
)
def test_what_no_route_takes_is_refused_in_the_same_shape(
    server_with_key: Server, method: str, path: str, status: int, code: str
) -> None:
    """Of the server without vLLM, whose own answers these are otherwise."""
    answer = requests.request(method, f"{server_with_key.url}/zoact/v1/{path}", timeout=TIMEOUT)
    error = checked(answer, status)
    assert error["code"] == code
    assert f"{method} /zoact/v1/{path}" in error["message"]
    assert ("allow" in answer.headers) == (status == 405)


def test_a_server_with_a_key_wants_it(server_with_key: Server) -> None:
    url = server_with_key.url
    for authorization in (None, "Bearer wrong", f"Bearer {KEY[:-1]}", KEY):
        headers = {} if authorization is None else {"authorization": authorization}
        response = requests.get(f"{url}/zoact/v1/info", headers=headers, timeout=TIMEOUT)
        assert checked(response, 401)["code"] == "invalid_api_key"
    checked(requests.post(f"{url}/zoact/v1/adapters", json={"name": "tests/intruder"}, timeout=TIMEOUT), 401)
    with server_with_key.client(api_key="wrong") as client, pytest.raises(AuthenticationError):
        client.adapters()
    with server_with_key.client(api_key=KEY) as client:
        assert client.adapters() == []
    assert requests.get(f"{url}/health", timeout=TIMEOUT).ok
