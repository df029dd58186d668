"""Client and adapter: what each call sends, and what it makes of the answer."""

import io
import json
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import responses
from responses import matchers

from zoact_remote import (
    Adapter,
    Basis,
    Client,
    Conflict,
    InvalidValue,
    NotFound,
    PermissionDenied,
    Probe,
    ServerError,
    Side,
    StaleVersion,
    Update,
)
from zoact_remote.wire import BasisResult

URL = "http://server:8000"
API = f"{URL}/zoact/v1"
PATH = f"{API}/adapters/acme/triage"
ROW = {"prompt": "It was", "choices": [" bad", " good"], "answer": 1}
INFO: dict[str, Any] = {
    "model": {"name": "tiny", "digest": "sha256:1", "dtype": "float32"},
    "engine": {"name": "transformers", "version": "5"},
    "noise": {"version": 1, "distributions": ["rademacher", "gaussian"]},
    "sites": [
        {"index": i, "name": f"layers.0.{name}", "input": "mlp", "in_features": 8, "out_features": 4}
        for i, name in enumerate(("up_proj", "down_proj"))
    ],
    "limits": {
        "max_rank": 64,
        "max_probes": 64,
        "max_rows": 256,
        "max_row_tokens": 2048,
        "max_call_tokens": 65536,
        "max_terms": 4096,
        "max_choices": 128,
    },
}


def adapter_json(**changes: Any) -> dict[str, Any]:
    made = {
        "name": "acme/triage",
        "version": 0,
        "rank": 4,
        "noise": {"distribution": "rademacher", "version": 1},
        "sites": ["layers.0.up_proj", "layers.0.down_proj"],
        "parameters": 32,
        "basis": Basis().to_json() | {"digest": None, "energy": None, "positions_seen": None},
        "digest": None,
        "created": "2026-11-22T01:02:03Z",
        "state": "new",
    }
    return made | changes


@pytest.fixture
def server() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr("zoact_remote.client.POLL_S", 0.001)
    with Client(URL) as client:
        client._transport._sleep = lambda seconds: None
        yield client


@pytest.fixture
def adapter(client: Client, server: responses.RequestsMock) -> Adapter:
    server.get(PATH, json=adapter_json())
    return client.adapter("acme/triage")


def sent(server: responses.RequestsMock, call: int = -1) -> Any:
    return json.loads(server.calls[call].request.body)  # type: ignore[arg-type]


def test_url_and_key_from_the_environment(monkeypatch: pytest.MonkeyPatch, server: responses.RequestsMock) -> None:
    monkeypatch.setenv("ZOACT_URL", URL + "/")
    monkeypatch.setenv("ZOACT_API_KEY", "secret")
    server.get(f"{API}/adapters", json={"adapters": [adapter_json()]})
    with Client() as client:
        assert [info.name for info in client.adapters()] == ["acme/triage"]
        assert client.url == URL
    assert server.calls[0].request.headers["Authorization"] == "Bearer secret"


def test_info(client: Client, server: responses.RequestsMock) -> None:
    server.get(f"{API}/info", json=INFO)
    info = client.info()
    assert (info.model, info.engine, info.noise_version) == ("tiny", "transformers", 1)
    assert info.sites[1].name == "layers.0.down_proj"
    assert info.limits.max_terms == 4096


def test_metrics_are_text_beside_the_calls(client: Client, server: responses.RequestsMock) -> None:
    server.get(f"{URL}/metrics", body="zoact_slots 8.0\n")
    assert client.metrics() == "zoact_slots 8.0\n"
    server.replace("GET", f"{URL}/metrics", status=403, json={"error": {"code": "operator_only"}})
    with pytest.raises(PermissionDenied):
        client.metrics()


def test_wait_until_ready(client: Client, server: responses.RequestsMock) -> None:
    server.get(f"{API}/info", body=requests.ConnectionError("refused"))
    server.get(f"{API}/info", status=503)
    server.get(f"{API}/info", status=502, body="<html>Bad Gateway</html>")
    server.get(f"{API}/info", json=INFO)
    assert client.wait_until_ready(timeout=60).model == "tiny"


def test_options_are_those_of_the_copy_alone(client: Client) -> None:
    before = client.tenants
    assert client.with_options(retries=0).tenants is not before
    assert client.tenants is before


