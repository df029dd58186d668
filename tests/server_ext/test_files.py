"""What lies on disk beside the journal: bases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server_ext import basis_files
from zoact_remote.digest import basis_digest


def basis() -> dict[str, np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    rng = np.random.default_rng(0)
    # One of them not contiguous, as a slice of a decomposition is.
    return {"a.q_proj": rng.normal(size=(4, 9)).astype(np.float32).T, "a.down_proj": np.eye(6, 2, dtype=np.float32)}


def test_a_basis_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "bases" / "key.safetensors"
    basis_files.write(path, basis())
    found = basis_files.read(path)
    assert found.keys() == basis().keys()
    for name, vectors in basis().items():
        np.testing.assert_array_equal(found[name], vectors)
    assert basis_digest(found) == basis_digest(basis())
    assert [file.name for file in path.parent.iterdir()] == ["key.safetensors"], "nothing half-written is left"


def test_a_missing_basis_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        basis_files.read(tmp_path / "key.safetensors")


def test_the_basis_digest_covers_names_shapes_and_values() -> None:
    plain = basis()
    swapped = {"a.q_proj": plain["a.down_proj"], "a.down_proj": plain["a.q_proj"]}
    reshaped = plain | {"a.down_proj": plain["a.down_proj"].reshape(3, 4)}
    nudged = plain | {"a.down_proj": np.nextafter(plain["a.down_proj"], np.float32(2))}
    assert len({basis_digest(b) for b in (plain, swapped, reshaped, nudged, {"a.q_proj": plain["a.q_proj"]})}) == 5
    assert basis_digest(dict(reversed(plain.items()))) == basis_digest(plain)
