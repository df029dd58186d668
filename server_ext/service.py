"""The calls of ``/zoact/v1``, whatever the engine."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from weakref import WeakValueDictionary

import numpy as np
from structlog.contextvars import bind_contextvars

from server_ext import schemas
from server_ext.adapters import BYTES_PER_COEFFICIENT, Adapter
from server_ext.basis import Basis, random_test_matrix
from server_ext.disk import in_thread, spooled
from server_ext.engines.base import CalibrationRow, Engine, GeneratedText
from server_ext.errors import BATCH_TOO_LARGE, ApiError, invalid
from server_ext.export import Exported, write_export
from server_ext.fairness import FairQueue
from server_ext.importing import largest_archive, read_lora
from server_ext.journal import AdapterRow, Entry
from server_ext.metrics import Metrics
from server_ext.registry import SNAPSHOT_EVERY, Registry
from server_ext.rows import TOO_LONG, RowScore, TokenRow
from server_ext.scoring import Scorer
from server_ext.store import Point
from server_ext.tenants import Caller
from server_ext.together import Gone, unless
from server_ext.tokeniser import Tokeniser
from zoact_remote.digest import basis_digest, coefficients_digest
from zoact_remote.errors import InvalidValue
from zoact_remote.layout import Layout, select_sites
from zoact_remote.noise import DISTRIBUTIONS, NOISE_VERSION, Distribution
from zoact_remote.wire import Change, Probe, Rollback, Update

EXPORTS_ON_DISK = 4
"""Of a tenant's; for a further one it waits until somebody has read one."""


