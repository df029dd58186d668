"""The client of a server that holds adapters."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from zoact_remote.adapter import Adapter, adapter_path
from zoact_remote.errors import CallFailed, Conflict, TooLarge
from zoact_remote.exports import pack
from zoact_remote.layout import select_sites
from zoact_remote.noise import Distribution
from zoact_remote.tenants import Tenants
from zoact_remote.transport import Transport, is_passing
from zoact_remote.wire import AdapterInfo, Basis, Info

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Adapter", "Client"]

DEFAULT_URL = "http://127.0.0.1:8000"
POLL_S = 0.5


class Client:
    """A server that holds adapters.

    A client may be used from several threads. Close it, or use it as a context manager, to release its connections.

    Args:
        url: where the server is; ``$ZOACT_URL``, else ``http://127.0.0.1:8000``, if None.
        api_key: ``$ZOACT_API_KEY`` if None.
        timeout: seconds to connect, and seconds between bytes of an answer.
        retries: how often a call is sent again at most, where that is safe (:mod:`zoact_remote.transport`).
        patience: seconds that a call waits for a server that has answered before and is then gone, as while it is
            restarted, where it is safe to send it again; 0 to be content with ``retries``.

    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: tuple[float, float] = (5.0, 600.0),
        retries: int = 5,
        patience: float = 600.0,
    ) -> None:
        self._transport = Transport(
            url or os.environ.get("ZOACT_URL") or DEFAULT_URL,
            api_key=api_key or os.environ.get("ZOACT_API_KEY") or None,
            timeout=timeout,
            retries=retries,
            patience=patience,
        )

    def with_options(
        self,
        *,
        timeout: tuple[float, float] | None = None,
        retries: int | None = None,
        patience: float | None = None,
    ) -> Client:
        """A client with other options, over the same connections, which close with either of the two.

        Adapters keep to the options of the client that they come from, or of :meth:`Adapter.with_options`.

        Args:
            timeout: as for the client; None leaves it as it is, here and below.
            retries: as for the client.
            patience: as for the client.

        """
        other = copy.copy(self)
        other.__dict__.pop("tenants", None)  # of the client that it is a copy of
        other._transport = self._transport.with_options(timeout=timeout, retries=retries, patience=patience)
        return other

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._transport.url

    def info(self) -> Info:
        """The server's model, sites, noise specification and limits."""
        return self._transport.call("GET", "/info", Info.from_json, repeatable=True)

    def wait_until_ready(self, timeout: float = 120.0) -> Info:
        """Wait for a server that is starting.

        Args:
            timeout: seconds.

        Raises:
            CallFailed: the last failure, if the server does not answer in time; at once, if it answers with an error
                other than that it, or a gateway before it, is not ready.

        """
        deadline = time.monotonic() + timeout
        while True:
            left = max(POLL_S, deadline - time.monotonic())
            connect, read = self._transport.timeout
            patient = self._transport.with_options(timeout=(min(connect, left), min(read, left)))
            try:
                return patient.call("GET", "/info", Info.from_json, repeatable=True, once=True)
            except CallFailed as error:
                if not is_passing(error) or time.monotonic() + POLL_S > deadline:
                    raise
            time.sleep(POLL_S)

    def adapters(self) -> list[AdapterInfo]:
        """The adapters that the API key may use."""
        return self._transport.call(
            "GET", "/adapters", lambda data: [AdapterInfo.from_json(item) for item in data["adapters"]], repeatable=True
        )

    def adapter(self, name: str) -> Adapter:
        """An adapter that exists.

        Args:
            name: ``tenant/adapter``.

        Raises:
            NotFound: it does not.

        """
        adapter = Adapter(self._transport, name)
        adapter.refresh()
        return adapter

    def create_adapter(
        self,
        name: str,
        *,
        rank: int = 4,
        sites: Sequence[str] | None = None,
        noise: Distribution = "rademacher",
        basis: Basis | None = None,
        exist_ok: bool = False,
    ) -> Adapter:
        """Create an adapter: rank, sites, noise and basis are fixed from here on.

        Args:
            name: ``tenant/adapter``.
            rank: columns of each coefficient matrix.
            sites: full names or last components of layers; None for all that the server offers.
            noise: distribution of the probes.
            basis: what the basis will be taken from, ``Basis()`` if None; :meth:`Adapter.calibrate` takes it.
            exist_ok: return the adapter if it exists already with these very properties. The call is then safe to
                repeat, and is repeated after failures that may pass.

        Raises:
            Conflict: it exists, and ``exist_ok`` is false or its properties differ.

        """
        adapter = Adapter(self._transport, name)
        basis = basis or Basis()
        body = {
            "name": name,
            "rank": rank,
            "sites": None if sites is None else list(sites),
            "noise": noise,
            "basis": basis.to_json(),
        }
        try:
            adapter.info = self._transport.call(
                "POST", "/adapters", AdapterInfo.from_json, json=body, repeatable=exist_ok
            )
        except Conflict as conflict:
            if not exist_ok or conflict.code != "adapter_exists":
                raise
            found = adapter.refresh()
            wanted = {site.name for site in select_sites(self.info().sites, sites)}
            compared = {"rank": (found.rank, rank), "noise": (found.noise, noise), "basis": (found.basis, basis)}
            differing = [f"{key} is {has}, not {want}" for key, (has, want) in compared.items() if has != want]
            if set(found.sites) != wanted:
                differing.append(f"{len(found.sites)} sites are not the {len(wanted)} asked for")
            if differing:
                raise Conflict(
                    f"{name} exists, but its {'; its '.join(differing)}",
                    status=conflict.status,
                    code=conflict.code,
                    request_id=conflict.request_id,
                ) from None
        return adapter

    def import_adapter(
        self, name: str, directory: str | os.PathLike[str], *, noise: Distribution = "rademacher"
    ) -> Adapter:
        """Create an adapter whose version 0 is a LoRA, and which can be trained from there.

        A float32 :meth:`Adapter.export` comes back bit for bit, with its basis. Of any other LoRA the server makes a
        basis and coefficients that compute the same; its rank may then be that of several A's together, since layers
        that read one input share one basis.

        Args:
            name: ``tenant/adapter``.
            directory: a PEFT directory, with ``adapter_config.json`` and ``adapter_model.safetensors``.
            noise: distribution of the probes.

        Raises:
            Conflict: there is an adapter of that name.
            BadRequest: the LoRA does not fit the model, or does what an adapter cannot;
                :attr:`~zoact_remote.errors.CallFailed.param` says what of it.
            TooLarge: it is longer than what the server takes for an adapter.

        """
        adapter = Adapter(self._transport, name)
        archive = pack(Path(directory))
        most = self.info().limits.max_import_bytes
        if most is not None and len(archive) > most:
            # A server that refuses a body while it is sent may be heard as a broken connection alone.
            raise TooLarge(f"{directory} comes to {len(archive)} bytes; max_import_bytes is {most}")
        adapter.info = self._transport.call(
            "POST",
            f"{adapter_path(name)}/import",
            AdapterInfo.from_json,
            content=archive,
            params={"noise": noise},
            repeatable=False,
        )
        return adapter

    def metrics(self) -> str:
        """What the server counts, in Prometheus' text format, for the operator."""
        return self._transport.text("/metrics")

    @cached_property
    def tenants(self) -> Tenants:
        """Who holds keys, for the operator."""
        return Tenants(self._transport)

    def close(self) -> None:
        """Release the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
