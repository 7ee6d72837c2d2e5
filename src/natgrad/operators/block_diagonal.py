"""The matrix of a whole model: one operator per part, nothing between parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, overload

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.jacobians import Jacobians
from natgrad.layouts import ParameterLayout
from natgrad.operators.operator import Operator
from natgrad.solvers import Solver

Vector = TypeVar("Vector", Tensor, dict[str, Tensor])


@dataclass(frozen=True, eq=False)
class FisherMatrix(Operator):
    """A Fisher matrix ``P × P`` in some structure, or what was made of it: an inverse, a sum.

    It takes flat vectors, columns ``(P, k)`` or dicts of tensors by parameter name, and returns the
    same kind of object, in the floating type it was given.

    Attributes:
        layout: Order of all trainable parameters, that of rows and columns.
        parts: Part name → its operator: one per layer, or ``"all layers"`` for a joint one.
        members: Part name → names of the blocks it is about.
        structure: Name of the structure.

    Example:
        >>> F = natgrad.fisher_matrix(model, (x, y), structure="kfac")
        >>> P = F.inverse(damping=1e-3)  # factorised once
        >>> step = P @ gradient
    """

    layout: ParameterLayout
    parts: dict[str, Operator]
    members: dict[str, tuple[str, ...]]
    structure: str

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Parameter names in the order of rows and columns."""
        return self.layout.names

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return next(iter(self.parts.values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return next(iter(self.parts.values())).device

    def _with(self, function: Callable[[str, Operator], Operator]) -> FisherMatrix:
        return replace(self, parts={name: function(name, one) for name, one in self.parts.items()})

    # Products.

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``F V`` for ``(P, k)`` in the matrix's own type."""
        result = torch.zeros_like(columns)
        for one in self.parts.values():
            values = one @ self.layout.gather(one.layout, columns)
            self.layout.scatter(one.layout, values, result)
        return result

    def __matmul__(self, vector: Vector) -> Vector:
        """Return ``F v`` for a flat vector, columns ``(P, k)``, or a dict name → tensor.

        Raises:
            TypeError: If it is something else.
            ValueError: If it has a wrong shape or wrong names.
        """
        product: Vector = super().__matmul__(vector)
        return product

    def solve(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Return ``(F + damping I)⁻¹ v``; keep :meth:`inverse` where it is wanted again.

        Args:
            vector: A flat vector ``(P,)``, columns ``(P, k)``, or a dict name → tensor.
            damping: λ ≥ 0, in the units of F; 0 is the pseudo-inverse.

        Returns:
            The same kind of object.

        Raises:
            ValueError: If the vector has a wrong shape, or the damping is negative or not finite.
        """
        return self.inverse(damping) @ vector

    # Inverses, sums.

    def inverse(
        self, damping: float | Mapping[str, float] = 0.0, solver: str | Solver = "direct"
    ) -> FisherMatrix:
        """Return ``(F + damping I)⁻¹``, factorised once; the pseudo-inverse for 0.

        Args:
            damping: λ ≥ 0, in the units of F: one value, or one per part name.
            solver: See :meth:`Operator.inverse`.

        Raises:
            ValueError: If a damping is negative or not finite, a part has none, or the solver is
                unknown.
            FactorizationError: If a factorisation is impossible.
        """
        dampings = list(self._dampings(damping).values())
        if solver != "direct":
            inverses = [
                one.inverse(value, solver)
                for one, value in zip(self.parts.values(), dampings, strict=True)
            ]
        else:
            inverses = inverses_together(list(self.parts.values()), dampings)
        return replace(self, parts=dict(zip(self.parts, inverses, strict=True)))

    def _dampings(self, damping: float | Mapping[str, float]) -> dict[str, float]:
        """Return part name → λ; refuse what is negative or not finite, and parts without any."""
        by_name = damping if isinstance(damping, Mapping) else dict.fromkeys(self.parts, damping)
        for one in by_name.values():
            check_damping(one)
        if not all({name, *self.members[name]} & set(by_name) for name in self.parts):
            raise ValueError(
                f"damping must be one number, or one for each part of {list(self.parts)}, got them "
                f"for {list(by_name)}"
            )
        return {name: damping_of(name, damping) for name in self.parts}

    def direct_inverse(self, damping: float) -> FisherMatrix:
        """Return the inverse by the structure's own factorisation."""
        return self.inverse(damping)

    def inverse_root(self, damping: float | Mapping[str, float]) -> FisherMatrix:
        """Return the symmetric root ``(F + damping I)^(−1/2)``.

        Standard normal vectors become samples of ``N(0, (F + damping I)⁻¹)``.

        Args:
            damping: λ > 0, in the units of F: one value, or one per part name.

        Raises:
            FactorizationError: If a damped part is not positive definite.
            NotImplementedError: For ``"two_level"``, whose inverse is not symmetric.
            ValueError: If the damping is not positive and finite, or a dense part is needed and
                does not fit memory.
        """
        dampings = self._dampings(damping)
        if not all(dampings.values()):
            raise ValueError("inverse_root needs a positive damping")
        return self._with(lambda name, one: one.inverse_root(dampings[name]))

    @overload
    def __add__(self, other: FisherMatrix) -> FisherMatrix: ...

    @overload
    def __add__(self, other: Operator) -> Operator: ...

    def __add__(self, other: Operator) -> Operator:
        """Return the sum with a matrix about the same parameters.

        That of Fisher matrices in the same parts is one again.

        Raises:
            ValueError: If parameters or parts differ.
        """
        if not isinstance(other, FisherMatrix):
            return super().__add__(other)
        if self.layout.shapes != other.layout.shapes or self.members != other.members:
            raise ValueError(
                "only Fisher matrices of the same parameters in the same parts add, got "
                f"{self!r} and {other!r}"
            )
        return self._with(lambda name, one: one + other.parts[name])

    def __mul__(self, factor: float) -> FisherMatrix:
        """Return a multiple."""
        return self._with(lambda _, one: one * factor)

    # Quantities.

    def trace(self) -> Tensor:
        """Return the sum of the parts' traces."""
        return torch.stack([one.trace() for one in self.parts.values()]).sum()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(F + damping I)``; −inf where that is singular.

        Without damping eigenvalues up to ``d · eps`` times the largest are taken for rounding, d
        being the size of the matrix that they are eigenvalues of: a part's, a unit's, a factor's.

        Raises:
            ValueError: If the damping is negative or not finite.
        """
        check_damping(damping)
        values = torch.stack([one.logdet(damping) for one in self.parts.values()])
        # An indefinite part without a logarithm takes nothing from the zero of another.
        return torch.where((values == -math.inf).any(), -math.inf, values.sum())

    def diagonal(self) -> Tensor:
        """Return the diagonal, flat ``(P,)``."""
        pieces: dict[str, Tensor] = {}
        for one in self.parts.values():
            pieces.update(one.layout.to_dict(one.diagonal()))
        # Parameters without entries are in no part.
        return torch.cat([pieces[n].reshape(-1) for n in self.layout.names if n in pieces])

    def eigenvalues(self) -> Tensor:
        """Return all ``P`` eigenvalues, largest first."""
        values = torch.cat([one.eigenvalues() for one in self.parts.values()])
        return values.sort(descending=True).values

    def to_dense(self) -> Tensor:
        """Return the matrix, ``(P, P)``."""
        result: Tensor | None = None
        for one in self.parts.values():
            dense, segments = one.to_dense(), self.layout.slices(one.layout)
            if result is None:
                result = dense.new_zeros(self.shape)
            rows = dense.split(list(one.layout.sizes))
            for i, row in zip(segments, rows, strict=True):
                columns = row.split(list(one.layout.sizes), dim=1)
                for j, piece in zip(segments, columns, strict=True):
                    result[i, j] = piece
        assert result is not None
        return result

    def function_space_map(  # type: ignore[override]
        self, rows: Jacobians, other: Jacobians | None = None, damping: float = 0.0
    ) -> dict[str, Tensor]:
        r"""Return how a natural-gradient step moves the outputs, layer by layer.

        A gradient ``∇L = Jᵀu`` turns into the step ``(F + λI)⁻¹Jᵀu``, which moves the outputs whose
        rows are ``J'`` by ``J'(F + λI)⁻¹Jᵀu``, the sum of what its layers contribute. Where the
        sum is a multiple of the identity the structure is *isotropic* (Karakida & Osawa 2020).

        Args:
            rows: ``J``, R rows. For the structures that keep rows it costs least if they are those
                of the one update so far.
            other: ``J'``, R' rows of the same blocks; ``J`` by default.
            damping: λ ≥ 0, in the units of F; 0 is the pseudo-inverse.

        Returns:
            Block name → contribution ``(R', R)``. No ``R × P`` matrix is built.

        Raises:
            ValueError: If the damping is negative or not finite, or R × R' does not fit memory.
        """
        check_damping(damping)
        other = rows if other is None else other
        side = int((rows.rows * other.rows) ** 0.5) + 1
        linalg.check_memory(side, len(rows) + 1, self.layout.dtype, self.layout.device)
        result: dict[str, Tensor] = {}
        for name, one in self.parts.items():
            result.update(one.function_space_map(self.members[name], rows, other, damping))
        return result

    def sample_forms(  # type: ignore[override]
        self, rows: Jacobians, *, diagonal: bool = False
    ) -> Tensor:
        """Return ``J_n F J_nᵀ`` of every sample, ``(N, K, K)``, or its diagonal, ``(N, K)``.

        Of a damped inverse these are the covariances of a sample's outputs under the Laplace
        approximation. Nothing of the size ``(N·K)²`` or ``K × P`` is formed.

        Args:
            rows: ``J``, of N samples with K vectors each.
            diagonal: Whether the diagonal is all that is wanted, default False.
        """
        parts = (one.sample_forms(self.members[n], rows, diagonal) for n, one in self.parts.items())
        result = next(parts)
        for part in parts:
            result = result.add_(part)
        return result

    def __repr__(self) -> str:
        """Show structure, size and number of blocks."""
        blocks = sum(map(len, self.members.values()))
        return f"FisherMatrix({self.structure}, {self.shape[0]} x {self.shape[1]}, {blocks} blocks)"


def damping_of(name: str, damping: float | Mapping[str, float]) -> float:
    """Return a part's damping; parts that join several blocks take the largest of theirs."""
    if isinstance(damping, Mapping):
        return damping[name] if name in damping else max(damping.values())
    return float(damping)


def inverses_together(
    operators: Collection[Operator], dampings: Collection[float]
) -> list[Operator]:
    """Return the direct inverses of operators, those of one class factorised together."""
    results: dict[int, Operator] = {}
    groups: dict[type[Operator], list[tuple[int, Operator, float]]] = {}
    for index, (one, damping) in enumerate(zip(operators, dampings, strict=True)):
        groups.setdefault(type(one), []).append((index, one, damping))
    for kind, group in groups.items():
        found = kind.inverses([one for _, one, _ in group], [value for *_, value in group])
        results.update(zip([index for index, *_ in group], found, strict=True))
    return [results[index] for index in range(len(results))]
