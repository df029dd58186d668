"""One adapter on a server, and the calls that it answers."""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zoact_remote.audit import Audit, audit
from zoact_remote.errors import Conflict, InvalidValue
from zoact_remote.exports import ABOUT, read_coefficients, read_halves, unpack
from zoact_remote.layout import Layout, select_sites
from zoact_remote.merge import merge
from zoact_remote.model_digest import model_digest
from zoact_remote.transport import Transport
from zoact_remote.wire import (
    AdapterInfo,
    BasisResult,
    Generation,
    Info,
    JournalEntry,
    Limits,
    Losses,
    Probe,
    Row,
    Scores,
    Side,
    Update,
    UpdateResult,
)
from zoact_remote.wire.values import NAME


class Adapter:
    """One adapter on a server. Made by :meth:`Client.adapter` and :meth:`Client.create_adapter`.

    Attributes:
        name: ``tenant/adapter``.
        info: what the server last said about it, with the newest version and its digest as this object's own updates
            and rollbacks leave them; :meth:`refresh` asks anew.

    """

    info: AdapterInfo

    def __init__(self, transport: Transport, name: str) -> None:
        self.name = name
        self._path = adapter_path(name)
        self._transport = transport
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Adapter {self.name} at {self._transport.url}>"

    def with_options(
        self,
        *,
        timeout: tuple[float, float] | None = None,
        retries: int | None = None,
        patience: float | None = None,
    ) -> Adapter:
        """The same adapter under other options for its calls (:class:`Client`); None leaves an option as it is."""
        other = copy.copy(self)
        other._transport = self._transport.with_options(timeout=timeout, retries=retries, patience=patience)
        return other

    def refresh(self) -> AdapterInfo:
        """Ask the server about the adapter; the answer is kept as :attr:`info`."""
        self.info = self._transport.call("GET", self._path, AdapterInfo.from_json, repeatable=True)
        return self.info

    @property
    def version(self) -> int:
        """The newest version, as far as :attr:`info` knows."""
        return self.info.version

    def limits(self) -> Limits:
        """What one call may ask of the server."""
        return self._server_info().limits

    def layout(self) -> Layout:
        """Where its coefficients lie in the flat buffer of :mod:`zoact_remote.replay`."""
        return self._layout_on(self._server_info())

    def calibrate(self, rows: Sequence[Row] = (), *, exist_ok: bool = False) -> BasisResult:
        """Take the basis, once, from the activations on some rows.

        Args:
            rows: typical data; may be empty for a random basis.
            exist_ok: return the basis that there is if it has been taken, be it from other rows. The call is then safe
                to repeat, and is repeated after failures that may pass.

        Raises:
            Conflict: the adapter has its basis already, and ``exist_ok`` is false.

        """
        body = {"rows": _plain(rows)}
        try:
            result = self._transport.call(
                "POST", f"{self._path}/basis", BasisResult.from_json, json=body, repeatable=exist_ok
            )
        except Conflict as conflict:
            if not exist_ok or conflict.code != "basis_exists":
                raise
            info = self.refresh()
            return BasisResult(info.basis_digest or "", info.energy or {}, len(rows), info.positions_seen or 0)
        self.refresh()
        return result

    def losses(
        self,
        rows: Sequence[Row],
        probes: Sequence[Probe],
        *,
        base: bool = False,
        version: int | None = None,
        update: Update | None = None,
    ) -> Losses:
        """Mean losses of a batch under probes.

        Args:
            rows: the batch.
            probes: may be empty if ``base`` is true.
            base: also answer with the unperturbed loss.
            version: the version to probe, checked after ``update`` is applied; None for the newest.
            update: applied first, so that a training step is one round trip.

        Raises:
            StaleVersion: the update's base version is not the newest one; nothing was changed.
            NotFound: there is no such version.
            Conflict: the adapter has no basis yet, or the update's key was used for another update.
            TooLarge: a row is longer than the model's context, or there are more rows, tokens or probes than a call may
                have; nothing was changed.
            ServerError: the answer is not one to these probes.

        """
        body = {
            "version": version,
            "probes": [probe.to_json() for probe in probes],
            "rows": _plain(rows),
            "base": base,
            "update": None if update is None else _keyed(update).to_json(),
        }

        def read(data: Any) -> Losses:
            losses = Losses.from_json(data)
            if [(loss.seed, loss.epsilon) for loss in losses.losses] != [(p.seed, p.epsilon) for p in probes]:
                raise ValueError("these are not the losses of the probes that were asked for")
            # JSON has no NaN, so a loss that is not finite comes as null; only here is it known which were asked for.
            found = tuple(
                replace(loss, minus=math.nan) if probe.sides == "both" and loss.minus is None else loss
                for probe, loss in zip(probes, losses.losses, strict=True)
            )
            return replace(losses, losses=found, base=math.nan if base and losses.base is None else losses.base)

        losses = self._transport.call("POST", f"{self._path}/losses", read, json=body, repeatable=True)
        if losses.update is not None:
            self._note(losses.update)
        return losses

    def update(self, update: Update) -> UpdateResult:
        """Apply an update.

        It is applied once, however often it must be sent: an update without a key is given one.

        Raises:
            StaleVersion: its base version is not the newest one; nothing was changed.
            Conflict: the adapter has no basis yet, or the key was used for another update.

        """
        body = _keyed(update).to_json()
        return self._note(
            self._transport.call("POST", f"{self._path}/updates", UpdateResult.from_json, json=body, repeatable=True)
        )

    def rollback(self, version: int, *, base_version: int | None = None, key: str | None = None) -> UpdateResult:
        """Return to a version: make a new one whose coefficients are those of an earlier one, bit for bit.

        It stands in the journal as an entry of its own, and can itself be rolled back. It is done once, however often
        it must be sent.

        Args:
            version: the one to return to; 0 is what the adapter began with.
            base_version: the newest version as the caller knows it; None to ask the server.
            key: names the rollback, so that a caller that starts anew can send it again; None for a new one.

        Raises:
            NotFound: there is no such version.
            StaleVersion: the base version is not the newest one; nothing was changed.

        """
        if base_version is None:
            base_version = self.refresh().version
        body = {"base_version": base_version, "to_version": version, "key": key or uuid.uuid4().hex}
        return self._note(
            self._transport.call("POST", f"{self._path}/rollback", UpdateResult.from_json, json=body, repeatable=True)
        )

    def scores(self, rows: Sequence[Row], *, version: int | None = None, probe: Side | None = None) -> Scores:
        """Log-likelihoods, row by row.

        Args:
            rows: at most :attr:`~zoact_remote.wire.Limits.max_rows`; :func:`zoact_remote.evaluate` takes any number.
            version: None for the newest; 0 is the base model, or what was imported.
            probe: score a perturbation of that version.

        """
        body = {"version": version, "probe": None if probe is None else probe.to_json(), "rows": _plain(rows)}
        return self._transport.call("POST", f"{self._path}/scores", Scores.from_json, json=body, repeatable=True)

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        version: int | None = None,
        probe: Side | None = None,
    ) -> Generation:
        """Generate text.

        It changes nothing, so a call that fails in transit is made again; without a seed, that samples anew.

        Args:
            prompt: text or token ids; give this or ``messages``.
            messages: a conversation, put through the model's chat template.
            max_tokens: most tokens to generate.
            temperature: 0 takes the likeliest token each time.
            seed: of the sampling.
            stop: the text ends before any of these strings.
            version: None for the newest; 0 is the base model, or what was imported.
            probe: generate from a perturbation of that version.

        """
        if (prompt is None) == (messages is None):
            raise InvalidValue("prompt", "give either a prompt or messages")
        body: dict[str, Any] = {
            "version": version,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop": [stop] if isinstance(stop, str) else list(stop),
            "probe": None if probe is None else probe.to_json(),
        }
        if messages is not None:
            body["messages"] = _for_json(messages, "messages")
        else:
            body["prompt"] = _for_json(prompt, "prompt")
        return self._transport.call("POST", f"{self._path}/generate", Generation.from_json, json=body, repeatable=True)

    def journal(self, after: int = 0, *, page: int = 1000) -> Iterator[JournalEntry]:
        """All updates and rollbacks, oldest first, fetched page by page.

        Args:
            after: leave out entries up to this version.
            page: entries a call.

        """
        while True:
            entries = self._transport.call(
                "GET",
                f"{self._path}/journal",
                lambda data: [JournalEntry.from_json(item) for item in data["updates"]],
                params={"after": after, "limit": page},
                repeatable=True,
            )
            if not entries:
                return
            yield from entries
            after = entries[-1].version

    def audit(self, export: str | os.PathLike[str] | None = None) -> Audit:
        """Rebuild the coefficients from the journal, with NumPy alone, and compare every digest on the way.

        An adapter that was imported is rebuilt from its version 0, which is fetched and must have the digest that the
        server says. What does not agree is in the answer's ``failures``.

        Args:
            export: directory of a float32 :meth:`export` of any version, whose matrices are to be compared too.

        Raises:
            Conflict: the adapter has no basis yet.
            InvalidValue: the journal has a gap, or the export is damaged or of something else.

        """
        info = self.refresh()
        # Somebody may train it meanwhile.
        entries = [entry for entry in self.journal() if entry.version <= info.version]
        layout, start = self.layout(), None
        if info.imported_digest is not None:
            with tempfile.TemporaryDirectory() as scratch:
                start = read_coefficients(self.export(scratch, version=0), layout)
        return audit(info, layout, entries, export, start)

    def export(
        self,
        directory: str | os.PathLike[str],
        *,
        version: int | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> Path:
        """Write a version as a PEFT adapter, which PEFT and vLLM load.

        Args:
            directory: made if it does not exist; files of the same names in it are replaced.
            version: None for the newest.
            dtype: of the weights.

        Returns:
            The directory.

        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile() as archive:
            self._transport.download(f"{self._path}/export", archive, params={"version": version, "dtype": dtype})
            archive.seek(0)
            unpack(archive, target)
        return target

    def export_merged(
        self,
        directory: str | os.PathLike[str],
        checkpoint: str | os.PathLike[str],
        *,
        version: int | None = None,
    ) -> Path:
        """Write a whole model: a copy of the base model's checkpoint in which a version is added to the weights.

        Weights never leave the server, so the checkpoint is the caller's own. It has to be the very one that the server
        serves, and stays as it is. Only some rows of one weight are in memory at a time.

        Args:
            directory: made if it does not exist; files of the same names in it are replaced.
            checkpoint: directory of the base model, in safetensors.
            version: None for the newest.

        Returns:
            The directory.

        Raises:
            InvalidValue: the checkpoint is not that of the server's model, or a weight of it cannot be added to.

        """
        served = self._server_info()
        found = model_digest(checkpoint)
        if found != served.model_digest:
            raise InvalidValue(
                str(checkpoint),
                f"is not the checkpoint of {served.model} that the server serves: its digest is {found}, not "
                f"{served.model_digest}",
            )
        with tempfile.TemporaryDirectory() as scratch:
            export = self.export(scratch, version=version)
            halves = read_halves(export, self._layout_on(served))
            merge(Path(checkpoint), halves, Path(directory))
            shutil.copyfile(export / ABOUT, Path(directory, ABOUT))
        return Path(directory)

    def delete(self) -> None:
        """Delete the adapter, its coefficients and its journal. There is no way back."""
        self._transport.call("DELETE", self._path, lambda answer: None, repeatable=False)

    def _note(self, made: UpdateResult) -> UpdateResult:
        with self._lock:
            # One that was applied before may be older than what is known.
            if made.version > self.info.version:
                self.info = replace(self.info, version=made.version, digest=made.digest)
        return made

    def _server_info(self) -> Info:
        return self._transport.call("GET", "/info", Info.from_json, repeatable=True)

    def _layout_on(self, server: Info) -> Layout:
        return Layout(select_sites(server.sites, self.info.sites), self.info.rank)


def adapter_path(name: str) -> str:
    """Where an adapter's calls are, below ``/zoact/v1``."""
    if not re.fullmatch(f"{NAME}/{NAME}", name):
        raise InvalidValue(
            "name",
            "an adapter is named tenant/adapter, each of at most 63 lower-case letters, digits, '.', '_' and '-' that "
            f"begin with a letter or a digit; got {name!r}",
        )
    return f"/adapters/{name}"


def _keyed(update: Update) -> Update:
    return update if update.key is not None else replace(update, key=uuid.uuid4().hex)


def _plain(rows: Sequence[Row]) -> list[Any]:
    return [_for_json(row, f"rows[{i}]") for i, row in enumerate(rows)]


def _for_json(value: Any, param: str) -> Any:
    """A row or a part of it as JSON holds it, NumPy's integers and arrays of token ids as Python's."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {name: _for_json(item, f"{param}.{name}") for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        # Token ids are many, and most are Python's.
        return [item if type(item) is int else _for_json(item, f"{param}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.integer | np.ndarray):
        return value.tolist()
    raise InvalidValue(param, f"must be text, integers or lists of them, got {type(value).__name__}")
