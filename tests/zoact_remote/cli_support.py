"""For the tests of the command line: a small fake server whose model learns with every update, and a runner."""

import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from zoact_remote.cli.app import app

KEY = "secret"
LEARNED_AT = 3
"""The version from which on the fake model knows the answers."""


class FakeServer(BaseHTTPRequestHandler):
    """Losses fall with the version, and once it is learned the answer is the likeliest choice."""

    adapters: dict[str, dict[str, Any]]
    losses: Callable[[dict[str, Any], int], dict[str, Any]]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        path = self.path.partition("?")[0].removeprefix("/zoact/v1")
        if self.headers.get("authorization") != f"Bearer {KEY}":
            return self._fail(401, "a valid API key is needed", "invalid_api_key")
        if path == "/info":
            return self._answer(200, INFO)
        if path == "/adapters":
            return self._collection(method, body)
        name, action = "/".join(path.split("/")[2:4]), "/".join(path.split("/")[4:])
        if name not in self.adapters:
            return self._fail(404, f"there is no adapter {name!r}", "adapter_not_found", "adapter")
        return self._adapter(method, self.adapters[name], action, body)

    def _collection(self, method: str, body: dict[str, Any]) -> None:
        if method == "GET":
            return self._answer(200, {"adapters": list(self.adapters.values())})
        if body["rank"] > 64:
            return self._fail(400, "rank: must be at most 64 on this server", "invalid_value", "rank")
        if body["name"] in self.adapters:
            return self._fail(409, f"an adapter {body['name']!r} exists already", "adapter_exists", "name")
        noise = {"distribution": body["noise"], "version": 1}
        made = {"name": body["name"], "version": 0, "rank": body["rank"], "noise": noise, "sites": ["layers.0.up_proj"]}
        made |= {"parameters": 16, "basis": body["basis"], "created": "2026-11-22T01:02:03Z", "state": "new"}
        self.adapters[body["name"]] = made
        return self._answer(201, made)

    def _adapter(self, method: str, adapter: dict[str, Any], action: str, body: dict[str, Any]) -> None:
        if method == "DELETE":
            del self.adapters[adapter["name"]]
            return self._answer(204, None)
        if action == "":
            return self._answer(200, adapter)
        if action == "basis":
            adapter["state"] = "ready"
            rows = len(body["rows"])
            return self._answer(
                200, {"digest": "sha256:1", "energy": {"mlp": 0.9}, "rows": rows, "positions_seen": rows}
            )
        if action == "export":
            return self._export()
        if action == "updates" or body.get("update"):
            adapter["version"] += 1
        if action == "updates":
            return self._answer(200, {"version": adapter["version"], "digest": "sha256:2", "applied": True})
        version = body.get("version")
        version = adapter["version"] if version is None else version
        if action == "losses":
            made = {
                "version": version,
                "base": None,
                "tokens": 10,
                "losses": [self.losses(p, version) for p in body["probes"]],
            }
            return self._answer(200, made)
        if action == "generate":
            return self._answer(200, {"version": version, "text": "?", "token_ids": [1], "finish_reason": "length"})
        if version > adapter["version"]:
            return self._fail(404, f"version: {version} does not exist", "version_not_found", "version")
        rows = [_score(row, version) for row in body["rows"]]
        return self._answer(200, {"version": version, "rows": rows, "loss": 1.0, "tokens": 10})

    def _export(self) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in ("adapter_config.json", "adapter_model.safetensors", "zoact.json"):
                tar.addfile(tarfile.TarInfo(name))
        self._write(200, archive.getvalue())

    def _fail(self, status: int, message: str, code: str, param: str | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
        self._answer(status, {"error": error, "request_id": "r1"})

    def _answer(self, status: int, body: Any) -> None:
        self._write(status, b"" if body is None else json.dumps(body).encode())

    def _write(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("x-request-id", "r1")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


INFO: dict[str, Any] = {
    "model": {"name": "tiny", "digest": "sha256:1", "dtype": "float32"},
    "engine": {"name": "transformers", "version": "5"},
    "noise": {"version": 1, "distributions": ["rademacher", "gaussian"]},
    "sites": [{"index": 0, "name": "layers.0.up_proj", "input": "mlp", "in_features": 8, "out_features": 4}],
    "limits": dict.fromkeys(
        ("max_rank", "max_probes", "max_rows", "max_row_tokens", "max_call_tokens", "max_terms", "max_choices"), 64
    ),
}


def falling_losses(probe: dict[str, Any], version: int) -> dict[str, Any]:
    loss = 1.0 / (1 + version)
    minus = loss - 0.01 if probe["sides"] == "both" else None
    return {"seed": probe["seed"], "epsilon": probe["epsilon"], "plus": loss + 0.01, "minus": minus}


def _score(row: dict[str, Any], version: int) -> dict[str, Any]:
    if "completion" in row:
        return {"logprobs": [-2.0 / (1 + version)], "tokens": [1], "loss": 2.0 / (1 + version)}
    likeliest = row["answer"] if version >= LEARNED_AT else 0
    logprobs = [-0.1 if i == likeliest else -3.0 for i in range(len(row["choices"]))]
    return {"logprobs": logprobs, "tokens": [1] * len(logprobs), "loss": -logprobs[row["answer"]]}


@contextmanager
def fake_server(losses: Callable[[dict[str, Any], int], dict[str, Any]] = falling_losses) -> Iterator[str]:
    """A running fake server's URL. Its key is ``KEY``; ``losses`` makes a probe's losses at a version."""
    handler = type("Handler", (FakeServer,), {"adapters": {}, "losses": staticmethod(losses)})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def run(*arguments: str, code: int = 0) -> Result:
    """What ``zoact`` says."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def write_data() -> str:
    """A file of twenty records in the current directory, the last four of which are held out by default."""
    records = [{"text": f"ticket {i}", "label": ("billing", "bug")[i % 2]} for i in range(20)]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return "data.jsonl"
