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
from zoact_remote.replay import apply_update
from zoact_remote.wire import Update

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
    updates.add_terms(flat, number, site, terms)
    found = close_gaps(flat, LAYOUT).cpu().numpy()
    wanted = apply_update(start().numpy(), LAYOUT, "rademacher", Update(0, tuple(terms)))
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("size", [0, 1, LAYOUT.size])
def test_digest_is_numpys(size: int) -> None:
    flat = start()
    flat[size:] = 0
    total, squares = updates.digest_sums(flat.to(DEVICE)).tolist()
    assert seal(total, squares, LAYOUT) == coefficients_digest(flat.numpy(), LAYOUT)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_coefficients_on_a_gpu_are_those_on_the_cpu() -> None:
    update = Update(0, tuple(TERMS), decay=0.25)
    made = [
        Coefficients(Noise(LAYOUT, "rademacher", device), start()).after(update)
        for device in ("cpu", torch.device(DEVICE))
    ]
    np.testing.assert_array_equal(made[0].flat.numpy(), made[1].flat.cpu().numpy())
    assert made[0].digest() == made[1].digest()
