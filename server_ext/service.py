"""The calls of ``/zoact/v1``, whatever the engine: checks, order and durability."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from server_ext import basis_files, schemas
from server_ext.adapters import Adapter, OldVersions
from server_ext.basis import Basis, random_test_matrix
from server_ext.coefficients import LARGEST_COEFFICIENT, Coefficients, largest_step
from server_ext.engines.base import CalibrationRow, Engine
from server_ext.errors import ApiError, invalid
from server_ext.export import Exported, export_tar
from server_ext.journal import AdapterRow, Journal
from server_ext.locks import WriteHold
from server_ext.rows import RowScore, TokenRow, contexts_of, score_of, tokenise, tokenise_rows
from server_ext.store import Point, basis_digest
from zoact_remote.layout import Layout, select_sites
from zoact_remote.noise import DISTRIBUTIONS, NOISE_VERSION
from zoact_remote.wire import Update

T = TypeVar("T")


@dataclass(frozen=True)
class CallLimits:
    """What one call may ask for."""

    max_probes: int = 256
    max_rows: int = 1024
    max_call_tokens: int = 1 << 20


class Service:
    """All adapters of one engine, with their journal and bases in one directory."""

    def __init__(self, engine: Engine, directory: Path, limits: CallLimits | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.engine = engine
        self.limits = limits or CallLimits()
        self._directory = directory
        self._journal = Journal(directory / "journal.sqlite")
        # One thread: SQLite sees its statements in order, and commits wait for the disk beside the event loop.
        self._disk = ThreadPoolExecutor(1, "zoact-disk")
        self._adapters: dict[str, Adapter] = {}
        self._old_versions = OldVersions(engine, self._put_old_version)

    # Start and stop ---------------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Brings every adapter of the journal back at its last version.

        Raises:
            ValueError: the journal belongs to another model.

        """
        for row in await self._on_disk(self._journal.adapters):
            try:
                layout = Layout(select_sites(self.engine.sites, row.sites), row.rank)
            except ValueError as error:
                raise ValueError(f"adapter {row.name} in {self._directory} is not of this model: {error}") from None
            adapter = self._adapters[row.name] = Adapter(row, layout)
            if row.basis.digest is not None:
                await self._load(adapter)

    async def close(self) -> None:
        await self._on_disk(self._journal.close)
        self._disk.shutdown()

    # Adapters ---------------------------------------------------------------------------------------------------------

    def info(self) -> schemas.Info:
        model = self.engine.model
        return schemas.Info(
            model=schemas.ModelInfo(name=model.name, digest=model.digest, dtype=model.dtype),
            engine=schemas.EngineInfo(name=self.engine.name, version=self.engine.version),
            noise=schemas.NoiseSpec(version=NOISE_VERSION, distributions=list(DISTRIBUTIONS)),
            sites=[schemas.SiteInfo(**site.to_json()) for site in self.engine.sites],
            limits=schemas.Limits(
                max_rank=self.engine.max_rank,
                max_probes=self.limits.max_probes,
                max_rows=self.limits.max_rows,
                max_row_tokens=model.max_tokens,
                max_call_tokens=self.limits.max_call_tokens,
                max_terms=schemas.MAX_TERMS,
                max_choices=schemas.MAX_CHOICES,
            ),
        )

    def list_adapters(self) -> schemas.AdapterList:
        return schemas.AdapterList(adapters=[adapter.info() for adapter in self._adapters.values()])

    def adapter(self, name: str) -> Adapter:
        """Raises ApiError (404) for a name that is not there."""
        try:
            return self._adapters[name]
        except KeyError:
            raise ApiError(404, "adapter_not_found", f"there is no adapter {name!r}", "adapter") from None

    async def create(self, ask: schemas.CreateAdapter) -> schemas.AdapterInfo:
        if ask.rank > self.engine.max_rank:
            raise invalid("rank", f"must be at most {self.engine.max_rank} on this server")
        try:
            layout = Layout(select_sites(self.engine.sites, ask.sites), ask.rank)
        except ValueError as error:
            raise invalid("sites", str(error)) from None
        narrowest = min(layout.inputs.values())
        if ask.rank > narrowest:
            raise invalid("rank", f"must be at most the width of the narrowest input, {narrowest}")
        row = AdapterRow(
            key=uuid.uuid4().hex,
            name=ask.name,
            rank=ask.rank,
            sites=tuple(site.name for site in layout.sites),
            distribution=ask.noise,
            noise_version=NOISE_VERSION,
            basis=schemas.BasisInfo(**ask.basis.model_dump()),
            created=datetime.now(timezone.utc),
        )
        try:
            await self._on_disk(self._journal.add_adapter, row)
        except KeyError:
            raise ApiError(409, "adapter_exists", f"an adapter {ask.name!r} exists already", "name") from None
        adapter = self._adapters[ask.name] = Adapter(row, layout)
        return adapter.info()

    async def delete(self, name: str) -> None:
        async with self._writing(name) as (adapter, _):
            await self._on_disk(self._journal.remove_adapter, adapter.row.key)
            adapter.deleted = True
            del self._adapters[name]
            await self._old_versions.forget(adapter)
            await self.engine.drop(adapter.row.key)
            await self._on_disk(self._basis_path(adapter).unlink, True)

    async def calibrate(self, name: str, ask: schemas.Calibrate) -> schemas.BasisResult:
        adapter = self.adapter(name)
        spec = adapter.row.basis
        if spec.digest is not None:
            raise ApiError(409, "basis_exists", f"the basis of {name!r} has been taken; create a new adapter instead")
        if spec.source == "activations" and not ask.rows:
            raise invalid("rows", "a basis of activations needs at least one row")
        rows = self._tokenise(ask.rows, points=spec.passes)
        async with self._writing(name) as (adapter, _):
            if adapter.row.basis.digest is not None:
                raise ApiError(409, "basis_exists", f"the basis of {name!r} has been taken meanwhile")
            bases, seen = await self._take_basis(adapter, rows)
            vectors = {key: basis.vectors for key, basis in bases.items()}
            energy = {key: basis.energy for key, basis in bases.items() if not np.isnan(basis.energy)}
            digest = basis_digest(vectors)
            await self._on_disk(basis_files.write, self._basis_path(adapter), vectors)
            taken = spec.model_copy(update={"digest": digest, "energy": energy, "positions_seen": seen})
            await self._on_disk(self._journal.set_basis, adapter.row.key, taken)
            adapter.row = replace(adapter.row, basis=taken)
            await self._load(adapter)
        return schemas.BasisResult(digest=digest, energy=energy, rows=len(rows), positions_seen=seen)

    # Training ---------------------------------------------------------------------------------------------------------

    async def update(self, name: str, ask: schemas.Update) -> schemas.UpdateResult:
        async with self._writing(name) as (adapter, _):
            return await self._apply(adapter, ask)

    async def losses(self, name: str, ask: schemas.AskLosses) -> schemas.Losses:
        started = time.perf_counter()
        self._ready(name)
        sides = sum(2 if probe.sides == "both" else 1 for probe in ask.probes) + ask.base
        if len(ask.probes) > self.limits.max_probes:
            raise invalid("probes", f"at most {self.limits.max_probes} probes a call")
        rows = self._tokenise(ask.rows, points=sides)
        if ask.update is None:
            async with self._reading(name) as adapter:
                return await self._losses(adapter, ask, rows, None, started)
        async with self._writing(name) as (adapter, hold):
            lands_at = ask.update.base_version + 1
            if ask.version is not None and ask.version != lands_at:
                raise invalid("version", f"must be {lands_at}, the version that the carried update leads to")
            result = await self._apply(adapter, ask.update, "update.")
            await hold.downgrade()
            return await self._losses(adapter, ask, rows, result, started)

    async def scores(self, name: str, ask: schemas.AskScores) -> schemas.Scores:
        self._ready(name)
        rows = self._tokenise(ask.rows, points=1)
        async with self._point(name, ask.version, ask.probe) as (version, point):
            ((scores, tokens),) = await self._score([point], rows)
        return schemas.Scores(
            version=version,
            rows=[
                schemas.RowScores(logprobs=list(s.logprobs), tokens=[len(c) for c in r.continuations], loss=s.loss)
                for r, s in zip(rows, scores, strict=True)
            ],
            loss=_mean_loss(scores),
            tokens=tokens,
        )

    async def generate(self, name: str, ask: schemas.AskGeneration) -> schemas.Generation:
        self._ready(name)
        if ask.messages is not None:
            try:
                tokens = self.engine.encode_chat([message.model_dump() for message in ask.messages])
            except Exception as error:  # a chat template is a program of the model's author and may raise anything
                raise invalid("messages", f"the model's chat template refuses them: {error}") from None
            if not tokens:
                raise invalid("messages", "the model's chat template makes nothing of them")
        else:
            assert ask.prompt is not None
            tokens = list(tokenise(ask.prompt, "prompt", True, self.engine.encode, self.engine.model.vocabulary))
        room = self.engine.model.max_tokens - len(tokens)
        if ask.max_tokens > room:
            raise invalid(
                "max_tokens", f"at most {max(room, 0)} tokens fit behind this prompt", "context_length_exceeded"
            )
        async with self._point(name, ask.version, ask.probe) as (version, point):
            text = await self.engine.generate(point, tuple(tokens), ask.max_tokens, ask.temperature, ask.seed)
        return schemas.Generation(
            version=version,
            text=text.text,
            token_ids=list(text.tokens),
            finish_reason="stop" if text.stopped else "length",
        )

    # History ----------------------------------------------------------------------------------------------------------

    async def journal(self, name: str, after: int, limit: int) -> schemas.JournalPage:
        async with self._reading(name) as adapter:
            rows = await self._on_disk(self._journal.updates, adapter.row.key, after, adapter.version, limit)
            info = adapter.info()
        return schemas.JournalPage(
            adapter=name,
            basis_digest=info.basis.digest or "",
            noise=info.noise,
            updates=[
                schemas.JournalEntry(
                    version=row.version, digest=row.digest or "", time=row.time, **row.update.to_json()
                )
                for row in rows
            ],
        )

    async def export(self, name: str, version: int | None, dtype: str) -> bytes:
        async with self._reading(name) as adapter:
            version = self._existing(adapter, version)
            if version == adapter.version:
                assert adapter.digest is not None
                flat, digest = await self.engine.read(adapter.row.key), adapter.digest
            else:
                coefficients = await self._replay(adapter, version)
                flat, digest = coefficients.flat.numpy(), coefficients.digest()
            basis = await self._on_disk(basis_files.read, self._basis_path(adapter))
            exported = Exported(
                name, version, digest, self.engine.model.name, self.engine.model.digest, adapter.layout, basis, flat
            )
            return await asyncio.to_thread(export_tar, exported, self.engine.sites, dtype)

    # Inside -----------------------------------------------------------------------------------------------------------

    async def _on_disk(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(function, *args))

    def _basis_path(self, adapter: Adapter) -> Path:
        return self._directory / "bases" / f"{adapter.row.key}.safetensors"

    def _ready(self, name: str) -> Adapter:
        adapter = self.adapter(name)
        if adapter.digest is None:
            raise ApiError(409, "basis_missing", f"{name!r} has no basis yet: POST rows to its /basis first", "adapter")
        return adapter

    @asynccontextmanager
    async def _reading(self, name: str) -> AsyncIterator[Adapter]:
        """A calibrated adapter that does not change meanwhile."""
        adapter = self._ready(name)
        async with adapter.lock.read():
            if adapter.deleted:
                self.adapter(name)
            yield adapter

    @asynccontextmanager
    async def _writing(self, name: str) -> AsyncIterator[tuple[Adapter, WriteHold]]:
        """An adapter that nobody else reads or changes meanwhile."""
        adapter = self.adapter(name)
        async with adapter.lock.write() as hold:
            if adapter.deleted:
                self.adapter(name)
            yield adapter, hold

    def _tokenise(self, rows: Sequence[schemas.Row], points: int) -> list[TokenRow]:
        """Token rows that fit the limits when evaluated at a number of points."""
        if len(rows) > self.limits.max_rows:
            raise invalid("rows", f"at most {self.limits.max_rows} rows a call, got {len(rows)}")
        model = self.engine.model
        result = tokenise_rows(rows, self.engine.encode, model.vocabulary, model.max_tokens)
        tokens = points * sum(len(context.tokens) for row in result for context in contexts_of(row))
        if tokens > self.limits.max_call_tokens:
            raise invalid(
                "rows", f"{tokens} tokens over all sides exceed the limit of {self.limits.max_call_tokens} a call"
            )
        return result

    async def _take_basis(self, adapter: Adapter, rows: list[TokenRow]) -> tuple[dict[str, Basis], int]:
        spec, layout = adapter.row.basis, adapter.layout
        if spec.source == "random":
            inputs = enumerate(layout.inputs.items())
            drawn = {name: random_test_matrix(width, layout.rank, spec.seed, i) for i, (name, width) in inputs}
            return {name: Basis(v.astype(np.float32), float("nan")) for name, v in drawn.items()}, 0
        calibration = [CalibrationRow(row.prompt + row.target[:-1], len(row.prompt)) for row in rows]
        try:
            return await self.engine.calibrate(calibration, layout, spec.spec())
        except ValueError as error:
            raise invalid("rows", str(error)) from None

    async def _load(self, adapter: Adapter) -> None:
        """Puts an adapter into the engine as its journal says."""
        key = adapter.row.key
        basis = await self._on_disk(basis_files.read, self._basis_path(adapter))
        if basis_digest(basis) != adapter.row.basis.digest:
            raise ValueError(f"the basis file of {adapter.row.name} is damaged: {self._basis_path(adapter)}")
        adapter.digest = await self.engine.put(key, adapter.layout, adapter.row.distribution, basis, None, 0)
        adapter.version, adapter.largest = 0, math.inf
        for row in await self._on_disk(self._journal.updates, key):
            adapter.digest = await self.engine.update(key, row.update)
            adapter.version = row.version
            if row.digest is None:
                await self._on_disk(self._journal.set_digest, key, row.version, adapter.digest)
            elif row.digest != adapter.digest and adapter.row.distribution == "rademacher":
                raise ValueError(
                    f"version {row.version} of {adapter.row.name} replays to other coefficients than were acknowledged"
                )

    async def _apply(self, adapter: Adapter, ask: schemas.Update, path: str = "") -> schemas.UpdateResult:
        """Journals an update, then applies it. The adapter is held for writing; ``path`` is where the call has it."""
        self._ready(adapter.row.name)
        key, update = adapter.row.key, ask.to_wire()
        if update.key is not None:
            before = await self._on_disk(self._journal.find, key, update.key)
            if before is not None:
                if before.update != update:
                    raise ApiError(
                        409, "key_conflict", f"{path}key: another update was sent under this key", f"{path}key"
                    )
                assert before.digest is not None
                return schemas.UpdateResult(version=before.version, digest=before.digest, applied=False)
        if update.base_version != adapter.version:
            raise ApiError(
                412,
                "stale_version",
                f"{path}base_version: {update.base_version} is not the newest version ({adapter.version}); "
                "nothing changed",
                f"{path}base_version",
                current_version=adapter.version,
            )
        largest = await self._largest_after(adapter, update, path)
        version = await self._on_disk(self._journal.append, key, update)
        try:
            adapter.digest = await self.engine.update(key, update)
            adapter.version = version
            adapter.largest = largest
        except Exception:
            # The update stands in the journal, so it happened; the engine's copy is what has to catch up.
            await self._load(adapter)
        assert adapter.digest is not None
        await self._on_disk(self._journal.set_digest, key, version, adapter.digest)
        return schemas.UpdateResult(version=version, digest=adapter.digest, applied=True)

    async def _largest_after(self, adapter: Adapter, update: Update, path: str) -> float:
        """A bound on the coefficients after an update; ApiError if it is too large."""

        def bound() -> float:
            kept = (1.0 - update.decay) * adapter.largest if update.decay < 1.0 else 0.0
            return kept + largest_step(update, adapter.row.distribution)

        if bound() > LARGEST_COEFFICIENT:
            # The bound has added up every step so far, whatever its sign: look at what they came to.
            adapter.largest = float(np.abs(await self.engine.read(adapter.row.key)).max())
            if bound() > LARGEST_COEFFICIENT:
                limit = f"{LARGEST_COEFFICIENT:g}"
                raise invalid(f"{path}terms", f"coefficients could come to {bound():.3g}, beyond the limit of {limit}")
        return bound()

    async def _losses(
        self,
        adapter: Adapter,
        ask: schemas.AskLosses,
        rows: list[TokenRow],
        update: schemas.UpdateResult | None,
        started: float,
    ) -> schemas.Losses:
        begun = time.perf_counter()
        signs = [(p, sign) for p in ask.probes for sign in ((1, -1) if p.sides == "both" else (1,))]
        async with self._at(adapter, ask.version, perturbed=bool(signs)) as (version, point):
            points: list[Point | None] = [
                replace(point, seed=p.seed, epsilon=sign * p.epsilon) for p, sign in signs if point is not None
            ]
            if ask.base:
                points.append(point if version else None)
            results = await self._score(points, rows)
        means = [_mean_loss(scores) for scores, _ in results]
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
        return schemas.Losses(
            version=version,
            losses=losses,
            base=unperturbed,
            tokens=sum(tokens for _, tokens in results),
            update=update,
            timing=schemas.Timing(update_s=begun - started, forward_s=now - begun, total_s=now - started),
        )

    async def _score(self, points: Sequence[Point | None], rows: list[TokenRow]) -> list[tuple[list[RowScore], int]]:
        """By point: the rows' scores, and the tokens that went through the model."""
        contexts = [contexts_of(row) for row in rows]
        bounds = list(pairwise(accumulate((len(c) for c in contexts), initial=0)))
        flat = [context for row in contexts for context in row]
        tokens = sum(len(context.tokens) for context in flat)
        scores = await self.engine.score(points, flat)
        return [
            ([score_of(r, c, point[a:b]) for r, c, (a, b) in zip(rows, contexts, bounds, strict=True)], tokens)
            for point in scores
        ]

    # Versions ---------------------------------------------------------------------------------------------------------

    def _existing(self, adapter: Adapter, version: int | None) -> int:
        if version is None:
            return adapter.version
        if version > adapter.version:
            raise ApiError(
                404,
                "version_not_found",
                f"version: {version} does not exist; the newest is {adapter.version}",
                "version",
            )
        return version

    @asynccontextmanager
    async def _at(
        self, adapter: Adapter, version: int | None, perturbed: bool
    ) -> AsyncIterator[tuple[int, Point | None]]:
        """A version (the newest for None) and its point; no point is needed to evaluate version 0 itself."""
        version = self._existing(adapter, version)
        if version == 0 and not perturbed:
            yield 0, None
        elif version == adapter.version:
            yield version, adapter.newest
        else:
            async with self._old_versions.hold(adapter, version) as point:
                yield version, point

    @asynccontextmanager
    async def _point(
        self, name: str, version: int | None, probe: schemas.SignedProbe | None
    ) -> AsyncIterator[tuple[int, Point | None]]:
        """A version of an adapter by name, and the point of it or of a probe around it."""
        async with self._reading(name) as adapter, self._at(adapter, version, probe is not None) as (found, point):
            if probe is not None and point is not None:
                point = replace(point, seed=probe.seed, epsilon=probe.sign * probe.epsilon)
            yield found, point

    async def _put_old_version(self, key: str, adapter: Adapter, version: int) -> str:
        coefficients = await self._replay(adapter, version)
        basis = await self._on_disk(basis_files.read, self._basis_path(adapter))
        flat = coefficients.flat.numpy()
        return await self.engine.put(key, adapter.layout, adapter.row.distribution, basis, flat, version)

    async def _replay(self, adapter: Adapter, version: int) -> Coefficients:
        rows = await self._on_disk(self._journal.updates, adapter.row.key, 0, version)

        def run() -> Coefficients:
            coefficients = Coefficients(adapter.layout, adapter.row.distribution)
            for row in rows:
                coefficients.apply(row.update)
            return coefficients

        return await asyncio.to_thread(run)


def _mean_loss(scores: Sequence[RowScore]) -> float:
    return float(np.mean([score.loss for score in scores]))
