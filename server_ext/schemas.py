"""The wire: what calls carry and what they answer (JSON under ``/zoact/v1``)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from zoact_remote import wire
from zoact_remote.noise import MAX_SEED
from zoact_remote.wire.values import NAME

MAX_TERMS = 4096
"""Terms an update may list."""
MAX_CHOICES = 128
"""Choices a row may have: vLLM reads at most this many candidate tokens at a position."""
MAX_STOPS = 16
"""Stop strings that a text may have."""
MAX_STOP_CHARACTERS = 256
MOST_MEMBERS = 64
"""Members of one object: more than any message has."""
MOST_ITEMS = 1 << 16
"""Of any list in a body, whatever a caller's limits: it is checked while everybody waits."""
LARGEST_LIMIT = 2**53
"""Larger whole numbers are not exact in everybody's JSON."""
LARGEST_SCALAR = 1e30
"""Scalars beyond this overflow float32 once squared or summed."""
SMALLEST_DIVISOR = 2.0**-126
"""Divisors below float32's smallest normal number may be zero on a device."""

TENANT = f"^{NAME}$"
TENANT_ADAPTER = f"^{NAME}/{NAME}$"

Scalar = Annotated[float, Field(ge=-LARGEST_SCALAR, le=LARGEST_SCALAR, allow_inf_nan=False)]
Weight = Annotated[Scalar, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)]
Epsilon = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Version = Annotated[int, Field(ge=0, le=LARGEST_LIMIT, strict=True)]
Term = tuple[Seed, Scalar]
IdempotencyKey = Annotated[
    str, Field(min_length=1, max_length=128, description="A change that is sent twice under one key is applied once.")
]


def tenant_of(adapter: str) -> str:
    """Whose an adapter of this name (``tenant/adapter``) is."""
    return adapter.partition("/")[0]


def _is_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


Unicode = Annotated[str, AfterValidator(_is_unicode)]
# A list that a caller sends ends at its first mistake: one of a million would be described a million times.
Text = Unicode | Annotated[list[Annotated[int, Field(strict=True)]], Field(fail_fast=True)]


class Message(BaseModel):
    """Base of all messages: unknown members are refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_members(cls, value: Any) -> Any:
        # Each that is unknown would be described.
        if isinstance(value, dict) and len(value) > MOST_MEMBERS:
            raise ValueError(f"has {len(value)} members, more than {MOST_MEMBERS}")
        return value


class CompletionRow(Message):
    """A prompt and what should follow it. Loss: mean negative log-likelihood of the completion's tokens, in nats."""

    prompt: Text
    completion: Text


class ChoicesRow(Message):
    """A prompt, what could follow it and which choice is right. Loss: cross-entropy over the choices, in nats."""

    prompt: Text
    choices: Annotated[list[Text], Field(fail_fast=True, min_length=2, max_length=MAX_CHOICES)]
    answer: Annotated[int, Field(ge=0, strict=True)]

    @field_validator("answer")
    @classmethod
    def _answer_is_a_choice(cls, answer: int, info: ValidationInfo) -> int:
        if "choices" in info.data and answer >= len(info.data["choices"]):
            raise ValueError(f"must be below the number of choices ({len(info.data['choices'])})")
        return answer


class ChatMessage(Message):
    role: Unicode
    content: Unicode


class ChatRow(Message):
    """A conversation in the model's chat template. Loss: mean negative log-likelihood, in nats, of its last turn.

    What is scored is all that the template writes from where the assistant speaks last, its end-of-turn mark included.
    """

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=2, max_length=MOST_ITEMS)]

    @field_validator("messages")
    @classmethod
    def _the_assistant_speaks_last(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if messages[-1].role != "assistant":
            raise ValueError(f"must end with the assistant's turn, which is scored, not with {messages[-1].role!r}")
        return messages


def _row_kind(row: Any) -> str:
    members = row if isinstance(row, dict) else type(row).model_fields if isinstance(row, Message) else ()
    return "ChatRow" if "messages" in members else "ChoicesRow" if "choices" in members else "CompletionRow"


# Told apart by one member, so that an error speaks of the kind of row that was meant.
Row = Annotated[
    Annotated[CompletionRow, Tag("CompletionRow")]
    | Annotated[ChoicesRow, Tag("ChoicesRow")]
    | Annotated[ChatRow, Tag("ChatRow")],
    Discriminator(_row_kind),
]
Rows = Annotated[list[Row], Field(fail_fast=True, min_length=1, max_length=MOST_ITEMS)]


class BasisOptions(Message):
    """How a basis is taken."""

    positions: Literal["scored", "prompt", "both"] = Field(
        "scored",
        description="Positions whose activations count: those that predict a continuation's token, all of the "
        "prompt's, or both, each kind weighted to the same energy.",
    )
    centred: bool = Field(False, description="Take the mean activation away before the decomposition.")
    passes: Literal[1, 2] = Field(1, description="Passes over the calibration rows; a second one sharpens the basis.")
    oversampling: Annotated[int, Field(ge=0, le=64)] = Field(8, description="Columns of the sketch beyond the rank.")
    seed: Seed = Field(0, description="Seed of the sketch, or of the random basis.")


class BasisSpec(BasisOptions):
    """What an adapter's basis is taken from."""

    source: Literal["activations", "random"] = Field(
        "activations",
        description="The inputs' top right singular vectors, or a random orthonormal basis to compare with.",
    )


class CreateAdapter(Message):
    name: Annotated[str, Field(pattern=TENANT_ADAPTER, description="tenant/adapter")]
    rank: Annotated[int, Field(ge=1, le=512)] = 4
    sites: Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_ITEMS)] | None = Field(
        None, description="Full names or last components of layers; all of the model's sites if left out."
    )
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    basis: BasisSpec = Field(default_factory=BasisSpec)