class Service:
    """Checks calls, and answers them from the registry's adapters and the engine.

    Calls name adapters that their caller owns: the routes see to that. What is evaluated for a caller who has gone is
    given up, but for calls that change an adapter: those always run to their end.

    Args:
        engine: evaluates.
        directory: of the registry.
        snapshot_every: changes of an adapter from one snapshot to the next.
        metrics: count what happens; in a registry of their own if None.

    Raises:
        ValueError: the directory is in use, or belongs to another model.

    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        snapshot_every: int = SNAPSHOT_EVERY,
        metrics: Metrics | None = None,
    ) -> None:
        self.engine = engine
        self.metrics = metrics or Metrics()
        self._directory = directory
        self.registry = Registry(engine, directory, self.metrics, snapshot_every)
        self._turns = FairQueue(engine.tokens_at_once)
        # A text holds its place from its first token to its last: those who train would wait long behind it.
        self._texts = FairQueue(engine.tokens_at_once)
        self._tokeniser = Tokeniser(engine)
        self._scorer = Scorer(engine, self._turns, self.metrics)
        self._creating = asyncio.Lock()
        self._importing = asyncio.Lock()
        self._exporting = asyncio.Lock()
        # By tenant, as long as anybody holds them or waits.
        self._uploads: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._exports: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    # Adapters ---------------------------------------------------------------------------------------------------------

    def info(self, limits: schemas.TenantLimits) -> schemas.Info:
        model = self.engine.model
        return schemas.Info(
            model=schemas.ModelInfo(name=model.name, digest=model.digest, dtype=model.dtype),
            engine=schemas.EngineInfo(name=self.engine.name, version=self.engine.version),
            noise=schemas.NoiseSpec(version=NOISE_VERSION, distributions=list(DISTRIBUTIONS)),
            sites=[schemas.SiteInfo(**site.to_json()) for site in self.engine.sites],
            limits=schemas.Limits(
                **limits.model_dump(exclude={"max_rank", "max_import_bytes"}),
                max_rank=self._max_rank(limits),
                max_import_bytes=self.max_import_bytes(limits),
                max_row_tokens=model.max_tokens,
                max_terms=schemas.MAX_TERMS,
                max_choices=schemas.MAX_CHOICES,
            ),
        )

    def list_adapters(self, caller: Caller) -> schemas.AdapterList:
        return schemas.AdapterList(
            adapters=[adapter.info() for adapter in self.registry.all() if caller.owns(adapter.row.name)]
        )

    async def create(self, caller: Caller, ask: schemas.CreateAdapter) -> schemas.AdapterInfo:
        if not caller.owns(ask.name):
            raise ApiError(403, "foreign_tenant", f"name: must begin with {caller.tenant}/ for this API key", "name")
        if ask.rank > self._max_rank(caller.limits):
            raise invalid("rank", f"must be at most max_rank ({self._max_rank(caller.limits)})")
        try:
            layout = Layout(select_sites(self.engine.sites, ask.sites), ask.rank)
        except ValueError as error:
            raise invalid("sites", str(error)) from None
        narrowest = min(layout.inputs.values())
        if ask.rank > narrowest:
            raise invalid("rank", f"must be at most the width of the narrowest input, {narrowest}")
        row = self._row(ask.name, layout, ask.noise, schemas.BasisInfo(**ask.basis.model_dump()))
        # One at a time: whoever asks for many at once has no more room than others.
        async with self._creating:
            self._check_room(caller, layout)
            return (await self.registry.add(row, layout)).info()

    async def import_adapter(
        self, caller: Caller, name: str, archive: AsyncIterable[bytes], noise: Distribution
    ) -> schemas.AdapterInfo:
        if re.fullmatch(schemas.TENANT_ADAPTER, name) is None:
            raise invalid("adapter", f"must match {schemas.TENANT_ADAPTER}")
        engine, max_rank = self.engine, self._max_rank(caller.limits)
        async with self._uploads.setdefault(schemas.tenant_of(name), asyncio.Lock()):
            self.registry.check_free(name)
            self._check_number(caller)
            # One archive of every tenant's waits on disk, and one of them is taken into memory at a time.
            async with spooled(archive, self._directory) as file, self._importing:
                found = await asyncio.to_thread(read_lora, file, engine.sites, max_rank, engine.model.digest)
                digest = await asyncio.to_thread(basis_digest, found.basis)
                flat_digest = await asyncio.to_thread(coefficients_digest, found.flat, found.layout)
                basis = schemas.BasisInfo(source="imported", digest=digest)
                row = self._row(name, found.layout, noise, basis, flat_digest)
                async with self._creating:
                    self._check_room(caller, found.layout)
                    return (await self.registry.add_imported(row, found.layout, found.basis, found.flat)).info()

    def _row(
        self,
        name: str,
        layout: Layout,
        noise: Distribution,
        basis: schemas.BasisInfo,
        imported_digest: str | None = None,
    ) -> AdapterRow:
        """A new adapter's row."""
        return AdapterRow(
            key=uuid.uuid4().hex,
            name=name,
            model_digest=self.engine.model.digest,
            rank=layout.rank,
            sites=tuple(site.name for site in layout.sites),
            distribution=noise,
            noise_version=NOISE_VERSION,
            basis=basis,
            created=datetime.now(timezone.utc),
            imported_digest=imported_digest,
        )

    async def delete(self, name: str) -> None:
        async with self.registry.changing(name) as adapter:
            await self.registry.remove(adapter)

    def _max_rank(self, limits: schemas.TenantLimits) -> int:
        return self.engine.max_rank if limits.max_rank is None else min(limits.max_rank, self.engine.max_rank)

    def max_import_bytes(self, limits: schemas.TenantLimits) -> int:
        """The most that an import's body may have: what an adapter of the largest rank takes, if not given."""
        given = limits.max_import_bytes
        return largest_archive(self.engine.sites, self._max_rank(limits)) if given is None else given

    def _owned(self, caller: Caller) -> list[Layout]:
        return [adapter.layout for adapter in self.registry.all() if caller.owns(adapter.row.name)]

    def _check_number(self, caller: Caller) -> None:
        """Raises ApiError (403) if a tenant has as many adapters as it may have."""
        most = caller.limits.max_adapters
        if most is not None and len(self._owned(caller)) >= most:
            raise ApiError(403, "limit_exceeded", f"name: max_adapters ({most}) adapters exist", "name")

    def _check_room(self, caller: Caller, layout: Layout) -> None:
        """Raises ApiError (403) if another adapter would be more than its tenant may have."""
        self._check_number(caller)
        limits, owned = caller.limits, self._owned(caller)
        held = BYTES_PER_COEFFICIENT * sum(each.parameters for each in [*owned, layout])
        if limits.max_coefficient_bytes is not None and held > limits.max_coefficient_bytes:
            raise ApiError(
                403,
                "limit_exceeded",
                f"rank: coefficients would come to {held} bytes, beyond max_coefficient_bytes "
                f"({limits.max_coefficient_bytes})",
                "rank",
            )

    async def calibrate(self, caller: Caller, name: str, ask: schemas.Calibrate) -> schemas.BasisResult:
        adapter = self.registry.adapter(name)
        spec = adapter.row.basis
        if spec.digest is not None:
            raise ApiError(409, "basis_exists", f"the basis of {name!r} has been taken; create a new adapter instead")
        if spec.source == "activations" and not ask.rows:
            raise invalid("rows", "a basis of activations needs at least one row")
        rows = await self._tokeniser.rows(adapter.row.tenant, ask.rows, caller.limits, [spec.passes] * len(ask.rows))
        async with self.registry.changing(name) as adapter:
            if adapter.row.basis.digest is not None:
                raise ApiError(409, "basis_exists", f"the basis of {name!r} has been taken meanwhile")
            bases, seen = await self._take_basis(adapter, rows)
            vectors = {key: basis.vectors for key, basis in bases.items()}
            energy = {key: basis.energy for key, basis in bases.items() if not np.isnan(basis.energy)}
            digest = await self.registry.set_basis(adapter, vectors, energy, seen)
        return schemas.BasisResult(digest=digest, energy=energy, rows=len(rows), positions_seen=seen)

    # Training ---------------------------------------------------------------------------------------------------------

    async def update(self, name: str, ask: schemas.Update) -> schemas.UpdateResult:
        async with self.registry.changing(name) as adapter:
            return await self._change(adapter, ask.to_wire())

    async def rollback(self, name: str, ask: schemas.Rollback) -> schemas.UpdateResult:
        async with self.registry.changing(name) as adapter:
            return await self._change(adapter, Rollback(ask.base_version, ask.to_version, ask.key))

    async def _change(self, adapter: Adapter, change: Change, path: str = "") -> schemas.UpdateResult:
        result = await self.registry.change(adapter, change, path)
        bind_contextvars(version=result.version)
        return result

    async def losses(
        self, caller: Caller, name: str, ask: schemas.AskLosses, gone: Gone | None = None
    ) -> schemas.Losses:
        started = time.perf_counter()
        adapter = await self.registry.calibrated(name)
        if len(ask.probes) > caller.limits.max_probes:
            message = f"at most max_probes ({caller.limits.max_probes}) a call, got {len(ask.probes)}"
            raise invalid("probes", message, BATCH_TOO_LARGE)
        everything = range(len(ask.rows))
        sides = [(probe, part, sign) for probe, part in _parts(ask.probes, len(everything)) for sign in probe.signs]
        times = _times([part for _, part, _ in sides] + ([everything] if ask.base else []), len(everything))
        rows = await self._tokeniser.rows(adapter.row.tenant, ask.rows, caller.limits, times)
        result = None
        wanted = ask.version
        if ask.update is not None:
            lands_at = ask.update.base_version + 1
            if wanted is not None and wanted != lands_at:
                raise invalid("version", f"must be {lands_at}, the version that the carried update leads to")
            async with self.registry.changing(name) as adapter:
                result = await self._change(adapter, ask.update.to_wire(), "update.")
            wanted = result.version
        updated = time.perf_counter()
        async with self._at(adapter, wanted, perturbed=bool(sides)) as (version, point):
            points: list[tuple[Point | None, range]] = [
                (replace(point, seed=probe.seed, epsilon=sign * probe.epsilon), part)
                for probe, part, sign in sides
                if point is not None
            ]
            if ask.base:
                points.append((None if adapter.is_model(version) else point, everything))
            scoring = self._scorer.score(adapter.row.tenant, points, rows)
            results, tokens = await unless(gone if ask.update is None else None, scoring)
        means = [_mean_loss(scores) for scores in results]
        unperturbed = means.pop() if ask.base else None
        plus_minus = iter(means)
        losses = [
            schemas.ProbeLoss(
                seed=probe.seed,
                epsilon=probe.epsilon,
                plus=next(plus_minus),
                minus=next(plus_minus) if probe.sides == "both" else None,
            )
            for probe in ask.probes
        ]
        now = time.perf_counter()
        self.metrics.evaluated(adapter.row.tenant, len(losses), tokens, now - started)
        return schemas.Losses(
            version=version,
            losses=losses,
            base=unperturbed,
            tokens=tokens,
            update=result,
            timing=schemas.Timing(update_s=updated - started, forward_s=now - updated, total_s=now - started),
        )

    async def scores(
        self, caller: Caller, name: str, ask: schemas.AskScores, gone: Gone | None = None
    ) -> schemas.Scores:
        adapter = await self.registry.calibrated(name)
        rows = await self._tokeniser.rows(adapter.row.tenant, ask.rows, caller.limits, [1] * len(ask.rows))
        async with self._point(adapter, ask.version, ask.probe) as (version, point):
            scoring = self._scorer.score(adapter.row.tenant, [(point, range(len(rows)))], rows)
            (scores,), tokens = await unless(gone, scoring)
        return schemas.Scores(
            version=version,
            rows=[
                schemas.RowScores(logprobs=list(s.logprobs), tokens=[len(c) for c in r.continuations], loss=s.loss)
                for r, s in zip(rows, scores, strict=True)
            ],
            loss=_mean_loss(scores),
            tokens=tokens,
        )

    async def generate(self, name: str, ask: schemas.AskGeneration, gone: Gone | None = None) -> schemas.Generation:
        adapter = await self.registry.calibrated(name)
        tokens = await self._tokeniser.prompt(adapter.row.tenant, ask)
        room = self.engine.model.max_tokens - len(tokens)
        if ask.max_tokens > room:
            raise invalid("max_tokens", f"at most {max(room, 0)} tokens fit behind this prompt", TOO_LONG)

        async def write(point: Point | None) -> GeneratedText:
            async with self._texts.turn(adapter.row.tenant, len(tokens) + ask.max_tokens):
                return await self.engine.generate(point, tokens, ask.max_tokens, ask.temperature, ask.seed, ask.stop)

        async with self._point(adapter, ask.version, ask.probe) as (version, point):
            text = await unless(gone, write(point))
        return schemas.Generation(
            version=version,
            text=text.text,
            token_ids=list(text.tokens),
            finish_reason="stop" if text.stopped else "length",
        )

    # History ----------------------------------------------------------------------------------------------------------

    async def journal(self, name: str, after: int, limit: int) -> schemas.JournalPage:
        adapter = await self.registry.calibrated(name)
        entries = await self.registry.entries(adapter, after, limit)
        info = adapter.info()
        return schemas.JournalPage(
            adapter=name,
            basis_digest=info.basis.digest or "",
            imported_digest=info.imported_digest,
            noise=info.noise,
            updates=[_journal_entry(entry) for entry in entries],
        )

    @asynccontextmanager
    async def export(self, name: str, version: int | None, dtype: str) -> AsyncIterator[IO[bytes]]:
        """A version's archive in a temporary file, at its end; gone with the context."""
        adapter = await self.registry.calibrated(name)
        version = self.registry.existing(adapter, version)
        places = self._exports.setdefault(adapter.row.tenant, asyncio.Semaphore(EXPORTS_ON_DISK))
        async with places:
            with await in_thread(lambda: TemporaryFile(dir=self._directory)) as file:
                await self._write_export(adapter, version, dtype, file)
                yield file

    async def _write_export(self, adapter: Adapter, version: int, dtype: str, file: IO[bytes]) -> None:
        """Writes a version's archive. One is in memory at a time, and only until it is written."""
        model = self.engine.model
        async with self.registry.at(adapter, version) as point, self._exporting:
            flat = await self.engine.read(point.key, version)
            basis = await self.registry.basis(adapter)
            name, layout = adapter.row.name, adapter.layout
            exported = Exported(name, version, point.digest, model.name, model.digest, layout, basis, flat)
            await in_thread(write_export, exported, self.engine.sites, dtype, file)

    async def _take_basis(self, adapter: Adapter, rows: list[TokenRow]) -> tuple[dict[str, Basis], int]:
        spec, layout = adapter.row.basis, adapter.layout
        if spec.source == "random":
            return await asyncio.to_thread(_random_basis, layout, spec.seed), 0
        calibration = [CalibrationRow(row.prompt + row.target[:-1], len(row.prompt)) for row in rows]
        tokens = spec.passes * sum(len(row.tokens) for row in calibration)
        try:
            async with self._turns.turn(adapter.row.tenant, tokens):
                return await self.engine.calibrate(calibration, layout, spec.spec())
        except ValueError as error:
            raise invalid("rows", str(error)) from None

    @asynccontextmanager
    async def _at(
        self, adapter: Adapter, version: int | None, perturbed: bool
    ) -> AsyncIterator[tuple[int, Point | None]]:
        """A version (the newest for None) and its point; no point is needed to evaluate the model itself."""
        version = self.registry.existing(adapter, version)
        bind_contextvars(version=version)
        if adapter.is_model(version) and not perturbed:
            yield version, None
        else:
            async with self.registry.at(adapter, version) as point:
                yield version, point

    @asynccontextmanager
    async def _point(
        self, adapter: Adapter, version: int | None, probe: schemas.SignedProbe | None
    ) -> AsyncIterator[tuple[int, Point | None]]:
        """A version of an adapter, and the point of it or of a probe around it."""
        async with self._at(adapter, version, probe is not None) as (found, point):
            if probe is not None and point is not None:
                point = replace(point, seed=probe.seed, epsilon=probe.sign * probe.epsilon)
            yield found, point


