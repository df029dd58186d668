"""The gate between a server's start and its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server_ext.engines.transformers import TransformersEngine
from server_ext.errors import ApiError
from server_ext.gate import Gate
from server_ext.schemas import BasisSpec, Calibrate, CreateAdapter, Update
from server_ext.service import Service
from server_ext.tenants import Tenants
from tests.server_ext.support import OPERATOR

NAMES = ("acme/a", "acme/b", "acme/c")


def test_a_server_told_to_end_while_adapters_come_back_loses_none(tiny_model: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(str(tiny_model))

    def gate() -> Gate:
        return Gate(Service(engine, tmp_path), Tenants(tmp_path / "tenants.sqlite"))

    async def run(steps_before_the_end: int) -> list[tuple[str, int]]:
        first = gate()
        first.begin()
        with pytest.raises(ApiError, match="still starting"):
            first.check_ready()
        for _ in range(steps_before_the_end):
            await asyncio.sleep(0)
        await first.drain()
        with pytest.raises(ApiError, match="about to stop"):
            first.check_ready()
        second = gate()
        await second.restore()
        found: list[tuple[str, int]] = [(a.info().state, a.version) for a in second.service.registry.all()]
        await second.drain()
        return found

    async def make() -> None:
        first = gate()
        await first.restore()
        for name in NAMES:
            await first.service.create(OPERATOR, CreateAdapter(name=name, basis=BasisSpec(source="random")))
            await first.service.calibrate(OPERATOR, name, Calibrate())
            await first.service.update(name, Update(base_version=0, terms=[(1, 0.5)]))
        await first.drain()

    asyncio.run(make())
    for steps in (0, 1, 5, 50):
        assert asyncio.run(run(steps)) == [("ready", 1)] * len(NAMES)