class NoiseInfo(Message):
    distribution: Literal["rademacher", "gaussian"]
    version: int


class BasisInfo(BasisOptions):
    source: Literal["activations", "random", "imported"] = Field(
        "activations", description="imported: it came with the adapter, and was not taken here."
    )
    digest: str | None = None
    energy: dict[str, float] | None = Field(
        None, description="Share of each input's activation energy that the basis keeps, 0 to 1."
    )
    positions_seen: int | None = None

    def spec(self) -> BasisSpec:
        """What was asked for, without what came of it."""
        return BasisSpec(**self.model_dump(include=set(BasisSpec.model_fields)))


class AdapterInfo(Message):
    name: str
    version: int
    rank: int
    noise: NoiseInfo
    sites: list[str]
    parameters: int
    basis: BasisInfo
    digest: str | None = Field(None, description="Digest of the newest coefficients.")
    imported_digest: str | None = Field(
        None,
        description="Digest of version 0's coefficients where they were imported; null where it is the model itself.",
    )
    created: datetime
    state: Literal["new", "ready", "failed"] = Field(
        description="new: the basis has not been taken yet. failed: it could not be loaded; the next call tries again."
    )


class AdapterList(Message):
    adapters: list[AdapterInfo]


class Calibrate(Message):
    rows: Annotated[list[Row], Field(fail_fast=True, max_length=MOST_ITEMS)] = []


class BasisResult(Message):
    digest: str
    energy: dict[str, float]
    rows: int
    positions_seen: int


Count = Annotated[int, Field(ge=0, le=LARGEST_LIMIT)]
Place = Annotated[int, Field(ge=0, le=LARGEST_LIMIT, strict=True)]


class Probe(Message):
    seed: Seed
    epsilon: Epsilon
    sides: Literal["both", "plus"] = "both"
    part: tuple[Place, Place] | None = Field(
        None,
        description="[j, q]: evaluated on the j-th, from 0, of q parts of the rows, equal and in order; else on all.",
    )

    @field_validator("part")
    @classmethod
    def _is_one_of_them(cls, part: tuple[int, int] | None) -> tuple[int, int] | None:
        if part is not None and part[0] >= part[1]:
            raise ValueError("must be [j, q] with j below q")
        return part

    def to_wire(self) -> wire.Probe:
        return wire.Probe(self.seed, self.epsilon, self.sides, self.part)


class Normaliser(Message):
    """Divides the summed terms, by coordinate, by sqrt(offset + sum_i b_i Z(seed_i)^2) + epsilon."""

    terms: Annotated[list[tuple[Seed, Weight]], Field(fail_fast=True, max_length=MAX_TERMS)] = []
    offset: Weight = 0.0
    epsilon: Annotated[Weight, Field(ge=SMALLEST_DIVISOR)]


class Update(Message):
    """C <- (1 - decay) C + sum_i a_i Z(seed_i): float32, terms in listed order."""

    base_version: Version
    terms: Annotated[list[Term], Field(fail_fast=True, max_length=MAX_TERMS)]
    decay: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    normaliser: Normaliser | None = None
    key: IdempotencyKey | None = None

    def to_wire(self) -> wire.Update:
        return wire.Update.from_json(self.model_dump())


class Rollback(Message):
    """A new version whose coefficients are those of an earlier one, bit for bit."""

    base_version: Version
    to_version: Version
    key: IdempotencyKey | None = None


class UpdateResult(Message):
    version: int
    digest: str
    applied: bool = Field(description="False: a change with this key had been applied before; nothing changed.")


class AskLosses(Message):
    version: Version | None = Field(
        None, description="The newest if left out; with an update, none but the version that it leads to."
    )
    base: bool = Field(False, description="Also answer with the unperturbed loss.")
    probes: Annotated[list[Probe], Field(fail_fast=True, validate_default=True, max_length=MOST_ITEMS)] = []
    rows: Rows
    update: Update | None = Field(None, description="Applied first, so that a training step is one round trip.")

    @field_validator("probes")
    @classmethod
    def _asks_for_something(cls, probes: list[Probe], info: ValidationInfo) -> list[Probe]:
        if not probes and not info.data.get("base"):
            raise ValueError("must not be empty unless base is true")
        return probes


