"""Dense definitions of structures in Kronecker eigenbases: explicit sums, Kronecker products.

As :mod:`tests.dense`, nothing here imports natgrad. Rows come from the dense Jacobian, inputs and
output gradients from plain forward hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import dense
from tests.cases import Case


@dataclass
class DenseBlock:
    """One block of a case.

    Attributes:
        names: Its parameters.
        where: Flat index of every entry of its matrices, (G, d_out, d_in + bias).
        rows: The dense rows as matrices, (N·K, G, d_out, d_in + bias).
        inputs: (N, T, G, d_in + bias); None where rows have no factored form.
        gradients: (K, N, T, G, d_out).
    """

    names: tuple[str, ...]
    where: Tensor
    rows: Tensor
    inputs: Tensor | None = None
    gradients: Tensor | None = None


def blocks(
    case: Case, likelihood: str, kind: str, factored: bool = True
) -> tuple[list[DenseBlock], float]:
    """Return the blocks that the output depends on, and what means over events divide by."""
    y, loss = case.target(likelihood), case.loss(likelihood)
    vectors = dense.fisher_vectors(loss, case.z, y, kind)
    rows = dense.rows(case.jacobian[1], vectors).flatten(0, 1)
    layers = list(dict.fromkeys(s.layer for s in case.blocks if s.unit != "whole"))
    model, recorded = dense.record(case.model, case.x, vectors, layers, case.output)
    indices = dense.indices(case.model)
    result = []
    for spec in case.blocks:
        if spec.unit == "whole":
            where = torch.cat([indices[name].flatten() for name in spec.names]).reshape(1, 1, -1)
            result.append(DenseBlock(spec.names, where, rows[:, where]))
        elif recorded[spec.layer].inputs:
            layer = model.get_submodule(spec.layer)
            bias_only = spec.names[0].endswith("bias")
            if isinstance(layer, nn.modules.conv._ConvTransposeNd) and bias_only:
                where = indices[spec.names[0]].reshape(1, -1, 1)
                moved = [
                    dense._channels_last(d, 2, 1)[..., 0, :] for d in recorded[spec.layer].gradients
                ]
                delta = torch.cat(moved, 2).unsqueeze(3)
                a = torch.ones_like(delta[0, ..., :1])
            else:
                where = dense.augmented_indices(case.model, spec)
                a, delta = _pairs(layer, recorded[spec.layer], spec.names)
            result.append(DenseBlock(spec.names, where, rows[:, where], a, delta))
    return result, float(loss.count(case.z, y))


def _pairs(
    layer: nn.Module, recorded: dense.Recorded, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    both = [
        dense.pairs(layer, x, d) for x, d in zip(recorded.inputs, recorded.gradients, strict=True)
    ]
    a = torch.cat([pair[0] for pair in both], 1)
    delta = torch.cat([pair[1] for pair in both], 2)
    if all(name.endswith("bias") for name in names):
        a = a[..., :0]
    if any(name.endswith("bias") for name in names):
        a = torch.cat([a, torch.ones_like(delta[0, ..., :1])], -1)
    return a, delta


def kfac_factors(block: DenseBlock, count: float, sharing: str) -> list[tuple[Tensor, Tensor]]:
    """Return K-FAC's pair (A, B) of every group."""
    if block.inputs is None:
        flat = block.rows.flatten(1)
        return [(flat.T @ flat / count, torch.ones(1, 1, dtype=flat.dtype))]
    result = []
    for a, delta in _groups(block, sharing):
        factor_a = torch.einsum("nti,ntj->ij", a, a) / (a.shape[0] * a.shape[1])
        factor_b = torch.einsum("knto,kntp->op", delta, delta) / count
        result.append((factor_a, factor_b))
    return result


def tkfac_factors(block: DenseBlock, count: float, sharing: str) -> list[tuple[Tensor, Tensor]]:
    """Return TKFAC's pair (√δ Φ, √δ Ψ) of every group.

    Identities stand for Φ and Ψ whose summed gradients cancel, up to rounding.
    """
    result = []
    for group in range(block.where.shape[0]):
        rows = block.rows[:, group]
        if block.inputs is None:
            phi = torch.einsum("roi,roj->ij", rows, rows)
            psi = torch.einsum("roi,rpi->op", rows, rows)
        else:
            a, delta = _groups(block, sharing)[group]
            phi = torch.einsum("knto,knto,nti,ntj->ij", delta, delta, a, a)
            psi = torch.einsum("nti,nti,knto,kntp->op", a, a, delta, delta)
        trace = rows.square().sum() / count
        noise = 1e-15 * count * trace
        eyes = (torch.eye(len(m), dtype=m.dtype) / len(m) for m in (phi, psi))
        unit_phi, unit_psi = (
            m / m.trace() if m.trace() > noise else eye
            for m, eye in zip((phi, psi), eyes, strict=True)
        )
        result.append((trace.sqrt() * unit_phi, trace.sqrt() * unit_psi))
    return result


def _groups(block: DenseBlock, sharing: str) -> list[tuple[Tensor, Tensor]]:
    assert block.inputs is not None and block.gradients is not None
    a, delta = block.inputs, block.gradients
    if sharing == "reduce":
        a, delta = a.mean(1, keepdim=True), delta.sum(2, keepdim=True)
    return [(a[:, :, g], delta[:, :, :, g]) for g in range(a.shape[2])]


def place(matrix: Tensor, where: Tensor, block: Tensor) -> None:
    """Write a group's (d_out·d_in)² block to its entries of a P × P matrix."""
    index = where.flatten()
    matrix[index.unsqueeze(1), index] = block


def kronecker_matrix(
    size: int, pairs: Sequence[tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]]
) -> Tensor:
    """Return the P × P matrix of ``B ⊗ A`` for every group of every block."""
    result = torch.zeros(size, size, dtype=torch.float64)
    for where, factors in pairs:
        for index, (a, b) in zip(where, factors, strict=True):
            place(result, index, torch.kron(b.contiguous(), a.contiguous()))
    return result


def eigen_block(rows: Tensor, count: float, basis_a: Tensor, basis_b: Tensor) -> Tensor:
    """Return ``U diag(Uᵀ F U) Uᵀ`` with ``U = U_B ⊗ U_A`` for rows (R, d_out, d_in + bias)."""
    basis = torch.kron(basis_b.contiguous(), basis_a.contiguous())
    exact = rows.flatten(1).T @ rows.flatten(1) / count
    return basis @ torch.diag((basis.T @ exact @ basis).diagonal()) @ basis.T


def exact_groups(size: int, found: Sequence[DenseBlock], count: float) -> Tensor:
    """Return the P × P Fisher matrix without what couples different groups or blocks."""
    result = torch.zeros(size, size, dtype=torch.float64)
    for block in found:
        for group, index in enumerate(block.where):
            rows = block.rows[:, group].flatten(1)
            place(result, index, rows.T @ rows / count)
    return result
