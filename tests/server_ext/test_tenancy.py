"""Tenants on one server: nobody sees another's adapters by any route, and everybody's limits hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from server_ext.routes import ADAPTER, PREFIX, TENANT, health, router
from server_ext.tenants import key_digest
from tests.loras import lora_archive
from tests.support import Server
from zoact_remote import Adapter, Basis, Client, Update
from zoact_remote.cli.local_server import free_port

TIMEOUT = (5, 60)
OPERATOR = "the operator's key"
FIXED = "the key of a tenant in the keys file"
SECRET, NOBODY = "acme/secret", "acme/nobody"
PROMPT = "Nobody but acme knows of Project Nightingale"
ROW = {"prompt": PROMPT, "completion": " and its aims"}

LORA = lora_archive({"model.layers.1.mlp.up_proj": (np.eye(2, 64, dtype=np.float32), np.ones((128, 2), np.float32))})

BODIES: dict[tuple[str, str], Any] = {
    ("GET", ADAPTER): None,
    ("DELETE", ADAPTER): None,
    ("POST", ADAPTER + "/basis"): {"rows": [ROW]},
    ("POST", ADAPTER + "/losses"): {"rows": [ROW], "probes": [{"seed": 1, "epsilon": 0.1}]},
    ("POST", ADAPTER + "/scores"): {"rows": [ROW]},
    ("POST", ADAPTER + "/generate"): {"prompt": PROMPT, "max_tokens": 1},
    ("POST", ADAPTER + "/updates"): {"base_version": 2, "terms": [[1, 0.5]], "key": "third"},
    ("POST", ADAPTER + "/rollback"): {"base_version": 2, "to_version": 0},
    ("GET", ADAPTER + "/journal"): None,
    ("GET", ADAPTER + "/export"): None,
    ("POST", ADAPTER + "/import"): LORA,
}
"""A body that every route to an adapter takes."""
MANAGED: dict[tuple[str, str], Any] = {
    ("GET", "/tenants"): None,
    ("POST", "/tenants"): {"name": "mallory"},
    ("PUT", TENANT + "/limits"): {"max_rows": 1},
    ("POST", TENANT + "/key"): None,
    ("DELETE", TENANT): None,
}
STATUS = {("DELETE", ADAPTER): 204, ("POST", ADAPTER + "/import"): 201}
"""Status codes that are not 200."""
OWN = {("GET", "/info"), ("POST", "/adapters"), ("GET", "/adapters")}
"""Routes that speak of the caller alone."""


@dataclass
class House:
    """A server with an operator and some tenants."""

    server: Server
    keys: dict[str, str]

    def call(self, who: str | None, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
        """A call with somebody's key."""
        headers = {} if who is None else {"authorization": f"Bearer {self.keys.get(who, who)}"}
        content = {"data": body} if isinstance(body, bytes) else {"json": body}
        return requests.request(
            method, f"{self.server.url}{PREFIX}{path}", headers=headers, timeout=TIMEOUT, **content, **options
        )

    def client(self, who: str) -> Client:
        return self.server.client(api_key=self.keys[who])

    def add(self, name: str, **limits: Any) -> None:
        """A tenant with few limits but those given."""
        added = self.call("operator", "POST", "/tenants", {"name": name, "limits": {"max_adapters": None} | limits})
        assert added.status_code == 201, added.text
        self.keys[name] = added.json()["key"]


