r"""Hessian and Gauss-Newton matrix of a loss, by products alone.

.. math:: H v = \nabla_\theta \left(\nabla_\theta L \cdot v\right), \qquad
          G v = J^\top \left(\nabla_z^2 L\right) J v

Pearlmutter (1994) and Schraudolph (2002). The loss is the mean that :func:`natgrad.fisher_matrix`
is about, ``Σ −log p / count``, so that for the likelihoods of natgrad G is the exact Fisher matrix
with all its entries, and H is G plus what the curvature of the outputs adds. Only batch norms in
train mode differ: their statistics are functions of the parameters here and constants there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from natgrad import linalg
from natgrad.derivatives.passes import (
    Pass,
    Passes,
    check_differentiable,
    derivatives,
    pushed_forward,
)
from natgrad.fisher import Batch
from natgrad.layouts import ParameterLayout
from natgrad.likelihoods import LikelihoodLike, as_likelihood
from natgrad.operators.operator import Operator


@dataclass(frozen=True, eq=False)
class _LossMatrix(Operator):
    """A matrix of second derivatives of a loss; every product reads the data once.

    Attributes:
        layout: Order of all trainable parameters.
        passes: The model, the data and their likelihood.
        count: What the mean over data points divides by.
    """

    layout: ParameterLayout
    passes: Passes
    count: float
    semidefinite: ClassVar[bool] = False

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Parameter names in the order of rows and columns."""
        return self.layout.names

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.layout.device

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P, k)``."""
        total = torch.zeros_like(columns)
        for one in self.passes:
            if one.count() > 0:
                total += torch.stack(self._products(one, columns), 1)
        return total / self.count

    def _products(self, one: Pass, columns: Tensor) -> list[Tensor]:
        """Return a batch's part of every product, of sums over data points."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """Return the matrix, by P products."""
        linalg.check_memory(self.layout.numel, 2, self.dtype, self.device)
        dense = super().to_dense()
        return (dense + dense.mT) / 2  # Symmetric but for rounding.

    def __repr__(self) -> str:
        """Show the size."""
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]})"


@dataclass(frozen=True, eq=False, repr=False)
class HessianMatrix(_LossMatrix):
    """The Hessian of the mean loss, ``P × P``: symmetric, and mostly indefinite.

    Products, :mod:`natgrad.tools` and iterative solvers need no more than products; everything
    else (``trace``, ``diagonal``, ``eigenvalues``, ``logdet``, the direct inverse) takes P of them.

    Attributes:
        layout: Order of all trainable parameters.
        passes: The model, the data and their likelihood.
        count: What the mean over data points divides by.
    """

    def _products(self, one: Pass, columns: Tensor) -> list[Tensor]:
        check_differentiable(one.output, self.passes)
        loss = one.loss()
        (gradient,) = derivatives(loss, self.passes, [torch.ones_like(loss)], create_graph=True)
        return derivatives(gradient, self.passes, columns.unbind(1))


@dataclass(frozen=True, eq=False, repr=False)
class GaussNewtonMatrix(_LossMatrix):
    """The generalised Gauss-Newton matrix of the mean loss, ``P × P``: no negative eigenvalue.

    It is ``fisher_matrix(..., "full")`` without rows or moments: memory is that of a backward pass.

    Attributes:
        layout: Order of all trainable parameters.
        passes: The model, the data and their likelihood.
        count: What the mean over data points divides by.
    """

    def _products(self, one: Pass, columns: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            output = one.output.detach().requires_grad_(True)
            loss = Pass(output, one.target, one.likelihood).loss()
            (slope,) = torch.autograd.grad(loss, output, create_graph=True)
        vectors = []
        for moved in pushed_forward(one.output, self.passes, columns):
            found = None
            if slope.requires_grad:
                (found,) = torch.autograd.grad(
                    slope, output, moved, retain_graph=True, allow_unused=True
                )
            vectors.append(torch.zeros_like(output) if found is None else found)
        return derivatives(one.output, self.passes, vectors)


def hessian_matrix(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    likelihood: LikelihoodLike = "categorical",
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> HessianMatrix:
    """Return the Hessian of a model's mean loss on some data, matrix-free.

    Args:
        model: Any module whose layers can be differentiated twice; it runs in its present train or
            eval mode, once now and at every product.
        data: A pair ``(inputs, targets)`` or a re-iterable of such pairs.
        likelihood: A name, a :class:`natgrad.Likelihood`, or a torch loss module, as in
            :func:`natgrad.fisher_matrix`; the loss is its mean over data points.
        output: Picks the tensor the likelihood looks at out of the model's output.

    Raises:
        ValueError: If an argument is wrong, targets are missing, or the data cannot be read again;
            from products, if a layer cannot be differentiated twice.

    Example:
        >>> H = natgrad.hessian_matrix(model, (x, y))
        >>> product = H @ torch.ones(H.shape[0])
        >>> values, vectors = natgrad.tools.top_eigenpairs(H, 5)
        >>> block = H.submatrix(["0"])
    """
    return HessianMatrix(*_prepared(model, data, likelihood, output))


def gauss_newton_matrix(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    likelihood: LikelihoodLike = "categorical",
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> GaussNewtonMatrix:
    """Return the generalised Gauss-Newton matrix of a model's mean loss, matrix-free.

    The arguments are those of :func:`hessian_matrix`. Where it shall be inverted or looked at
    entry by entry, :func:`natgrad.fisher_matrix` is faster.

    Raises:
        ValueError: If an argument is wrong, targets are missing, or the data cannot be read again;
            from products, if a layer cannot be differentiated twice.

    Example:
        >>> G = natgrad.gauss_newton_matrix(model, (x, y))
        >>> density = natgrad.tools.spectral_density(G, steps=10)
    """
    return GaussNewtonMatrix(*_prepared(model, data, likelihood, output))


def _prepared(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    likelihood: LikelihoodLike,
    output: Callable[[Any], Tensor] | None,
) -> tuple[ParameterLayout, Passes, float]:
    passes = Passes.of(model, data, as_likelihood(likelihood), output)
    count = sum(one.count() for one in passes)
    if count == 0:
        raise ValueError("no target of the data counts, so there is no loss to differentiate")
    return passes.layout, passes, count
