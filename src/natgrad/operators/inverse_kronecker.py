"""Kronecker products known by structured factors of their inverse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from natgrad.arguments import check_damping
from natgrad.jacobians import LinearJacobian
from natgrad.layouts import BlockLayout
from natgrad.operators.eigen_kronecker import EigenKroneckerOperator
from natgrad.operators.kronecker import is_weight_matrix, multiply_left, multiply_right
from natgrad.operators.operator import GradientSource, Operator
from natgrad.operators.sparse_matrices import DiagonalMatrix
from natgrad.operators.structured_matrix import StructuredMatrix

#: Structures whose products take of the order of d² entries.
EXPANDED = ("dense", "lower_triangular", "upper_triangular", "lower_toeplitz", "upper_toeplitz")


@dataclass(frozen=True, eq=False)
class MetricKroneckerOperator(Operator):
    """``C Cᵀ ⊗ K Kᵀ``, applied by products with the structured factors.

    Attributes:
        layout: Layout of the layer's block.
        inputs: K.
        outputs: C.
        precision: Type in which it is looked at, at least that of the factors.
    """

    layout: BlockLayout
    inputs: StructuredMatrix
    outputs: StructuredMatrix
    precision: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it is looked at."""
        return torch.promote_types(self.inputs.dtype, self.precision)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``(K Kᵀ, C Cᵀ)``, ``(G, d, d)`` or, of diagonal ones, ``(G, d)``."""
        both = []
        for factor in (self.inputs, self.outputs):
            if isinstance(factor, DiagonalMatrix):
                both.append(factor.entries[0].to(self.dtype).square())
                continue
            full = factor.to_dense().to(self.dtype)
            both.append(full @ full.mT)
        return both[0], both[1]

    @cached_property
    def spectrum(self) -> EigenKroneckerOperator:
        """The same by the singular values of its factors."""
        (basis_a, values_a), (basis_b, values_b) = map(self._singular, (self.inputs, self.outputs))
        scale = values_b.unsqueeze(-1) * values_a.unsqueeze(-2)
        return EigenKroneckerOperator(self.layout, basis_a, basis_b, scale)

    def _singular(self, factor: StructuredMatrix) -> tuple[Tensor | None, Tensor]:
        if isinstance(factor, DiagonalMatrix):
            return None, factor.entries[0].to(self.dtype).square()
        basis, values, _ = torch.linalg.svd(factor.to_dense().to(self.dtype))
        return basis, values.square()

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P, k)``."""
        a, b = self.factors
        matrices = multiply_left(b, self.layout.matrix(columns.T))
        return self.layout.flat(multiply_right(matrices, a)).T

    def trace(self) -> Tensor:
        """Return the trace."""
        return self.spectrum.trace()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        return self.spectrum.diagonal()

    def eigenvalues(self) -> Tensor:
        """Return all products of the factors' squared singular values."""
        return self.spectrum.eigenvalues()

    def direct_inverse(self, damping: float) -> Operator:
        """Return the inverse by the spectrum."""
        return self.spectrum.direct_inverse(damping)

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Return ``C Cᵀ G K Kᵀ`` in the type of the factors.

        Where ``G = δᵀa`` has fewer rows than the layer has units, δ and a are multiplied instead,
        while ``.grad`` is exactly what the backward pass left.
        """
        layout, dtype = self.layout, self.inputs.dtype
        rows = None if source.rows is None else source.rows.get(layout.names[0])
        if isinstance(rows, LinearJacobian):
            a = rows.augmented_inputs().flatten(0, 2).to(dtype)  # (N·T, d_in + bias), as G = 1
            delta = rows.output_gradients.flatten(0, 3).to(dtype)  # (N·T, d_out), as K = G = 1
            a = self.inputs.multiply_metric(a.unsqueeze(0))
            natural = self.outputs.multiply_metric(delta.unsqueeze(0)).mT @ a
        else:
            matrix = layout.matrix(layout.to_flat(source.gradients).to(dtype))
            natural = self.outputs.multiply_metric(self.inputs.multiply_metric(matrix).mT).mT
        return layout.to_dict(layout.flat(natural))


@dataclass(frozen=True, eq=False)
class InverseKroneckerOperator(Operator):
    """``(C Cᵀ)⁻¹ ⊗ (K Kᵀ)⁻¹``, whose inverse needs no factorisation.

    Attributes:
        layout: Layout of the layer's block.
        metric: ``C Cᵀ ⊗ K Kᵀ``.
    """

    layout: BlockLayout
    metric: MetricKroneckerOperator

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it is looked at."""
        return self.metric.dtype

    @cached_property
    def _spectrum(self) -> EigenKroneckerOperator:
        spectrum = self.metric.spectrum
        return EigenKroneckerOperator(
            self.layout, spectrum.input_basis, spectrum.output_basis, spectrum.scale.reciprocal()
        )

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the product with ``(P, k)``."""
        return self._spectrum.multiply(columns)

    def trace(self) -> Tensor:
        """Return the trace."""
        return self._spectrum.trace()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        return self._spectrum.diagonal()

    def eigenvalues(self) -> Tensor:
        """Return all products of the factors' eigenvalues."""
        return self._spectrum.eigenvalues()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(F + damping I)``; an inverse is regular, however ill-conditioned."""
        check_damping(damping)
        return (self.eigenvalues() + damping).log().sum()

    def direct_inverse(self, damping: float) -> Operator:
        """Return the inverse; with *further* damping by the spectrum, without it the metric."""
        if damping == 0:
            return self.metric
        spectrum = self.metric.spectrum  # p ↦ p/(1 + λp) divides by nothing small.
        scale = spectrum.scale / (1.0 + damping * spectrum.scale)
        return EigenKroneckerOperator(
            self.layout, spectrum.input_basis, spectrum.output_basis, scale
        )

    def inverse_root(self, damping: float) -> Operator:
        """Return the symmetric root of the inverse."""
        inverse = self.metric.spectrum
        scale = (inverse.scale / (1.0 + damping * inverse.scale)).sqrt()
        return EigenKroneckerOperator(self.layout, inverse.input_basis, inverse.output_basis, scale)


def multiplications(factor: StructuredMatrix) -> tuple[float, float]:
    """Return how many one row, all groups together, and a product of two matrices take."""
    if factor.structure in EXPANDED:
        row = float(factor.groups) * factor.size**2
        return row, row * factor.size
    if factor.structure == "block_diagonal":
        return float(factor.numel), float(factor.numel) * factor.entries[0].shape[-1]
    if factor.structure == "hierarchical":
        return float(factor.numel), float(factor.numel) * max(1, factor.entries[0].shape[-1])
    return float(factor.numel), float(factor.numel)


def metric_cost(
    factors: tuple[StructuredMatrix, StructuredMatrix], rows_in: int, rows_out: int
) -> float:
    """Return the multiplications of ``K Kᵀ`` with some rows and ``C Cᵀ`` with others."""
    total = 0.0
    for factor, rows in zip(factors, (rows_in, rows_out), strict=True):
        total += (1 if factor.forms_metric(rows) else 2) * rows * multiplications(factor)[0]
    return total


def metric_takes_rows(
    layout: BlockLayout, factors: tuple[StructuredMatrix, StructuredMatrix], rows: int
) -> bool:
    """Return whether applying the factors to ``rows`` rows beats applying them to ``G``."""
    if not is_weight_matrix(layout):
        return False
    product = float(rows) * layout.d_augmented * layout.d_out
    on_gradient = metric_cost(factors, layout.d_out, layout.d_augmented)
    return metric_cost(factors, rows, rows) + product < on_gradient
