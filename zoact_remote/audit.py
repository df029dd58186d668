"""An audit of what a server serves: coefficients rebuilt from the journal with NumPy alone.

For Rademacher noise the rebuilt coefficients are those of the server bit for bit, so that every digest in the journal,
and every float of an export, must be what the rebuilt ones are. Version 0 of an adapter that was imported is taken from
an export of it, and must have the digest that the server says.

For Gaussian noise libraries round logarithm and sine differently, and digests of two devices differ. What is then
checked without an export is that the journal's digests agree with one another; an export's coefficients must lie within
:data:`TOLERANCE` times the square root of the number of terms added, relative to the largest coefficient on the way.
Roundings add up like a random walk of steps of at most half a unit in the last place, 2^-24; the tolerance is sixteen
times that.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoact_remote.digest import basis_digest, coefficients_digest
from zoact_remote.errors import InvalidValue
from zoact_remote.exports import ABOUT, TENSORS, read_halves
from zoact_remote.layout import Layout
from zoact_remote.noise import NOISE_VERSION
from zoact_remote.replay import Replayer
from zoact_remote.wire import AdapterInfo, JournalEntry

Flat = NDArray[np.float32]

TOLERANCE = 2.0**-20
"""Of a Gaussian adapter's coefficients: see above."""


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        adapter: ``tenant/adapter``.
        version: the newest version, to which the coefficients were rebuilt.
        layout: where the sites lie in them.
        coefficients: float32 ``[layout.size]``.
        digest: of the rebuilt coefficients.
        exact: whether digests had to be those of the rebuilt coefficients; false for Gaussian noise.
        exported: the version that an export held; None if there was none to check.
        failures: what does not agree, a line each; empty if everything does.

    """

    adapter: str
    version: int
    layout: Layout
    coefficients: Flat
    digest: str
    exact: bool
    exported: int | None
    failures: tuple[str, ...]


def audit(
    adapter: AdapterInfo,
    layout: Layout,
    entries: Sequence[JournalEntry],
    export: str | os.PathLike[str] | None = None,
    start: Flat | None = None,
) -> Audit:
    """Rebuild an adapter, and compare it with what the server says of it.

    Args:
        adapter: what the server says of it.
        layout: where it acts.
        entries: its whole journal, up to the adapter's version.
        export: directory of a float32 export of any of its versions, to be checked too.
        start: version 0's coefficients, float32 ``[layout.size]``, of an adapter that was imported; None for zeros.

    Raises:
        InvalidValue: the journal has a gap or is of another noise specification, or the export is damaged, of another
            adapter or not float32.

    """
    if adapter.noise_version != NOISE_VERSION:
        raise InvalidValue("noise.version", f"is {adapter.noise_version}; this release knows version {NOISE_VERSION}")
    about = {} if export is None else _about(Path(export), adapter)
    exported = about.get("version")
    # Of the versions on the way, only those that are come back to are kept.
    wanted = {entry.rollback_to for entry in entries} | {exported}
    exact = adapter.noise == "rademacher"
    flat, replayer = (
        np.zeros(layout.size, dtype=np.float32) if start is None else start,
        Replayer(layout, adapter.noise),
    )
    kept = {0: flat}
    digests = [coefficients_digest(flat, layout)]
    failures = []
    if adapter.imported_digest not in (None, digests[0]):
        failures.append(f"version 0: the digest of what was imported is {adapter.imported_digest}, not {digests[0]}")
    terms, largest = 0, float(np.abs(flat).max())
    for version, entry in enumerate(entries, 1):
        if (entry.version, entry.update.base_version) != (version, version - 1):
            raise InvalidValue("journal", f"entry {version} is of version {entry.version}")
        if entry.digest_before != digests[-1]:
            failures.append(f"version {version}: the digest before it is {entry.digest_before}, not {digests[-1]}")
        if entry.rollback_to is not None:
            if not 0 <= entry.rollback_to < version:
                raise InvalidValue("journal", f"version {version} is a rollback to {entry.rollback_to}")
            flat, digest = kept[entry.rollback_to], digests[entry.rollback_to]
        else:
            flat = replayer.apply(flat, entry.update)
            digest = coefficients_digest(flat, layout) if exact else entry.digest
            terms += len(entry.update.terms)
            largest = max(largest, float(np.abs(flat).max()))
        if entry.digest != digest:
            failures.append(f"version {version}: its digest is {entry.digest}, but its coefficients' is {digest}")
        digests.append(digest)
        if version in wanted:
            kept[version] = flat
    if (adapter.version, adapter.digest) != (len(entries), digests[-1]):
        failures.append(
            f"{adapter.name} is at version {adapter.version} with the digest {adapter.digest}, but its journal leads "
            f"to version {len(entries)} with the digest {digests[-1]}"
        )
    if export is not None:
        if exported not in kept:
            raise InvalidValue(f"{export}: version", f"is {exported}; the journal ends at version {len(entries)}")
        if about.get("coefficients_digest") != digests[exported]:
            failures.append(f"{export}: its digest is {about.get('coefficients_digest')}, not {digests[exported]}")
        tolerance = None if exact else TOLERANCE * math.sqrt(terms) * largest
        failures += _compare(Path(export), layout, kept[exported], tolerance, adapter.basis_digest)
    digest = digests[-1] if exact else coefficients_digest(flat, layout)
    return Audit(adapter.name, len(entries), layout, flat, digest, exact, exported, tuple(failures))


def _about(export: Path, adapter: AdapterInfo) -> dict[str, Any]:
    """What an export says of itself."""
    file = export / ABOUT
    try:
        about = json.loads(file.read_bytes())
    except ValueError as error:
        raise InvalidValue(str(file), f"is not JSON: {error}") from error
    if not isinstance(about, dict) or about.get("adapter") != adapter.name:
        raise InvalidValue(f"{file}: adapter", f"must be {adapter.name}: this is an export of something else")
    if not isinstance(about.get("version"), int):
        raise InvalidValue(f"{file}: version", f"must be a number, is {about.get('version')!r}")
    return about


def _compare(
    export: Path, layout: Layout, flat: Flat, tolerance: float | None, expected_basis: str | None
) -> list[str]:
    """What of an export's matrices does not agree with coefficients (to the bit without a tolerance) and a basis."""
    file = export / TENSORS
    halves = read_halves(export, layout)
    failures = []
    basis: dict[str, Flat] = {}
    for site, matrix in zip(layout.sites, layout.matrices(flat).values(), strict=True):
        half_a, half_b = halves[site.name]
        off = float(np.abs(half_b - matrix).max())
        # As words, since a negative zero equals a positive one.
        if not (np.array_equal(_words(half_b), _words(matrix)) if tolerance is None else off <= tolerance):
            failures.append(f"{file}: lora_B of {site.name} is off the rebuilt coefficients by {off:.3g}")
        if not np.array_equal(_words(basis.setdefault(site.input, half_a.T).T), _words(half_a)):
            failures.append(f"{file}: lora_A of {site.name} is not that of the other sites with its input")
    if (digest := basis_digest(basis)) != expected_basis:
        failures.append(f"{file}: the digest of the basis is {digest}, not {expected_basis}")
    return failures


def _words(matrix: Flat) -> NDArray[np.uint32]:
    return np.ascontiguousarray(matrix).view(np.uint32)
