r"""Spectra of matrices that are too large for all of their eigenvalues.

Stochastic Lanczos quadrature: with a random unit vector v, k steps of the Lanczos iteration give
nodes t and weights w with ``Σ_i w_i f(t_i) ≈ vᵀf(F)v``, exactly so for polynomials up to degree
2k − 1, and ``tr f(F)`` is P times the expectation of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.arguments import check_integer
from natgrad.operators import Operator


@dataclass(frozen=True)
class SpectralDensity:
    """How the eigenvalues of a matrix are distributed, from random vectors.

    Attributes:
        nodes: Points that stand for eigenvalues, ``(vectors, steps)``, float64.
        weights: Their shares of the spectrum, likewise; each row sums to 1.
        size: P, the number of eigenvalues.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def sum_of(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Return the estimate of ``tr f(F) = Σ f(eigenvalue)``, and its standard error.

        Args:
            function: f, entry by entry.
        """
        terms = self.weights * function(self.nodes)
        # What has no weight has no part in it, also where f is infinite there.
        each = self.size * torch.where(self.weights > 0, terms, 0.0).sum(1)
        error = each.std() / math.sqrt(len(each)) if len(each) > 1 else each.new_tensor(math.nan)
        return float(each.mean()), float(error)

    def per_decade(self, points: Tensor, width: float = 0.1) -> Tensor:
        """Return the share of the spectrum per decade around some eigenvalues, for a plot.

        Nodes are smeared out to Gaussians in the logarithm; those that are not positive are left
        out, so that the integral over ``log10`` of the points is the share of positive eigenvalues.

        Args:
            points: Where, positive, ``(n,)``.
            width: Standard deviation of the Gaussians in decades.
        """
        positive = self.nodes > linalg.rounding(self.nodes)
        places = torch.where(positive, self.nodes, 1.0).log10().flatten()
        weights = (torch.where(positive, self.weights, 0.0) / len(self.nodes)).flatten()
        offset = (points.double().log10().unsqueeze(1) - places) / width
        return torch.exp(-0.5 * offset.square()) @ weights / (width * math.sqrt(2 * math.pi))


def spectral_density(
    matrix: Operator, steps: int = 50, vectors: int = 5, *, seed: int = 0
) -> SpectralDensity:
    """Return the distribution of the eigenvalues by stochastic Lanczos quadrature.

    It takes ``steps · vectors`` products with the matrix and keeps ``steps`` vectors at a time, as
    every one is made orthogonal to all before it. Extreme eigenvalues are found first.

    Args:
        matrix: A Fisher matrix, an inverse, or any other symmetric :class:`natgrad.operators`
            matrix.
        steps: Lanczos steps, the number of nodes; more than P mean P.
        vectors: Random vectors to average over.
        seed: Seed of the vectors.

    Raises:
        ValueError: If a number is not a positive integer.

    Source: Ubaru, Chen & Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature
    (2017); Ghorbani, Krishnan & Xiao (2019), for networks.

    Example:
        >>> density = natgrad.tools.spectral_density(F)
        >>> log_determinant, error = density.sum_of(lambda t: torch.log(t + 1e-3))
    """
    check_integer("steps", steps)
    check_integer("vectors", vectors)
    size = matrix.shape[0]
    steps = min(steps, size)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    nodes = torch.zeros(vectors, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    for row in range(vectors):
        start = torch.randn(size, generator=generator, dtype=matrix.dtype, device=matrix.device)
        diagonal, beside = _lanczos(matrix, start / start.norm(), steps)
        tridiagonal = diagonal.diag() + beside.diag(1) + beside.diag(-1)
        values, columns = torch.linalg.eigh(tridiagonal.cpu().double())
        nodes[row, : len(values)], weights[row, : len(values)] = values, columns[0].square()
    return SpectralDensity(nodes, weights, size)


def _lanczos(matrix: Operator, vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return diagonal ``(k,)`` and off-diagonal ``(k − 1,)`` of the tridiagonal matrix.

    ``k`` is less than the steps where the vectors span an invariant space before.
    """
    basis = vector.new_zeros(len(vector), steps)
    diagonal, beside = [], []
    largest = 0.0
    for step in range(steps):
        basis[:, step] = vector
        product = matrix @ vector
        diagonal.append(torch.dot(vector, product))
        largest = max(largest, float(product.norm()))
        known = basis[:, : step + 1]
        for _ in range(2):  # Once would leave what rounding has let in.
            product = product - known @ (known.mT @ product)
        norm = product.norm()
        if step + 1 == steps or float(norm) <= 10 * torch.finfo(norm.dtype).eps * largest:
            break
        beside.append(norm)
        vector = product / norm
    return torch.stack(diagonal), torch.stack(beside) if beside else vector.new_zeros(0)


def top_eigenpairs(matrix: Operator, number: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues and their eigenvectors, by products with the matrix alone.

    Args:
        matrix: A Fisher matrix in any structure, a Hessian, or another symmetric matrix.
        number: How many, less than P.

    Returns:
        Eigenvalues ``(number,)``, largest first, and eigenvectors, columns of ``(P, number)``, in
        the type of the matrix.

    Raises:
        ImportError: If SciPy is not installed.
        ValueError: If the number is not a whole one between 1 and P − 1, or the matrix not square.

    Example:
        >>> values, vectors = natgrad.tools.top_eigenpairs(F, 10)
    """
    size, columns = matrix.shape
    if size != columns:
        raise ValueError(
            f"a matrix of shape {(size, columns)} has no eigenvalues: take a symmetric one"
        )
    check_integer("the number of eigenpairs", number)
    if number >= size:
        raise ValueError(
            f"the number of eigenpairs must be between 1 and P - 1 = {size - 1}, got {number!r}: "
            "for all eigenvalues there is eigenvalues()"
        )
    operator = matrix.to_scipy()
    from scipy.sparse.linalg import eigsh

    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if not operator.matvec(start.numpy()).any():  # Of a matrix that is zero nothing is found.
        nothing = torch.zeros(number, dtype=matrix.dtype, device=matrix.device)
        return nothing, torch.eye(size, number, dtype=matrix.dtype, device=matrix.device)
    values, vectors = eigsh(operator, number, which="LA", v0=start.numpy())
    order = values.argsort()[::-1].copy()
    found = torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order])
    largest, theirs = (one.to(matrix.device, matrix.dtype) for one in found)
    return largest, theirs


def effective_dimension(matrix: Operator | SpectralDensity, damping: float | Tensor) -> Tensor:
    r"""Return how many directions the data determine, ``tr F(F + λI)⁻¹ = Σ μ/(μ + λ)``.

    Each eigenvalue μ counts as 1 if it is far above λ and as 0 if it is far below. With λ = δ/N
    these are MacKay's well-determined parameters of a Laplace posterior with prior precision δ.

    Args:
        matrix: F, whose eigenvalues are then computed, or its :func:`spectral_density`.
        damping: λ > 0, in the units of F: a number, or a tensor of several.

    Raises:
        ValueError: If a damping is not positive and finite.

    Source: MacKay, Bayesian interpolation (1992); Maddox, Benton & Wilson (2020).

    Example:
        >>> natgrad.tools.effective_dimension(F, 1.0 / 60_000)
    """
    shifts = torch.as_tensor(damping, dtype=torch.float64)
    if not bool(((shifts > 0) & (shifts < math.inf)).all()):
        raise ValueError(f"damping must be positive and finite, got {damping!r}")
    if isinstance(matrix, SpectralDensity):
        values, weights = matrix.nodes, matrix.weights * (matrix.size / len(matrix.nodes))
    else:
        values = matrix.eigenvalues().cpu().double()
        weights = torch.ones_like(values)
    values, weights = values.clamp(min=0.0).flatten(), weights.flatten()
    shares = values / (values + shifts.cpu().unsqueeze(-1))
    return shares @ weights