@pytest.fixture(scope="module")
def house(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("house")
    file = directory / "keys.toml"
    file.write_text(f'[tenants.fixed]\nkeys = ["{key_digest(FIXED)}"]\nlimits = {{ max_rows = 2 }}\n')
    server = Server(tiny_model, "transformers", directory, OPERATOR, file)
    try:
        found = House(server.start(), {"operator": OPERATOR, "fixed": FIXED})
        for name in ("acme", "umbra"):
            found.add(name)
        yield found
    finally:
        server.kill()


@pytest.fixture(scope="module")
def secret(house: House) -> Iterator[Adapter]:
    """An adapter of acme's, two updates old."""
    with house.client("acme") as client:
        yield made(client, SECRET)


def made(client: Client, name: str, rank: int = 2) -> Adapter:
    adapter = client.create_adapter(name, rank=rank, basis=Basis(source="random"))
    adapter.calibrate()
    adapter.update(Update(0, ((1, 0.1),), key="first"))
    adapter.update(Update(1, ((2, 0.1),)))
    return adapter


def state(adapter: Adapter) -> tuple[Any, ...]:
    return (adapter.refresh(), *adapter.journal())


# Every route ----------------------------------------------------------------------------------------------------------


def test_no_route_is_forgotten() -> None:
    """A new route stands in one of the tables here, and so in the tests below."""
    there = {(method, route.path) for route in router.routes for method in route.methods}  # type: ignore[attr-defined]
    listed = {(method, PREFIX + path) for method, path in [*BODIES, *MANAGED, *OWN]}
    assert there == listed
    assert {route.path for route in health.routes} == {  # type: ignore[attr-defined]
        f"{PREFIX}/health/live",
        f"{PREFIX}/health/ready",
    }


def words(answer: requests.Response, name: str = "NAME") -> tuple[Any, ...]:
    """All of an answer but for what differs from call to call, and for a name that the call named itself."""
    own = ("date", "x-request-id", "content-length")
    headers = {header: value for header, value in answer.headers.items() if header.lower() not in own}
    text = answer.text.replace(answer.headers["x-request-id"], "").replace(name, "NAME")
    return answer.status_code, headers, text


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_anothers_adapter_is_not_there(house: House, secret: Adapter, method: str, path: str) -> None:
    before = state(secret)
    bodies: list[Any] = [BODIES[method, path], {}, {"bogus": 1}, [], "text", None]
    for body in bodies:
        told = []
        for name in (SECRET, NOBODY):
            tenant, _, adapter = name.partition("/")
            answer = house.call("umbra", method, path.format(tenant=tenant, adapter=adapter), body)
            told.append(words(answer, name))
        assert told[0] == told[1]
        assert told[0][0] in (400, 404)
        if body == BODIES[method, path]:
            assert json.loads(told[0][2])["error"] == {
                "message": "there is no adapter 'NAME'",
                "type": "invalid_request_error",
                "param": "adapter",
                "code": "adapter_not_found",
            }
    assert state(secret) == before


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_the_owner_and_the_operator_may(house: House, method: str, path: str) -> None:
    """The bodies above are good ones: it is the key that other tenants lack."""
    for number, who in enumerate(("acme", "operator")):
        name = f"acme/{method.lower()}-{path.rpartition('/')[2].strip('{}')}-{number}"
        with house.client("acme") as client:
            if path.endswith("/basis"):
                client.create_adapter(name, rank=2)
            elif not path.endswith("/import"):
                made(client, name)
        tenant, _, adapter = name.partition("/")
        answer = house.call(who, method, path.format(tenant=tenant, adapter=adapter), BODIES[method, path])
        assert answer.status_code == STATUS.get((method, path), 200), answer.text
        house.call("operator", "DELETE", f"/adapters/{name}")


@pytest.mark.parametrize(
    "path",
    [
        "acme%2Fsecret",
        "umbra/..%2Facme%2Fsecret",
        "umbra%2F..%2Facme/secret",
        "./acme/secret",
        "ACME/secret",
        "acme/secret/",
    ],
)
def test_other_spellings_lead_nowhere(house: House, secret: Adapter, path: str) -> None:
    with requests.Session() as session:
        request = session.prepare_request(requests.Request("GET", f"{house.server.url}{PREFIX}/info"))
        request.url = f"{house.server.url}{PREFIX}/adapters/{path}"
        request.headers["authorization"] = f"Bearer {house.keys['umbra']}"
        answer = session.send(request, timeout=TIMEOUT, allow_redirects=True)
    assert answer.status_code == 404
    assert "digest" not in answer.text


@pytest.mark.parametrize(("method", "path"), [*BODIES, *MANAGED, *OWN])
def test_nothing_opens_without_a_key(house: House, secret: Adapter, method: str, path: str) -> None:
    before = state(secret)
    body = (BODIES | MANAGED).get((method, path))
    told = set()
    for key in (None, "wrong", key_digest(house.keys["acme"])):
        for tenant, adapter in (SECRET.split("/"), NOBODY.split("/"), ("nobody", "nobody")):
            answer = house.call(key, method, path.format(tenant=tenant, adapter=adapter), body)
            told.add(json.dumps(words(answer)))
    assert len(told) == 1
    assert '"invalid_api_key\\"' in told.pop()
    assert state(secret) == before


@pytest.mark.parametrize(("method", "path"), MANAGED)
def test_tenants_are_managed_by_the_operator_alone(house: House, method: str, path: str) -> None:
    before = house.call("operator", "GET", "/tenants").text
    for tenant in ("acme", "umbra", "nobody"):
        answer = house.call("umbra", method, path.format(tenant=tenant), MANAGED[method, path])
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "operator_only")
        assert "acme" not in answer.text
    assert house.call("operator", "GET", "/tenants").text == before


