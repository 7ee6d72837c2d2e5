"""Matrices that are diagonal in a Kronecker-factored basis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.jacobians import Jacobians, LinearJacobian
from natgrad.layouts import BlockLayout
from natgrad.operators.operator import Operator, scaled_forms


@dataclass(frozen=True, eq=False)
class EigenKroneckerOperator(Operator):
    """``(U_B ⊗ U_A) diag(s) (U_B ⊗ U_A)ᵀ``: rotate, scale, rotate back.

    Attributes:
        layout: Layout of the layer's block.
        input_basis: ``U_A``, columns of ``(G, d, d)``; None for the identity.
        output_basis: ``U_B``, likewise.
        scale: s, ``(G, d_out, d_in + bias)``.
        orthogonal: Whether the bases are orthogonal, so that s are the eigenvalues.
    """

    layout: BlockLayout
    input_basis: Tensor | None
    output_basis: Tensor | None
    scale: Tensor
    orthogonal: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.scale.dtype

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P, k)``."""
        matrices = self.layout.matrix(columns.T)
        rotated = linalg.rotate(self.output_basis, matrices, self.input_basis) * self.scale
        return self.layout.flat(linalg.rotate_back(self.output_basis, rotated, self.input_basis)).T

    def trace(self) -> Tensor:
        """Return the trace, ``Σ s`` in orthogonal bases."""
        return self.scale.sum() if self.orthogonal else super().trace()

    def diagonal(self) -> Tensor:
        """Return ``Σ_ij s_ij (U_B)²_oi (U_A)²_pj``."""
        return self.layout.flat(
            moved(self.scale, (self.input_basis, self.output_basis), (None, None))
        )

    def eigenvalues(self) -> Tensor:
        """Return s, in orthogonal bases."""
        return self.scale.flatten() if self.orthogonal else super().eigenvalues()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``Σ log(s + damping)`` in orthogonal bases, group by group."""
        check_damping(damping)
        if not self.orthogonal:
            return super().logdet(damping)
        return linalg.log_determinant(self.scale.flatten(1), damping)

    def sample_forms(
        self, names: Collection[str], rows: Jacobians, diagonal: bool = False
    ) -> Tensor:
        """Return ``J_n F J_nᵀ``; of linear maps in the bases, without a column of ``F Jᵀ``."""
        found = [rows[name] for name in names if name in rows]
        block = found[0] if found else None
        if type(block) is not LinearJacobian or block.positions != 1:
            return super().sample_forms(names, rows, diagonal)
        a = block.augmented_inputs()[:, 0].to(self.dtype)  # (N, G, d_in + bias)
        delta = block.output_gradients[:, :, 0].to(self.dtype)  # (N, K, G, d_out)
        if self.input_basis is not None:
            a = torch.einsum("ngi,gij->ngj", a, self.input_basis)
        if self.output_basis is not None:
            delta = torch.einsum("nkgo,gop->nkgp", delta, self.output_basis)
        weights = torch.einsum("goi,ngi->ngo", self.scale, a.square())
        return scaled_forms(delta.flatten(2), weights.flatten(1), diagonal)

    def with_damped_inputs(self, share: Tensor) -> EigenKroneckerOperator:
        """Return the matrix with ``s + share · (mean of s over inputs)``."""
        return replace(self, scale=self.scale + (share * self.scale.mean(-1, True)).to(self.dtype))

    def direct_inverse(self, damping: float) -> Operator:
        """Divide by ``s + damping``; zero damping is the pseudo-inverse."""
        if not self.orthogonal:
            return super().direct_inverse(damping)
        if damping > 0:
            scale = 1.0 / (self.scale + damping)
        else:
            scale = linalg.inverse_on_range(self.scale.flatten()).view(self.scale.shape)
        linalg.require_finite(self.scale, "a second moment is NaN or infinite")
        return replace(self, scale=scale)

    def inverse_root(self, damping: float) -> Operator:
        """Divide by ``√(s + damping)``."""
        return replace(self, scale=(self.scale + damping).rsqrt())


def eigenbasis(factors: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    """Return eigenvectors (None for a diagonal factor) and eigenvalues, negatives cut to 0.

    Factors ``(G, d, d)`` of one shape are decomposed together; diagonal ones are ``(G, d)``.
    """
    found = iter(linalg.map_stacked(linalg.eigh, [x for x in factors if x.dim() == 3]))
    results: list[tuple[Tensor | None, Tensor]] = []
    for factor in factors:
        if factor.dim() == 2:
            results.append((None, factor))
        else:
            values, vectors = next(found)
            results.append((vectors, values.clamp(min=0.0)))
    return results


def eigenvalues(factor: Tensor) -> Tensor:
    """Return the eigenvalues of a factor, negatives cut to 0."""
    return eigenbasis([factor])[0][1]


#: Eigenvectors ``(G, d, d)`` of the input and of the output factor; None is the identity.
Basis = tuple[Tensor | None, Tensor | None]


def moved(scale: Tensor, old: Basis, new: Basis) -> Tensor:
    """Return the diagonal, in a new basis, of the matrix with this diagonal in the old one."""
    left, right = _overlap(new[1], old[1]), _overlap(new[0], old[0])
    scale = scale if left is None else left @ scale
    return scale if right is None else scale @ right.mT


def _overlap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """Return the squared entries of ``U'ᵀU``."""
    if new is None:
        return None if old is None else old.square()
    return (new.mT if old is None else new.mT @ old).square()
