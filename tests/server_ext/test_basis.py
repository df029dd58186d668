"""The streamed basis against singular vectors in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server_ext.basis import Basis, RangeFinder, make_finders, random_test_matrix
from server_ext.schemas import BasisSpec
from zoact_remote.layout import Layout, Site

Array = NDArray[np.float64]
WIDTH, RANK, OVERSAMPLING, COUNT = 96, 4, 8, 300
CPU = torch.device("cpu")


def synthetic(seed: int, decay: float, count: int = COUNT, width: int = WIDTH, mean: float = 0.0) -> Array:
    """Activations whose singular values fall as k^-decay, about a mean."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(count, width)))[0]
    right = np.linalg.qr(rng.normal(size=(width, width)))[0]
    x: Array = left * np.arange(1, width + 1) ** -decay @ right.T * 30
    # As the engines hand them over: in float32.
    rounded: Array = (x + mean * rng.normal(size=width)).astype(np.float32).astype(np.float64)
    return rounded


def finder(positions: str = "prompt", centred: bool = False, seed: int = 0, rank: int = RANK) -> RangeFinder:
    columns = min(rank + OVERSAMPLING, WIDTH)
    omega = random_test_matrix(WIDTH, columns, seed, 0)
    return RangeFinder(WIDTH, rank, positions, centred, omega, CPU)  # type: ignore[arg-type]


def feed(found: RangeFinder, x: Array, prompt: NDArray[np.bool_] | None = None, chunk: int = COUNT) -> None:
    """Hands over activations in chunks; positions not of the prompt are scored."""
    mask = np.ones(len(x), dtype=bool) if prompt is None else prompt
    for at in range(0, len(x), chunk):
        part, where = torch.from_numpy(x[at : at + chunk]).float(), torch.from_numpy(mask[at : at + chunk])
        found.add(part, where, ~where)


def take(x: Array, passes: int = 1, chunk: int = COUNT, **options: object) -> Basis:
    found = finder(**options)  # type: ignore[arg-type]
    feed(found, x, chunk=chunk)
    for _ in range(1, passes):
        found.next_pass()
        feed(found, x, chunk=chunk)
    return found.basis()


def kept(vectors: NDArray[np.float32], x: Array) -> float:
    """Share of the squared norm of x in the span of orthonormal vectors."""
    return float(np.square(x @ vectors.astype(np.float64)).sum() / np.square(x).sum())


def best(x: Array, rank: int = RANK) -> tuple[Array, float]:
    """The leading right singular vectors, and the share of the squared norm that they keep."""
    _, values, right = np.linalg.svd(x, full_matrices=False)
    return right[:rank].T, float(np.square(values[:rank]).sum() / np.square(values).sum())


def sine(one: Array, other: NDArray[np.float32]) -> float:
    """Sine of the largest angle between two subspaces."""
    return float(np.linalg.norm(other - one @ (one.T @ other), 2))


@settings(max_examples=12)
@given(st.integers(0, 1000), st.sampled_from([0.5, 1.0, 2.0]), st.booleans())
def test_the_basis_keeps_nearly_all_that_can_be_kept(seed: int, decay: float, centred: bool) -> None:
    x = synthetic(seed, decay, mean=0.2)
    target = x - x.mean(0) if centred else x
    vectors, optimum = best(target)
    one, two = (take(x, passes, centred=centred) for passes in (1, 2))
    for basis in (one, two):
        v = basis.vectors.astype(np.float64)
        assert basis.vectors.dtype == np.float32
        np.testing.assert_allclose(v.T @ v, np.eye(RANK), atol=1e-6)
        assert kept(basis.vectors, target) <= optimum + 1e-6
        assert 0 < basis.energy <= kept(basis.vectors, target) + 1e-5, "the estimate stays below the truth"
    assert kept(one.vectors, target) >= 0.8 * optimum
    assert kept(two.vectors, target) >= 0.98 * optimum
    assert kept(two.vectors, target) >= kept(one.vectors, target) - 1e-6, "a second pass is never worse"
    assert two.energy >= one.energy - 1e-6
    if decay == 2.0:
        assert sine(vectors, one.vectors) < 0.3
        assert sine(vectors, two.vectors) < 2e-3
        assert two.energy == pytest.approx(optimum, abs=1e-5)


def test_columns_lead_with_the_strongest_direction() -> None:
    x = synthetic(3, 2.0)
    vectors, _ = best(x)
    cosines = np.abs((vectors * take(x, 2).vectors).sum(0))
    np.testing.assert_allclose(cosines, 1, atol=1e-4)


def test_centring_is_that_of_the_activations_themselves() -> None:
    x = synthetic(1, 1.0, mean=1.0)
    centred = take(x, centred=True)
    explicit = take(x - x.mean(0))
    plain = take(x)
    assert sine(explicit.vectors.astype(np.float64), centred.vectors) < 1e-3
    assert centred.energy == pytest.approx(explicit.energy, abs=1e-4)
    assert sine(explicit.vectors.astype(np.float64), plain.vectors) > 0.1, "the mean must matter for this to say much"


@pytest.mark.parametrize("chunk", [1, 7, 299])
def test_chunks_make_no_difference(chunk: int) -> None:
    x = synthetic(2, 1.0)
    whole, streamed = take(x, 2), take(x, 2, chunk=chunk)
    assert sine(whole.vectors.astype(np.float64), streamed.vectors) < 1e-4
    assert streamed.energy == pytest.approx(whole.energy, abs=1e-5)


