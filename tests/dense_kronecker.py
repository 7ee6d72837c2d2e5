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
        one_hot: Whether inputs are tokens.
    """

    names: tuple[str, ...]
    where: Tensor
    rows: Tensor
    inputs: Tensor | None = None
    gradients: Tensor | None = None
    one_hot: bool = False


def blocks(case: Case, likelihood: str, kind: str) -> tuple[list[DenseBlock], float]:
    """Return the blocks that the output depends on, and what means over events divide by."""
    y, loss = case.target(likelihood), case.loss(likelihood)
    vectors = dense.fisher_vectors(loss, case.z, y, kind)
    return blocks_of(case, vectors), float(loss.count(case.z, y))


def blocks_of(case: Case, vectors: Tensor) -> list[DenseBlock]:
    """Return the blocks that the output depends on, for vectors (K, N, ...) at the output."""
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
            where = dense.augmented_indices(case.model, spec)
            a, delta = _pairs(layer, recorded[spec.layer], spec.names)
            one_hot = spec.unit == "columns"
            result.append(DenseBlock(spec.names, where, rows[:, where], a, delta, one_hot))
    return result


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


def kfac_factors(
    block: DenseBlock, count: float, sharing: str, partial: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return K-FAC's pair (A, B) of every group."""
    if block.inputs is None:
        flat = block.rows.flatten(1)
        return [(flat.T @ flat / count, torch.ones(1, 1, dtype=flat.dtype))]
    if sharing == "split" and block.one_hot:
        sharing = "expand"
    found = [dense.second_moments(*pair, sharing, partial) for pair in _groups(block)]
    return [(a, b / count) for a, b in found]


def foof_factors(
    block: DenseBlock, count: float, sharing: str, partial: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return FOOF's pair (A, I) of every group, (A, 0) of a layer that the output passes by."""
    eye = torch.eye(block.where.shape[1], dtype=block.rows.dtype) * bool(block.rows.any())
    return [(a, eye) for a, _ in kfac_factors(block, count, sharing, partial)]


def tkfac_factors(
    block: DenseBlock, count: float, sharing: str, partial: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
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
            a, delta, _ = dense.shared(*_groups(block)[group], sharing, partial)
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


def _groups(block: DenseBlock) -> list[tuple[Tensor, Tensor]]:
    """Return inputs (N, T, d_in + bias) and gradients (K, N, T, d_out) of every group."""
    assert block.inputs is not None and block.gradients is not None
    a, delta = block.inputs, block.gradients
    return [(a[:, :, g], delta[:, :, :, g]) for g in range(a.shape[2])]


def rearranged(block: Tensor, d_out: int, d_in: int) -> Tensor:
    """Return Z (d_in², d_out²), on which B ⊗ A is vec(A) vec(B)ᵀ."""
    z = block.reshape(d_out, d_in, d_out, d_in).permute(1, 3, 0, 2)
    return z.reshape(d_in**2, d_out**2)


def truncated(block: Tensor, d_out: int, d_in: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the pairs (A, B) of the truncated decomposition among symmetric factors."""
    z = rearranged(block, d_out, d_in).reshape(d_in, d_in, -1)
    z = ((z + z.transpose(0, 1)) / 2).reshape(d_in**2, -1)
    u, s, v = torch.linalg.svd(z, full_matrices=False)
    rank = min(rank, len(s))
    a = (u[:, :rank] * s[:rank].sqrt()).T.reshape(rank, d_in, d_in)
    b = (v[:rank] * s[:rank].sqrt().unsqueeze(1)).reshape(rank, d_out, d_out)
    return a, b


def kron_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return ``Σ_r B_r ⊗ A_r``."""
    return sum(torch.kron(y.contiguous(), x.contiguous()) for x, y in zip(a, b, strict=True))


def pi_shifts(a: Tensor, b: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return ``A + π√λ I`` and ``B + √λ/π I``, π² = mean(A_ii) / mean(B_jj)."""
    pi = (a.diagonal().mean() / b.diagonal().mean()).sqrt()
    root = damping**0.5
    eye_a, eye_b = (torch.eye(len(m), dtype=m.dtype) for m in (a, b))
    return a + root * pi * eye_a, b + root / pi * eye_b


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


def damped_inputs(dense: Tensor, d_out: int, share: float) -> Tensor:
    """Return ``F + share · (tr_inputs F/d_a) ⊗ I`` of a block of weight and bias, in that order."""
    d_in = len(dense) // d_out
    order = torch.cat([
        torch.arange(d_out * (d_in - 1)).view(d_out, -1),
        d_out * (d_in - 1) + torch.arange(d_out).view(d_out, 1),
    ], 1).flatten()  # fmt: skip
    matrix = dense[order][:, order].view(d_out, d_in, d_out, d_in)
    means = matrix.diagonal(dim1=1, dim2=3).mean(-1)
    added = torch.kron(means, torch.eye(d_in, dtype=dense.dtype))
    back = order.argsort()
    return dense + share * added[back][:, back]
