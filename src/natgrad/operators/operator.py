"""What every structured symmetric matrix can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.jacobians import (
    CHUNK_ELEMENTS,
    DenseJacobian,
    Jacobians,
    LayerJacobian,
    LinearJacobian,
)
from natgrad.layouts import ParameterLayout
from natgrad.operators.linear_map import (
    LinearMap,
    as_given,
    check_real,
    product_with,
    scipy_operator,
)
from natgrad.records import Record
from natgrad.solvers import IterativeSolver, Solver, TruncatedEigh, as_solver


class VectorLayout(Protocol):
    """How a flat vector is cut into parameters: a block's layout or a whole model's."""

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified parameter names in order."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their numbers of entries."""

    @property
    def numel(self) -> int:
        """Their sum."""

    def to_flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate tensors by name into one vector."""

    def to_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a vector into tensors by name."""


@dataclass
class GradientSource:
    """A loss gradient together with how it came about.

    Attributes:
        gradients: Parameter name → gradient.
        rows: First parameter name of a block → Jacobian whose rows sum to the block's gradient.
            Present only while the gradients are exactly what the last backward pass left.
        natural: Blocks whose gradients the backward pass has preconditioned already.
        coordinates: ``u`` (N, K) with ``∇L = Jᵀu`` for the rows of the last batch.
    """

    gradients: dict[str, Tensor]
    rows: Mapping[str, LayerJacobian] | None = None
    coordinates: Tensor | None = None
    natural: Set[str] = frozenset()


