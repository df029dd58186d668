"""The tenants of a server, for its operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

from zoact_remote.transport import Transport
from zoact_remote.wire.answers import read_time

PATH = "/tenants"


@dataclass(frozen=True)
class Tenant:
    """An account.

    Attributes:
        name: before the slash in its adapters' names.
        limits: what it may use, by the names of :class:`~zoact_remote.wire.Limits`; None stands for no limit.
        adapters: how many it has.
        created: when; None for a tenant of the server's keys file.

    """

    name: str
    limits: Mapping[str, int | None]
    adapters: int
    created: datetime | None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tenant:
        created = data["created"]
        return cls(
            data["name"], dict(data["limits"]), data["adapters"], None if created is None else read_time(created)
        )


class Tenants:
    """What :attr:`Client.tenants` is. Every call wants the operator's key.

    Calls that make a key are not repeated after a failure, since a key that was lost on its way is lost: ask for a new
    one with :meth:`replace_key`.

    Raises (all calls):
        AuthenticationError: there is no key, or a wrong one.
        PermissionDenied: the key is a tenant's.

    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> list[Tenant]:
        """All of them, by name."""
        return self._transport.call(
            "GET", PATH, lambda data: [Tenant.from_json(item) for item in data["tenants"]], repeatable=True
        )

    def add(self, name: str, limits: Mapping[str, int | None] | None = None) -> str:
        """Add a tenant, and return its key, of which the server keeps a digest alone.

        Args:
            name: lower-case letters, digits, ``.``, ``_`` and ``-``.
            limits: those that differ from the server's defaults.

        Raises:
            Conflict: it exists, or the server has no operator's key yet.

        """
        body = {"name": name, "limits": dict(limits or {})}
        return self._transport.call("POST", PATH, _key, json=body, repeatable=False)

    def set_limits(self, name: str, limits: Mapping[str, int | None]) -> None:
        """Change what a tenant may use; limits that are left out go back to the server's defaults.

        Raises:
            NotFound: there is no such tenant.
            Conflict: it stands in the server's keys file.

        """
        path = f"{_path(name)}/limits"
        self._transport.call("PUT", path, lambda _: None, json=dict(limits), repeatable=True)

    def replace_key(self, name: str) -> str:
        """Give a tenant a new key, and return it; the old one stops working at once.

        Raises:
            NotFound: there is no such tenant.
            Conflict: it stands in the server's keys file.

        """
        return self._transport.call("POST", f"{_path(name)}/key", _key, repeatable=False)

    def remove(self, name: str) -> None:
        """Take a tenant's keys away. Its adapters stay, for the operator, until they are deleted.

        Raises:
            NotFound: there is no such tenant.
            Conflict: it stands in the server's keys file.

        """
        self._transport.call("DELETE", _path(name), lambda _: None, repeatable=False)


def _path(name: str) -> str:
    return f"{PATH}/{quote(name, safe='')}"


def _key(data: Any) -> str:
    return str(data["key"])