@pytest.mark.parametrize("positions", ["prompt", "scored"])
def test_only_the_positions_asked_for_count(positions: str) -> None:
    prompt, scored = synthetic(4, 1.0), synthetic(5, 1.0, count=200)
    x, mask = np.concatenate([prompt, scored]), np.arange(COUNT + 200) < COUNT
    order = np.random.default_rng(0).permutation(len(x))
    found = finder(positions)
    feed(found, x[order], mask[order], chunk=50)
    alone = take(prompt if positions == "prompt" else scored, positions="prompt")
    assert sine(alone.vectors.astype(np.float64), found.basis().vectors) < 1e-4
    assert [m.count for m in found.moments.values()] == [COUNT if positions == "prompt" else 200]


def test_both_kinds_of_position_weigh_the_same() -> None:
    """However many there are of each, and however large."""
    prompt, scored = synthetic(6, 1.0), 100 * synthetic(7, 1.0, count=150)
    x, mask = np.concatenate([prompt, scored]), np.arange(COUNT + 150) < COUNT
    found = finder("both")
    feed(found, x, mask)
    found.next_pass()
    feed(found, x, mask)
    basis = found.basis()
    balanced = np.concatenate([prompt / np.linalg.norm(prompt), scored / np.linalg.norm(scored)])
    _, optimum = best(balanced)
    assert kept(basis.vectors, balanced) >= 0.98 * optimum
    assert kept(best(x)[0].astype(np.float32), balanced) < 0.9 * optimum, "unweighted, the louder kind would win"


def test_a_position_may_be_of_both_kinds_or_of_none() -> None:
    found = finder("both")
    x = torch.randn(3, WIDTH)
    found.add(x, torch.tensor([True, True, False]), torch.tensor([False, True, False]))
    assert {kind: moments.count for kind, moments in found.moments.items()} == {"prompt": 2, "scored": 1}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("true_rank", [1, 2])
def test_activations_of_lower_rank_are_spanned_and_completed(true_rank: int, passes: int) -> None:
    rng = np.random.default_rng(true_rank)
    x = rng.normal(size=(50, true_rank)) @ rng.normal(size=(true_rank, WIDTH))
    basis = take(x, passes)
    v = basis.vectors.astype(np.float64)
    np.testing.assert_allclose(v.T @ v, np.eye(RANK), atol=1e-6)
    assert kept(basis.vectors, x) == pytest.approx(1, abs=1e-5)
    assert basis.energy == pytest.approx(1, abs=1e-4)
    leading = basis.vectors[:, :true_rank]
    assert kept(leading, x) == pytest.approx(1, abs=1e-5), "what was found comes first"


def test_one_position_is_enough() -> None:
    x = synthetic(8, 1.0)[:1]
    assert abs(float(x[0] @ take(x).vectors[:, 0])) == pytest.approx(float(np.linalg.norm(x)), rel=1e-5)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("x", [np.zeros((0, WIDTH)), np.zeros((5, WIDTH))])
def test_nothing_to_find_is_said(x: Array, passes: int) -> None:
    with pytest.raises(ValueError, match="no activations other than zero"):
        take(x, passes)


def test_one_position_has_no_centred_basis() -> None:
    with pytest.raises(ValueError, match="no activations"):
        take(np.eye(1, WIDTH), centred=True)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scale_does_not_matter(scale: float) -> None:
    x = synthetic(9, 1.0)
    one, other = take(x), take(x * scale)
    assert sine(one.vectors.astype(np.float64), other.vectors) < 1e-3
    assert other.energy == pytest.approx(one.energy, abs=1e-4)


def test_sixteen_bit_activations_are_summed_in_float32() -> None:
    x = torch.from_numpy(synthetic(10, 1.0)).to(torch.bfloat16)
    found = finder()
    everywhere = torch.ones(COUNT, dtype=torch.bool)
    found.add(x, everywhere, ~everywhere)
    exact = take(x.double().numpy())
    assert sine(exact.vectors.astype(np.float64), found.basis().vectors) < 1e-4


def test_memory_does_not_grow_with_the_positions() -> None:
    found = finder("both")
    feed(found, synthetic(0, 1.0))

    def held() -> int:
        tensors = [t for m in found.moments.values() for t in vars(m).values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() for t in tensors) + found._omega.numel() + found.omega.size

    before = held()
    for seed in range(5):
        feed(found, synthetic(seed, 1.0))
    assert held() == before
    # Two test matrices (float64 and float32), and a sketch and a sum for each kind of position.
    assert before <= 4 * WIDTH * (RANK + OVERSAMPLING) + 2 * (WIDTH + 1)


def test_test_matrices_are_orthonormal_and_differ_by_input_and_seed() -> None:
    drawn = {(s, n): random_test_matrix(WIDTH, 12, s, n) for s in (0, 1) for n in (0, 1)}
    for omega in drawn.values():
        np.testing.assert_allclose(omega.T @ omega, np.eye(12), atol=1e-12)
    for key, omega in drawn.items():
        for other, matrix in drawn.items():
            if key != other:
                assert np.linalg.norm(omega.T @ matrix, 2) < 0.95
    np.testing.assert_array_equal(drawn[0, 1], random_test_matrix(WIDTH, 12, 0, 1))


def test_each_input_gets_a_finder_and_sketches_are_no_wider_than_inputs() -> None:
    shapes = (("a.down_proj", "a.down_proj", 6), ("a.q_proj", "a.q_proj", 40), ("a.k_proj", "a.q_proj", 40))
    sites = tuple(Site(i, name, reads, width, 4) for i, (name, reads, width) in enumerate(shapes))
    spec = BasisSpec(positions="both", centred=True, oversampling=8)
    finders = make_finders(Layout(sites, 4), spec, CPU)
    assert {name: f.omega.shape for name, f in finders.items()} == {"a.down_proj": (6, 6), "a.q_proj": (40, 12)}
    assert all((f.rank, f.positions, f.centred) == (4, "both", True) for f in finders.values())