class ProbeLoss(Message):
    seed: int
    epsilon: float
    plus: float
    minus: float | None


class Timing(Message):
    """Wall-clock seconds on the server."""

    update_s: float
    forward_s: float
    total_s: float


class Losses(Message):
    version: int
    losses: list[ProbeLoss]
    base: float | None
    tokens: int = Field(description="Tokens that went through the model.")
    update: UpdateResult | None
    timing: Timing


class SignedProbe(Message):
    seed: Seed
    epsilon: Epsilon
    sign: Literal[1, -1] = 1


class AskScores(Message):
    version: Version | None = None
    probe: SignedProbe | None = None
    rows: Rows


class RowScores(Message):
    logprobs: list[float] = Field(description="Summed log-likelihood of the completion, or of each choice, in nats.")
    tokens: list[int] = Field(description="Tokens of the completion, or of each choice.")
    loss: float


class Scores(Message):
    version: int
    rows: list[RowScores]
    loss: float
    tokens: int


class AskGeneration(Message):
    version: Version | None = None
    probe: SignedProbe | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MOST_ITEMS)] | None = None
    prompt: Annotated[Text | None, Field(validate_default=True)] = None
    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[
        list[Annotated[Unicode, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        Field(fail_fast=True, max_length=MAX_STOPS, description="The text ends before any of these."),
    ] = []

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: str | list[int] | None, info: ValidationInfo) -> str | list[int] | None:
        if (prompt is None) == (info.data.get("messages") is None):
            raise ValueError("exactly one of prompt and messages is needed")
        return prompt


class Generation(Message):
    version: int
    text: str
    token_ids: list[int] = Field(description="All that were generated, the end of a stop string included.")
    finish_reason: Literal["stop", "length"]


class JournalEntry(Message):
    version: int
    base_version: int
    terms: list[Term]
    decay: float
    normaliser: Normaliser | None
    rollback_to: int | None = Field(description="The version that was gone back to; null for an update.")
    key: str | None
    digest_before: str
    digest: str
    time: datetime


class JournalPage(Message):
    adapter: str
    basis_digest: str
    imported_digest: str | None = Field(description="As the adapter's.")
    noise: NoiseInfo
    updates: list[JournalEntry]


class SiteInfo(Message):
    index: int
    name: str
    input: str
    in_features: int
    out_features: int


class ModelInfo(Message):
    name: str
    digest: str
    dtype: str


class EngineInfo(Message):
    name: Literal["vllm", "transformers"]
    version: str


class NoiseSpec(Message):
    version: int
    distributions: list[str]


class TenantLimits(Message):
    """What one tenant may use. None: as much as there is."""

    max_adapters: Count | None = 64
    max_coefficient_bytes: Count | None = Field(
        4 << 30, description="Over all of its adapters' coefficients, each at one version."
    )
    max_rank: Count | None = Field(None, description="The engine's own limit is the other bound.")
    max_probes: Count = Field(256, description="A call.")
    max_rows: Count = Field(1024, description="A call.")
    max_call_tokens: Count = Field(1 << 20, description="A call, over all of its probes' sides.")
    max_request_bytes: Count = Field(32 << 20, description="Of a call's body, but for an import's.")
    max_import_bytes: Count | None = Field(
        None, description="Of an import's body. Null: what a float32 adapter of all sites takes at the largest rank."
    )
    requests_per_minute: Annotated[int, Field(ge=1, le=LARGEST_LIMIT)] | None = 6000

    @classmethod
    def operators(cls) -> TenantLimits:
        """The operator's: the limits of a single call alone."""
        return cls(max_adapters=None, max_coefficient_bytes=None, requests_per_minute=None)

    def over(self, others: TenantLimits) -> TenantLimits:
        """These limits as far as they were given, and others where they were not."""
        return others.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})


class Limits(TenantLimits):
    """The caller's limits on this server."""

    max_rank: int
    max_import_bytes: int
    max_row_tokens: int
    max_terms: int
    max_choices: int


class CreateTenant(Message):
    name: Annotated[str, Field(pattern=TENANT)]
    limits: TenantLimits = Field(default_factory=TenantLimits)


class TenantInfo(Message):
    name: str
    limits: TenantLimits
    adapters: int
    created: datetime | None = Field(description="Null for a tenant of the server's keys file.")


class TenantList(Message):
    tenants: list[TenantInfo]


class TenantKey(Message):
    tenant: str
    key: str = Field(description="Shown this once: the server keeps its digest alone.")


class Info(Message):
    model: ModelInfo
    engine: EngineInfo
    noise: NoiseSpec
    sites: list[SiteInfo]
    limits: Limits


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Message):
    error: ErrorObject
    request_id: str
