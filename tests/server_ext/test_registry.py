"""The registry on a real engine: what stands in the journal is what is served, whatever happened in between."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from server_ext import basis_files, snapshots
from server_ext.engines.transformers import TransformersEngine
from server_ext.errors import ApiError
from server_ext.journal import Change, Rollback
from server_ext.schemas import BasisSpec, Calibrate, CreateAdapter
from server_ext.service import Service
from server_ext.tenants import OPERATOR
from tests.strategies import SEEDS
from zoact_remote import Update
from zoact_remote.digest import coefficients_digest
from zoact_remote.layout import Layout
from zoact_remote.replay import apply_update

EVERY = 3
"""Changes between snapshots: few, so that histories have several."""


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(str(tiny_model))


@dataclass
class Told:
    """What a model of the registry knows of an adapter: its coefficients by version, and its changes by key."""

    layout: Layout
    flats: list[NDArray[np.float32]]
    by_key: dict[str, tuple[Change, int]]


class Stage:
    """A service on an engine, which may be stopped, killed and started again."""

    def __init__(self, engine: TransformersEngine, directory: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self._engine = engine
        self._directory = directory
        self.start()

    def run(self, awaitable: Awaitable[object]) -> object:
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, 60))

    def start(self) -> None:
        async def start() -> None:
            self.service = Service(self._engine, self._directory)
            self.service.registry._snapshots.every = EVERY
            await self.service.registry.restore()

        self.run(start())

    def stop(self) -> None:
        self.run(self.service.registry.close())

    def kill(self) -> None:
        """The files as they are, without a close: what a process that dies leaves behind."""
        copy = self._directory.with_name(f"{self._directory.name}-")
        shutil.copytree(self._directory, copy, ignore=shutil.ignore_patterns("*-shm", "lock"))
        self.stop()
        self._directory = copy

    @property
    def directory(self) -> Path:
        return self._directory
