"""The noise specification: published and committed vectors, slices and statistics."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoact_remote.noise import DISTRIBUTIONS, LANES, Distribution, draw, philox4x32

SIGMAS = 6.2
"""A normal deviate is farther out one time in 1.8e9."""
MANY = 1 << 18

# Known answers for philox4x32 with 10 rounds, from the kat_vectors file of Random123 (D. E. Shaw Research).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter: str, key: str, expected: str) -> None:
    low, high = words(key)
    found = philox4x32(np.array([words(counter)], dtype=np.uint64), low | high << 32)
    assert found.tolist() == [words(expected)]


# Version 1 of the specification, for good: these numbers stand behind every journal ever written.
GOLDEN_SIGNS: list[tuple[int, int, int, str]] = [
    (0, 0, 0, "-+-+-+--+++-+------++-+++--++--+-+--+++-"),
    (0xFFFFFFFFFFFFFFFF, 7, 0, "+-++--+---+----++++++-+++-+--+--+---++++"),
    (0x123456789ABCDEF, 0xD1, 100, "-+-++++-+-+-+++----++--+-+--++--+-+-++--"),
    (42, 0xFFFFFFFF, 0x7FFFFFFFF0, "---+++++---------+-+-++-++-------+----+-"),
]
GOLDEN_NORMALS: list[tuple[int, int, int, list[float]]] = [
    (0, 0, 0, [1.651178, 0.84564537, -0.102098614, -0.115636036, -0.17499219, 0.3935259]),
    (0xFFFFFFFFFFFFFFFF, 7, 0, [-1.7100797, 0.46384797, 0.3818678, -0.28206095, -1.145301, -0.777367]),
    (0x123456789ABCDEF, 0xD1, 3, [-0.12238737, 0.52849364, -0.4055445, -0.2535815, -0.7455135, -1.8028204]),
    (42, 0xFFFFFFFF, 0x3FFFFFFFE, [-1.4055475, -1.7342914, 0.645292, 0.17932145, -0.7594061, -0.46536487]),
]


@pytest.mark.parametrize(("seed", "site", "first", "expected"), GOLDEN_SIGNS)
def test_rademacher_noise_is_what_it_was(seed: int, site: int, first: int, expected: str) -> None:
    found = draw("rademacher", seed, site, len(expected), first)
    assert "".join("+" if z > 0 else "-" for z in found) == expected
    assert set(np.abs(found)) == {1.0}


@pytest.mark.parametrize(("seed", "site", "first", "expected"), GOLDEN_NORMALS)
def test_gaussian_noise_is_what_it_was(seed: int, site: int, first: int, expected: list[float]) -> None:
    found = draw("gaussian", seed, site, len(expected), first)
    np.testing.assert_array_max_ulp(found, np.array(expected, dtype=np.float32), maxulp=1)


def philox(counter: list[int], seed: int) -> list[int]:
    """Philox4x32-10 by the letter of the paper, in Python's integers."""
    key = [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def element(distribution: str, seed: int, site: int, number: int) -> float:
    """One element of Z(seed), as the specification reads."""
    if distribution == "rademacher":
        block, lane = divmod(number, 128)
        word = philox([block % 2**32, block >> 32, site, 0], seed)[lane // 32]
        return -1.0 if word >> lane % 32 & 1 else 1.0
    block, lane = divmod(number, 4)
    a, b = philox([block % 2**32, block >> 32, site, 1], seed)[lane // 2 * 2 :][:2]
    radius = math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24))
    angle = 2 * math.pi * (b >> 8) / 2**24
    return radius * (math.sin(angle) if lane % 2 else math.cos(angle))


SEED = st.integers(0, 2**64 - 1)
SITE = st.integers(0, 2**32 - 1)
# Beyond 2^32 blocks too, where the counter's second word comes in.
FIRST = st.integers(0, 1000) | st.integers(2**39 - 300, 2**39 + 300) | st.integers(0, 2**50)


@given(st.sampled_from(DISTRIBUTIONS), SEED, SITE, FIRST, st.integers(1, 9))
def test_each_element_is_as_specified(distribution: Distribution, seed: int, site: int, first: int, count: int) -> None:
    found = draw(distribution, seed, site, count, first)
    expected = [element(distribution, seed, site, first + i) for i in range(count)]
    np.testing.assert_array_max_ulp(found, np.array(expected, dtype=np.float32), maxulp=1)


@given(st.sampled_from(DISTRIBUTIONS), SEED, SITE, st.integers(0, 700), st.integers(0, 700))
def test_a_slice_is_a_slice_of_the_whole(distribution: Distribution, seed: int, site: int, first: int, n: int) -> None:
    whole = draw(distribution, seed, site, first + n)
    part = draw(distribution, seed, site, n, first)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, whole[first:])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mean_and_variance(distribution: Distribution) -> None:
    z = draw(distribution, 7, 3, MANY).astype(np.float64)
    assert abs(z.mean()) < SIGMAS / math.sqrt(MANY)
    if distribution == "gaussian":
        # The moments' own variances: Var z^2 = 2, Var z^3 = 15, Var z^4 = 96.
        for power, mean, variance in ((2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs((z**power).mean() - mean) < SIGMAS * math.sqrt(variance / MANY)
        quantiles = np.quantile(z, [0.1, 0.5, 0.9])
        np.testing.assert_allclose(quantiles, [-1.2815516, 0, 1.2815516], atol=SIGMAS * 1.8 / math.sqrt(MANY))


def draws(distribution: Distribution) -> dict[str, Any]:
    """Vectors that must look independent, by what tells them apart from the first."""
    at = {"seed": 11, "site": 5, "count": MANY}
    return {
        "itself": draw(distribution, **at),
        "next seed": draw(distribution, **{**at, "seed": 12}),
        "seed's high word": draw(distribution, **{**at, "seed": 11 + 2**32}),
        "next site": draw(distribution, **{**at, "site": 6}),
        "seed and site swapped": draw(distribution, **{**at, "seed": 5, "site": 11}),
        "next element": draw(distribution, **at, first=1),
        "next block": draw(distribution, **at, first=LANES[distribution]),
        "elements far away": draw(distribution, **at, first=2**40),
    }


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_independence(distribution: Distribution) -> None:
    found = {name: z.astype(np.float64) for name, z in draws(distribution).items()}
    for one, other in combinations(found, 2):
        correlation = (found[one] * found[other]).mean()
        assert abs(correlation) < SIGMAS / math.sqrt(MANY), (one, other)


def test_distributions_do_not_share_bits() -> None:
    signs, normals = draw("rademacher", 1, 2, MANY), draw("gaussian", 1, 2, MANY)
    assert abs((signs * np.sign(normals)).mean(dtype=np.float64)) < SIGMAS / math.sqrt(MANY)


@pytest.mark.parametrize(
    ("distribution", "seed", "site", "word"),
    [
        ("uniform", 0, 0, "distribution"),
        ("gaussian", -1, 0, "seed"),
        ("gaussian", 2**64, 0, "seed"),
        ("rademacher", 0, -1, "site"),
        ("rademacher", 0, 2**32, "site"),
    ],
)
def test_what_is_out_of_range_is_refused(distribution: Any, seed: int, site: int, word: str) -> None:
    with pytest.raises(ValueError, match=f"^{word} must"):
        draw(distribution, seed, site, 4)
