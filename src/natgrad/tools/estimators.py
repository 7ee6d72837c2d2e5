r"""Traces and diagonals from products with random vectors.

For what is known by products alone, as inverses by an iterative solver. With a random matrix Ω of
independent columns and an orthonormal basis Q of ``AΩ``,

.. math:: \operatorname{tr} A = \operatorname{tr} Q^\top A Q
          + \operatorname{tr} (I - QQ^\top) A (I - QQ^\top),

the first exactly and only the second, which is small for a matrix that decays, by sampling.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from natgrad.arguments import check_choice, check_integer
from natgrad.operators import Operator


def estimate_trace(
    matrix: Operator,
    products: int = 30,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Return an unbiased estimate of the trace, and its standard error.

    Args:
        matrix: Any symmetric matrix with products: a Fisher matrix, an inverse.
        products: How many products with vectors it may take, at least 4. From ``2P`` (``P`` for
            Hutchinson's) on the trace is exact.
        method: ``"hutchinson"``, the mean of ``gᵀAg`` over vectors of random signs, whose error
            falls as one over the root of the products; ``"hutch++"``, with a third of them for Q;
            ``"xtrace"`` (default), in which every vector serves for Q and for the rest, in turns.
            The last two are exact for ranks below a third and a half of the products.
        seed: Seed of the vectors.

    Raises:
        ValueError: If the method is unknown, or there are too few products.

    Source: Hutchinson (1989); Meyer et al., Hutch++: optimal stochastic trace estimation (2021);
    Epperly, Tropp & Webber, XTrace (2024).

    Example:
        >>> P = F.inverse(1e-3, "conjugate_gradient")
        >>> trace, error = natgrad.tools.estimate_trace(P, 100)
    """
    check_choice("method", method, "xtrace", "hutch++", "hutchinson")
    check_integer("products", products, 4)
    size = matrix.shape[0]
    if products >= (size if method == "hutchinson" else 2 * size):
        return float(matrix.to_dense().trace()), 0.0
    generator = torch.Generator(matrix.device).manual_seed(seed)
    if method == "xtrace":
        omega = torch.randn(
            size, products // 2, generator=generator, dtype=matrix.dtype, device=matrix.device
        )
        return _mean(_xtrace(matrix, omega))
    if method == "hutchinson":
        signs = _signs(matrix, products, generator)
        return _mean((signs * (matrix @ signs)).sum(0))
    basis = _basis(matrix, _signs(matrix, products // 3, generator))
    rest = _signs(matrix, products - 2 * (products // 3), generator)
    rest = rest - basis @ (basis.mT @ rest)
    known = float((basis * (matrix @ basis)).sum())
    mean, error = _mean((rest * (matrix @ rest)).sum(0))
    return known + mean, error


def _xtrace(matrix: Operator, omega: Tensor) -> Tensor:
    """Return the estimates whose basis leaves out one column of Ω and whose sample it is.

    The basis without column i is that of all without the direction ``s_i`` in it, the only one that
    is orthogonal to every other column of ``AΩ = QR``: column i of ``R⁻ᵀ``, normalised. The sample
    is scaled to the length it has on average in what the basis leaves.
    """
    size, number = omega.shape
    sketch = matrix @ omega
    basis, triangle = torch.linalg.qr(sketch)
    pivots = triangle.diagonal()
    # Of a matrix of low rank the directions beyond it are arbitrary, and nothing is there.
    pivots[pivots == 0] = torch.finfo(pivots.dtype).eps * max(1.0, float(pivots.abs().max()))
    eye = torch.eye(number, dtype=omega.dtype, device=omega.device)
    left_out = torch.linalg.solve_triangular(triangle, eye, upper=True).mT
    left_out = left_out / left_out.norm(dim=0)
    inside = basis.mT @ (matrix @ basis)
    coordinates = basis.mT @ omega
    coordinates = coordinates - left_out * (left_out * coordinates).sum(0)
    forms = (omega * sketch).sum(0) - 2 * (coordinates * triangle).sum(0)
    forms = forms + (coordinates * (inside @ coordinates)).sum(0)
    lengths = omega.square().sum(0) - coordinates.square().sum(0)
    known = inside.trace() - (left_out * (inside @ left_out)).sum(0)
    found: Tensor = known + forms * (size - number + 1) / lengths
    return found


def estimate_diagonal(
    matrix: Operator,
    products: int = 30,
    method: Literal["diag++", "hutchinson"] = "diag++",
    *,
    seed: int = 0,
) -> Tensor:
    """Return an unbiased estimate of the diagonal, ``(P,)``.

    Args:
        matrix: Any symmetric matrix with products.
        products: How many products with vectors it may take, at least 4.
        method: ``"hutchinson"``, the mean of ``g ∘ Ag`` over vectors of random signs; ``"diag++"``
            (default), the same for what is left of A beside a basis from a third of the products;
            exact for ranks below that.
        seed: Seed of the vectors.

    Raises:
        ValueError: If the method is unknown, or there are too few products.

    Source: Bekas, Kokiopoulou & Saad (2007); Baston & Nakatsukasa, Stochastic diagonal estimation:
    probabilistic bounds and an improved algorithm (2022).

    Example:
        >>> variances = natgrad.tools.estimate_diagonal(F.inverse(1e-3, "conjugate_gradient"), 100)
    """
    check_choice("method", method, "diag++", "hutchinson")
    check_integer("products", products, 4)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    if method == "hutchinson":
        signs = _signs(matrix, products, generator)
        known: Tensor = (signs * (matrix @ signs)).mean(1)
        return known
    basis = _basis(matrix, _signs(matrix, products // 3, generator))
    known = (basis * (matrix @ basis)).sum(1)
    signs = _signs(matrix, products - 2 * (products // 3), generator)
    rest = matrix @ signs
    rest = rest - basis @ (basis.mT @ rest)
    found: Tensor = known + (signs * rest).mean(1)
    return found


def _signs(matrix: Operator, number: int, generator: torch.Generator) -> Tensor:
    """Return vectors of random signs, columns of ``(P, number)``."""
    shape = (matrix.shape[0], number)
    bits = torch.randint(0, 2, shape, generator=generator, device=matrix.device)
    return (2 * bits - 1).to(matrix.dtype)


def _basis(matrix: Operator, columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the products with some columns."""
    basis: Tensor = torch.linalg.qr(matrix @ columns)[0]
    return basis


def _mean(estimates: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error."""
    spread = float(estimates.double().std()) / math.sqrt(len(estimates))
    return float(estimates.double().mean()), spread
