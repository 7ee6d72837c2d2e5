r"""Infinite-width limits of the kernels of fully connected networks.

As widths grow, ``(σ_w²/M_{l−1}) H H^T + σ_b²`` of layer ``l`` tends to ``Q_l``, the inner products
``D_l D_l^T`` of output gradients tend to ``B_l``, and each layer's tangent kernel to their product
(Jacot et al. 2018; in the layer-wise form of Karakida & Osawa 2020):

.. math::
    Q_l &= σ_w^2 A_{l-1} + σ_b^2, & A_0 &= X X'^\top / M_0, & A_l &= E[φ(u)φ(v)], \\
    B_l &= σ_w^2 B_{l+1} \circ E[φ'(u)φ'(v)], & B_L &= 1, & (u, v) &\sim N(0, Q_l).

The variances belong to the layer they stand in: ``B_l`` has ``σ_w²`` of layer ``l + 1``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from torch import Tensor, nn

from natgrad.ntk.networks import Architecture


@dataclass(frozen=True, eq=False)
class InfiniteKernel:
    """The kernels of an infinitely wide network on N by N' inputs; all tensors are (N, N') float64.

    Do not change the tensors in place: some share memory.

    Attributes:
        architecture: The network; its hidden widths play no role.
        forward: ``A_0 … A_{L−1}``, the kernels of the layers' inputs.
        preactivation: ``Q_1 … Q_L``, the covariances of the layers' outputs.
        backward: ``B_1 … B_L``, the kernels of one output's gradients; ``B_L`` is 1.
        error: A bound, to first order, on the absolute errors of ``layers`` over the largest entry
            of each; 0.0 where the activation has a closed form.
    """

    architecture: Architecture
    forward: tuple[Tensor, ...]
    preactivation: tuple[Tensor, ...]
    backward: tuple[Tensor, ...]
    error: float

    @property
    def depth(self) -> int:
        """The number of weight layers ``L``."""
        return len(self.preactivation)

    @functools.cached_property
    def layers(self) -> tuple[Tensor, ...]:
        """The tangent kernels ``Θ_l = B_l ∘ Q_l`` of one output, L tensors (N, N').

        The limit of ``J_l J'_l^T``, without a factor 1/N, where ``J_l`` is the Jacobian by weight
        and bias of layer ``l``. Outputs are independent: for C of them the kernel is ``Θ_l ⊗ I_C``.
        """
        return tuple(b * q for b, q in zip(self.backward, self.preactivation, strict=True))

    @property
    def total(self) -> Tensor:
        """The neural tangent kernel ``Σ_l Θ_l`` of one output, (N, N')."""
        total = self.backward[0] * self.preactivation[0]
        for b, q in zip(self.backward[1:], self.preactivation[1:], strict=True):
            total.addcmul_(b, q)
        return total


def infinite_kernel(
    architecture: Architecture | nn.Module, x1: Tensor, x2: Tensor | None = None
) -> InfiniteKernel:
    """Return the kernels of an infinitely wide network.

    Args:
        architecture: An ``Architecture``, or a model that ``Architecture.of`` can read.
        x1: Inputs (N, …), flattened to (N, M_0), of any floating dtype.
        x2: Inputs (N', …) of the other side, as for test by training samples. Without it the
            kernels are symmetric, and their diagonals exact.

    Returns:
        The kernels, computed in float64 on the device of ``x1``.

    Raises:
        ValueError: If the inputs are empty, of another dimension or not finite, if one is all zero
            and the first layer has no bias, or if the model is not a chain of layers.
        TypeError: If the inputs are not floating point tensors.
    """
    if not isinstance(architecture, Architecture):
        architecture = Architecture.of(architecture)
    first = _inputs(architecture, x1, "x1")
    symmetric = x2 is None
    second = first if x2 is None else _inputs(architecture, x2, "x2").to(first.device)
    activation = architecture.activation
    dim = architecture.input_dim

    kernel = (first @ second.T).div_(dim)
    p1 = (first**2).sum(1) / dim
    p2 = p1 if symmetric else (second**2).sum(1) / dim
    if symmetric:
        kernel.diagonal().copy_(p1)
    forward, preactivation, slopes = [kernel], [], []
    # Bounds on absolute errors, and on absolute values, of each Q_l and slope.
    input_error = 0.0
    q_bounds: list[tuple[float, float]] = []
    slope_bounds: list[tuple[float, float]] = []
    for layer, (weight, bias) in enumerate(
        zip(architecture.weight_variances, architecture.bias_variances, strict=True)
    ):
        q = (weight * forward[-1]).add_(bias)
        q1 = weight * p1 + bias
        q2 = q1 if symmetric else weight * p2 + bias
        preactivation.append(q)
        input_error *= weight
        q_bounds.append((input_error, _largest(q1, q2)))
        if layer == architecture.depth - 1:
            break
        kernel = activation.covariance(q1, q2, q)
        slope = activation.derivative_covariance(q1, q2, q)
        p1, s1 = activation.variance(q1), activation.derivative_variance(q1)
        if symmetric:
            p2, s2 = p1, s1
            kernel.diagonal().copy_(p1)
            slope.diagonal().copy_(s1)
        else:
            p2, s2 = activation.variance(q2), activation.derivative_variance(q2)
        input_error, slope_error = activation.error(q1, q2, input_error)
        slope_bounds.append((slope_error, _largest(s1, s2)))
        forward.append(kernel)
        slopes.append(slope)

    backward = [q.new_ones(()).expand_as(q)]
    for weight, slope in zip(architecture.weight_variances[:0:-1], slopes[::-1], strict=True):
        backward.append(slope.mul_(weight).mul_(backward[-1]))
    backward.reverse()

    result = InfiniteKernel(
        architecture, tuple(forward), tuple(preactivation), tuple(backward), error=0.0
    )
    if not any(error for error, _ in (*q_bounds, *slope_bounds)):
        return result
    return replace(result, error=_relative_error(architecture, result, q_bounds, slope_bounds))


def _inputs(architecture: Architecture, x: Tensor, name: str) -> Tensor:
    """Check inputs, and return them as (N, M_0) in float64."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {found}; convert it first")
    if x.dim() < 2 or len(x) < 1 or x[0].numel() != architecture.input_dim:
        raise ValueError(
            f"{name} must hold at least one sample of dimension {architecture.input_dim}, shape "
            f"(N, {architecture.input_dim}), got {tuple(x.shape)}"
        )
    x = x.detach().flatten(1).double()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} has entries that are not finite; remove those samples")
    zero = (x == 0).all(1)
    if architecture.bias_variances[0] == 0 and bool(zero.any()):
        raise ValueError(
            f"sample {int(zero.int().argmax())} of {name} is all zero, so without a bias in the "
            "first layer its correlation with others is undefined; remove it, or set bias_variance"
        )
    return x


def _largest(first: Tensor, second: Tensor) -> float:
    """Bound the entries of a matrix by those of its diagonals (Cauchy and Schwarz)."""
    return float((first.max() * second.max()).sqrt())


def _relative_error(
    architecture: Architecture,
    kernel: InfiniteKernel,
    q_bounds: list[tuple[float, float]],
    slope_bounds: list[tuple[float, float]],
) -> float:
    """Carry the errors of Q_l and of the slopes on to Θ_l, to first order."""
    relative = 0.0
    b_error, b_size = 0.0, 1.0
    for layer in range(architecture.depth - 1, -1, -1):
        q_error, q_size = q_bounds[layer]
        largest = float((kernel.backward[layer] * kernel.preactivation[layer]).abs().max())
        if largest > 0:
            relative = max(relative, (b_error * q_size + b_size * q_error) / largest)
        if layer:
            weight = architecture.weight_variances[layer]
            error, size = slope_bounds[layer - 1]
            b_error, b_size = weight * (b_error * size + b_size * error), weight * b_size * size
    return relative
