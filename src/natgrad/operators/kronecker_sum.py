"""Sums of Kronecker products, ``Σ_r B_r ⊗ A_r`` on the matrices of one layer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.layouts import BlockLayout
from natgrad.linalg import FactorizationError
from natgrad.operators.dense import DenseOperator, SpectralOperator
from natgrad.operators.eigen_kronecker import EigenKroneckerOperator
from natgrad.operators.kronecker import KroneckerOperator, pi_shifts
from natgrad.operators.operator import Operator


@dataclass(frozen=True, eq=False)
class KroneckerSumOperator(Operator):
    """``Σ_r B_r ⊗ A_r``; one that is indefinite is possible.

    Attributes:
        layout: Layout of the layer's block.
        inputs: A, ``(R, G, d_in + bias, d_in + bias)``, symmetric.
        outputs: B, ``(R, G, d_out, d_out)``, symmetric.
        factored_damping: How it is damped. False inverts ``F + λI``: in the eigenbases for
            ``R = 1``, else through the dense block, ``P_l × P_l``. True inverts
            ``(B_1 + √λ/π I) ⊗ (A_1 + π√λ I) + B_2 ⊗ A_2`` with
            ``π² = (tr A_1 / d_a) / (tr B_1 / d_g)`` by diagonalising both sides simultaneously.
        leading_only: Whether the first product alone is inverted, with a warning, where the damped
            sum is not positive definite; otherwise that is an error.
    """

    layout: BlockLayout
    inputs: Tensor
    outputs: Tensor
    factored_damping: bool = False
    leading_only: bool = False
    semidefinite: ClassVar[bool] = False

    @property
    def rank(self) -> int:
        """Number of products R."""
        return self.inputs.shape[0]

    @classmethod
    def of(cls, *operators: Operator) -> KroneckerSumOperator | None:
        """Return the sum of dense Kronecker products of one layout; None if they are not."""
        pairs: list[tuple[Tensor, Tensor]] = []
        known: list[KroneckerSumOperator | KroneckerOperator] = []
        for one in operators:
            if isinstance(one, KroneckerSumOperator):
                pairs.append((one.inputs, one.outputs))
                known.append(one)
            elif isinstance(one, KroneckerOperator) and one.inputs.dim() == one.outputs.dim() == 3:
                pairs.append((one.inputs.unsqueeze(0), one.outputs.unsqueeze(0)))
                known.append(one)
            else:
                return None
        layout = operators[0].layout
        if not isinstance(layout, BlockLayout) or any(one.layout != layout for one in operators):
            return None
        inputs, outputs = (torch.cat(found) for found in zip(*pairs, strict=True))
        factored = len(inputs) <= 2 and all(one.factored_damping for one in known)
        return cls(layout, inputs, outputs, factored)

    def __add__(self, other: Operator) -> Operator:
        """Return the sum, as a sum of Kronecker products where the other is one, too."""
        return KroneckerSumOperator.of(self, other) or super().__add__(other)

    def __mul__(self, factor: float) -> Operator:
        """Return a multiple."""
        if factor < 0:  # Spectra of products take negative eigenvalues of a factor for rounding.
            return super().__mul__(factor)
        return replace(self, inputs=self.inputs * factor)

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``Σ_r B_r V A_r`` for ``(P_l, k)``."""
        matrices = self.layout.matrix(columns.T)
        result = torch.zeros_like(matrices)
        for left, right in zip(self.outputs, self.inputs, strict=True):
            result = result + left @ matrices @ right
        return self.layout.flat(result).T

    def trace(self) -> Tensor:
        """Return ``Σ_r tr A_r tr B_r``."""
        a, b = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (self.inputs, self.outputs))
        return (a * b).sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        a, b = (x.diagonal(dim1=-2, dim2=-1) for x in (self.inputs, self.outputs))
        return self.layout.flat((b.unsqueeze(-1) * a.unsqueeze(-2)).sum(0))

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues; some may be negative, and ``R > 1`` needs the dense block.

        Raises:
            ValueError: If that does not fit memory.
        """
        if self.rank > 1:
            return self._dense_spectrum()[0]
        return self._leading().eigenvalues()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(F + damping I)``; −inf where singular, NaN where not definite."""
        return self._leading().logdet(damping) if self.rank == 1 else super().logdet(damping)

    def with_damped_inputs(self, share: Tensor) -> KroneckerSumOperator:
        """Return ``Σ_r B_r ⊗ (A_r + share · (tr A_r/d_a) I)``."""
        means = self.inputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        shift = (share * means).to(self.inputs.dtype)
        return replace(self, inputs=linalg.add_to_diagonal(self.inputs, shift))

    # Inverses.

    def direct_inverse(self, damping: float) -> Operator:
        """Invert by the damping rule; zero damping is the pseudo-inverse in both.

        Raises:
            FactorizationError: If the damped matrix is not positive definite.
            ValueError: If the dense block is needed and does not fit memory.
        """
        if self.rank == 1 and not (self.factored_damping and damping > 0):
            return self._leading().direct_inverse(damping)
        try:
            return self._inverse_of_all(damping)
        except FactorizationError as error:
            if not self.leading_only:
                raise
            warnings.warn(
                f"the curvature of {self.layout.names[0]!r}: {error}; its first product alone is "
                "used",
                stacklevel=2,
            )
            return self._leading().direct_inverse(damping)

    def inverse_root(self, damping: float) -> Operator:
        """Return the root of what :meth:`direct_inverse` inverts, with its errors."""
        if self.factored_damping:
            inverse = self.direct_inverse(damping)
            linalg.check_memory(self.layout.numel, 3, self.dtype, self.device)
            values, vectors = linalg.eigh(inverse.to_dense())
            return SpectralOperator(self.layout, values.clamp(min=0.0).sqrt(), vectors)
        if self.rank == 1:
            return self._leading().inverse_root(damping)
        return super().inverse_root(damping)

    def _inverse_of_all(self, damping: float) -> Operator:
        if self.factored_damping and damping > 0:
            return self._simultaneous(damping)
        values, vectors = self._dense_spectrum()
        if damping == 0:
            dense = torch.linalg.pinv(self.to_dense(), hermitian=True)
            return DenseOperator(self.layout, dense)
        if self.leading_only and not bool((values + damping > 0).all()):
            raise FactorizationError("the damped sum of products is not positive definite")
        return SpectralOperator(self.layout, 1.0 / (values + damping), vectors)

    def _dense_spectrum(self) -> tuple[Tensor, Tensor]:
        linalg.check_memory(self.layout.numel, 3, self.dtype, self.device)
        dense = self.to_dense()
        return linalg.eigh((dense + dense.mT) / 2)

    def _leading(self) -> KroneckerOperator:
        """Return the first product."""
        return KroneckerOperator(self.layout, self.inputs[0], self.outputs[0], lower=False)

    def _simultaneous(self, damping: float) -> EigenKroneckerOperator:
        """Return ``K_b``, ``K_a`` that turn the damped sum into a diagonal matrix, and 1 over it.

        ``KᵀX̂_1K = I`` and ``KᵀX_2K`` diagonal on each side.
        """
        if self.rank > 2:
            raise FactorizationError("factored damping inverts sums of one or two products")
        shift_a, shift_b = pi_shifts(self.inputs[0], self.outputs[0], damping)
        basis_a, values_a = _joint_basis(self.inputs, shift_a)
        basis_b, values_b = _joint_basis(self.outputs, shift_b)
        total = 1.0 + values_b.unsqueeze(-1) * values_a.unsqueeze(-2)
        if not bool((total > torch.finfo(total.dtype).eps ** 0.5).all()):
            raise FactorizationError("the damped sum of products is not positive definite")
        return EigenKroneckerOperator(self.layout, basis_a, basis_b, 1.0 / total, orthogonal=False)


def _joint_basis(factors: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``K`` with ``Kᵀ(X_1 + shift I)K = I``, and ``KᵀX_2K`` as its diagonal, 0 for one X."""
    values, vectors = linalg.eigh(factors[0])
    damped = values + shift.unsqueeze(-1)
    if not bool((damped > 0).all()):
        raise FactorizationError("the first damped factor is not positive definite")
    whitening = vectors * damped.rsqrt().unsqueeze(-2)
    if len(factors) == 1:
        return whitening, torch.zeros_like(values)
    second = whitening.mT @ factors[1] @ whitening
    spectrum, rotation = linalg.eigh((second + second.mT) / 2)
    return whitening @ rotation, spectrum
