r"""Is a structure isotropic, how much, and which learning rate does that imply?

A structure is isotropic when its step, seen in function space, is a multiple of the gradient with
respect to the outputs: :math:`J \hat F^{-1} J^\top / N = \alpha I`. Gradient descent on the squared
loss with learning rate η then contracts the residual of the linearised network by ``1 − ηα`` per
step, so ``η = 1/α`` converges in one step and every ``η < 2/α`` converges (Karakida & Osawa 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.arguments import check_integer
from natgrad.capture import Capture
from natgrad.capture.evaluation import evaluated
from natgrad.curvature import Curvature, Structure, as_structure
from natgrad.fisher import (
    ExactFisher,
    FisherType,
    as_fisher_type,
    partial_samples,
    update_from_output,
)
from natgrad.jacobians import Jacobians
from natgrad.layouts import BlockLayout
from natgrad.likelihoods import Likelihood, as_likelihood
from natgrad.operators import FisherMatrix
from natgrad.operators.block_tridiagonal import tridiagonal_coefficients

#: Structures that are isotropic in wide networks.
ISOTROPIC_STRUCTURES = ("full", "block_diagonal", "block_tridiagonal", "kfac", "unit_wise")

#: Deviation from αI below which a structure counts as isotropic.
TOLERANCE = 0.1


@dataclass(frozen=True)
class LayerShare:
    """What one layer contributes to the coefficient matrix.

    Attributes:
        name: Block name.
        alpha: Its share of α; the shares sum to α.
        deviation: Frobenius norm of what it adds besides a multiple of the identity, relative to
            that of αI, with α of the whole network.
        reason: Why it cannot be isotropic, where its shape tells; otherwise empty.
    """

    name: str
    alpha: float
    deviation: float
    reason: str = ""


@dataclass(frozen=True)
class Isotropy:
    """How a structure's natural-gradient step acts in function space.

    Attributes:
        structure: Name of the structure.
        damping: λ.
        rows: R, the number of rows: samples times output directions.
        alpha: α, the mean of the coefficients over the directions the likelihood can see.
        deviation: ``‖M − αI‖_F / ‖αI‖_F`` of the coefficient matrix ``M = JF̂⁻¹Jᵀ/N``.
        learning_rate: 1/α; NaN where α is not positive.
        largest_learning_rate: Largest stable learning rate of the linearised network,
            ``2/λ_max(M)``; 0 if M has a negative eigenvalue, as no rate is stable then.
        layers: Each layer's share.
        coefficients: M, ``(R, R)``.
    """

    structure: str
    damping: float
    rows: int
    alpha: float
    deviation: float
    learning_rate: float
    largest_learning_rate: float
    layers: tuple[LayerShare, ...]
    coefficients: Tensor = field(repr=False)

    @property
    def holds(self) -> bool:
        """Whether the deviation is at most 10 % and some learning rate is stable."""
        return self.deviation <= TOLERANCE and self.largest_learning_rate > 0

    def __str__(self) -> str:
        """Say whether the condition of fast convergence holds, or which layer breaks it."""
        size = f"deviates {100 * self.deviation:.3g} % from {self.alpha:.4g} times the identity"
        if self.holds:
            return (
                f"The condition of fast convergence holds for {self.structure}: its coefficient "
                f"matrix {size}; the learning rate 1/α is {self.learning_rate:.4g}, rates up to "
                f"{self.largest_learning_rate:.4g} are stable."
            )
        text = f"The condition of fast convergence does not hold for {self.structure}: its "
        text += f"coefficient matrix {size}"
        worst = max(self.layers, key=lambda layer: layer.deviation, default=None)
        if worst is not None:
            reason = worst.reason or "at this width, its share is not a multiple of the identity"
            text += f"; layer {worst.name!r} breaks it ({100 * worst.deviation:.3g} %): {reason}"
        if self.largest_learning_rate == 0:
            return text + "; some outputs move away from their targets at every learning rate."
        return text + f"; learning rates up to {self.largest_learning_rate:.4g} are stable."


def isotropy(
    model: nn.Module,
    x: Any,
    structure: str | Structure = "kfac",
    damping: float = 0.0,
    *,
    likelihood: str | Likelihood | nn.Module = "gaussian",
    fisher: str | FisherType = "exact",
    target: Tensor | None = None,
    output: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype | None = torch.float64,
    seed: int = 0,
    **structure_options: Any,
) -> Isotropy:
    r"""Measure the isotropy of a structure on a model and a batch.

    With ``Ĵ = SᵀJ`` the rows of the exact Fisher matrix (``J`` itself for the squared loss), the
    coefficient matrix is :math:`M = \hat J \hat F^{-1} \hat J^\top / N`. It is compared with αΠ,
    where Π projects on the output directions the likelihood can see: all of them, except for the
    sum of the logits of a categorical one.

    Args:
        model: Any model natgrad can capture, in its present mode; left as it was.
        x: N inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        structure: A structure of the Fisher matrix, or its name.
        damping: λ, in the units of F. At 0 the pseudo-inverse is taken.
        likelihood: A name, a :class:`natgrad.Likelihood` or a torch loss module.
        fisher: Fisher type of ``F̂``: ``"exact"``, ``"mc"`` or ``"empirical"``.
        target: The targets, for ``fisher="empirical"``.
        output: Picks the tensor the likelihood looks at out of the model's output.
        dtype: Precision: a copy of the model is made in it; None to work on the model itself.
        seed: Seed of the draws of ``fisher="mc"``.
        **structure_options: Options of the structure, with the defaults of its optimizer.

    Returns:
        α, the deviation, the learning rates, and each layer's share.

    Raises:
        ValueError: If a name is unknown, a parameter cannot be covered, the matrix would not fit
            memory, or the structure is singular at this damping (block_tridiagonal of depth 3s + 2
            without any).

    Source: Karakida & Osawa, Understanding approximate Fisher information for fast convergence of
    natural gradient descent in wide neural networks (2020).

    Example:
        >>> found = natgrad.ntk.isotropy(model, x, "block_diagonal")
        >>> print(found)
        >>> optimizer = natgrad.BlockDiagonalNGD(model, "gaussian", lr=found.learning_rate)
    """
    likelihood = as_likelihood(likelihood)
    fisher = as_fisher_type(fisher)
    if dtype is not None:
        model, x = copy.deepcopy(model).to(dtype), cast_inputs(x, dtype)
    with Capture(model, output) as capture:
        capture.check_covered()
        layouts = {name: block.layout for name, block in capture.blocks.items()}
        chosen = as_structure(structure, training=True, every_row=True, **structure_options)
        curvature = Curvature(chosen, layouts, capture.layout)
        with evaluated(capture, x) as found:
            rows, projection, count = fisher_rows(capture, likelihood, found)
            if isinstance(fisher, ExactFisher):
                curvature.update(rows, count)
            else:
                detached = found.detach()
                weights = likelihood.event_weights(detached, target)
                update_from_output(
                    curvature,
                    capture,
                    likelihood,
                    fisher,
                    found,
                    weights,
                    likelihood.count(detached, target),
                    partial=partial_samples(weights),
                    generator=torch.Generator(found.device).manual_seed(seed),
                    target=target,
                )
                curvature.join()
        return isotropy_of(curvature.matrix(), rows, projection, count, damping)


def fisher_rows(
    capture: Capture, likelihood: Likelihood, output: Tensor
) -> tuple[Jacobians, Tensor, float]:
    """Return the exact Fisher's rows ``SᵀJ`` of a recorded pass, the projection Π and the count.

    Rows have K directions per sample; ``Π_n = S_n⁺S_n``, ``(N, K, K)``; the count is that of data
    points. No sample is a ValueError.
    """
    detached = output.detach()
    if detached.numel() == 0:
        raise ValueError(f"the output has shape {tuple(detached.shape)}: give inputs of one sample")
    weights = likelihood.event_weights(detached, None)
    vectors = ExactFisher().vectors(likelihood, detached, weights)
    roots = vectors.reshape(len(vectors), len(detached), -1).transpose(0, 1)
    roots = roots.to(torch.promote_types(vectors.dtype, torch.float32))
    projection = roots @ torch.linalg.pinv(roots)
    rows = capture.pull_back(output, vectors)
    return rows, projection, float(likelihood.count(detached))


def isotropy_of(
    matrix: FisherMatrix, rows: Jacobians, projection: Tensor, count: float, damping: float
) -> Isotropy:
    """Return the isotropy of an updated structure with respect to rows ``Ĵ``.

    The projection Π is ``(N, K, K)``; the count is that of data points.
    """
    shares = matrix.function_space_map(rows, None, damping)
    if not shares:
        raise ValueError("the output depends on no captured parameter, so there is no step")
    seen = projection.diagonal(dim1=1, dim2=2).sum().item()
    norm = seen**0.5
    total = torch.zeros_like(next(iter(shares.values())))
    for share in shares.values():
        share /= count
        total += share
    total = 0.5 * (total + total.T)
    values = torch.linalg.eigvalsh(total)
    largest, smallest = float(values[-1]), float(values[0])
    alpha = float(total.trace()) / seen
    scale = max(abs(alpha), torch.finfo(total.dtype).tiny)
    layers = []
    for name, share in shares.items():
        own = float(share.trace()) / seen
        rest = _remainder(share, own, projection) / (scale * norm)
        reason = _reason(matrix, name, rows, damping) if rest > TOLERANCE / len(shares) else ""
        layers.append(LayerShare(name, own, rest, reason))
    uphill = smallest < -1e-6 * max(largest, -smallest)
    return Isotropy(
        matrix.structure,
        damping,
        rows.rows,
        alpha,
        _remainder(total, alpha, projection) / (scale * norm),
        1.0 / alpha if alpha > 0 else float("nan"),
        2.0 / largest if largest > 0 and not uphill else 0.0,
        tuple(layers),
        total,
    )


def _remainder(matrix: Tensor, alpha: float, projection: Tensor) -> float:
    """Return ``‖M − αΠ‖_F``."""
    difference = matrix.clone()
    samples, k = projection.shape[:2]
    blocks = difference.view(samples, k, samples, k)
    index = torch.arange(samples, device=matrix.device)
    blocks[index, :, index, :] -= alpha * projection.to(matrix.dtype)
    return float(difference.norm())


def _reason(matrix: FisherMatrix, name: str, rows: Jacobians, damping: float) -> str:
    """Say why a layer cannot be isotropic, or nothing."""
    layout: BlockLayout = rows[name].layout
    samples, count, units = rows.samples, rows.rows, layout.groups * layout.d_out
    kind = matrix.structure
    layer_wise = kind in ("block_diagonal", "block_tridiagonal")
    if kind == "diagonal":
        return "a diagonal matrix is not isotropic at any width"
    if kind == "full" and matrix.shape[0] < count:
        return f"the {matrix.shape[0]} parameters are fewer than the {count} rows"
    if layer_wise and layout.numel < count:
        return f"its {layout.numel} parameters are fewer than the {count} rows"
    if kind in ("kfac", "unit_wise") and layout.d_augmented < samples:
        return f"it has {layout.d_augmented} inputs for {samples} samples"
    # The output layer has one unit per output and needs no more.
    if kind == "kfac" and units < count and units != rows.directions:
        return f"it has {units} units for {count} rows"
    if damping > 0:
        return f"the damping {damping:g} shrinks some directions more than others"
    if kind == "full":
        return "the Jacobian does not have full row rank"
    return "its Jacobian does not have full row rank" if layer_wise else ""


def cast_inputs(x: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors of some inputs."""
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, x
    )


