"""Second moments of rows in a Kronecker-factored basis."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.jacobians.embedding import EmbeddingJacobian
from natgrad.jacobians.layer import LayerJacobian
from natgrad.jacobians.linear import LinearJacobian


def second_moments(
    jacobian: LayerJacobian, basis_a: Tensor | None, basis_b: Tensor | None
) -> Tensor:
    """Return ``Σ_nk (U_Bᵀ M_nk U_A)²`` of one layer's rows, ``(G, d_out, d_in + bias)``.

    Rows of single positions are products, whose squares are those of the rotated inputs and output
    gradients. Others are summed over positions first: before the rotation or after it, whichever
    takes fewer multiplications.

    Args:
        jacobian: The rows.
        basis_a: ``U_A``, ``(G, d_in + bias, d_in + bias)``; None for the identity.
        basis_b: ``U_B``, ``(G, d_out, d_out)``; None for the identity.
    """
    if isinstance(jacobian, EmbeddingJacobian) and basis_a is None:
        return _embedding_moments(jacobian, basis_b)
    if isinstance(jacobian, LinearJacobian) and _rotates_positions(jacobian):
        plain = jacobian.augmented()
        inputs = _rotate_rows(plain.inputs, basis_a)
        rotated = plain.replaced(inputs, _rotate_rows(plain.output_gradients, basis_b))
        return plain.layout.matrix(rotated.diagonal())
    layout = jacobian.layout
    total = torch.zeros(
        layout.groups,
        layout.d_out,
        layout.d_augmented,
        dtype=jacobian.dtype,
        device=jacobian.device,
    )
    for start, stop in jacobian.chunks():
        rows = linalg.rotate(basis_b, jacobian.per_sample_gradients(start, stop), basis_a)
        total += rows.square().sum((0, 1))
    return total


def _rotates_positions(jacobian: LinearJacobian) -> bool:
    """Return whether rotating inputs and output gradients beats rotating their products."""
    directions, d_in, d_out = (
        jacobian.directions,
        jacobian.layout.d_augmented,
        jacobian.layout.d_out,
    )
    pairs = jacobian.positions * (d_in**2 + directions * d_out**2)
    return jacobian.positions == 1 or pairs <= directions * d_in * d_out * (d_in + d_out)


def _rotate_rows(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Return ``x U`` for rows ``(..., G, d)``."""
    if basis is None:
        return rows
    grouped = rows.movedim(-2, 0)
    rotated = grouped.flatten(1, -2) @ basis
    return rotated.view(grouped.shape).movedim(0, -2)


def _embedding_moments(jacobian: EmbeddingJacobian, basis_b: Tensor | None) -> Tensor:
    """Sum over the positions of each token in each sample, without one-hot vectors."""
    vocabulary = jacobian.layout.d_in
    delta = _rotate_rows(jacobian.output_gradients, basis_b)[:, :, :, 0]  # (N, K, T, d)
    sample = torch.arange(jacobian.samples, device=jacobian.device).unsqueeze(1)
    tokens, place = torch.unique(sample * vocabulary + jacobian.indices, return_inverse=True)
    sums = delta.new_zeros(tokens.numel(), delta.shape[1], delta.shape[3])
    sums.index_add_(0, place.flatten(), delta.transpose(1, 2).flatten(0, 1))
    result = delta.new_zeros(vocabulary, delta.shape[3])
    result.index_add_(0, tokens % vocabulary, sums.square().sum(1))
    return result.T.unsqueeze(0)