def test_wait_until_ready_gives_up(client: Client, server: responses.RequestsMock) -> None:
    server.get(f"{API}/info", status=503, json={"error": {"message": "loading", "code": "not_ready"}})
    with pytest.raises(ServerError, match="loading"):
        client.wait_until_ready(timeout=0)


def test_wait_until_ready_does_not_wait_for_what_will_not_come(client: Client, server: responses.RequestsMock) -> None:
    server.get(f"{API}/info", status=404, body="Not Found")
    with pytest.raises(NotFound):
        client.wait_until_ready(timeout=60)


def test_create_adapter(client: Client, server: responses.RequestsMock) -> None:
    server.post(f"{API}/adapters", status=201, json=adapter_json(rank=8))
    adapter = client.create_adapter("acme/triage", rank=8, sites=["down_proj"], basis=Basis(positions="both"))
    assert adapter.info.rank == 8
    assert sent(server) == {
        "name": "acme/triage",
        "rank": 8,
        "sites": ["down_proj"],
        "noise": "rademacher",
        "basis": Basis(positions="both").to_json(),
    }


def exists(server: responses.RequestsMock) -> None:
    error = {"message": "acme/triage exists", "code": "adapter_exists"}
    server.post(f"{API}/adapters", status=409, json={"error": error})


def test_create_adapter_that_exists(client: Client, server: responses.RequestsMock) -> None:
    exists(server)
    with pytest.raises(Conflict):
        client.create_adapter("acme/triage")


def test_create_adapter_that_may_exist(client: Client, server: responses.RequestsMock) -> None:
    exists(server)
    server.get(PATH, json=adapter_json(version=3))
    server.get(f"{API}/info", json=INFO)
    assert client.create_adapter("acme/triage", exist_ok=True).info.version == 3


def test_create_adapter_is_repeated_only_if_it_may_exist(client: Client, server: responses.RequestsMock) -> None:
    server.post(f"{API}/adapters", status=502)
    with pytest.raises(ServerError):
        client.create_adapter("acme/triage")
    server.post(f"{API}/adapters", body=requests.ConnectionError("reset"))
    exists(server)
    server.get(PATH, json=adapter_json())
    server.get(f"{API}/info", json=INFO)
    assert client.create_adapter("acme/triage", exist_ok=True).info.version == 0


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"rank": 8}, "rank is 4, not 8"),
        ({"noise": "gaussian"}, "noise is rademacher, not gaussian"),
        ({"sites": ["down_proj"]}, "2 sites are not the 1 asked for"),
        ({"basis": Basis(centred=True)}, "basis is"),
    ],
)
def test_create_adapter_that_exists_but_differs(
    client: Client, server: responses.RequestsMock, properties: dict[str, Any], message: str
) -> None:
    exists(server)
    server.get(PATH, json=adapter_json())
    server.get(f"{API}/info", json=INFO)
    with pytest.raises(Conflict, match=message):
        client.create_adapter("acme/triage", exist_ok=True, **properties)


@pytest.mark.parametrize(
    "name", ["triage", "a/b/c", "/triage", "acme/", "", "acme/bad name", "Acme/triage", "acme/.x", "acme/x\n"]
)
def test_adapter_names(client: Client, name: str) -> None:
    with pytest.raises(InvalidValue, match="tenant/adapter"):
        client.adapter(name)


def test_calibrate(adapter: Adapter, server: responses.RequestsMock) -> None:
    result = {"digest": "sha256:2", "energy": {"mlp": 0.9}, "rows": 1, "positions_seen": 2}
    server.post(f"{PATH}/basis", json=result)
    server.get(PATH, json=adapter_json(state="ready"))
    assert adapter.calibrate([ROW]).energy == {"mlp": 0.9}
    assert sent(server, 1) == {"rows": [ROW]}
    assert adapter.info.state == "ready"