def _random_basis(layout: Layout, seed: int) -> dict[str, Basis]:
    drawn = {
        name: random_test_matrix(width, layout.rank, seed, i) for i, (name, width) in enumerate(layout.inputs.items())
    }
    return {name: Basis(vectors.astype(np.float32), float("nan")) for name, vectors in drawn.items()}


def _journal_entry(entry: Entry) -> schemas.JournalEntry:
    change, rollback_to = entry.change, None
    if isinstance(change, Rollback):
        rollback_to = change.to_version
        change = Update(change.base_version, (), key=change.key)
    return schemas.JournalEntry(
        version=entry.version,
        **change.to_json(),
        rollback_to=rollback_to,
        digest_before=entry.digest_before,
        digest=entry.digest or "",
        time=entry.time,
    )


def _mean_loss(scores: Sequence[RowScore]) -> float:
    return float(np.mean([score.loss for score in scores]))


def _parts(asked: Sequence[schemas.Probe], rows: int) -> list[tuple[Probe, range]]:
    """The probes, each with its rows of a batch of so many."""
    found = []
    for i, probe in enumerate(each.to_wire() for each in asked):
        try:
            found.append((probe, probe.rows_of(rows)))
        except InvalidValue as error:
            raise invalid(f"probes[{i}].part", error.message) from None
    return found


def _times(parts: Iterable[range], rows: int) -> list[int]:
    """How often each row of a batch is evaluated."""
    changes = [0] * (rows + 1)
    for part in parts:
        changes[part.start] += 1
        changes[part.stop] -= 1
    return list(accumulate(changes[:-1]))
