"""The calls of ``/zoact/v1``, whatever the engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from server_ext import schemas
from server_ext.adapters import Adapter
from server_ext.basis import Basis, random_test_matrix
from server_ext.engines.base import CalibrationRow, Engine
from server_ext.errors import ApiError, invalid
from server_ext.export import Exported, export_tar
from server_ext.journal import AdapterRow
from server_ext.registry import Registry
from server_ext.rows import RowScore, TokenRow, contexts_of, score_of, tokenise, tokenise_rows
from server_ext.store import Point
from zoact_remote.layout import Layout, select_sites
from zoact_remote.noise import DISTRIBUTIONS, NOISE_VERSION


@dataclass(frozen=True)
class CallLimits:
    """What one call may ask for."""

    max_probes: int = 256
    max_rows: int = 1024
    max_call_tokens: int = 1 << 20


class Service:
    """Checks calls, and answers them from the registry's adapters and the engine."""

    def __init__(self, engine: Engine, directory: Path, limits: CallLimits | None = None) -> None:
        self.engine = engine
        self.registry = Registry(engine, directory)
        self.limits = limits or CallLimits()

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
        return schemas.AdapterList(adapters=[adapter.info() for adapter in self.registry.all()])

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
        return (await self.registry.add(row, layout)).info()

    async def delete(self, name: str) -> None:
        async with self.registry.writing(name) as (adapter, _):
            await self.registry.remove(adapter)

    async def calibrate(self, name: str, ask: schemas.Calibrate) -> schemas.BasisResult:
        adapter = self.registry.adapter(name)
        spec = adapter.row.basis
        if spec.digest is not None:
            raise ApiError(409, "basis_exists", f"the basis of {name!r} has been taken; create a new adapter instead")
        if spec.source == "activations" and not ask.rows:
            raise invalid("rows", "a basis of activations needs at least one row")
        rows = self._tokenise(ask.rows, points=spec.passes)
        async with self.registry.writing(name) as (adapter, _):
            if adapter.row.basis.digest is not None:
                raise ApiError(409, "basis_exists", f"the basis of {name!r} has been taken meanwhile")
            bases, seen = await self._take_basis(adapter, rows)
            vectors = {key: basis.vectors for key, basis in bases.items()}
            energy = {key: basis.energy for key, basis in bases.items() if not np.isnan(basis.energy)}
            digest = await self.registry.set_basis(adapter, vectors, energy, seen)
        return schemas.BasisResult(digest=digest, energy=energy, rows=len(rows), positions_seen=seen)

    # Training ---------------------------------------------------------------------------------------------------------

    async def update(self, name: str, ask: schemas.Update) -> schemas.UpdateResult:
        async with self.registry.writing(name) as (adapter, _):
            return await self.registry.apply(adapter, ask.to_wire())

    async def losses(self, name: str, ask: schemas.AskLosses) -> schemas.Losses:
        started = time.perf_counter()
        self.registry.calibrated(name)
        sides = sum(2 if probe.sides == "both" else 1 for probe in ask.probes) + ask.base
        if len(ask.probes) > self.limits.max_probes:
            raise invalid("probes", f"at most {self.limits.max_probes} probes a call")
        rows = self._tokenise(ask.rows, points=sides)
        if ask.update is None:
            async with self.registry.reading(name) as adapter:
                return await self._losses(adapter, ask, rows, None, started)
        async with self.registry.writing(name) as (adapter, hold):
            lands_at = ask.update.base_version + 1
            if ask.version is not None and ask.version != lands_at:
                raise invalid("version", f"must be {lands_at}, the version that the carried update leads to")
            result = await self.registry.apply(adapter, ask.update.to_wire(), "update.")
            await hold.downgrade()
            return await self._losses(adapter, ask, rows, result, started)

    async def scores(self, name: str, ask: schemas.AskScores) -> schemas.Scores:
        self.registry.calibrated(name)
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
        self.registry.calibrated(name)
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
        async with self.registry.reading(name) as adapter:
            rows = await self.registry.updates(adapter, after, limit)
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
        async with self.registry.reading(name) as adapter:
            version = self.registry.existing(adapter, version)
            flat, digest = await self.registry.coefficients(adapter, version)
            basis = await self.registry.basis(adapter)
            exported = Exported(
                name, version, digest, self.engine.model.name, self.engine.model.digest, adapter.layout, basis, flat
            )
            return await asyncio.to_thread(export_tar, exported, self.engine.sites, dtype)

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
        async with self.registry.at(adapter, ask.version, perturbed=bool(signs)) as (version, point):
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

    @asynccontextmanager
    async def _point(
        self, name: str, version: int | None, probe: schemas.SignedProbe | None
    ) -> AsyncIterator[tuple[int, Point | None]]:
        """A version of an adapter by name, and the point of it or of a probe around it."""
        async with (
            self.registry.reading(name) as adapter,
            self.registry.at(adapter, version, probe is not None) as (found, point),
        ):
            if probe is not None and point is not None:
                point = replace(point, seed=probe.seed, epsilon=probe.sign * probe.epsilon)
            yield found, point


def _mean_loss(scores: Sequence[RowScore]) -> float:
    return float(np.mean([score.loss for score in scores]))
