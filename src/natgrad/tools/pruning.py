r"""The optimal brain surgeon: which weights to remove, and what the others do about it.

Around an optimum, with ``H = F + λI``, the least loss at which the weights Q can be zero is

.. math:: \tfrac12 \theta_Q^\top ([H^{-1}]_{QQ})^{-1} \theta_Q, \qquad
          \delta_S = H_{SS}^{-1} H_{SQ} \theta_Q

more, the change δ being that of the weights S that stay.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad import linalg
from natgrad.arguments import check_kind, is_number
from natgrad.capture.model_output import unwrap
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.operators import (
    DiagonalOperator,
    EigenKroneckerOperator,
    FisherMatrix,
    Operator,
)
from natgrad.optim import RelativeDamping
from natgrad.tools.linear_system import part_dampings, solved
from natgrad.tools.parameters import (
    has_units,
    places,
    values_of,
    weight_blocks,
    weight_places,
)


@dataclass(frozen=True)
class Pruning:
    """What was removed from a model.

    Attributes:
        kept: Parameter name → which entries stay, bool in the parameter's shape.
        saliencies: Block name → saliency of every weight ``(G, d_out, d_in)``, or of every unit
            ``(G, d_out)``: the loss that removing it alone costs, the others adjusted.
        loss_increase: ``½ δᵀFδ`` for all that was removed and adjusted, in the units of the loss.
    """

    kept: dict[str, Tensor]
    saliencies: dict[str, Tensor]
    loss_increase: float

    def apply(self, model: nn.Module) -> None:
        """Set what was removed to zero again, as after a step of training."""
        values = dict(unwrap(model).named_parameters())
        with torch.no_grad():
            for name, mask in self.kept.items():
                values[name].mul_(mask)


def prune(
    model: nn.Module,
    matrix: FisherMatrix,
    fraction: float,
    *,
    units: bool = False,
    layers: Collection[str] | None = None,
    adjust: bool = True,
    damping: float | RelativeDamping = RelativeDamping(0.01),  # noqa: B008
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> Pruning:
    """Set the least salient weights of a model to zero and adjust the others.

    Saliencies are those of removing each weight, or unit, alone; the adjustment is the best one for
    all that is removed, by conjugate gradients. To prune gradually, call it again with the matrix
    of the pruned model and a larger fraction: weights at zero are the first to be taken.

    Args:
        model: The trained model; its parameters are changed in place.
        matrix: F of the training data, in any structure. With ``"diagonal"`` it is optimal brain
            damage, and there is nothing to adjust.
        fraction: How many of the weights of the layers to remove, in [0, 1]. Biases, the weights
            of norms and other parameters of one dimension are neither counted nor removed.
        units: Remove whole output units, weights and bias, ``fraction`` of their number, of all
            layers that have such; leave the last layer out by ``layers``.
        layers: Names of the blocks to take weights from; all by default.
        adjust: Whether the other parameters make up for what is removed, default True.
        damping: λ, in the units of F; a :class:`natgrad.RelativeDamping`, by default a hundredth,
            is a share of the mean eigenvalue of every part.
        tolerance: Relative residual of the adjustment.
        max_iterations: Most iterations of it; a warning says if they were too few.

    Raises:
        TypeError: If the matrix is none of :func:`natgrad.fisher_matrix`.
        ValueError: If the fraction is out of range, a layer unknown or without units, or the
            parameters are not those of the matrix.

    Source: LeCun, Denker & Solla, Optimal brain damage (1989); Hassibi & Stork, Second order
    derivatives for network pruning: optimal brain surgeon (1992); Singh & Alistarh, WoodFisher
    (2020).

    Example:
        >>> F = natgrad.fisher_matrix(model, loader, structure="ekfac")
        >>> pruning = natgrad.tools.prune(model, F, 0.8)
    """
    check_kind("matrix", matrix, FisherMatrix)
    if not (is_number(fraction) and 0 <= fraction <= 1):
        raise ValueError(f"fraction must be in [0, 1], got {fraction!r}")
    layout, blocks = matrix.layout, weight_blocks(model, layers)
    if units:
        blocks = _with_units(blocks, layers)
    if not blocks:
        what = "output units" if units else "weight matrices"
        raise ValueError(f"the model has no {what}, so there is nothing to remove")
    theta = layout.to_flat(values_of(layout, model)).detach().to(layout.dtype)
    shifts = part_dampings(matrix, damping)
    if isinstance(damping, RelativeDamping):  # What no data reach costs nothing: a share of zero.
        least = torch.finfo(layout.dtype).eps * (max(shifts.values()) or 1.0)
        shifts = {name: shift or least for name, shift in shifts.items()}
    inverse = matrix.inverse(shifts)
    if units:
        saliencies = _of_units(inverse, blocks, theta)
    else:
        for one in inverse.parts.values():
            if type(one).diagonal is Operator.diagonal:  # It goes through the dense matrix.
                linalg.check_memory(one.shape[0], 2, one.dtype, one.device)
        each = 0.5 * theta.square() / inverse.diagonal()
        saliencies = {n: each[_weights(layout, b)] for n, b in blocks.items()}
    removed = torch.zeros_like(theta, dtype=torch.bool)
    chosen = _smallest(saliencies, fraction)
    for name, block in blocks.items():
        where = places(layout, block) if units else _weights(layout, block)
        removed[where[chosen[name]]] = True
    change = -theta * removed
    if adjust and bool(removed.any()):
        change = change + _adjustment(matrix, shifts, change, ~removed, tolerance, max_iterations)
    increase = 0.5 * float(torch.dot(change, matrix @ change))
    kept = {name: value != 0 for name, value in layout.to_dict((~removed).to(theta)).items()}
    values = dict(unwrap(model).named_parameters())
    with torch.no_grad():
        for name, value in layout.to_dict(theta + change).items():
            values[name].copy_(value)
    pruning = Pruning(kept, saliencies, increase)
    pruning.apply(model)  # Sums leave rounding where there should be zeros.
    return pruning


def _weights(layout: ParameterLayout, block: BlockLayout) -> Tensor:
    """Return where the weights of a block lie, ``(G, d_out, d_in)``; in a row where several do."""
    matrices = weight_places(layout, block)
    if not block.is_dense:
        return matrices[0]
    return torch.cat([one.reshape(1, 1, -1) for one in matrices], 2)


def _with_units(
    blocks: dict[str, BlockLayout], layers: Collection[str] | None
) -> dict[str, BlockLayout]:
    """Return the blocks that have output units; a ValueError if another one was asked for."""
    found = {name: block for name, block in blocks.items() if has_units(block)}
    without = sorted(set(blocks) - set(found))
    if layers is not None and without:
        raise ValueError(
            f"no output units in {without}, whose parameters have no formula: leave units out, or "
            f"name some of {list(found)}"
        )
    return found


def _smallest(saliencies: dict[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Return which of all saliencies are the smallest ones, block by block."""
    flat = torch.cat([values.flatten() for values in saliencies.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(stable=True)[: round(fraction * len(flat))]] = True
    pieces = chosen.split([values.numel() for values in saliencies.values()])
    return {n: p.view(v.shape) for (n, v), p in zip(saliencies.items(), pieces, strict=True)}


def _of_units(
    inverse: FisherMatrix, blocks: dict[str, BlockLayout], theta: Tensor
) -> dict[str, Tensor]:
    """Return ``½ θ_gᵀ([H⁻¹]_gg)⁻¹θ_g`` of every output unit, ``(G, d_out)``."""
    part_of = {n: part for part, names in inverse.members.items() for n in names}
    found: dict[str, Tensor] = {}
    for name, block in blocks.items():
        where, one = places(inverse.layout, block), inverse.parts[part_of[name]]
        matrices = theta[where]
        if isinstance(one, DiagonalOperator):
            one = EigenKroneckerOperator(block, None, None, block.matrix(one.entries))
        if isinstance(one, EigenKroneckerOperator) and one.orthogonal:
            a, b = one.input_basis, one.output_basis
            rotated = matrices if a is None else matrices @ a
            blocks_of_units = one.scale if b is None else b.square() @ one.scale
            found[name] = 0.5 * (rotated.square() / blocks_of_units).sum(-1)
            continue
        values = []
        for index in where.flatten(0, 1):
            columns = theta.new_zeros(len(theta), len(index))
            columns[index, torch.arange(len(index), device=index.device)] = 1.0
            solution = torch.linalg.solve((inverse @ columns)[index], theta[index])
            values.append(0.5 * torch.dot(theta[index], solution))
        found[name] = torch.stack(values).view(where.shape[:2])
    return found


def _adjustment(
    matrix: FisherMatrix,
    shifts: dict[str, float],
    change: Tensor,
    stays: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """Return ``−H_SS⁻¹ H_S change`` at the weights that stay, and zero elsewhere."""
    damping = torch.zeros_like(change)
    for name, one in matrix.parts.items():
        for place in matrix.layout.slices(one.layout):
            damping[place] = shifts[name]

    def product(vector: Tensor) -> Tensor:
        return stays * (matrix @ vector + damping * vector)

    diagonal = torch.where(stays, matrix.diagonal() + damping, 1.0)
    return solved(
        lambda v: product(stays * v) + ~stays * v, -product(change), diagonal, tolerance,
        max_iterations,
    )  # fmt: skip
