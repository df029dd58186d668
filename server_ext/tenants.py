"""Tenants: who makes a call, and what they may use.

A key is kept as its SHA-256 digest alone: keys are random strings of 256 bits, so there is nothing that a slow hash
would protect. They come from a file that the operator writes, from the environment, or from the operator's calls, which
are kept in a SQLite file of their own.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from server_ext.database import connect, transaction
from server_ext.errors import ApiError, storage_failed
from server_ext.schemas import TENANT, TenantLimits, tenant_of
from zoact_remote import toml
from zoact_remote.transport import is_loopback

KEY_VARIABLE = "ZOACT_API_KEY"
FILE_VARIABLE = "ZOACT_KEYS"
DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")
SCHEMA = """
CREATE TABLE IF NOT EXISTS tenants (name TEXT PRIMARY KEY, limits TEXT NOT NULL, created TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS keys (
    digest TEXT PRIMARY KEY,
    tenant TEXT NOT NULL REFERENCES tenants(name) ON DELETE CASCADE
) STRICT;
"""


@dataclass(frozen=True)
class Caller:
    """Who makes a call.

    Attributes:
        tenant: a tenant's name; None for the operator, who may use everything.
        limits: of the tenant.

    """

    tenant: str | None
    limits: TenantLimits

    def owns(self, adapter: str) -> bool:
        """Whether the caller may use adapters of this name (``tenant/adapter``)."""
        return self.tenant is None or tenant_of(adapter) == self.tenant


@dataclass(frozen=True)
class Tenant:
    """An account.

    Attributes:
        name: of the tenant, before the slash in its adapters' names.
        limits: what it may use.
        keys: digests of its keys.
        created: when; None for a tenant of the keys file.

    """

    name: str
    limits: TenantLimits
    keys: frozenset[str]
    created: datetime | None = None


calling: ContextVar[str | None] = ContextVar("zoact_calling", default=None)
"""The tenant whose call is under way; None for the operator's."""


class Defaults(BaseModel):
    """Limits where no others were given.

    Attributes:
        tenants: of tenants.
        operator: of the operator, who is everybody on a server without keys.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    tenants: TenantLimits = Field(default_factory=TenantLimits)
    operator: TenantLimits = Field(default_factory=TenantLimits.operators)

    @field_validator("operator")
    @classmethod
    def _operators(cls, limits: TenantLimits) -> TenantLimits:
        return limits.over(TenantLimits.operators())


SERVERS_OWN = Defaults()


class Tenants:
    """Everybody who holds a key.

    Args:
        path: of the SQLite file.
        operators: digests of keys that open everything. With none of them, and no tenant, there is nobody to tell apart
            and every call is the operator's.
        fixed: tenants of the keys file, which no call can change.
        defaults: limits of everybody else, as far as they have none of their own.

    """

    def __init__(
        self,
        path: Path,
        operators: Iterable[str] = (),
        fixed: Iterable[Tenant] = (),
        defaults: Defaults = SERVERS_OWN,
    ) -> None:
        self._operators = list(operators)
        self._operator = Caller(None, defaults.operator)
        self._default = defaults.tenants
        self._fixed = {tenant.name: tenant for tenant in fixed}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = connect(path)
        self._db.executescript(SCHEMA)
        self._read()

    @property
    def open_to_all(self) -> bool:
        """Whether there are no keys, so that whoever reaches the server is its operator."""
        return not self._operators and not self._by_name

    def identify(self, authorization: str) -> Caller:
        """Whose call it is, by its Authorization header.

        Raises:
            ApiError: there are keys, and it holds none of them (401).

        """
        if self.open_to_all:
            return self._operator
        scheme, _, token = authorization.partition(" ")
        sent = key_digest(token.strip()) if scheme.lower() == "bearer" else ""
        digest, caller = self._by_key.get(sent, ("", None))
        # The digests of keys are as good as random, so that what a look-up's time tells of them opens nothing.
        if caller is None or not hmac.compare_digest(sent, digest):
            raise ApiError(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")
        return caller

    def all(self) -> list[Tenant]:
        """Every tenant, by name."""
        return sorted(self._by_name.values(), key=lambda tenant: tenant.name)

    def add(self, name: str, limits: TenantLimits) -> str:
        """Adds a tenant and returns its key, which is not kept.

        Raises:
            ApiError: it exists (409), the server has no operator's key (409), or the disk failed (503).

        """
        if not self._operators:
            raise ApiError(
                409, "no_operator_key", "give the server an operator's key first: the first tenant ends open access"
            )
        if name in self._by_name:
            raise ApiError(409, "tenant_exists", f"a tenant {name!r} exists already", "name")
        created = datetime.now(timezone.utc).isoformat()
        with self._change():
            self._db.execute("INSERT INTO tenants VALUES (?, ?, ?)", (name, _given(limits), created))
            return self._new_key(name)

    def replace_key(self, name: str) -> str:
        """A new key of a tenant, in place of those that it had; it is not kept.

        Raises:
            ApiError: the tenant is not there (404) or stands in the keys file (409), or the disk failed (503).

        """
        self._check_changeable(name)
        with self._change():
            self._db.execute("DELETE FROM keys WHERE tenant = ?", (name,))
            return self._new_key(name)

    def change_limits(self, name: str, limits: TenantLimits) -> TenantLimits:
        """Gives a tenant limits in place of those that it had, and returns them with the defaults of the others.

        Raises ApiError for a tenant that is not there (404) or stands in the keys file (409).
        """
        self._check_changeable(name)
        with self._change():
            self._db.execute("UPDATE tenants SET limits = ? WHERE name = ?", (_given(limits), name))
        return self._by_name[name].limits

    def remove(self, name: str) -> None:
        """Takes a tenant's keys away. Raises ApiError if it is not there (404) or stands in the keys file (409)."""
        self._check_changeable(name)
        with self._change():
            self._db.execute("DELETE FROM tenants WHERE name = ?", (name,))

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change that is made as a whole; ApiError (503) if the disk fails, and nothing has changed."""
        try:
            with transaction(self._db):
                yield
        except sqlite3.OperationalError as error:
            raise storage_failed(error) from error
        self._read()

    def _new_key(self, name: str) -> str:
        key = f"zo-{secrets.token_urlsafe(32)}"
        self._db.execute("INSERT INTO keys VALUES (?, ?)", (key_digest(key), name))
        return key

    def _check_changeable(self, name: str) -> None:
        if name in self._fixed:
            raise ApiError(409, "tenant_fixed", f"{name!r} stands in the server's keys file: change it there", "tenant")
        if name not in self._by_name:
            raise ApiError(404, "tenant_not_found", f"there is no tenant {name!r}", "tenant")

    def _read(self) -> None:
        keys: dict[str, set[str]] = {}
        for digest, name in self._db.execute("SELECT digest, tenant FROM keys"):
            keys.setdefault(name, set()).add(digest)
        kept = {
            name: Tenant(
                name,
                TenantLimits.model_validate_json(limits).over(self._default),
                frozenset(keys.get(name, ())),
                datetime.fromisoformat(created),
            )
            for name, limits, created in self._db.execute("SELECT name, limits, created FROM tenants")
        }
        self._by_name = kept | self._fixed
        self._by_key: dict[str, tuple[str, Caller]] = {digest: (digest, self._operator) for digest in self._operators}
        for tenant in self._by_name.values():
            self._by_key |= {digest: (digest, Caller(tenant.name, tenant.limits)) for digest in tenant.keys}


def _given(limits: TenantLimits) -> str:
    """How a tenant's own limits are kept: the defaults of the others may change."""
    return limits.model_dump_json(exclude_unset=True)


def key_digest(key: str) -> str:
    """How a key is kept."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


class _FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    keys: list[Annotated[str, Field(pattern=DIGEST.pattern)]]
    limits: TenantLimits = Field(default_factory=TenantLimits)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    operators: list[Annotated[str, Field(pattern=DIGEST.pattern)]] = []
    limits: Defaults = SERVERS_OWN
    tenants: dict[Annotated[str, Field(pattern=TENANT)], _FileEntry] = {}


def open_tenants(directory: Path, host: str | None, operator_keys: Iterable[str] = ()) -> Tenants:
    """The tenants of a server whose state is in a directory, by what the environment says.

    ``ZOACT_API_KEY`` holds the operator's key or its digest, ``ZOACT_KEYS`` the path of a keys file. Both add to the
    operator's keys given.

    Args:
        directory: of the state.
        host: where the server listens; None for all interfaces.
        operator_keys: keys, or their digests, that open everything.

    Raises:
        ValueError: the keys file cannot be read, or there is no key although not only this machine reaches the server.

    """
    given = [*operator_keys, *filter(None, [os.environ.get(KEY_VARIABLE)])]
    # Who sends a digest is nobody: only the operator, who sets the environment, may give one in a key's place.
    operators = [key if DIGEST.fullmatch(key) else key_digest(key) for key in given]
    fixed: list[Tenant] = []
    defaults = SERVERS_OWN
    if os.environ.get(FILE_VARIABLE):
        more, fixed, defaults = read_keys_file(Path(os.environ[FILE_VARIABLE]))
        operators += more
    tenants = Tenants(directory / "tenants.sqlite", operators, fixed, defaults)
    if tenants.open_to_all and not is_loopback(host or ""):
        tenants.close()
        raise ValueError(
            f"whoever reaches {host or 'this machine, on any of its interfaces,'} could read and change every adapter, "
            f"as there is no key: set {KEY_VARIABLE} to the operator's, name a file with keys in {FILE_VARIABLE} "
            "(zoact serve: --api-key, --keys), or listen on this machine alone with --host 127.0.0.1"
        )
    return tenants


def read_keys_file(path: Path) -> tuple[list[str], list[Tenant], Defaults]:
    """The operators' digests, the tenants and everybody's limits of a keys file, in TOML::

        operators = ["sha256:..."]

        [limits]
        tenants = { max_request_bytes = 67108864 }
        operator = { max_call_tokens = 4194304 }

        [tenants.acme]
        keys = ["sha256:..."]
        limits = { max_adapters = 8, requests_per_minute = 600 }

    Raises:
        ValueError: it cannot be read; the message names the field.

    """
    try:
        file = _File.model_validate(toml.load(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    tenants = [
        Tenant(name, entry.limits.over(file.limits.tenants), frozenset(entry.keys))
        for name, entry in file.tenants.items()
    ]
    return file.operators, tenants, file.limits
