"""The Grafana dashboard asks for what servers export, and for all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server_ext.support import Figures
from tests.support import ROWS, Server, trained_adapter
from zoact_remote import Client, Probe, StaleVersion, Update

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples/grafana-dashboard.json").read_text())
METRIC = re.compile(r"\b(?:zoact_|vllm:)\w+")
LABELS = re.compile(r"by \((.*?)\)|(\w+)=~?\"|\{\{(\w+)\}\}")


def queries() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield from panel.get("targets", ())


def asked(text: str) -> set[str]:
    return set(METRIC.findall(text))


@pytest.fixture
def figures(server: Server, client: Client) -> Figures:
    """What a server exports after calls of every kind that is counted."""
    adapter = trained_adapter(client)
    adapter.losses(ROWS, [Probe(1, 0.1)])
    adapter.rollback(0)
    with pytest.raises(StaleVersion):
        adapter.update(Update(0, ((1, 0.1),)))
    return Figures.of(server)


def test_every_query_is_answered(server: Server, figures: Figures) -> None:
    labels: dict[str, set[str]] = {}
    for name, found in figures:
        labels.setdefault(name, set()).update(label for label, _ in found)
    names = {name for query in queries() for name in asked(query["expr"])}
    assert names
    assert {name for name in names - labels.keys() if server.engine == "vllm" or not name.startswith("vllm:")} == set()
    for query in queries():
        (name,) = asked(query["expr"])
        if name in labels:
            groups = LABELS.findall(query["expr"] + query["legendFormat"])
            assert {label for group in groups for part in group for label in part.split(", ") if label} <= labels[name]


def test_whatever_is_exported_is_shown(figures: Figures) -> None:
    def ours(names: Iterable[str]) -> set[str]:
        # Of a histogram any part will do; when a series began is the client library's own.
        whole = {re.sub("_(bucket|count|sum)$", "", name) for name in names if name.startswith("zoact_")}
        return {name for name in whole if not name.endswith("_created")}

    assert ours(name for name, _ in figures) == ours(name for query in queries() for name in asked(query["expr"]))


def test_it_can_be_provisioned() -> None:
    """No data source, and no number of one Grafana's, is written into it."""
    assert "id" not in DASHBOARD
    assert "__inputs" not in DASHBOARD
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    charts = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    for source in (*charts, *queries(), variables["tenant"]):
        assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert asked(variables["tenant"]["definition"]) == {"zoact_adapters"}