def test_calibrate_is_repeated_only_if_the_basis_may_exist(adapter: Adapter, server: responses.RequestsMock) -> None:
    error = {"message": "taken", "code": "basis_exists"}
    server.post(f"{PATH}/basis", status=502)
    with pytest.raises(ServerError):
        adapter.calibrate([ROW])
    server.post(f"{PATH}/basis", body=requests.ConnectionError("reset"))
    server.post(f"{PATH}/basis", status=409, json={"error": error})
    basis = Basis().to_json() | {"digest": "sha256:2", "energy": {"mlp": 0.5}, "positions_seen": 9}
    server.get(PATH, json=adapter_json(state="ready", basis=basis))
    assert adapter.calibrate([ROW], exist_ok=True) == BasisResult("sha256:2", {"mlp": 0.5}, 1, 9)
    with pytest.raises(Conflict):
        adapter.calibrate([ROW])


def test_rollback(adapter: Adapter, server: responses.RequestsMock) -> None:
    made = {"version": 6, "digest": "sha256:3", "applied": True}
    server.get(PATH, json=adapter_json(version=5))
    server.post(f"{PATH}/rollback", status=504)
    server.post(f"{PATH}/rollback", json=made)
    assert adapter.rollback(2).version == 6
    assert sent(server, -2) == sent(server)
    body = sent(server)
    assert body.pop("key")
    assert body == {"base_version": 5, "to_version": 2}


def test_rollback_from_a_version_that_is_not_the_newest(adapter: Adapter, server: responses.RequestsMock) -> None:
    error = {"message": "stale", "code": "stale_version", "current_version": 5}
    server.post(f"{PATH}/rollback", status=412, json={"error": error})
    with pytest.raises(StaleVersion) as caught:
        adapter.rollback(2, base_version=4)
    assert caught.value.current_version == 5
    assert sent(server)["base_version"] == 4


LOSSES = {
    "version": 5,
    "losses": [{"seed": 7, "epsilon": 0.5, "plus": 1.0, "minus": 0.5}],
    "base": 0.75,
    "tokens": 12,
    "update": {"version": 5, "digest": "sha256:3", "applied": True},
    "timing": {"update_s": 0.1, "forward_s": 0.2, "total_s": 0.4},
}


def test_a_loss_that_is_not_finite_is_nan(adapter: Adapter, server: responses.RequestsMock) -> None:
    # JSON has no NaN: the server writes null.
    found = [{"seed": 7, "epsilon": 0.5, "plus": None, "minus": 0.5}]
    server.post(f"{PATH}/losses", json=LOSSES | {"base": None, "losses": found})
    losses = adapter.losses([ROW], [Probe(7, 0.5)], base=True)
    assert losses.base is not None
    assert math.isnan(losses.base)
    assert math.isnan(losses.losses[0].plus)
    assert adapter.losses([ROW], [Probe(7, 0.5)]).base is None


def test_a_side_that_is_not_finite_is_nan(adapter: Adapter, server: responses.RequestsMock) -> None:
    found = [{"seed": 7, "epsilon": 0.5, "plus": 1.0, "minus": None}]
    server.post(f"{PATH}/losses", json=LOSSES | {"losses": found})
    minus = adapter.losses([ROW], [Probe(7, 0.5)]).losses[0].minus
    assert minus is not None
    assert math.isnan(minus)
    assert adapter.losses([ROW], [Probe(7, 0.5, "plus")]).losses[0].minus is None


@pytest.mark.parametrize("asked", [[], [Probe(8, 0.5)], [Probe(7, 0.25)], [Probe(7, 0.5), Probe(7, 0.5)]])
def test_losses_of_other_probes_are_the_servers_fault(
    adapter: Adapter, server: responses.RequestsMock, asked: list[Probe]
) -> None:
    server.post(f"{PATH}/losses", json=LOSSES)
    with pytest.raises(ServerError, match="not the losses of the probes"):
        adapter.losses([ROW], asked, base=True)


def test_losses_carry_an_update_whose_key_outlives_retries(adapter: Adapter, server: responses.RequestsMock) -> None:
    server.post(f"{PATH}/losses", status=502)
    server.post(f"{PATH}/losses", body=requests.ConnectionError("reset"))
    server.post(f"{PATH}/losses", json=LOSSES)
    losses = adapter.losses([ROW], [Probe(7, 0.5)], base=True, version=5, update=Update(4, ((1, 0.25),)))
    assert losses.losses[0].minus == 0.5
    assert losses.update is not None
    assert losses.update.applied
    assert losses.timing.total_s == 0.4
    keys = {sent(server, i)["update"]["key"] for i in (1, 2, 3)}
    assert len(keys) == 1
    assert None not in keys
    body = sent(server)
    assert body["probes"] == [{"seed": 7, "epsilon": 0.5, "sides": "both"}]
    assert (body["version"], body["base"], body["rows"]) == (5, True, [ROW])


