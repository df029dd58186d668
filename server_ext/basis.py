"""The activation basis: top right singular vectors of a layer's inputs, from one streaming pass.

For activations X ``[positions, d]`` the vectors wanted are the leading eigenvectors of A = X'X. A itself is d x d for
every input and is never formed: the pass keeps Y = A Omega for a random Omega ``[d, l]``, l = rank + oversampling: it
takes O(d l) memory whatever the number of positions. A is then approximated from Y and Omega alone (the shifted Nystrom
approximation of Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data", NeurIPS 2017, algorithm 3), and its eigenvectors are the basis. A second pass repeats this with the
first pass's range in Omega's place: a step of subspace iteration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from server_ext.schemas import BasisSpec
from zoact_remote.layout import Layout
from zoact_remote.noise import draw

Positions = Literal["scored", "prompt", "both"]

SKETCH_STREAM = 2**31
"""Sketches draw from sites above this number, so that they never share noise with a probe."""

NOISE_MARGIN = 4.0
"""Eigenvalues below this multiple of the sketch's rounding are taken for noise."""


@dataclass(frozen=True)
class Basis:
    """The basis of one input.

    Attributes:
        vectors: float32 ``[d, rank]``, orthonormal columns, leading first.
        energy: share of the activations' squared norm that lies in their span, 0 to 1. After one pass it is the
            sketch's estimate, which never exceeds the true share but for rounding; NaN for a random basis.

    """

    vectors: NDArray[np.float32]
    energy: float


def random_test_matrix(width: int, columns: int, seed: int, number: int) -> NDArray[np.float64]:
    """A random orthonormal ``[width, columns]``, the same on every engine.

    Args:
        width: width of the input.
        columns: at most ``width``.
        seed: 64-bit seed.
        number: the input's number, so that inputs of one width differ.

    """
    gaussian = draw("gaussian", seed, SKETCH_STREAM + number, width * columns).reshape(width, columns)
    return np.linalg.qr(gaussian.astype(np.float64))[0]


@dataclass
class Moments:
    """Running sums of one kind of position at one input.

    Attributes:
        sketch: A Omega, float32 ``[d, l]``.
        total: sum of the activations, float32 ``[d]``.
        squares: sum of their squared norms, float64 scalar tensor.
        count: positions seen.

    """

    sketch: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    @classmethod
    def zeros(cls, omega: torch.Tensor) -> Moments:
        squares = torch.zeros((), dtype=torch.float64, device=omega.device)
        return cls(torch.zeros_like(omega), torch.zeros_like(omega[:, 0]), squares)

    def add(self, x: torch.Tensor, omega: torch.Tensor) -> None:
        """Takes in activations ``[n, d]`` of any floating dtype."""
        x = x.to(torch.float32)
        self.sketch.addmm_(x.T, x @ omega)
        self.total += x.sum(0)
        self.squares += x.square().sum(dtype=torch.float64)
        self.count += len(x)

    def finish(self, omega: NDArray[np.float64], centred: bool) -> tuple[NDArray[np.float64], float]:
        """Y and the trace of A, divided by that trace so that kinds of position weigh the same."""
        sketch, total = self.sketch.double().cpu().numpy(), self.total.double().cpu().numpy()
        trace = float(self.squares)
        if centred:
            sketch = sketch - np.outer(total, total @ omega) / self.count
            trace -= float(total @ total) / self.count
        return (sketch / trace, 1.0) if trace > 0 else (np.zeros_like(sketch), 0.0)


@dataclass
class RangeFinder:
    """Finds the basis of one input from activations that stream by.

    Attributes:
        width: width of the input, d.
        rank: columns wanted.
        positions: which positions count; ``"both"`` keeps a sketch of each kind.
        centred: whether the mean is taken away.
        omega: the test matrix, float64 ``[d, l]``; replaced between passes.
        device: where activations arrive.

    """

    width: int
    rank: int
    positions: Positions
    centred: bool
    omega: NDArray[np.float64]
    device: torch.device
    moments: dict[str, Moments] = field(init=False)

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._omega = torch.from_numpy(self.omega).to(self.device, torch.float32)
        kinds = ("prompt", "scored") if self.positions == "both" else (self.positions,)
        self.moments = {kind: Moments.zeros(self._omega) for kind in kinds}

    def add(self, x: torch.Tensor, prompt: torch.Tensor, scored: torch.Tensor) -> None:
        """Takes in activations ``[n, d]`` and, for each kind of position, a boolean mask ``[n]``."""
        for kind, mask in (("prompt", prompt), ("scored", scored)):
            if kind in self.moments:
                self.moments[kind].add(x[mask], self._omega)

    def next_pass(self) -> None:
        """Takes the range found so far as the test matrix of another pass over the same activations."""
        sketch, _ = self._sketch()
        self.omega = np.linalg.qr(sketch)[0]
        self._begin()

    def basis(self) -> Basis:
        """The basis after the last pass.

        Activations may span fewer dimensions than the rank: one token scored in the first layer is one vector. Columns
        beyond what rises above float32's rounding are then an arbitrary orthonormal completion.

        Raises:
            ValueError: there were no activations, or all were zero.

        """
        sketch, trace = self._sketch()
        if trace == 0:
            raise ValueError("the calibration rows gave no activations other than zero")
        vectors, values, noise = _nystrom(sketch, self.omega)
        found = int((values[: self.rank] > NOISE_MARGIN * noise).sum())
        vectors = np.linalg.qr(np.hstack([vectors[:, :found], self.omega]))[0][:, : self.rank]
        signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(self.rank)])
        return Basis((vectors * signs).astype(np.float32), float(min(values[:found].sum() / trace, 1.0)))

    def _sketch(self) -> tuple[NDArray[np.float64], float]:
        parts = [m.finish(self.omega, self.centred) for m in self.moments.values() if m.count]
        if not parts:
            return np.zeros_like(self.omega), 0.0
        return np.sum([y for y, _ in parts], axis=0), float(sum(trace for _, trace in parts))


def _nystrom(
    sketch: NDArray[np.float64], omega: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The Nystrom approximation of A from Y = A Omega.

    Returns:
        Eigenvectors ``[d, l]``, eigenvalues ``[l]``, falling, and the size of the rounding in them.

    """
    # Y was summed in float32. A multiple of the identity as large as its rounding keeps the core matrix positive
    # definite, and is taken off the eigenvalues again.
    shift = float(np.finfo(np.float32).eps * np.linalg.norm(sketch))
    shifted = sketch + shift * omega
    core = omega.T @ shifted
    values, rotation = np.linalg.eigh((core + core.T) / 2)
    values = np.maximum(values, shift * 1e-3)
    vectors, singular, _ = np.linalg.svd(shifted @ rotation / np.sqrt(values), full_matrices=False)
    return vectors, np.maximum(singular**2 - shift, 0.0), shift


def make_finders(layout: Layout, spec: BasisSpec, device: torch.device) -> dict[str, RangeFinder]:
    """A range finder for each input of a layout, by name."""
    finders = {}
    for number, (name, width) in enumerate(layout.inputs.items()):
        columns = min(layout.rank + spec.oversampling, width)
        omega = random_test_matrix(width, columns, spec.seed, number)
        finders[name] = RangeFinder(width, layout.rank, spec.positions, spec.centred, omega, device)
    return finders
