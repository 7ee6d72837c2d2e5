r"""EKFAC: K-FAC's eigenbases with second moments measured in them.

.. math:: F_l \approx (U_B \otimes U_A)\, \mathrm{diag}(s)\, (U_B \otimes U_A)^\top, \qquad
          s = \frac{1}{count} \sum_{nk} (U_B^\top M_{nk} U_A)^2

with the eigenvectors of K-FAC's factors ``A`` and ``B`` and the rows ``M_nk`` as matrices (George
et al. 2018). ``s`` is the diagonal of the exact block in that basis, so the trace is exact and no
other diagonal is closer to the block in Frobenius norm; K-FAC's is one of those others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import GradientSource, check_choice, refuse_options
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.factors import eigenbasis, random_subset, rotate, rotate_back
from natgrad.curvature.function_space import map_by_columns
from natgrad.curvature.kfac import KroneckerPart
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure
from natgrad.jacobians import (
    EmbeddingJacobian,
    Jacobians,
    LayerJacobian,
    LinearJacobian,
    WeightSharing,
)
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["EKFACFisher", "EigenbasisPart", "second_moments"]

#: Rows of several updates wait for a basis together while they have no more elements than this.
KEPT_ELEMENTS = 2**22

#: Eigenvectors ``(G, d, d)`` of the input and of the output factor; None is the identity, where a
#: factor is kept as its diagonal.
Basis = tuple[Tensor | None, Tensor | None]


class EigenbasisPart(CurvaturePart):
    """One layer's Kronecker eigenbasis and the second moments of its rows there.

    The basis is that of the factors of everything seen so far, made by :meth:`refresh` or, before
    the first one, at the first use. It then stays until the next :meth:`refresh`.

    An update's rows are kept until the part is next used, and then measured in the basis of that
    moment; rows of earlier updates that were not used since are kept with them up to 2²² elements
    and measured before that otherwise. So the part is exactly the EKFAC of all its data, if they
    came in one update, or in several that are small enough and are not used in between; and the
    rows of a step that refreshes are measured in the new basis. Of rows that are gone
    :meth:`refresh` keeps the diagonal, in the new basis, of the matrix they had given in the old
    one. That is the nearest diagonal to that matrix and keeps its trace, so the trace is always
    exact, but it is not what the rows themselves would give.

    Args:
        name: Block name.
        layout: Its layout.
        parameters: Order, dtype and device of all parameters.
        factors: An empty part whose Kronecker factors give the basis.
        max_moment_samples: If a batch has more samples and the weight is shared, an update of the
            moments takes a random subset of samples, drawn anew every time, which is unbiased.
            None for all.
    """

    def __init__(
        self,
        name: str,
        layout: BlockLayout,
        parameters: ParameterLayout,
        factors: KroneckerPart,
        max_moment_samples: int | None = None,
    ) -> None:
        self.name = name
        self.layout = layout
        self.parameters = parameters
        self.names, self.sizes, self.numel = layout.names, layout.sizes, layout.numel
        self.factors = factors
        self.max_moment_samples = max_moment_samples
        self.basis: Basis | None = None
        self.sum: Tensor | None = None  # Squared rows in the basis, (G, d_out, d_in + bias).
        self._waiting: tuple[tuple[LayerJacobian, float], ...] = ()  # Rows and their weights.
        self._damping = 0.0
        self._inverse: Tensor | None = None

    # Accumulation.

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add rows to factors and moments; rows that are not finite are left out."""
        factors = copy.copy(self.factors)  # The old one may be returned to.
        factors.update(jacobians, count)
        if factors.outputs is not self.factors.outputs:
            rows, weight = self._sampled(jacobians[self.name])
            held = sum(_elements(jacobian) for jacobian, _ in self._waiting)
            if held and held + _elements(rows) > KEPT_ELEMENTS:
                self._settle()
            self._waiting = (*self._waiting, (rows, weight))
        self.factors = factors

    def _sampled(self, rows: LayerJacobian) -> tuple[LayerJacobian, float]:
        """Return the rows, or those of some samples, and what their squares count."""
        limit = self.max_moment_samples
        if limit is None or not isinstance(rows, LinearJacobian) or rows.positions == 1:
            return rows, 1.0
        if rows.samples <= limit:
            return rows, 1.0
        chosen = random_subset(rows.samples, limit, self.factors.draws, rows.device)
        return rows.of_samples(chosen), rows.samples / limit

    def discount(self, factor: float) -> None:
        """Discount factors and moments; with 0 forget them, but for the basis."""
        self.factors = copy.copy(self.factors)
        self.factors.discount(factor)
        if factor == 0.0:
            self._waiting, self.sum = (), None
            return
        self._waiting = tuple((rows, weight * factor) for rows, weight in self._waiting)
        self.sum = None if self.sum is None else self.sum * factor

    def _eigenbasis(self) -> Basis:
        a, b = self.factors.lower_factors()
        return eigenbasis(a)[0], eigenbasis(b)[0]

    def _measured(self, basis: Basis) -> Tensor | None:
        """Return the squared rows, summed, in a basis; None before the first."""
        total = self.sum
        if total is not None and self.basis is not None and basis is not self.basis:
            total = _moved(total, self.basis, basis)
        for rows, weight in self._waiting:
            moments = second_moments(rows, *basis)
            total = moments * weight if total is None else total + moments * weight
        return total

    def _settle(self) -> None:
        """Measure the rows that wait, in the present basis or else that of the present factors."""
        if self._waiting:
            basis = self._eigenbasis() if self.basis is None else self.basis
            self.sum, self.basis, self._waiting = self._measured(basis), basis, ()

    def _mean(self, total: Tensor | None) -> Tensor:
        count = self.factors.count
        if total is None or count == 0:
            layout = self.layout
            return self.parameters.zeros(layout.groups, layout.d_out, layout.d_augmented)
        return total / count

    # The matrix.

    def spectrum(self) -> tuple[Basis, Tensor]:
        """Return the basis ``(U_A, U_B)`` and the moments ``s``, ``(G, d_out, d_in + bias)``.

        Eigenvectors are columns of ``(G, d, d)``; None stands for the identity. Rows that wait are
        measured first.
        """
        self._settle()
        return self.basis or (None, None), self._mean(self.sum)

    def matvec(self, columns: Tensor) -> Tensor:
        """Return ``F_l V``."""
        basis, moments = self.spectrum()
        return self._scaled(columns, basis, moments)

    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Divide by ``s + damping`` in the basis; zero damping is the pseudo-inverse."""
        basis, moments = self.spectrum()
        inverse = _inverse(moments, damping)
        return lambda columns: self._scaled(columns, basis, inverse)

    def inverse_root(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Divide by ``√(s + damping)`` in the basis."""
        basis, moments = self.spectrum()
        scale = (moments + damping).rsqrt()
        return lambda columns: self._scaled(columns, basis, scale)

    def _scaled(self, columns: Tensor, basis: Basis, scale: Tensor) -> Tensor:
        matrices = self.layout.matrix(columns.T)
        return self.layout.flat(_scale_in(basis, matrices, scale)).T

    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'(F_l + λI)⁻¹Jᵀ``, by columns."""
        return map_by_columns(self.name, rows, other, self.solver(damping))

    def trace(self) -> Tensor:
        """Return ``Σ s``, the trace of the exact block."""
        return self.spectrum()[1].sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal ``Σ_ij s_ij (U_B)²_oi (U_A)²_pj``."""
        basis, moments = self.spectrum()
        return self.layout.flat(_moved(moments, basis, (None, None)))

    def eigenvalues(self) -> Tensor:
        """Return ``s``."""
        return self.spectrum()[1].flatten()

    def to_dense(self) -> Tensor:
        """Return the block in flat parameter order."""
        moments = self.spectrum()[1]
        return self.matvec(torch.eye(self.numel, dtype=moments.dtype, device=moments.device))

    # Training.

    def refresh(self, damping: float) -> None:
        """Make the basis of the present factors and move the moments there.

        Raises:
            FactorizationError: If the factors have no eigendecomposition, or a moment plus damping
                is not finite.
        """
        if self.factors.inputs is None or self.factors.count == 0:
            return
        basis = self._eigenbasis()
        total = self._measured(basis)
        inverse = _checked_inverse(self._mean(total), damping)
        self.basis, self.sum, self._waiting = basis, total, ()
        self._damping, self._inverse = damping, inverse

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return ``U_B[(U_Bᵀ G U_A) / (s + λ)]U_Aᵀ``.

        Basis and λ are those of the last :meth:`refresh`; the moments are the present ones.
        """
        if self._inverse is None or self.basis is None:
            return {name: source.gradients[name] for name in self.names}
        if self._waiting:
            self._settle()
            self._inverse = _inverse(self._mean(self.sum), self._damping)
        gradients = [source.gradients[name] for name in self.names]
        matrix = self.layout.matrix(self.layout.gather(gradients).to(self._inverse.dtype))
        matrix = _scale_in(self.basis, matrix, self._inverse)
        return dict(zip(self.names, self.layout.scatter(self.layout.flat(matrix)), strict=True))

    def cost(self, workload: Workload) -> Cost:
        """Return the factors' cost, with the moments, and with a rotation there and back."""
        layout, base = self.layout, self.factors.cost(workload)
        rows = float(workload.samples) * workload.directions
        squares = rows * workload.positions.get(self.name, 1) * self.numel
        rotation = float(layout.groups * layout.d_out * layout.d_augmented)
        rotation *= layout.d_out + layout.d_augmented
        memory = base.memory + 2 * self.parameters.dtype.itemsize * self.numel
        # Moving moments to another basis takes as much as moving a gradient.
        return Cost(base.factors, memory, base.refresh + squares + rotation, 2 * rotation)

    def state_dict(self) -> dict[str, Any]:
        """Return factors, basis, moments and damping; rows that wait are measured for it."""
        basis = self._eigenbasis() if self.basis is None and self._waiting else self.basis
        return {
            "factors": self.factors.state_dict(),
            "basis": None if basis is None else list(basis),
            "sum": self.sum if basis is None else self._measured(basis),
            "damping": self._damping,
            "inverse": self._inverse,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        self.factors = copy.copy(self.factors)
        self.factors.load_state_dict(state["factors"], device)
        basis = state["basis"]
        self.basis = None if basis is None else (moved(basis[0]), moved(basis[1]))
        self.sum, self._inverse = moved(state["sum"]), moved(state["inverse"])
        self._waiting, self._damping = (), state["damping"]


@register_structure
class EKFACFisher(PartitionedFisher):
    """K-FAC's eigenbasis with exact second moments; ``d_a d_g`` more memory than K-FAC.

    Damping is added to the moments, so ``(F + λI)⁻¹`` is exact. The basis is renewed by
    ``refresh``, the moments with every update (:class:`EigenbasisPart` says how they meet).

    Options: ``weight_sharing``, ``max_factor_size`` and ``rows_per_unit`` of
    :class:`~natgrad.curvature.kfac.KroneckerPart`, which concern the basis only, and
    ``max_moment_samples`` of :class:`EigenbasisPart`: the moments are those of the exact rows.
    """

    structure: ClassVar[str] = "ekfac"

    def make_parts(
        self,
        weight_sharing: WeightSharing = "expand",
        max_factor_size: int | None = 8192,
        rows_per_unit: float | None = None,
        max_moment_samples: int | None = None,
        **options: Any,
    ) -> dict[str, CurvaturePart]:
        """Return one part per block.

        Raises:
            ValueError: If an option has an unknown value.
            TypeError: If an option is unknown.
        """
        refuse_options(self.structure, options)
        check_choice("weight_sharing", weight_sharing, "expand", "reduce")
        if max_moment_samples is not None and max_moment_samples < 1:
            raise ValueError(
                f"max_moment_samples must be at least 1 or None, got {max_moment_samples}"
            )
        shared = {
            "weight_sharing": weight_sharing,
            "max_factor_size": max_factor_size,
            "rows_per_unit": rows_per_unit,
        }
        return {
            name: EigenbasisPart(
                name,
                block,
                self.layout,
                self.make_factors(name, block, shared),
                max_moment_samples,
            )
            for name, block in self.blocks.items()
        }

    def make_factors(
        self, name: str, block: BlockLayout, options: Mapping[str, Any]
    ) -> KroneckerPart:
        """Return the empty part whose factors give a block's basis.

        Args:
            name: Block name.
            block: Its layout.
            options: ``weight_sharing``, ``max_factor_size`` and ``rows_per_unit``.
        """
        return KroneckerPart(name, block, self.layout, **options)


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
        rows = rotate(basis_b, jacobian.per_sample_gradients(start, stop), basis_a)
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


def _moved(moments: Tensor, old: Basis, new: Basis) -> Tensor:
    """Return the diagonal, in a new basis, of the matrix with these moments in the old one."""
    left, right = _overlap(new[1], old[1]), _overlap(new[0], old[0])
    moments = moments if left is None else left @ moments
    return moments if right is None else moments @ right.mT


def _overlap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """Return the squared entries of ``U'ᵀU``."""
    if new is None:
        return None if old is None else old.square()
    return (new.mT if old is None else new.mT @ old).square()


def _scale_in(basis: Basis, matrices: Tensor, scale: Tensor) -> Tensor:
    basis_a, basis_b = basis
    return rotate_back(basis_b, rotate(basis_b, matrices, basis_a) * scale, basis_a)


def _inverse(moments: Tensor, damping: float) -> Tensor:
    """Return ``1/(s + damping)``, the pseudo-inverse for 0."""
    if damping > 0:
        return 1.0 / (moments + damping)
    return linalg.inverse_on_range(moments.flatten()).view(moments.shape)


def _checked_inverse(moments: Tensor, damping: float) -> Tensor:
    inverse = _inverse(moments, damping)
    if not bool(torch.isfinite(moments).all() & torch.isfinite(inverse).all()):
        raise linalg.FactorizationError("a second moment is NaN or infinite")
    return inverse


def _elements(jacobian: LayerJacobian) -> int:
    return sum(tensor.numel() for tensor in jacobian.state().values())
