"""What a server answers.

Members that this version does not know are passed over, so that an old client can talk to a newer server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from zoact_remote.layout import Site
from zoact_remote.noise import Distribution
from zoact_remote.wire.values import Basis, Update


def _read_loss(value: float | None) -> float:
    # JSON has no NaN: a server may write a loss that is not finite as null.
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Limits:
    """What one call, and one tenant, may ask for. Lengths are in tokens; None stands for no limit.

    Attributes:
        max_rank: columns of an adapter's coefficient matrices.
        max_probes: probes a call.
        max_rows: rows a call.
        max_row_tokens: tokens of a row.
        max_call_tokens: tokens of a call, over all sides of its probes.
        max_terms: terms of an update.
        max_choices: choices of a row.
        max_adapters: adapters of the tenant.
        max_coefficient_bytes: of all the tenant's adapters.
        max_request_bytes: of a call's body, but for an import's.
        max_import_bytes: of an import's body.
        requests_per_minute: of the tenant.

    """

    max_rank: int
    max_probes: int
    max_rows: int
    max_row_tokens: int
    max_call_tokens: int
    max_terms: int
    max_choices: int
    max_adapters: int | None = None
    max_coefficient_bytes: int | None = None
    max_request_bytes: int | None = None
    max_import_bytes: int | None = None
    requests_per_minute: int | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Limits:
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


@dataclass(frozen=True)
class Info:
    """A server.

    Attributes:
        model: the base model's name.
        model_digest: digest of its weights.
        dtype: the precision that it computes in.
        engine: name of the engine, such as ``"vllm"``.
        engine_version: the engine's version.
        noise_version: version of the noise specification (:mod:`zoact_remote.noise`).
        distributions: distributions of noise on offer.
        sites: layers that a basis can act on.
        limits: what one call may hold.

    """

    model: str
    model_digest: str
    dtype: str
    engine: str
    engine_version: str
    noise_version: int
    distributions: tuple[str, ...]
    sites: tuple[Site, ...]
    limits: Limits

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Info:
        model, engine, noise = data["model"], data["engine"], data["noise"]
        return cls(
            model=model["name"],
            model_digest=model["digest"],
            dtype=model["dtype"],
            engine=engine["name"],
            engine_version=engine["version"],
            noise_version=noise["version"],
            distributions=tuple(noise["distributions"]),
            sites=tuple(
                Site(s["index"], s["name"], s["input"], s["in_features"], s["out_features"]) for s in data["sites"]
            ),
            limits=Limits.from_json(data["limits"]),
        )


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter.

    Attributes:
        name: ``tenant/adapter``.
        version: number of updates applied.
        rank: columns of each coefficient matrix.
        noise: distribution of its probes.
        noise_version: version of the noise specification.
        sites: names of the layers that it acts on.
        parameters: number of trained coefficients.
        basis: what the basis is taken from.
        basis_digest: digest of the basis; None before calibration.
        energy: share (0 to 1) of each input's activation energy that the basis keeps; None before calibration.
        positions_seen: activations that the basis was taken from; None before calibration.
        digest: digest of the newest coefficients; None before calibration.
        imported_digest: digest of version 0's coefficients where they were imported; None where version 0 is the base
            model.
        created: when it was created.
        state: ``"new"`` before calibration, then ``"ready"``; ``"failed"`` if the server could not load it, which it
            tries again with the next call.

    """

    name: str
    version: int
    rank: int
    noise: Distribution
    noise_version: int
    sites: tuple[str, ...]
    parameters: int
    basis: Basis
    basis_digest: str | None
    energy: dict[str, float] | None
    positions_seen: int | None
    digest: str | None
    created: datetime
    state: str
    imported_digest: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterInfo:
        basis = data["basis"]
        return cls(
            name=data["name"],
            version=data["version"],
            rank=data["rank"],
            noise=data["noise"]["distribution"],
            noise_version=data["noise"]["version"],
            sites=tuple(data["sites"]),
            parameters=data["parameters"],
            basis=Basis.from_json(basis),
            basis_digest=basis.get("digest"),
            energy=basis.get("energy"),
            positions_seen=basis.get("positions_seen"),
            digest=data.get("digest"),
            created=read_time(data["created"]),
            state=data["state"],
            imported_digest=data.get("imported_digest"),
        )