def test_lists_show_ones_own(house: House, secret: Adapter) -> None:
    with house.client("umbra") as client:
        adapter = client.create_adapter("umbra/own", rank=2)
        assert [found.name for found in client.adapters()] == ["umbra/own"]
    with house.client("acme") as client:
        assert SECRET in {found.name for found in client.adapters()}
        assert all(found.name.startswith("acme/") for found in client.adapters())
    with house.client("fixed") as client:
        assert client.adapters() == []
    with house.client("operator") as client:
        assert {SECRET, "umbra/own"} <= {found.name for found in client.adapters()}
    listed = house.call("operator", "GET", "/tenants").json()["tenants"]
    assert [tenant["name"] for tenant in listed] == sorted(set(house.keys) - {"operator"})
    with house.client("umbra") as client:
        client.adapter(adapter.name).delete()


@pytest.mark.parametrize("name", [SECRET, NOBODY, "nobody/else"])
def test_nothing_is_made_in_anothers_name(house: House, secret: Adapter, name: str) -> None:
    answer = house.call("umbra", "POST", "/adapters", {"name": name})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (403, "foreign_tenant", "name")
    assert error["message"] == "name: must begin with umbra/ for this API key"


def test_keys_stop_working_at_once(house: House) -> None:
    house.add("shortlived")
    with house.client("shortlived") as client:
        made(client, "shortlived/model")
    first = house.keys["shortlived"]
    second = house.call("operator", "POST", "/tenants/shortlived/key").json()["key"]
    path = "/adapters/shortlived/model"
    assert [house.call(key, "GET", path).status_code for key in (first, second)] == [401, 200]
    assert house.call("operator", "DELETE", "/tenants/shortlived").status_code == 204
    assert house.call(second, "GET", path).status_code == 401
    # Its adapters are the operator's to delete.
    assert house.call("operator", "DELETE", path).status_code == 204
    del house.keys["shortlived"]


# Limits ---------------------------------------------------------------------------------------------------------------

LONG_ROW = {"prompt": [5] * 100, "completion": [6] * 10}
PROBES = [{"seed": seed, "epsilon": 0.1} for seed in range(4)]


