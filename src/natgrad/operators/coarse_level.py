r"""A coarse space, and what the exact Fisher matrix on it adds to an approximate inverse.

An inverse ``M⁻¹`` layer by layer knows nothing of how layers act together. A few vectors per layer,
the columns of ``R``, span a coarse space in which the exact Fisher matrix ``F`` of some rows is
small enough to be solved with:

.. math:: u = M^{-1} g + R F_c^{-1} R^\top \bigl(g - (F + \lambda I) M^{-1} g\bigr), \qquad
          F_c = R^\top (F + \lambda I) R

Then ``Rᵀ(g − (F + λI)u) = 0``, and no ``u`` in ``M⁻¹g + span R`` is closer to the exact natural
gradient in the norm of ``F + λI``. ``F`` is never formed: its rows are kept and multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NoReturn, overload

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.jacobians import Jacobians
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.linalg import FactorizationError
from natgrad.operators.block_diagonal import FisherMatrix, damping_of
from natgrad.operators.eigen_kronecker import EigenKroneckerOperator
from natgrad.operators.kronecker import KroneckerOperator
from natgrad.operators.operator import Operator
from natgrad.operators.rows import times, transposed_times
from natgrad.solvers import Solver
from natgrad.statistics.rows import Pieces

CoarseSpace = Literal["nicolaides", "residual", "spectral", "krylov"]
CoarseForm = Literal["residual", "additive"]

Damping = float | Mapping[str, float]
#: Block name → vectors of the coarse space on that block, ``(P_l, m)``.
Vectors = dict[str, Tensor]


@dataclass(frozen=True)
class CoarseSystem:
    """The coarse space and the inverse on it.

    Attributes:
        basis: ``R``, by block; blocks without vectors are absent.
        products: ``J R``, ``(rows, m)``.
        inverse: ``F_c⁻¹``, ``(m, m)``, in float64; the pseudo-inverse where that is singular.
    """

    basis: Vectors
    products: Tensor
    inverse: Tensor


@dataclass(frozen=True, eq=False)
class CoarseLevel:
    """The exact Fisher matrix of some rows, restricted to a few vectors per block.

    Blocks that the rows do not reach have no vectors.

    Attributes:
        blocks: Block name → layout.
        layout: Order of their parameters.
        space: See :class:`natgrad.curvature.TwoLevelKronecker`.
        form: Likewise.
        pieces: The rows.
        count: What their mean divides by, a scalar.
    """

    blocks: dict[str, BlockLayout]
    layout: ParameterLayout
    space: CoarseSpace
    form: CoarseForm
    pieces: Pieces
    count: Tensor

    @property
    def is_linear(self) -> bool:
        """Whether the coarse space is the same for every gradient."""
        return self.space in ("nicolaides", "spectral")

    def require_linear(self) -> None:
        """Raise a ValueError if the coarse space depends on the gradient."""
        if not self.is_linear:
            raise ValueError(
                f"coarse_space {self.space!r} depends on the gradient, so that no linear map "
                "tells how a step moves the outputs: use 'nicolaides' or 'spectral'"
            )

    def times(self, columns: Tensor) -> Tensor:
        """Return ``J V``, ``(rows, k)``."""
        return times(self.pieces, columns)

    def damped(self, columns: Tensor, damping: Damping) -> Tensor:
        """Return ``λV``, with every block's own λ."""
        values = set(damping.values()) if isinstance(damping, Mapping) else {damping}
        if len(values) == 1:
            return columns * values.pop()
        result = torch.zeros_like(columns)
        for name, block in self.blocks.items():
            part = self.layout.gather(block, columns) * damping_of(name, damping)
            self.layout.scatter(block, part, result)
        return result

    # The coarse space.

    @cached_property
    def reached(self) -> list[str]:
        """Names of the blocks that rows reach."""
        return [n for n in self.blocks if any(n in rows for _, rows in self.pieces)]

    def fixed_basis(self, leading: Callable[[str], Tensor]) -> Vectors:
        """Return the vectors of a linear space, perhaps leading eigenvectors ``(P_l, 1)``."""
        if self.space == "spectral":
            return {name: leading(name) for name in self.reached}
        sizes = {name: self.blocks[name].numel for name in self.reached}
        return {name: self.layout.zeros(size, 1) + 1.0 for name, size in sizes.items()}

    def system(self, basis: Vectors, damping: Damping) -> CoarseSystem:
        """Return ``F_c⁻¹`` for a coarse space.

        ``F_c`` is scaled to unit diagonal before its eigenvalues decide what is singular.

        Raises:
            FactorizationError: If there are no vectors, or their products are not finite.
        """
        basis = {name: _unit(basis[name]) for name in self.reached if name in basis}
        if not basis:
            raise FactorizationError("no layer has a coarse vector")
        products = torch.cat([_block_times(rows, basis) for _, rows in self.pieces]).double()
        matrix = products.T @ products / self.count
        start = 0
        for name, vectors in basis.items():
            stop = start + vectors.shape[1]
            gram = (vectors.T @ vectors).double()
            matrix[start:stop, start:stop] += damping_of(name, damping) * gram
            start = stop
        diagonal = matrix.diagonal()
        scale = torch.where(diagonal > 0, diagonal.clamp(min=1e-300).rsqrt(), 0.0)
        values, vectors = linalg.eigh(scale.unsqueeze(1) * matrix * scale)
        limit = len(values) * torch.finfo(self.layout.dtype).eps * values.abs().amax()
        keep = values > limit
        inverse = torch.where(keep, 1.0 / torch.where(keep, values, 1.0), 0.0)
        vectors = scale.unsqueeze(1) * vectors
        return CoarseSystem(basis, products, (vectors * inverse) @ vectors.T)

    # The correction.

    def corrected(
        self,
        gradient: Tensor,
        solution: Tensor,
        damping: Damping,
        fixed: Callable[[], CoarseSystem],
        smoother: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the solutions of both levels, of ``g`` and ``M⁻¹g``, ``(P, k)``, by ``V ↦ M⁻¹V``.

        It is ``M⁻¹g`` where there is no coarse system, or none that is finite.
        """
        try:
            if self.is_linear:
                return solution + self._correction(fixed(), gradient, solution, damping)
            columns = zip(gradient.split(1, 1), solution.split(1, 1), strict=True)
            return torch.cat([self._adapted(g, s, damping, smoother) for g, s in columns], 1)
        except FactorizationError:
            return solution

    def _adapted(
        self,
        gradient: Tensor,
        solution: Tensor,
        damping: Damping,
        smoother: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Correct one solution in a coarse space made from it."""
        seen = self.times(solution)
        product = transposed_times(self.pieces, seen) / self.count.to(seen.dtype)
        if self.space == "residual":
            vectors = smoother(gradient - product - self.damped(solution, damping))
        else:
            vectors = torch.cat([solution, smoother(product)], 1)
        basis = {name: self.layout.gather(self.blocks[name], vectors) for name in self.reached}
        system = self.system(basis, damping)
        return solution + self._correction(system, gradient, solution, damping, seen)

    def _correction(
        self,
        system: CoarseSystem,
        gradient: Tensor,
        solution: Tensor,
        damping: Damping,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Return ``R F_c⁻¹ Rᵀ(…)``; ``seen`` is ``J M⁻¹g``, where it is known."""
        if self.form == "additive":
            right = self._restrict(system.basis, gradient).double()
        else:
            rest = gradient - self.damped(solution, damping)
            seen = self.times(solution) if seen is None else seen
            coupled = system.products.T @ seen.double() / self.count
            right = self._restrict(system.basis, rest).double() - coupled
        weights = system.inverse @ right
        weights = torch.where(torch.isfinite(weights).all(), weights, 0.0)
        return self._prolong(system.basis, weights.to(solution.dtype))

    def _restrict(self, basis: Vectors, columns: Tensor) -> Tensor:
        """Return ``RᵀV``, ``(m, k)``."""
        return torch.cat(
            [basis[name].T @ self.layout.gather(self.blocks[name], columns) for name in basis]
        )

    def _prolong(self, basis: Vectors, weights: Tensor) -> Tensor:
        """Return ``R W``, ``(P, k)``."""
        result = self.layout.zeros(self.layout.numel, weights.shape[1])
        parts = weights.split([vectors.shape[1] for vectors in basis.values()])
        for (name, vectors), part in zip(basis.items(), parts, strict=True):
            self.layout.scatter(self.blocks[name], vectors @ part, result)
        return result

    def function_space_correction(
        self,
        rows: Jacobians,
        other: Jacobians,
        damping: Damping,
        system: CoarseSystem,
        smoother: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Return block name → ``J'_l R_l F_c⁻¹ Dᵀ``, where ``J' R F_c⁻¹ Dᵀ`` is the correction.

        ``D = J R`` in the additive form, else ``D = J (R − M⁻¹(F + λI)R)``, as M is symmetric.
        """
        sizes = [vectors.shape[1] for vectors in system.basis.values()]
        eye = torch.eye(sum(sizes), dtype=self.layout.dtype, device=self.layout.device)
        columns = self._prolong(system.basis, eye)
        if self.form == "residual":
            product = transposed_times(self.pieces, system.products.to(eye.dtype))
            product = product / self.count.to(eye.dtype)
            columns = columns - smoother(product + self.damped(columns, damping))
        ours = rows.of_blocks(self.blocks, self.layout)
        weights = (system.inverse @ times(((1.0, ours),), columns).double().T).to(eye.dtype)
        result: dict[str, Tensor] = {}
        for (name, vectors), part in zip(system.basis.items(), weights.split(sizes), strict=True):
            if name in other:
                result[name] = other[name].matvec(vectors) @ part
        return result


@dataclass(frozen=True, eq=False, repr=False)
class TwoLevelMatrix(FisherMatrix):
    """K-FAC's matrix, whose inverses are corrected on a coarse space.

    Attributes:
        coarse: The coarse level; None before there are rows.
    """

    coarse: CoarseLevel | None = None

    def inverse(self, damping: Damping = 0.0, solver: str | Solver = "direct") -> FisherMatrix:
        """Return the corrected inverse; see :meth:`FisherMatrix.inverse`."""
        inverted = super().inverse(damping, solver)
        if self.coarse is None:
            return inverted
        return CorrectedInverse(
            self.layout, inverted.parts, self.members, self.structure, self.coarse, damping, self
        )

    def coarse_system(self, damping: Damping) -> CoarseSystem:
        """Return the coarse system of a linear space."""
        assert self.coarse is not None
        basis = self.coarse.fixed_basis(lambda name: leading_eigenvector(self.parts[name]))
        return self.coarse.system(basis, damping)

    def inverse_root(self, damping: Damping) -> FisherMatrix:
        """Refuse with a NotImplementedError, as the corrected inverse is not symmetric."""
        raise NotImplementedError(
            f"structure {self.structure!r} has no square root of its inverse, which is not "
            "symmetric: use 'kfac'"
        )

    def function_space_map(  # type: ignore[override]
        self, rows: Jacobians, other: Jacobians | None = None, damping: float = 0.0
    ) -> dict[str, Tensor]:
        """Return how a step moves the outputs; see :meth:`FisherMatrix.function_space_map`.

        Raises:
            ValueError: If the coarse space depends on the gradient.
        """
        if self.coarse is not None:
            self.coarse.require_linear()
        result = super().function_space_map(rows, other, damping)
        if self.coarse is None:
            return result
        found = self.coarse.function_space_correction(
            rows, rows if other is None else other, damping, self.coarse_system(damping),
            super().inverse(damping).multiply,
        )  # fmt: skip
        for name, value in found.items():
            result[name] = result[name] + value if name in result else value
        return result

    def _plain(self) -> FisherMatrix:
        return FisherMatrix(self.layout, self.parts, self.members, self.structure)

    @overload
    def __add__(self, other: FisherMatrix) -> FisherMatrix: ...

    @overload
    def __add__(self, other: Operator) -> Operator: ...

    def __add__(self, other: Operator) -> Operator:
        """Return the sum of the matrices, without a coarse level."""
        return self._plain() + other

    def __radd__(self, other: Operator) -> Operator:
        """Return the sum, which Python asks for here if the other matrix has no coarse level."""
        return self._plain() + other

    def __mul__(self, factor: float) -> FisherMatrix:
        """Return a multiple, without a coarse level."""
        return self._plain() * factor


@dataclass(frozen=True, eq=False, repr=False)
class CorrectedInverse(FisherMatrix):
    """K-FAC's inverse, corrected on a coarse space.

    As an operator on gradients it is not symmetric, and no matrix is its inverse: it has no
    eigenvalues, and its entries are those of its products.

    Attributes:
        coarse: The coarse level.
        damping: λ.
        original: The matrix.
        factor: What the inverse is multiplied by.
    """

    coarse: CoarseLevel
    damping: Damping
    original: TwoLevelMatrix
    factor: float = 1.0

    def multiply(self, columns: Tensor) -> Tensor:
        """Return the corrected product with ``(P, k)``."""
        smoother = super().multiply
        found = self.coarse.corrected(
            columns, smoother(columns), self.damping, lambda: self._system, smoother
        )
        return found if self.factor == 1.0 else found * self.factor

    @cached_property
    def _system(self) -> CoarseSystem:
        """The coarse system of a linear space."""
        return self.original.coarse_system(self.damping)

    def to_dense(self) -> Tensor:
        """Return the entries, ``(P, P)``.

        Raises:
            ValueError: If the coarse space depends on the gradient.
        """
        self.coarse.require_linear()
        return Operator.to_dense(self)

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        return self.to_dense().diagonal()

    def trace(self) -> Tensor:
        """Return the sum of the diagonal."""
        return self.diagonal().sum()

    def frobenius_norm(self) -> Tensor:
        """Return ``√(Σ P_ij²)``."""
        norm: Tensor = self.to_dense().norm()
        return norm

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(P + damping I)``; NaN where the determinant is negative."""
        check_damping(damping)
        return torch.logdet(linalg.add_to_diagonal(self.to_dense(), damping))

    def det(self, damping: float = 0.0) -> Tensor:
        """Return ``det(P + damping I)``."""
        check_damping(damping)
        determinant: Tensor = torch.linalg.det(linalg.add_to_diagonal(self.to_dense(), damping))
        return determinant

    def sample_forms(  # type: ignore[override]
        self, rows: Jacobians, *, diagonal: bool = False
    ) -> Tensor:
        """Return ``J_n P J_nᵀ`` of every sample; see :meth:`FisherMatrix.sample_forms`.

        Raises:
            ValueError: If the coarse space depends on the gradient.
        """
        self.coarse.require_linear()
        return Operator.sample_forms(self, list(rows), rows, diagonal)

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"an inverse of structure {self.structure!r} has no {what}, as it is not symmetric: "
            "use 'kfac'"
        )

    def eigenvalues(self) -> Tensor:
        """Refuse with a NotImplementedError."""
        self._refuse("real eigenvalues")

    def inverse(self, damping: Damping = 0.0, solver: str | Solver = "direct") -> FisherMatrix:
        """Refuse with a NotImplementedError."""
        self._refuse("inverse")

    def inverse_root(self, damping: Damping) -> FisherMatrix:
        """Refuse with a NotImplementedError."""
        self._refuse("root of an inverse")

    def function_space_map(  # type: ignore[override]
        self, rows: Jacobians, other: Jacobians | None = None, damping: float = 0.0
    ) -> dict[str, Tensor]:
        """Refuse with a NotImplementedError."""
        self._refuse("inverse")

    def __add__(self, other: Operator) -> Operator:  # type: ignore[override]
        """Return the sum with a matrix about the same parameters."""
        return Operator.__add__(self, other)

    def __radd__(self, other: Operator) -> Operator:
        """Return the sum, which Python asks for here if the other is a Fisher matrix."""
        return self + other

    def __mul__(self, factor: float) -> CorrectedInverse:
        """Return a multiple."""
        return replace(self, factor=self.factor * float(factor))


def leading_eigenvector(operator: Operator, smallest: bool = False) -> Tensor:
    """Return the eigenvector ``(P_l, 1)`` of the largest or smallest eigenvalue of a product."""
    if isinstance(operator, EigenKroneckerOperator):
        scale = -operator.scale if smallest else operator.scale
        index = int(scale.argmax())
        d_out, d_in = scale.shape[1:]
        group, place = divmod(index, d_out * d_in)
        o, i = divmod(place, d_in)
        left = _column(operator.output_basis, group, o, d_out, scale)
        right = _column(operator.input_basis, group, i, d_in, scale)
        matrix = scale.new_zeros(1, *scale.shape)
    else:
        assert isinstance(operator, KroneckerOperator)
        factors = [-x if smallest else x for x in (operator.inputs, operator.outputs)]
        (basis_a, values_a), (basis_b, values_b) = (
            (None, x) if x.dim() == 2 else tuple(reversed(linalg.eigh(x))) for x in factors
        )
        best = values_a.amax(-1) * values_b.amax(-1)
        group = int(best.argmin() if smallest else best.argmax())
        o, i = int(values_b[group].argmax()), int(values_a[group].argmax())
        left = _column(basis_b, group, o, values_b.shape[1], values_b)
        right = _column(basis_a, group, i, values_a.shape[1], values_a)
        matrix = values_a.new_zeros(1, len(values_a), values_b.shape[1], values_a.shape[1])
    matrix[0, group] = torch.outer(left, right)
    return operator.layout.flat(matrix).T


def _column(basis: Tensor | None, group: int, index: int, size: int, like: Tensor) -> Tensor:
    """Return one eigenvector of one group's factor; a unit vector for a diagonal one."""
    if basis is not None:
        return basis[group, :, index]
    result = torch.zeros(size, dtype=like.dtype, device=like.device)
    result[index] = 1.0
    return result


def _unit(vectors: Tensor) -> Tensor:
    """Scale columns to length 1; zero stays zero."""
    norms = vectors.norm(dim=0)
    return vectors / torch.where(norms > 0, norms, 1.0)


def _block_times(rows: Jacobians, basis: Vectors) -> Tensor:
    """Return ``J R``, ``(rows, m)``; a vector on one block meets the rows of that block alone."""
    return torch.cat(
        [
            rows[name].matvec(vectors)
            if name in rows
            else vectors.new_zeros(rows.rows, vectors.shape[1])
            for name, vectors in basis.items()
        ],
        dim=1,
    )