@dataclass(frozen=True)
class BasisResult:
    """A calibration's outcome.

    Attributes:
        digest: digest of the basis.
        energy: share (0 to 1) of each input's activation energy that the basis keeps.
        rows: number of calibration rows.
        positions_seen: activations that the basis was taken from.

    """

    digest: str
    energy: dict[str, float]
    rows: int
    positions_seen: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BasisResult:
        return cls(data["digest"], data["energy"], data["rows"], data["positions_seen"])


@dataclass(frozen=True)
class UpdateResult:
    """An update's outcome.

    Attributes:
        version: the version that the update made.
        digest: digest of that version's coefficients (:mod:`zoact_remote.digest`).
        applied: False if an update with this key had been applied before, so that this call changed nothing.

    """

    version: int
    digest: str
    applied: bool

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UpdateResult:
        return cls(data["version"], data["digest"], data["applied"])


@dataclass(frozen=True)
class ProbeLoss:
    """A probe's losses, in nats: the means over the batch's rows. ``minus`` is None for a one-sided probe."""

    seed: int
    epsilon: float
    plus: float
    minus: float | None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProbeLoss:
        return cls(
            data["seed"],
            data["epsilon"],
            _read_loss(data["plus"]),
            None if data["minus"] is None else float(data["minus"]),
        )


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds on the server: applying the carried update, the model's forward passes, everything."""

    update_s: float = 0.0
    forward_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class Losses:
    """Losses of a batch under probes.

    Attributes:
        version: the version that was probed.
        losses: one a probe, in the order asked.
        base: the unperturbed loss in nats; None if it was not asked for.
        tokens: tokens that went through the model.
        update: outcome of the carried update; None if there was none.
        timing: where the server's time went.

    """

    version: int
    losses: tuple[ProbeLoss, ...]
    base: float | None
    tokens: int
    update: UpdateResult | None = None
    timing: Timing = Timing()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Losses:
        update, timing = data.get("update"), data.get("timing") or {}
        return cls(
            version=data["version"],
            losses=tuple(map(ProbeLoss.from_json, data["losses"])),
            base=None if data["base"] is None else float(data["base"]),
            tokens=data["tokens"],
            update=None if update is None else UpdateResult.from_json(update),
            timing=Timing(**{name: timing[name] for name in Timing.__dataclass_fields__ if name in timing}),
        )


@dataclass(frozen=True)
class RowScore:
    """One row's score.

    Attributes:
        logprobs: summed log-likelihood, in nats, of each choice; of the completion alone for a completion row.
        tokens: token count of each.
        loss: the row's loss in nats.

    """

    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    loss: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowScore:
        return cls(tuple(map(_read_loss, data["logprobs"])), tuple(data["tokens"]), _read_loss(data["loss"]))


@dataclass(frozen=True)
class Scores:
    """Scores of a batch.

    Attributes:
        version: the version that was scored.
        rows: one a row, in order.
        loss: mean of the rows' losses, in nats.
        tokens: tokens that went through the model.

    """

    version: int
    rows: tuple[RowScore, ...]
    loss: float
    tokens: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        return cls(
            data["version"], tuple(map(RowScore.from_json, data["rows"])), _read_loss(data["loss"]), data["tokens"]
        )


@dataclass(frozen=True)
class Generation:
    """Generated text. ``finish_reason`` is ``"stop"`` or ``"length"``."""

    version: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Generation:
        return cls(data["version"], data["text"], tuple(data["token_ids"]), data["finish_reason"])


@dataclass(frozen=True)
class JournalEntry:
    """An update or a rollback as the journal holds it.

    Attributes:
        version: the version that it made.
        update: the update; one of no terms for a rollback.
        digest: digest of that version's coefficients (:mod:`zoact_remote.digest`).
        digest_before: digest of the coefficients of the version before.
        rollback_to: the version whose coefficients a rollback took up again; None for an update.
        time: when it was written.

    """

    version: int
    update: Update
    digest: str
    digest_before: str
    rollback_to: int | None
    time: datetime

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JournalEntry:
        return cls(
            version=data["version"],
            update=Update.from_json(data),
            digest=data["digest"],
            digest_before=data["digest_before"],
            rollback_to=data["rollback_to"],
            time=read_time(data["time"]),
        )


def read_time(text: str) -> datetime:
    """An ISO 8601 time; Python 3.10 does not read the suffix ``Z`` by itself."""
    return datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