def test_updates_are_keyed_and_retried(adapter: Adapter, server: responses.RequestsMock) -> None:
    server.post(f"{PATH}/updates", status=504)
    server.post(f"{PATH}/updates", json={"version": 1, "digest": "sha256:3", "applied": False})
    assert not adapter.update(Update(0, ((1, 0.5),))).applied
    assert sent(server, 1) == sent(server, 2)
    assert sent(server)["key"]


def test_a_key_of_ones_own_is_kept(adapter: Adapter, server: responses.RequestsMock) -> None:
    server.post(f"{PATH}/updates", json={"version": 1, "digest": "sha256:3", "applied": True})
    adapter.update(Update(0, (), key="mine"))
    assert sent(server)["key"] == "mine"


def test_info_follows_our_own_changes(adapter: Adapter, server: responses.RequestsMock) -> None:
    def answer(version: int, digest: str, applied: bool = True) -> dict[str, Any]:
        return {"version": version, "digest": digest, "applied": applied}

    def known() -> tuple[int, str | None]:
        return adapter.version, adapter.info.digest

    server.post(f"{PATH}/updates", json=answer(1, "sha256:1"))
    adapter.update(Update(0, ()))
    assert known() == (1, "sha256:1")
    server.post(f"{PATH}/losses", json=LOSSES)
    adapter.losses([ROW], [Probe(7, 0.5)], update=Update(4, ()))
    assert known() == (5, "sha256:3")
    server.post(f"{PATH}/rollback", json=answer(6, "sha256:1"))
    adapter.rollback(1, base_version=5)
    assert known() == (6, "sha256:1")
    # One that is sent again says what it made at the time.
    server.replace("POST", f"{PATH}/updates", json=answer(1, "sha256:1", applied=False))
    adapter.update(Update(0, ()))
    assert known() == (6, "sha256:1")


def test_scores(adapter: Adapter, server: responses.RequestsMock) -> None:
    rows = [{"logprobs": [-1.5, -0.5], "tokens": [1, 1], "loss": 0.3}]
    server.post(f"{PATH}/scores", json={"version": 2, "rows": rows, "loss": 0.3, "tokens": 4})
    scores = adapter.scores([ROW], version=2, probe=Side(7, 0.5, -1))
    assert scores.rows[0].logprobs == (-1.5, -0.5)
    assert sent(server) == {"version": 2, "probe": {"seed": 7, "epsilon": 0.5, "sign": -1}, "rows": [ROW]}


def test_numpy_in_rows(adapter: Adapter, server: responses.RequestsMock) -> None:
    server.post(f"{PATH}/scores", json={"version": 2, "rows": [], "loss": 0.3, "tokens": 4})
    ids = np.array([3, 4])
    adapter.scores([{"prompt": ids, "choices": [ids[:1], [ids[1], 5]], "answer": np.int64(1)}])
    assert sent(server)["rows"] == [{"prompt": [3, 4], "choices": [[3], [4, 5]], "answer": 1}]
    for value, place in ({1}, ""), ([3, {1}], r"\[1\]"), (b"text", ""):
        with pytest.raises(
            InvalidValue, match=rf"^rows\[1\]\.prompt{place}: must be text, integers .*, got (set|bytes)"
        ):
            adapter.scores([ROW, {"prompt": value, "completion": " 4"}])


def test_generate(adapter: Adapter, server: responses.RequestsMock) -> None:
    answer = {"version": 2, "text": "4", "token_ids": [19], "finish_reason": "stop"}
    server.post(f"{PATH}/generate", json=answer)
    assert adapter.generate(messages=[{"role": "user", "content": "2 + 2?"}], max_tokens=4).text == "4"
    assert "prompt" not in sent(server)
    assert adapter.generate("2 + 2 =").token_ids == (19,)
    assert "messages" not in sent(server)
    stops: list[str | tuple[str, ...]] = ["\n\n", ("a", "bc")]
    assert [(adapter.generate("2", stop=stop), sent(server)["stop"])[1] for stop in stops] == [["\n\n"], ["a", "bc"]]
    with pytest.raises(InvalidValue):
        adapter.generate()
    with pytest.raises(InvalidValue):
        adapter.generate("2", messages=[])


