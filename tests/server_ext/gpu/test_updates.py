"""What the kernels make of updates is the specification's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server_ext.coefficients import Coefficients
from server_ext.gpu import updates
from server_ext.noise import Noise, close_gaps
from tests.server_ext.gpu.support import DEVICE
from zoact_remote.digest import coefficients_digest, seal
from zoact_remote.layout import Layout, Site
from zoact_remote.replay import apply_update, direction
from zoact_remote.wire import Normaliser, Update

# More blocks than one program takes, and a site whose last block is not full.
LAYOUT = Layout((Site(4, "a", "x", 96, 500), Site(5, "b", "y", 64, 1000), Site(9, "c", "y", 64, 7)), rank=3)
TERMS = [(2**63 + 12345, 0.3), (7, -1e-3), (2**32 - 1, 1 / 3), (0, -7.25), (7, 1e-20), (2**64 - 1, 0.1)]


def start() -> torch.Tensor:
    flat = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(1))
    return close_gaps(flat, LAYOUT)


@pytest.mark.parametrize("count", range(len(TERMS) + 1))
def test_terms_are_added_as_by_numpy(count: int) -> None:
    terms = TERMS[:count]
    number, _, site = Noise(LAYOUT, "rademacher", DEVICE).counter
    flat = start().to(DEVICE)
    updates.add_terms(flat, "rademacher", number, site, terms)
    found = close_gaps(flat, LAYOUT).cpu().numpy()
    wanted = apply_update(start().numpy(), LAYOUT, "rademacher", Update(0, tuple(terms)))
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("count", range(len(TERMS) + 1))
def test_gaussian_terms_are_added_up_to_the_last_bits_of_logarithms(count: int, squared: bool) -> None:
    terms = TERMS[:count]
    noise = Noise(LAYOUT, "gaussian", DEVICE)
    flat = start().to(DEVICE)
    updates.add_terms(flat, "gaussian", noise.counter[0], noise.counter[2], terms, squared)
    wanted = start().double()
    for seed, scalar in terms:
        z = torch.from_numpy(direction(LAYOUT, "gaussian", seed)).double()
        wanted += np.float32(scalar).item() * (z * z if squared else z)
    torch.testing.assert_close(close_gaps(flat, LAYOUT).cpu().double(), wanted, rtol=1e-6, atol=1e-5)


def test_squares_of_signs_are_not_drawn() -> None:
    number, _, site = Noise(LAYOUT, "rademacher", DEVICE).counter
    with pytest.raises(ValueError, match="all 1"):
        updates.add_terms(start().to(DEVICE), "rademacher", number, site, TERMS, squared=True)


@pytest.mark.parametrize("size", [0, 1, LAYOUT.size])
def test_digest_is_numpys(size: int) -> None:
    flat = start()
    flat[size:] = 0
    total, squares = updates.digest_sums(flat.to(DEVICE)).tolist()
    assert seal(total, squares, LAYOUT) == coefficients_digest(flat.numpy(), LAYOUT)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_normalised_coefficients_on_a_gpu_are_close_to_those_on_the_cpu() -> None:
    normaliser = Normaliser(tuple((seed, abs(scalar)) for seed, scalar in TERMS), offset=0.1, epsilon=1e-8)
    update = Update(0, tuple(TERMS), decay=0.25, normaliser=normaliser)
    made = [
        Coefficients(Noise(LAYOUT, "gaussian", device), start()).after(update)
        for device in ("cpu", torch.device(DEVICE))
    ]
    torch.testing.assert_close(made[0].flat, made[1].flat.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_coefficients_on_a_gpu_are_those_on_the_cpu() -> None:
    update = Update(0, tuple(TERMS), decay=0.25)
    made = [
        Coefficients(Noise(LAYOUT, "rademacher", device), start()).after(update)
        for device in ("cpu", torch.device(DEVICE))
    ]
    np.testing.assert_array_equal(made[0].flat.numpy(), made[1].flat.cpu().numpy())
    assert made[0].digest() == made[1].digest()
