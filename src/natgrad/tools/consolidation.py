r"""Elastic weight consolidation: a penalty that keeps what an earlier task needs.

.. math:: R(\theta) = \tfrac12 (\theta - \theta^*)^\top F (\theta - \theta^*)

is the mean loss of the earlier task around its optimum θ*, to second order and without its data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.operators import FisherMatrix
from natgrad.tools.parameters import values_of


def ewc_penalty(matrix: FisherMatrix, anchor: nn.Module | Mapping[str, Tensor]) -> EWCPenalty:
    """Return the penalty ``½(θ − θ*)ᵀF(θ − θ*)`` of moving away from an anchor.

    Its gradient is ``F(θ − θ*)``, at one product with F for value and gradient. Which Fisher matrix
    it is, exact, sampled or empirical, was the choice of :func:`natgrad.fisher_matrix`; the
    empirical one fades for samples that the network fits, and with it what they protect.

    Args:
        matrix: F on the earlier task, in any structure.
        anchor: θ*: the model as it is now, whose trainable parameters are copied, or parameter name
            → tensor.

    Returns:
        A function of a model, or of parameter name → tensor, that returns a scalar. It is in the
        units of a mean loss; times the number of data points it is that of their sum.

    Raises:
        ValueError: If a parameter of F is missing or has another shape.

    Source: Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks (2017), with
    the diagonal; Ritter, Botev & Barber, Online structured Laplace approximations (2018), with
    Kronecker factors.

    Example:
        >>> F = natgrad.fisher_matrix(model, first_task, structure="kfac")
        >>> penalty = natgrad.tools.ewc_penalty(F, model)
        >>> loss = cross_entropy(model(x), y) + 10.0 * penalty(model)
    """
    return EWCPenalty(matrix, anchor)


class EWCPenalty:
    """``½(θ − θ*)ᵀF(θ − θ*)``, as :func:`ewc_penalty` returns it.

    Attributes:
        matrix: F.
        anchor: θ*, parameter name → tensor.
    """

    def __init__(self, matrix: FisherMatrix, anchor: nn.Module | Mapping[str, Tensor]) -> None:
        self.matrix = matrix
        found = values_of(matrix.layout, anchor)
        self.anchor: dict[str, Tensor] = {n: v.detach().clone() for n, v in found.items()}

    def __call__(self, model: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of a model's parameters, a scalar."""
        layout = self.matrix.layout
        moved = values_of(layout, model)
        change = layout.to_flat({name: moved[name] - old for name, old in self.anchor.items()})
        return _quadratic_form(change, self.matrix)[0]


class _QuadraticForm(torch.autograd.Function):
    """``½ vᵀFv``, with the gradient ``Fv`` that its value needs anyway."""

    @staticmethod
    def forward(vector: Tensor, matrix: FisherMatrix) -> tuple[Tensor, Tensor]:
        product = matrix @ vector
        return 0.5 * torch.dot(vector, product), product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, FisherMatrix], output: Any) -> None:
        vector, ctx.matrix = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(vector, output[1])
        ctx.save_for_forward(vector, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None]:
        vector, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # With create_graph=True.
            product = _product(vector, ctx.matrix)
        return gradient * product, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> tuple[Tensor, None]:
        vector, _ = ctx.saved_tensors
        return torch.dot(_product(vector, ctx.matrix), tangent), None

    @staticmethod
    def vmap(info: Any, dims: Any, vectors: Tensor, matrix: FisherMatrix) -> Any:
        columns = vectors.movedim(dims[0], 1)
        products = _product(columns, matrix)
        return (0.5 * (columns * products).sum(0), products), (0, 1)


class _Product(torch.autograd.Function):
    """``FV``, of a vector or of columns."""

    @staticmethod
    def forward(vector: Tensor, matrix: FisherMatrix) -> Tensor:
        return matrix @ vector

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, FisherMatrix], output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _product(gradient, ctx.matrix), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return _product(tangent, ctx.matrix)

    @staticmethod
    def vmap(info: Any, dims: Any, vectors: Tensor, matrix: FisherMatrix) -> Any:
        inner = vectors.movedim(dims[0], -1)
        columns = _product(inner.flatten(1), matrix)
        return columns.view(inner.shape), inner.dim() - 1


_quadratic_form: Callable[[Tensor, FisherMatrix], tuple[Tensor, Tensor]] = _QuadraticForm.apply
_product: Callable[[Tensor, FisherMatrix], Tensor] = _Product.apply