@pytest.mark.parametrize(
    ("limit", "most", "call", "body", "status", "param"),
    [
        ("max_rank", 2, "", {"name": "NAME", "rank": 3}, 400, "rank"),
        ("max_probes", 3, "/losses", {"rows": [ROW], "probes": PROBES}, 400, "probes"),
        ("max_rows", 2, "/losses", {"rows": [ROW] * 3, "base": True}, 400, "rows"),
        ("max_rows", 2, "/scores", {"rows": [ROW] * 3}, 400, "rows"),
        ("max_call_tokens", 400, "/scores", {"rows": [LONG_ROW] * 4}, 400, "rows"),
        # Both sides count, and an update that is carried is not made.
        (
            "max_call_tokens",
            400,
            "/losses",
            {"rows": [LONG_ROW] * 2, "probes": PROBES[:1], "update": {"base_version": 2, "terms": [[3, 0.1]]}},
            400,
            "rows",
        ),
        # Of a part, each row counts as often as it is evaluated.
        (
            "max_call_tokens",
            400,
            "/losses",
            {"rows": [LONG_ROW, ROW], "probes": [{**probe, "part": [0, 2]} for probe in PROBES]},
            400,
            "rows",
        ),
        ("max_request_bytes", 2000, "/losses", {"rows": [ROW] * 100, "base": True}, 413, None),
        ("max_adapters", 1, "", {"name": "NAME"}, 403, "name"),
        ("max_coefficient_bytes", 30000, "", {"name": "NAME", "rank": 9}, 403, "rank"),
        ("max_rank", 1, "/import", LORA, 400, "adapter_config.json: r"),
        ("max_import_bytes", 2000, "/import", LORA, 413, None),
        ("max_adapters", 1, "/import", LORA, 403, "name"),
        ("max_coefficient_bytes", 5000, "/import", LORA, 403, "rank"),
    ],
)
def test_a_limit_is_named_and_nothing_changes(
    house: House, limit: str, most: int, call: str, body: Any, status: int, param: str | None
) -> None:
    tenant = f"{limit}{call.replace('/', '.')}.{len(body)}"
    house.add(tenant, **{limit: most})
    with house.client(tenant) as client:
        adapter = made(client, f"{tenant}/model", rank=1)
        assert house.call(tenant, "GET", "/info").json()["limits"][limit] == most
        before, there = state(adapter), client.adapters()
        # An import of a taken name is not even read.
        name = "more" if call == "/import" else "model"
        path = f"/adapters/{tenant}/{name}{call}" if call else "/adapters"
        if isinstance(body, dict) and "name" in body:
            body = {**body, "name": f"{tenant}/more"}
        answer = house.call(tenant, "POST", path, body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert (error["code"] == "batch_too_large") == (limit in ("max_probes", "max_rows", "max_call_tokens"))
        assert f"{limit} ({most})" in error["message"]
        assert (state(adapter), client.adapters()) == (before, there)
        # Nobody else has the limit.
        if call:
            done = 201 if call == "/import" else 200
            assert house.call("operator", "POST", path, body).status_code == done


def test_a_limit_holds_for_whoever_comes_at_the_same_time(house: House) -> None:
    house.add("crowd", max_adapters=3)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda n: house.call("crowd", "POST", "/adapters", {"name": f"crowd/{n}"}), range(12)))
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [403] * 9
    with house.client("crowd") as client:
        assert len(client.adapters()) == 3


def test_an_import_may_be_longer_than_other_calls(house: House) -> None:
    house.add("movers", max_request_bytes=2000)
    assert len(LORA) > 2000
    assert house.call("movers", "POST", "/adapters/movers/model/import", LORA).status_code == 201


