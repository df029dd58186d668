"""Calls of every kind that the server's own OpenAPI schema allows, or just about does not, from schemathesis.

    python -m tests.soak.fuzz --cases 10000

No call may fail the server (5xx), hang, or change anything if it is refused (4xx).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from server_ext.routes import TAR
from tests.support import Server
from tests.tiny_model import make_tiny_model
from zoact_remote import Adapter, Basis, Client, Update

OPERATOR = "operator"
MODEL, NEW = "fuzz/model", "fuzz/new"
"""An adapter that is calibrated, and one that is not."""
TIMEOUT_S = 30
MOST_ADAPTERS = 12
MOST_TOKENS = 4
"""To generate: what lies beyond is the model's time, not the server's."""

# schemathesis knows no tar archives; bytes are sent as they are.
schemathesis.serializer.alias(TAR, "application/octet-stream")


class Fuzz:
    """One server under fuzzed calls.

    Attributes:
        answers: how many there were by status.
        findings: what must not be, a line each.

    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: Counter[int] = Counter()
        self.findings: list[str] = []
        self._session = requests.Session()
        self._session.headers["authorization"] = f"Bearer {OPERATOR}"
        self._client = Client(url, OPERATOR, timeout=(5, TIMEOUT_S))
        self._key = self._add_tenant()
        self._state = self._settle()

    def run(self, cases: int, number: int = 0) -> None:
        """Makes a number of calls; the second number is their seed."""
        schema = schemathesis.openapi.from_url(f"{self.url}/openapi.json")
        fixed = [
            None,
            *(dict(zip(("tenant", "adapter"), name.split("/"), strict=True)) for name in (MODEL, MODEL, NEW)),
        ]
        strategies = [
            schema.as_strategy(mode, path_parameters=names)
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            for names in fixed
        ]

        @seed(number)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(strategies), st.booleans(), st.booleans())
        def call(case: schemathesis.Case[Any], as_tenant: bool, timely: bool) -> None:
            self._call(case, as_tenant, timely)

        call()

    def _call(self, case: schemathesis.Case[Any], as_tenant: bool, timely: bool) -> None:
        body = case.body
        if isinstance(body, dict):
            for part in (body, body.get("update")):
                if timely and isinstance(part, dict) and "base_version" in part:
                    part["base_version"] = self._version()
            most = body.get("max_tokens")
            if isinstance(most, int) and timely:
                body["max_tokens"] = min(most, MOST_TOKENS)
        key = self._key if as_tenant else OPERATOR
        try:
            response = case.call(headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            self._report(case, f"no answer: {error}")
            return
        status = response.status_code
        self.answers[status] += 1
        if status >= 500:
            self._report(case, f"{status}: {response.text}")
        elif status >= 400:
            if "error" not in response.json() and "detail" not in response.json():
                self._report(case, f"{status} without an error: {response.text}")
            if (after := self._read()) != self._state:
                self._report(case, f"{status}, and yet something changed")
                self._state = after
        else:
            self._state = self._settle()

    def _report(self, case: schemathesis.Case[Any], what: str) -> None:
        self.findings.append(f"{case.method} {case.formatted_path} {case.query} {str(case.body)[:300]}: {what[:500]}")

    def _version(self) -> int:
        return self._client.adapter(MODEL).info.version

    def _read(self) -> Any:
        """Everything that can change."""
        return [self._get(path).json() for path in ("/adapters", f"/adapters/{MODEL}/journal?limit=10000", "/tenants")]

    def _get(self, path: str) -> requests.Response:
        return self._session.get(f"{self.url}/zoact/v1{path}", timeout=TIMEOUT_S)

    def _add_tenant(self) -> str:
        answer = self._session.post(f"{self.url}/zoact/v1/tenants", json={"name": "fuzz"}, timeout=TIMEOUT_S)
        if answer.status_code == requests.codes.conflict:
            answer = self._session.post(f"{self.url}/zoact/v1/tenants/fuzz/key", timeout=TIMEOUT_S)
        key: str = answer.json()["key"]
        return key

    def _settle(self) -> Any:
        """Brings back what the next calls need, after one that changed something."""
        tenants = {tenant["name"]: tenant for tenant in self._get("/tenants").json()["tenants"]}
        # Whatever limits were set, calls are answered under them.
        answer = requests.get(
            f"{self.url}/zoact/v1/info", headers={"authorization": f"Bearer {self._key}"}, timeout=TIMEOUT_S
        )
        if answer.status_code >= 500:
            self.findings.append(f"limits {tenants.get('fuzz')}: {answer.text}")
        if answer.status_code == requests.codes.unauthorized:
            self._key = self._add_tenant()
        self._session.put(
            f"{self.url}/zoact/v1/tenants/fuzz/limits", json={"requests_per_minute": None}, timeout=TIMEOUT_S
        )
        for name in tenants.keys() - {"fuzz"}:
            self._session.delete(f"{self.url}/zoact/v1/tenants/{name}", timeout=TIMEOUT_S)
        there = {info.name: info for info in self._client.adapters()}
        for name in (there.keys() - {MODEL, NEW}) if len(there) > MOST_ADAPTERS else ():
            self._client.adapter(name).delete()
        if NEW in there and there[NEW].state != "new":
            Adapter(self._client._transport, NEW).delete()
            del there[NEW]
        if NEW not in there:
            self._client.create_adapter(NEW, rank=2)
        model = (
            self._client.create_adapter(MODEL, rank=2, basis=Basis(source="random"), exist_ok=True)
            if MODEL not in there
            else self._client.adapter(MODEL)
        )
        if model.info.state == "new":
            model.calibrate()
            model.update(Update(0, ((1, 0.1),)))
        return self._read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zoact-fuzz-") as name:
        server = Server(make_tiny_model(Path(name, "model")), "transformers", Path(name), OPERATOR)
        try:
            fuzz = Fuzz(server.start().url)
            fuzz.run(arguments.cases, arguments.seed)
        finally:
            server.kill()
    print(json.dumps({"cases": fuzz.answers.total(), "by status": dict(sorted(fuzz.answers.items()))}, indent=2))
    for finding in fuzz.findings[:20]:
        print(finding)
    if fuzz.findings:
        raise SystemExit(f"{len(fuzz.findings)} findings")


if __name__ == "__main__":
    main()