class Operator(Record, ABC):
    """A symmetric ``P × P`` matrix in structured form; it never changes.

    A subclass is a frozen dataclass with a ``layout``, which says how its vectors are cut into
    parameters. It knows no layers, no damping and no training. :meth:`inverse` factorises once and
    returns another operator, which is applied as often as wanted.
    """

    layout: VectorLayout
    #: Whether negative eigenvalues are rounding, as of a Fisher matrix.
    semidefinite: ClassVar[bool] = True

    # What a structured matrix implements.

    @abstractmethod
    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``F V`` for ``(P, k)``."""

    # What it implements where there is a shorter way than the dense matrix.

    def trace(self) -> Tensor:
        """Return ``tr F``."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        return self.to_dense().diagonal()

    def eigenvalues(self) -> Tensor:
        """Return all ``P`` eigenvalues, in any order."""
        values: Tensor = torch.linalg.eigvalsh(self.to_dense())
        return values

    def direct_inverse(self, damping: float) -> Operator:
        """Return ``(F + damping I)⁻¹`` by the matrix's own factorisation; the pseudo-inverse for 0.

        Raises:
            FactorizationError: If that is impossible.
        """
        from natgrad.operators.dense import DenseOperator

        return DenseOperator(self.layout, self.to_dense()).direct_inverse(damping)

    def with_damped_inputs(self, share: Tensor) -> Operator:
        """Return the matrix with ``A + share · (tr A/d_a) I`` in place of a factor A of inputs.

        Matrices that have no such factor stay as they are.
        """
        return self

    def inverse_root(self, damping: float) -> Operator:
        """Return the symmetric ``(F + damping I)^(−1/2)``, for ``damping > 0``.

        Raises:
            FactorizationError: If the damped matrix is not positive definite.
            ValueError: If the dense matrix is needed and does not fit memory.
        """
        from natgrad.operators.dense import spectral_root

        return spectral_root(self, damping)

    # What follows from it.

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return self.layout.numel, self.layout.numel

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return next(self.tensors()).dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return next(self.tensors()).device

    def inverse(self, damping: float = 0.0, solver: str | Solver = "direct") -> Operator:
        """Return ``(F + damping I)⁻¹``, factorised once; the pseudo-inverse for 0.

        Args:
            damping: λ ≥ 0, in the units of F.
            solver: ``"direct"`` (default), the structure's own factorisation; ``"eigh"``, on the
                space of nonzero eigenvalues; ``"conjugate_gradient"`` or ``"thermodynamic"``, which
                need products with F only; or a :class:`natgrad.solvers.Solver` with options.

        Raises:
            ValueError: If the damping is negative or not finite, or the solver unknown.
            FactorizationError: If a factorisation is impossible.
        """
        check_damping(damping)
        chosen = as_solver(solver)
        if isinstance(chosen, IterativeSolver):
            from natgrad.operators.iterative import IterativeInverse

            return IterativeInverse.of(self, damping, chosen)
        if isinstance(chosen, TruncatedEigh):
            return self.truncated_inverse(damping, chosen.cutoff)
        return self.direct_inverse(damping)

    def truncated_inverse(self, damping: float, cutoff: float) -> Operator:
        """Return ``(F + damping I)⁻¹`` on eigenvectors with values above ``cutoff`` the largest.

        It is zero on all others.
        """
        from natgrad.operators.dense import SpectralOperator

        values, vectors = linalg.eigh(self.to_dense())
        kept = values > cutoff * values[-1].clamp(min=0.0)
        inverse = torch.where(kept, 1.0 / torch.where(kept, values + damping, 1.0), 0.0)
        return SpectralOperator(self.layout, inverse, vectors)

    def continuing(self, previous: Operator | None) -> Operator:
        """Return the operator as one that goes on from what an earlier one has reached.

        Only iterative inverses carry something from one solution to the next.
        """
        return self

    @classmethod
    def inverses(cls, operators: Sequence[Self], dampings: Sequence[float]) -> list[Operator]:
        """Return the inverses of several operators of one class, if possible made together."""
        return [one.inverse(damping) for one, damping in zip(operators, dampings, strict=True)]

    def solve(self, columns: Tensor, damping: float = 0.0) -> Tensor:
        """Return ``(F + damping I)⁻¹ V``; keep :meth:`inverse` where it is wanted again."""
        solution: Tensor = self.inverse(damping) @ columns
        return solution

    def __matmul__(self, vector: Any) -> Any:
        """Return ``F v`` for a flat vector, columns ``(P, k)``, or a dict name → tensor.

        The result is of the same kind, in the floating type of v; of whole numbers in that of F.

        Raises:
            TypeError: If it is something else.
            ValueError: If it has a wrong shape or wrong names.
        """
        if isinstance(vector, Mapping):
            check_real(vector.values())
            flat = self.layout.to_flat({n: v.to(self.dtype) for n, v in vector.items()})
            found = self.layout.to_dict(self.multiply(flat.unsqueeze(1))[:, 0])
            return {name: as_given(value, vector[name]) for name, value in found.items()}
        return product_with(self.multiply, vector, self.shape, self.dtype)

    def to_scipy(self) -> Any:
        """Return a :class:`scipy.sparse.linalg.LinearOperator` on float64 NumPy vectors.

        Raises:
            ImportError: If SciPy is not installed.
        """
        return scipy_operator(self.shape, self.multiply, self.multiply, self.dtype, self.device)

    def submatrix(
        self, rows: Collection[str] | Tensor | Sequence[int], columns: Any = None
    ) -> Operator | LinearMap:
        """Return some rows and columns of the matrix, by products with the whole one.

        Args:
            rows: Which: names of parameters, or of modules for all of theirs, in the order of the
                matrix; or indices, in any order; or a mask ``(P,)``.
            columns: Likewise; the same ones by default.

        Returns:
            An operator again, if rows and columns are the same ones by default; else a
            :class:`natgrad.operators.LinearMap`.

        Raises:
            ValueError: If a name is unknown, or an index out of range or there twice.
        """
        from natgrad.operators.submatrix import submatrix_of

        return submatrix_of(self, rows, columns)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(F + damping I)``; −inf where singular, NaN where not definite.

        Without damping eigenvalues up to ``d · eps`` times the largest are taken for rounding, d
        being the size of the matrix that they are eigenvalues of: a part's, a unit's, a factor's.
        """
        check_damping(damping)
        return linalg.log_determinant(self.eigenvalues(), damping, positive=self.semidefinite)

    def det(self, damping: float = 0.0) -> Tensor:
        """Return ``det(F + damping I)``, with its sign; it soon leaves the range of numbers."""
        check_damping(damping)
        return (self.eigenvalues() + damping).prod()

    def frobenius_norm(self) -> Tensor:
        """Return ``‖F‖ = √(Σ F_ij²)``, from the eigenvalues."""
        norm: Tensor = torch.linalg.vector_norm(self.eigenvalues())
        return norm

    def to_dense(self) -> Tensor:
        """Return the matrix, ``(P, P)``.

        Raises:
            ValueError: If it does not fit memory.
        """
        linalg.check_memory(
            self.layout.numel, 2, self.dtype, self.device, what="the matrix entry by entry",
            advice="take products, natgrad.tools.estimate_trace or estimate_diagonal",
        )  # fmt: skip
        return self.multiply(torch.eye(self.layout.numel, dtype=self.dtype, device=self.device))

    def __add__(self, other: Operator) -> Operator:
        """Return the sum with a matrix of the same layout."""
        from natgrad.operators.combined import SumOperator

        if not isinstance(other, Operator):
            return NotImplemented
        return SumOperator.of(self, other)

    def __mul__(self, factor: float) -> Operator:
        """Return a multiple."""
        from natgrad.operators.combined import ScaledOperator

        return ScaledOperator(self.layout, self, float(factor))

    def __rmul__(self, factor: float) -> Operator:
        """Return a multiple."""
        return self * factor

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Return ``F ∇L`` of the operator's parameters by the cheapest route, in F's type.

        Inverses are what is applied so. Matrices that know one make use of how the gradient came
        about.
        """
        flat = self.flat_gradient(source).to(self.dtype)
        return self.layout.to_dict(self.multiply(flat.unsqueeze(1))[:, 0])

    def flat_gradient(self, source: GradientSource) -> Tensor:
        """Return the gradient of the operator's parameters, ``(P,)``."""
        return self.layout.to_flat({name: source.gradients[name] for name in self.layout.names})

    def row_products(self, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return ``JΔ`` and the count, for the rows the matrix was made of; None where unknown.

        Args:
            direction: Parameter name → Δ; parameters without one do not move.
        """
        return None

    def frozen(self) -> Operator:
        """Return the operator as it is now, for going back to it."""
        return self

    def for_checkpoint(self) -> Operator | None:
        """Return what a checkpoint keeps of it; None if it belongs to one batch."""
        return self

    def function_space_map(
        self, names: Collection[str], rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return block name → ``J'_l [(F + damping I)⁻¹ Jᵀ]_l``, ``(R', R)``.

        Args:
            names: The blocks whose parameters the matrix is about.
            rows: ``J``.
            other: ``J'``.
            damping: λ.
        """
        inverse = self.direct_inverse(damping)
        if isinstance(self.layout, ParameterLayout):
            mine = [name for name in names if name in rows and name in other]
            return map_jointly(mine, rows, other, inverse, self.layout)
        (name,) = names
        return map_by_columns(name, rows, other, inverse)

    def sample_forms(
        self, names: Collection[str], rows: Jacobians, diagonal: bool = False
    ) -> Tensor:
        """Return ``J_n F J_nᵀ`` of every sample, ``(N, K, K)``, or its diagonal, ``(N, K)``.

        Memory is that of the result and of some columns of ``F Jᵀ`` at a time.

        Args:
            names: The blocks whose parameters the matrix is about.
            rows: ``J``; blocks missing here contribute nothing.
            diagonal: Whether the diagonal is all that is wanted.
        """
        samples, directions = rows.samples, rows.directions
        shape = (samples, directions) if diagonal else (samples, directions, directions)
        blocks = [rows[name] for name in names if name in rows]
        if not blocks:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        result = torch.empty(shape, dtype=self.dtype, device=self.device)
        together = CHUNK_ELEMENTS // max(1, directions * self.layout.numel)
        for start in range(0, samples, together) if together else ():
            stop = min(start + together, samples)
            pieces = [b.layout.flat(b.per_sample_gradients(start, stop)) for b in blocks]
            columns = self._columns(blocks, [piece.flatten(0, 1).T for piece in pieces])
            left, right = (
                one.T.unflatten(0, (-1, directions)) for one in (columns, self.multiply(columns))
            )
            result[start:stop] = (left * right).sum(-1) if diagonal else left @ right.mT
        if together:
            return result
        eye = torch.eye(directions, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK_ELEMENTS // self.layout.numel)
        for n in range(samples):
            own = [_of_sample(block, n) for block in blocks]
            for some in torch.arange(directions, device=self.device).split(step):
                columns = self._columns(own, [one.rmatvec(eye[:, some]) for one in own])
                solved = self.multiply(columns)
                if diagonal:
                    result[n, some] = (columns * solved).sum(0)
                    continue
                result[n, :, some] = sum(
                    (one.matvec(self._part(one, solved)) for one in own), torch.zeros(())
                )
        return result

    def _columns(self, blocks: Sequence[LayerJacobian], pieces: Sequence[Tensor]) -> Tensor:
        """Lay columns ``(P_l, k)`` of blocks out as columns of the matrix, ``(P, k)``."""
        if not isinstance(self.layout, ParameterLayout):
            return pieces[0].to(self.dtype)
        columns = pieces[0].new_zeros(self.layout.numel, pieces[0].shape[1], dtype=self.dtype)
        for block, piece in zip(blocks, pieces, strict=True):
            self.layout.scatter(block.layout, piece, columns)
        return columns

    def _part(self, block: LayerJacobian, columns: Tensor) -> Tensor:
        """Return a block's part of columns, in the type of its rows."""
        if isinstance(self.layout, ParameterLayout):
            columns = self.layout.gather(block.layout, columns)
        return columns.to(block.dtype)


def _of_sample(block: LayerJacobian, n: int) -> LayerJacobian:
    """Return the rows of one sample."""
    if isinstance(block, LinearJacobian):
        return block.of_samples(torch.tensor([n], device=block.device))
    return DenseJacobian(block.layout, block.layout.flat(block.per_sample_gradients(n, n + 1)))


def scaled_forms(rows: Tensor, scale: Tensor, diagonal: bool) -> Tensor:
    """Return ``δ_n diag(s_n) δ_nᵀ``, or its diagonal, for ``(N, K, d)`` and ``(N, d)``."""
    if diagonal:
        return (rows.square() @ scale.unsqueeze(2)).squeeze(2)
    return (rows * scale.unsqueeze(1)) @ rows.mT


def map_by_columns(
    name: str, rows: Jacobians, other: Jacobians, inverse: Operator
) -> dict[str, Tensor]:
    """Return ``{name: J' H Jᵀ}`` of one block, applying ``H`` to some rows of ``J`` at a time.

    A block that ``J`` or ``J'`` lacks contributes nothing.
    """
    if name not in rows or name not in other:
        return {}
    left, right = other[name], rows[name]
    pieces = []
    for start, stop in right.chunks():
        columns = right.layout.flat(right.per_sample_gradients(start, stop)).flatten(0, 1).T
        pieces.append(left.matvec(inverse.multiply(columns)))
    return {name: torch.cat(pieces, dim=1)}


def map_jointly(
    names: Collection[str],
    rows: Jacobians,
    other: Jacobians,
    inverse: Operator,
    layout: ParameterLayout,
) -> dict[str, Tensor]:
    """Return block name → ``J'_l [H Jᵀ]_l`` of blocks with rows, some rows of ``J`` at a time."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}
    step = max(1, CHUNK_ELEMENTS // max(1, layout.numel * rows.directions))
    for start in range(0, rows.samples if names else 0, step):
        stop = min(start + step, rows.samples)
        columns = layout.zeros(layout.numel, (stop - start) * rows.directions)
        for name in names:
            block = rows[name]
            flat = block.layout.flat(block.per_sample_gradients(start, stop)).flatten(0, 1)
            layout.scatter(block.layout, flat.T, columns)
        solution = inverse.multiply(columns)
        for name in names:
            block = other[name]
            pieces[name].append(block.matvec(layout.gather(block.layout, solution)))
    return {name: torch.cat(columns, dim=1) for name, columns in pieces.items()}
