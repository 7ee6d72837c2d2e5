r"""Two-level K-FAC: K-FAC layer by layer, and a coarse correction that couples the layers.

K-FAC's inverse ``M⁻¹`` knows nothing of how layers act together. A few vectors per layer, the
columns of ``R``, span a coarse space in which the exact Fisher matrix ``F`` of the last update is
small enough to be solved with:

.. math:: u = M^{-1} g + R F_c^{-1} R^\top \bigl(g - (F + \lambda I) M^{-1} g\bigr), \qquad
          F_c = R^\top (F + \lambda I) R

(Tselepidis et al. 2020; with the residual in place of the gradient Koroko et al. 2022). Then
``Rᵀ(g − (F + λI)u) = 0``, and no ``u`` in ``M⁻¹g + span R`` is closer to the exact natural
gradient in the norm of ``F + λI``. ``F`` is never formed: the rows of the last update are kept and
multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import GradientSource, check_choice, damping_of
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.factors import eigenbasis
from natgrad.curvature.kfac import KFACFisher, KroneckerPart
from natgrad.curvature.partitioned import CurvaturePart
from natgrad.curvature.registry import register_structure
from natgrad.jacobians import (
    DenseJacobian,
    EmbeddingJacobian,
    Jacobians,
    LayerJacobian,
    LinearJacobian,
    SumJacobian,
)
from natgrad.jacobians.linear import tensor_identity
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.linalg import FactorizationError

if TYPE_CHECKING:
    from natgrad.capture import Block

__all__ = ["CoarseForm", "CoarseLevel", "CoarseSpace", "TwoLevelFisher"]

CoarseSpace = Literal["nicolaides", "residual", "spectral", "krylov"]
CoarseForm = Literal["residual", "additive"]

Damping = float | Mapping[str, float]
#: Block name → vectors of the coarse space on that block, ``(P_l, m)``.
Basis = dict[str, Tensor]


@dataclass(frozen=True)
class CoarseSystem:
    """The coarse space and the inverse on it.

    Attributes:
        basis: ``R``, by block; blocks without vectors are absent.
        products: ``J R``, ``(rows, m)``.
        inverse: ``F_c⁻¹``, ``(m, m)``, in float64; the pseudo-inverse where that is singular.
    """

    basis: Basis
    products: Tensor
    inverse: Tensor


class CoarseLevel:
    """The exact Fisher matrix of the last update, restricted to a few vectors per block.

    Rows are kept in whichever form is smaller: factored, or one gradient per row. They are copies,
    so that nothing changed in place later reaches them. Blocks that the rows do not reach have no
    vectors.

    Args:
        blocks: Block name → layout.
        layout: Order of all trainable parameters.
        space: See :class:`TwoLevelFisher`.
        form: See :class:`TwoLevelFisher`.

    Attributes:
        rows: Rows of the last update, in as many pieces as they came in.
        count: What their mean divides by.
        damping: Damping of the last refresh.
    """

    def __init__(
        self,
        blocks: Mapping[str, BlockLayout],
        layout: ParameterLayout,
        space: CoarseSpace,
        form: CoarseForm,
    ) -> None:
        self.blocks, self.layout = blocks, layout
        self.space, self.form = space, form
        self.rows: list[Jacobians] = []
        self.count = 0.0
        self.damping: Damping | None = None
        self._stale = False  # The next rows replace those there are.
        self._dropping = False  # The first chunk of the present batch was left out.
        self._basis: Basis = {}  # Spectral vectors of the last refresh.
        self._system: CoarseSystem | None = None  # For the rows and damping there are.

    @property
    def is_linear(self) -> bool:
        """Whether the coarse space is the same for every gradient."""
        return self.space in ("nicolaides", "spectral")

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows, or only such that count for nothing."""
        return not self.rows or self.count == 0

    # Rows.

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Keep rows; batches with NaN or infinite entries are left out."""
        weight = float(count)
        finite = all(block.is_finite() for block in jacobians.values())
        if weight > 0:
            self._dropping = not finite
        if self._dropping or not finite or len(jacobians) == 0:
            return
        copies: dict[Any, Tensor] = {}
        kept = {name: _kept(block, copies) for name, block in jacobians.items()}
        piece = Jacobians(self.layout, kept, jacobians.samples, jacobians.directions)
        before = ([], 0.0) if self._stale else (self.rows, self.count)
        self.rows, self.count = [*before[0], piece], before[1] + weight
        self._stale, self._system = False, None

    def discount(self, factor: float) -> None:
        """Let the next rows replace those there are; with 0 forget them now."""
        self._stale = True
        if factor == 0.0:
            self.rows, self.count, self._system = [], 0.0, None

    def refresh(self, damping: Damping, parts: Mapping[str, CurvaturePart]) -> None:
        """Take a damping, and where they are the coarse space, some parts' leading eigenvectors."""
        self.damping = dict(damping) if isinstance(damping, Mapping) else damping
        self._system = None
        if self.space == "spectral":
            self._basis = {**self._basis, **self.spectral_basis(parts)}

    # Products.

    def times(self, columns: Tensor) -> Tensor:
        """Return ``J V``, ``(rows, k)``."""
        return torch.cat([_times(rows, columns) for rows in self.rows])

    def _transposed_times(self, weights: Tensor) -> Tensor:
        result = weights.new_zeros(self.layout.numel, weights.shape[1])
        pieces = weights.split([rows.rows for rows in self.rows])
        for rows, piece in zip(self.rows, pieces, strict=True):
            for block in rows.values():
                self.layout.add(block.layout, block.rmatvec(piece), result)
        return result

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

    def _reached(self) -> list[str]:
        return [name for name in self.blocks if any(name in rows for rows in self.rows)]

    def spectral_basis(self, parts: Mapping[str, CurvaturePart]) -> Basis:
        """Return the leading eigenvector of every Kronecker product that has seen rows."""
        return {
            name: _leading_eigenvector(part)
            for name, part in parts.items()
            if isinstance(part, KroneckerPart) and part.inputs is not None
        }

    def ones(self) -> Basis:
        """Return the vector of ones on every block."""
        sizes = {name: self.blocks[name].numel for name in self._reached()}
        return {name: self.layout.zeros(size, 1) + 1.0 for name, size in sizes.items()}

    def system(self, basis: Basis, damping: Damping) -> CoarseSystem:
        """Return ``F_c⁻¹`` for a coarse space.

        ``F_c`` is scaled to unit diagonal before its eigenvalues decide what is singular.

        Raises:
            FactorizationError: If there are no vectors, or their products are not finite.
        """
        basis = {name: _unit(basis[name]) for name in self._reached() if name in basis}
        if not basis:
            raise FactorizationError("no layer has a coarse vector")
        products = torch.cat([_block_times(rows, basis) for rows in self.rows]).double()
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

    def applied_system(self) -> CoarseSystem:
        """Return the system of the present rows and the last refresh, for a linear space."""
        assert self.damping is not None
        if self._system is None:
            basis = self._basis if self.space == "spectral" else self.ones()
            self._system = self.system(basis, self.damping)
        return self._system

    def correct(
        self,
        gradient: Tensor,
        solution: Tensor,
        damping: Damping,
        fixed: Callable[[], CoarseSystem],
        smoother: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the solutions of both levels.

        It is ``M⁻¹g`` where there is no coarse system, or none that is finite.

        Args:
            gradient: ``g``, ``(P, k)``.
            solution: ``M⁻¹g``.
            damping: λ.
            fixed: Returns the system of a linear space.
            smoother: ``V ↦ M⁻¹V``.
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
        product = self._transposed_times(seen) / self.count
        if self.space == "residual":
            vectors = smoother(gradient - product - self.damped(solution, damping))
        else:
            vectors = torch.cat([solution, smoother(product)], 1)
        basis = {name: self.layout.gather(self.blocks[name], vectors) for name in self._reached()}
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

    def _restrict(self, basis: Basis, columns: Tensor) -> Tensor:
        """Return ``RᵀV``, ``(m, k)``."""
        blocks = self.blocks
        return torch.cat(
            [basis[name].T @ self.layout.gather(blocks[name], columns) for name in basis]
        )

    def _prolong(self, basis: Basis, weights: Tensor) -> Tensor:
        """Return ``R W``, ``(P, k)``."""
        result = self.layout.zeros(self.layout.numel, weights.shape[1])
        pieces = weights.split([vectors.shape[1] for vectors in basis.values()])
        for (name, vectors), piece in zip(basis.items(), pieces, strict=True):
            self.layout.scatter(self.blocks[name], vectors @ piece, result)
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
            product = self._transposed_times(system.products.to(eye.dtype)) / self.count
            columns = columns - smoother(product + self.damped(columns, damping))
        weights = (system.inverse @ _times(rows, columns).double().T).to(eye.dtype)
        result: dict[str, Tensor] = {}
        pieces = weights.split(sizes)
        for (name, vectors), piece in zip(system.basis.items(), pieces, strict=True):
            if name in other:
                result[name] = other[name].matvec(vectors) @ piece
        return result

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return rows, count, damping and basis."""
        return {
            "count": self.count,
            "stale": self._stale,
            "damping": self.damping,
            "basis": self._basis,
            "rows": [
                {
                    "samples": rows.samples,
                    "directions": rows.directions,
                    "blocks": {name: _pack(block) for name, block in rows.items()},
                }
                for rows in self.rows
            ],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self.count, self._stale, self.damping = state["count"], state["stale"], state["damping"]
        self._basis = {name: vector.to(device) for name, vector in state["basis"].items()}
        self.rows = [
            Jacobians(
                self.layout,
                {name: _unpack(block, device) for name, block in piece["blocks"].items()},
                piece["samples"],
                piece["directions"],
            )
            for piece in state["rows"]
        ]
        self._dropping, self._system = False, None


@register_structure
class TwoLevelFisher(KFACFisher):
    """K-FAC with a coarse correction that couples layers.

    The matrix (products, trace, diagonal, eigenvalues, ``to_dense``) is that of K-FAC. ``solve``
    and ``precondition`` are corrected; as an operator on gradients the corrected inverse is not
    symmetric, and no matrix is its inverse.

    The factors are averages over updates as K-FAC's are; the Fisher matrix of the coarse level is
    that of the last update alone, whose rows are kept (and saved with the state). New rows take
    effect with the next gradient, new factors with the next refresh.

    Options besides those of K-FAC:

    * ``coarse_space``, the vectors on each block: ``"nicolaides"``, all ones; ``"spectral"``, the
      Kronecker product of the factors' leading eigenvectors; ``"residual"``, the block's part of
      ``M⁻¹(g − (F + λI)M⁻¹g)``; ``"krylov"``, two, the parts of ``M⁻¹g`` and ``M⁻¹FM⁻¹g``. With
      the last two, which depend on the gradient, the result is not linear in it. The default is
      ``"krylov"`` where gradients are preconditioned in training, else ``"nicolaides"``.

      Only the space of ``"krylov"`` holds ``M⁻¹g`` itself. In the residual form ``u`` then is the
      best vector of the space: no further from the exact natural gradient than no step at all, and
      a direction of descent.
    * ``form``: ``"residual"``, as above, whose error is never above that of K-FAC, or
      ``"additive"``, ``u = M⁻¹g + R F_c⁻¹ Rᵀg``, without that guarantee.
    """

    structure: ClassVar[str] = "two_level"
    training_options: ClassVar[Mapping[str, Any]] = {
        **KFACFisher.training_options,
        "coarse_space": "krylov",
    }

    def __init__(
        self,
        blocks: Mapping[str, Block],
        layout: ParameterLayout,
        coarse_space: CoarseSpace = "nicolaides",
        form: CoarseForm = "residual",
        **options: Any,
    ) -> None:
        check_choice("coarse_space", coarse_space, "nicolaides", "residual", "spectral", "krylov")
        check_choice("form", form, "residual", "additive")
        super().__init__(blocks, layout, **options)
        self.coarse = CoarseLevel(self.blocks, layout, coarse_space, form)

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add second moments to every part and keep the rows."""
        super().update(jacobians, count)
        self.coarse.update(jacobians, count)

    def discount(self, factor: float) -> None:
        """Discount every part; rows are replaced by those of the next update."""
        super().discount(factor)
        self.coarse.discount(factor)

    def _smoother(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Factorise K-FAC once; return ``V ↦ M⁻¹V``."""
        solvers = [(part, part.solver(damping)) for part in self.parts.values()]

        def apply(columns: Tensor) -> Tensor:
            result = torch.zeros_like(columns)
            for part, solver in solvers:
                self.layout.scatter(part, solver(self.layout.gather(part, columns)), result)
            return result

        return apply

    def _system(self, damping: float) -> CoarseSystem:
        """Return the coarse system of the present factors and rows, for a linear space."""
        spectral = self.coarse.space == "spectral"
        basis = self.coarse.spectral_basis(self.parts) if spectral else self.coarse.ones()
        return self.coarse.system(basis, damping)

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        smoother = self._smoother(damping)
        solution = smoother(columns)
        if self.coarse.is_empty:
            return solution
        fixed = partial(self._system, damping)
        return self.coarse.correct(columns, solution, damping, fixed, smoother)

    def _function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        coarse = self.coarse
        if not coarse.is_linear:
            raise ValueError(
                f"coarse_space {coarse.space!r} depends on the gradient, so that no linear map "
                "tells how a step moves the outputs: use 'nicolaides' or 'spectral'"
            )
        result = super()._function_space_map(rows, other, damping)
        if coarse.is_empty:
            return result
        found = coarse.function_space_correction(
            rows, other, damping, self._system(damping), self._smoother(damping)
        )
        for name, value in found.items():
            result[name] = result[name] + value if name in result else value
        return result

    # Training.

    def refresh(
        self, damping: float | Mapping[str, float], names: Collection[str] | None = None
    ) -> None:
        """Factorise the parts; the coarse matrix follows with the next gradient.

        Args:
            damping: One value, or one per block name.
            names: Parts to factorise; all by default.
        """
        super().refresh(damping, names)
        try:
            chosen = self.parts if names is None else {name: self.parts[name] for name in names}
            self.coarse.refresh(damping, chosen)
        except FactorizationError as error:
            linalg.warn_kept(self, "all layers", error)

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return the corrected natural gradient.

        Blocks that the rows of the last update do not reach get that of K-FAC.
        """
        natural = super().precondition(source)
        coarse = self.coarse
        if coarse.is_empty or coarse.damping is None:
            return natural
        corrected = coarse.correct(
            self.layout.to_column(source.gradients),
            self.layout.to_column(natural),
            coarse.damping,
            coarse.applied_system,
            self._smooth,
        )
        found = self.layout.to_dict(corrected[:, 0])
        return {name: found[name] for name in natural}

    def _smooth(self, columns: Tensor) -> Tensor:
        """Return ``M⁻¹v`` by the last refresh, for ``(P, 1)``."""
        source = GradientSource(self.layout.to_dict(columns[:, 0]))
        return self.layout.to_column(super().precondition(source))

    def quadratic(self, direction: dict[str, Tensor], inner: Tensor) -> Tensor:
        """Return the larger of ``|⟨Δ, ∇L⟩|`` and ``‖JΔ‖²/count`` for the rows kept."""
        if self.coarse.is_empty:
            return inner.abs()
        products = self.coarse.times(self.layout.to_column(direction))
        return torch.maximum(inner.abs(), (products.square().sum() / self.coarse.count).to(inner))

    def costs(self, workload: Workload) -> dict[str, Cost]:
        """Return every part's cost, and that of the coarse level as ``"all layers"``.

        Products with the rows, and with them the memory of the rows, are stated for the smaller of
        factored rows and one gradient per row.
        """
        result = super().costs(workload)
        rows = workload.samples * workload.directions
        memory, product = 0, 0.0
        for name, block in self.blocks.items():
            spots = workload.samples * workload.positions.get(name, 1)
            inputs = block.groups * max(1, block.d_in)
            outputs = block.groups * block.d_out * workload.directions
            factored, whole = spots * (inputs + outputs), rows * block.numel
            memory += min(factored, whole)
            product += whole if whole <= factored else float(spots) * (block.numel + outputs)
        vectors = len(self.blocks) * (2 if self.coarse.space == "krylov" else 1)
        solving = float(rows) * vectors**2 + float(vectors) ** 3
        size = self.layout.numel
        smoothing = sum(cost.step for cost in result.values())
        spectra = 0.0
        if self.coarse.is_linear:
            memory += size + rows * vectors
            step = product + 2.0 * size
            solving += product
            if self.coarse.space == "spectral":
                blocks = self.blocks.values()
                spectra = sum(b.groups * float(b.d_augmented**3 + b.d_out**3) for b in blocks)
        else:
            # J M⁻¹g, Jᵀ, J R; M⁻¹ once more.
            step = (2.0 + vectors / len(self.blocks)) * product + smoothing + solving
            solving = 0.0
        entry = self.layout.dtype.itemsize
        result["all layers"] = Cost(
            f"{vectors} x {vectors}", entry * memory + 8 * vectors**2, solving + spectra, step
        )
        return result

    # State.

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the parts and the coarse level by reference."""
        return {"parts": super().snapshot(), "coarse": dict(self.coarse.__dict__)}

    def rollback(self, saved: dict[str, Any]) -> None:
        """Return to a snapshot."""
        super().rollback(saved["parts"])
        self.coarse.__dict__.clear()
        self.coarse.__dict__.update(saved["coarse"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the parts and the coarse level, rows included."""
        return {"parts": super().state_dict(), "coarse": self.coarse.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore both.

        Raises:
            ValueError: If the state has other layers than the model.
        """
        super().load_state_dict(state["parts"], device)
        self.coarse.load_state_dict(state["coarse"], device)


# Vectors.


def _unit(vectors: Tensor) -> Tensor:
    """Scale columns to length 1; zero stays zero."""
    norms = vectors.norm(dim=0)
    return vectors / torch.where(norms > 0, norms, 1.0)


def _leading_eigenvector(part: KroneckerPart) -> Tensor:
    """Return the eigenvector of ``B ⊗ A`` with the largest eigenvalue, ``(P_l, 1)``."""
    a, b = part.kronecker_factors()
    (basis_a, values_a), (basis_b, values_b) = eigenbasis(a), eigenbasis(b)
    group = int((values_a.amax(-1) * values_b.amax(-1)).argmax())
    matrix = a.new_zeros(1, a.shape[0], b.shape[1], a.shape[1])
    left, right = _top(basis_b, values_b, group), _top(basis_a, values_a, group)
    matrix[0, group] = torch.outer(left, right)
    return part.layout.flat(matrix).T


def _top(basis: Tensor | None, values: Tensor, group: int) -> Tensor:
    """Return the leading eigenvector of one group's factor; a unit vector for a diagonal one."""
    index = int(values[group].argmax())
    if basis is not None:
        return basis[group, :, index]
    result = torch.zeros_like(values[group])
    result[index] = 1.0
    return result


# Rows.


def _times(rows: Jacobians, columns: Tensor) -> Tensor:
    """Return ``J V``, ``(rows, k)``, for ``(P, k)``."""
    total = columns.new_zeros(rows.rows, columns.shape[1])
    for block in rows.values():
        total += block.matvec(rows.layout.gather(block.layout, columns))
    return total


def _block_times(rows: Jacobians, basis: Basis) -> Tensor:
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


def _kept(rows: LayerJacobian, copies: dict[Any, Tensor]) -> LayerJacobian:
    """Return a copy of rows in the form that takes less memory.

    Args:
        rows: The rows.
        copies: Copies made so far, as layers may read the same tensor.
    """
    if isinstance(rows, SumJacobian):
        return SumJacobian([_kept(part, copies) for part in rows.parts], rows.layout)
    state = rows.state()
    elements = sum(tensor.numel() for tensor in state.values())
    factored = type(rows) in (LinearJacobian, EmbeddingJacobian)
    if not factored or rows.rows * rows.layout.numel < elements:
        return _as_dense(rows)
    packed = _pack(rows)
    for key, tensor in state.items():
        identity = tensor_identity(tensor)
        if identity not in copies:
            copies[identity] = tensor.clone()
        packed[key] = copies[identity]
    return _unpack(packed, rows.device)


def _as_dense(rows: LayerJacobian) -> DenseJacobian:
    matrices = rows.per_sample_gradients()
    flat = rows.layout.flat(matrices).reshape(rows.samples, rows.directions, -1)
    layout = replace(
        rows.layout, groups=1, d_out=1, d_in=rows.layout.numel, has_weight=True, has_bias=False,
        transposed=False, one_hot=False,
    )  # fmt: skip
    return DenseJacobian(layout, flat.clone())


def _pack(rows: LayerJacobian) -> dict[str, Any]:
    """Return rows as tensors and plain values."""
    if isinstance(rows, SumJacobian):
        parts = [_pack(part) for part in rows.parts]
        return {"kind": "sum", "layout": asdict(rows.layout), "parts": parts}
    state: dict[str, Any] = {"layout": asdict(rows.layout), **rows.state()}
    if isinstance(rows, EmbeddingJacobian):
        return {"kind": "embedding", **state}
    if isinstance(rows, LinearJacobian):
        return {"kind": "linear", "bias_value": rows.bias_value, **state}
    return {"kind": "dense", **state}


def _unpack(state: Mapping[str, Any], device: torch.device) -> LayerJacobian:
    """Return the rows that :func:`_pack` packed."""
    layout = BlockLayout(**state["layout"])
    if state["kind"] == "sum":
        return SumJacobian([_unpack(part, device) for part in state["parts"]], layout)
    if state["kind"] == "dense":
        return DenseJacobian(layout, state["rows"].to(device))
    gradients = state["output_gradients"].to(device)
    if state["kind"] == "embedding":
        return EmbeddingJacobian(layout, state["indices"].to(device), gradients)
    inputs = state["inputs"].to(device)
    return LinearJacobian(layout, inputs, gradients, bias_value=state["bias_value"])