def test_a_body_of_no_announced_length_is_counted_as_it_comes(house: House, secret: Adapter) -> None:
    house.add("chunks", max_request_bytes=2000)
    with house.client("chunks") as client:
        made(client, "chunks/model")
    headers = {"authorization": f"Bearer {house.keys['chunks']}", "content-type": "application/json"}
    url = f"{house.server.url}{PREFIX}/adapters/chunks/model/scores"
    large = (
        piece for piece in [b'{"rows": [', *[json.dumps(ROW).encode() + b","] * 50, json.dumps(ROW).encode(), b"]}"]
    )
    answer = requests.post(url, data=large, headers=headers, timeout=TIMEOUT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    small = (piece for piece in [b'{"rows": [', json.dumps(ROW).encode(), b"]}"])
    assert requests.post(url, data=small, headers=headers, timeout=TIMEOUT).status_code == 200


@pytest.mark.parametrize("body", [b"\xff", b"[" * 100_000, b"1" * 5000, b'{"rows": ' + b"9" * 5000 + b"}"])
def test_a_body_that_no_parser_takes_is_refused(house: House, secret: Adapter, body: bytes) -> None:
    headers = {"authorization": f"Bearer {house.keys['acme']}", "content-type": "application/json"}
    url = f"{house.server.url}{PREFIX}/adapters/{SECRET}/scores"
    answer = requests.post(url, body, headers=headers, timeout=TIMEOUT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value"), answer.text


def test_too_many_calls_are_told_to_wait(house: House, secret: Adapter) -> None:
    house.add("hasty", requests_per_minute=3)
    answers = [house.call("hasty", "GET", "/adapters") for _ in range(6)]
    assert [answer.status_code for answer in answers[:3]] == [200] * 3
    assert answers[-1].status_code == 429
    error = answers[-1].json()["error"]
    assert (error["code"], "requests_per_minute (3)" in error["message"]) == ("rate_limited", True)
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    # The others go on.
    assert house.call("umbra", "GET", "/adapters").status_code == 200
    house.call("operator", "PUT", "/tenants/hasty/limits", {"requests_per_minute": None})
    assert house.call("hasty", "GET", "/adapters").status_code == 200


@pytest.mark.parametrize("value", [-1, 0.5, 10**400, "many"])
def test_a_limit_is_a_whole_number_of_some_size(house: House, value: Any) -> None:
    for limit in ("requests_per_minute", "max_rows", "max_coefficient_bytes"):
        before = house.call("operator", "GET", "/tenants").text
        answer = house.call("operator", "PUT", "/tenants/umbra/limits", {limit: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, limit)
        assert house.call("operator", "GET", "/tenants").text == before
    assert house.call("umbra", "GET", "/info").status_code == 200


def test_a_tenant_of_the_keys_file_is_as_it_says(house: House) -> None:
    with house.client("fixed") as client:
        made(client, "fixed/model")
    answer = house.call("fixed", "POST", "/adapters/fixed/model/scores", {"rows": [ROW] * 3})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "rows")
    for method, path, body in (
        ("PUT", "/limits", {}), ("POST", "/key", None), ("DELETE", "", None),
    ):  # fmt: skip
        answer = house.call("operator", method, f"/tenants/fixed{path}", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "tenant_fixed")


# The log --------------------------------------------------------------------------------------------------------------


def test_the_log_holds_no_key_and_no_text(house: House, secret: Adapter) -> None:
    with house.client("acme") as client:
        adapter = client.adapter(SECRET)
        adapter.scores([ROW])
        adapter.generate(PROMPT, max_tokens=2)
        adapter.generate(messages=[{"role": "user", "content": PROMPT}], max_tokens=1)
    # Errors too: text that is refused, in every place where text may be.
    for path, body in [
        ("/scores", {"rows": [{"prompt": PROMPT}]}),
        ("/scores", {"rows": [{"prompt": PROMPT, "completion": ""}]}),
        ("/scores", {"rows": PROMPT}),
        ("/generate", {"messages": [{"role": PROMPT, "content": PROMPT}]}),
        ("/generate", {"prompt": PROMPT, "max_tokens": 10**6}),
        ("/losses", PROMPT),
    ]:
        assert house.call("acme", "POST", f"/adapters/{SECRET}{path}", body).status_code == 400
    log = house.server.log.read_text()
    for key in house.keys.values():
        assert key not in log
    for word in ("Nightingale", "aims", PROMPT):
        assert word not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    calls = [line for line in lines if line["event"] == "call"]
    assert {"acme", "umbra"} <= {line["tenant"] for line in calls}
    scored = [line for line in calls if line["route"].endswith("/scores") and line["status"] == 200]
    assert {"request_id", "tenant", "adapter", "version", "seconds", "timestamp"} <= set(scored[-1])


# Starting -------------------------------------------------------------------------------------------------------------


def test_a_server_that_everybody_reaches_wants_keys(tmp_path: Path) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "zoact_remote.cli", "serve", "MODEL", "--engine", "transformers", "--host", "0.0.0.0",
         "--port", str(free_port()), "--state", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "--host 0.0.0.0" in refused.stderr
    assert "--api-key" in refused.stderr


@pytest.mark.usefixtures("secret")
def test_a_server_refuses_what_it_cannot_start_with(house: House, tiny_model: Path, tmp_path: Path) -> None:
    state = house.server.state
    other_model = tmp_path / "other-model"
    shutil.copytree(tiny_model, other_model)
    config = json.loads((other_model / "config.json").read_text())
    (other_model / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    broken = tmp_path / "broken.toml"
    broken.write_text('[tenants.acme]\nkeys = ["a key in the clear"]\n')
    for name in ("second", "other", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "second" / "state").symlink_to(state)
    shutil.copytree(state, tmp_path / "other" / "state", ignore=shutil.ignore_patterns("lock", "*-shm"))
    starts = {
        "another server uses": Server(tiny_model, "transformers", tmp_path / "second"),
        "holds adapters of another model": Server(other_model, "transformers", tmp_path / "other"),
        "tenants.acme.keys.0": Server(tiny_model, "transformers", tmp_path / "broken", keys=broken),
    }

    def start(server: Server) -> str:
        with pytest.raises(RuntimeError, match="did not come up") as refused:
            server.start()
        return str(refused.value)

    with ThreadPoolExecutor(len(starts)) as pool:
        for reason, said in zip(starts, pool.map(start, starts.values()), strict=True):
            assert reason in said
            assert "in the clear" not in said
    assert house.call("operator", "GET", "/adapters").status_code == 200