def isotropic_constant(
    structure: str,
    depth: int,
    samples: int,
    *,
    outputs: int = 1,
    input_dim: int | None = None,
    width: int | None = None,
    active_fraction: float = 0.5,
    last_layer: Literal["strict", "scaled"] = "strict",
) -> float:
    """Return α of a wide fully connected network at zero damping, for the squared loss.

    Args:
        structure: ``"full"``, ``"block_diagonal"``, ``"block_tridiagonal"``, ``"kfac"`` or
            ``"unit_wise"``.
        depth: Number of weight layers ``L``.
        samples: Training samples ``N`` of the full batch.
        outputs: Outputs ``C``; matters for unit_wise.
        input_dim: Input dimension ``M_0``; needed for kfac when it is below ``N``.
        width: Hidden width ``M``; needed for unit_wise.
        active_fraction: ``γ``, the share of samples with a non-zero slope at a hidden unit: 1/2
            for ReLU, 1 for smooth activations.
        last_layer: For kfac, whether the last layer counts 1, as it does with factors that are
            means over samples, or ``"scaled"`` to N, the convention in which α is ``N·L``.

    Returns:
        1 for the full matrix; ``L``; ``s`` or ``s + 1`` for ``L = 3s`` or ``3s + 1``; for kfac
        ``N(L − 1) + 1``, with the first layer counting ``min(M_0, N)``; ``γM(L − 1)/C + 1``.

    Raises:
        ValueError: If the structure has no such constant, as the diagonal, or a number it needs is
            missing; for the block tri-diagonal form at depth ``3s + 2``.

    Example:
        >>> natgrad.ntk.isotropic_constant("block_diagonal", depth=3, samples=100)
        3.0
        >>> natgrad.ntk.isotropic_constant("kfac", depth=3, samples=100)
        201.0
    """
    key = structure.replace("-", "_")
    check_integer("depth", depth)
    check_integer("samples", samples)
    if key in ("full", "exact"):
        return 1.0
    if key == "block_diagonal":
        return float(depth)
    if key == "block_tridiagonal":
        return float(tridiagonal_coefficients(depth).sum())
    if key == "kfac":
        last = 1 if last_layer == "strict" else samples
        first = samples if input_dim is None else min(samples, input_dim)
        if depth == 1:
            return float(last * first / samples)
        return float(first + samples * (depth - 2) + last)
    if key == "unit_wise":
        if width is None:
            raise ValueError("isotropic_constant of 'unit_wise' needs the hidden width")
        return active_fraction * width * (depth - 1) / outputs + 1.0
    raise ValueError(
        f"structure {structure!r} has no known constant α of wide networks; those that have one: "
        f"{', '.join(ISOTROPIC_STRUCTURES)}"
    )