def test_journal_is_read_to_its_end(adapter: Adapter, server: responses.RequestsMock) -> None:
    def page(after: int, versions: range) -> None:
        updates = [
            Update(v - 1, ((v, 0.5),), key=str(v)).to_json()
            | {"version": v, "digest": "sha256:3", "digest_before": "sha256:2", "rollback_to": None}
            | {"time": "2026-11-22T01:02:03Z"}
            for v in versions
        ]
        query = matchers.query_param_matcher({"after": after, "limit": 2})
        server.get(f"{PATH}/journal", json={"adapter": "acme/triage", "updates": updates}, match=[query])

    page(0, range(1, 3))
    page(2, range(3, 4))
    page(3, range(0))
    entries = list(adapter.journal(page=2))
    assert [entry.version for entry in entries] == [1, 2, 3]
    assert entries[2].update.terms == ((3, 0.5),)


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


EXPORT = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 1000, "zoact.json": b"{}"}


def test_export(adapter: Adapter, server: responses.RequestsMock, tmp_path: Path) -> None:
    query = matchers.query_param_matcher({"version": 3, "dtype": "bfloat16"})
    server.get(f"{PATH}/export", status=502, match=[query])
    server.get(f"{PATH}/export", body=archive(EXPORT | {"../evil": b"x", "other": b"y"}), match=[query])
    made = adapter.export(tmp_path / "peft" / "triage", version=3, dtype="bfloat16")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == EXPORT
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("body", [b"not an archive", archive({"adapter_config.json": b"{}"})])
def test_a_broken_export_leaves_nothing(
    adapter: Adapter, server: responses.RequestsMock, tmp_path: Path, body: bytes
) -> None:
    server.get(f"{PATH}/export", body=body)
    with pytest.raises(ServerError, match="unpacked"):
        adapter.export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_delete_is_not_repeated(adapter: Adapter, server: responses.RequestsMock) -> None:
    server.delete(PATH, status=502)
    with pytest.raises(ServerError):
        adapter.delete()
    server.delete(PATH, status=204)
    adapter.delete()
    assert len(server.calls) == 3


def test_options_of_a_part(client: Client, adapter: Adapter, server: responses.RequestsMock) -> None:
    answer = {"version": 3, "text": "4", "token_ids": [19], "finish_reason": "stop"}
    server.get(f"{API}/info", json=INFO, match=[matchers.request_kwargs_matcher({"timeout": (1.0, 2.0)})])
    server.post(f"{PATH}/generate", json=answer, match=[matchers.request_kwargs_matcher({"timeout": (3.0, 4.0)})])
    server.get(PATH, json=adapter_json(), match=[matchers.request_kwargs_matcher({"timeout": (5.0, 600.0)})])
    assert client.with_options(timeout=(1.0, 2.0)).info().model == "tiny"
    hasty = adapter.with_options(timeout=(3.0, 4.0), retries=0)
    assert hasty.generate("2 + 2 =").text == "4"
    assert (hasty.name, hasty.info) == (adapter.name, adapter.info)
    adapter.refresh()


def test_options_of_a_part_keep_the_others(client: Client, server: responses.RequestsMock) -> None:
    server.get(f"{API}/info", status=503)
    with pytest.raises(ServerError):
        client.with_options(retries=2).with_options(patience=0.0).info()
    assert len(server.calls) == 3
    with pytest.raises(ValueError, match="retries"):
        client.with_options(retries=-1)


def test_a_generation_that_is_cut_off_is_asked_for_again(adapter: Adapter, server: responses.RequestsMock) -> None:
    server.post(f"{PATH}/generate", body=requests.ConnectionError("cut off"))
    server.post(f"{PATH}/generate", json={"version": 3, "text": "4", "token_ids": [19], "finish_reason": "stop"})
    assert adapter.generate("2 + 2 =").text == "4"
