r"""Two-level K-FAC: K-FAC layer by layer, and a coarse correction that couples the layers.

.. math:: u = M^{-1} g + R F_c^{-1} R^\top \bigl(g - (F + \lambda I) M^{-1} g\bigr), \qquad
          F_c = R^\top (F + \lambda I) R

with K-FAC's inverse ``M⁻¹`` and a few vectors per layer, the columns of ``R`` (Tselepidis et al.
2020; with the residual in place of the gradient Koroko et al. 2022). See
:mod:`natgrad.operators.coarse_level`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad.arguments import check_choice
from natgrad.curvature.cost import Cost, Workload, factored_elements
from natgrad.curvature.kfac import KroneckerFactors
from natgrad.curvature.structure import Part, register_structure
from natgrad.jacobians import FIRST_DRAW, Draw, Jacobians
from natgrad.jacobians.collection import in_type
from natgrad.jacobians.packing import copied, pack, unpack
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.operators import GradientSource, Operator
from natgrad.operators.block_diagonal import FisherMatrix
from natgrad.operators.coarse_level import (
    CoarseForm,
    CoarseLevel,
    CoarseSpace,
    CoarseSystem,
    TwoLevelMatrix,
    leading_eigenvector,
)
from natgrad.statistics import Statistics

COARSE = "all layers"


@dataclass(frozen=True, eq=False)
class KeptRows(Statistics):
    """Copies of the rows of the last batch of a moving average, or of all batches of a sum.

    Attributes:
        pieces: The rows, batch by batch.
    """

    pieces: tuple[Jacobians, ...]

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return both, or the other's alone where the first decay."""
        if decay < 1:
            return other
        return replace(self, count=self.count + other.count, pieces=self.pieces + other.pieces)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor, those of the rows included."""
        yield self.count
        for rows in self.pieces:
            for block in rows.values():
                yield from (t for t in block.state().values() if t.is_floating_point())

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the same rows with a function applied to the count."""
        return replace(self, count=function(self.count))

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the rows in a type, and the count on a device."""
        pieces = self.pieces
        if dtype is not None:
            pieces = tuple(in_type(one, dtype) for one in pieces)
        return replace(super().to(device, dtype), pieces=pieces)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as tensors and plain values."""
        return {**self.sums(), "rows": self.rows()}

    def sums(self) -> dict[str, Any]:
        """Return the count."""
        return {"kind": type(self).__name__, "count": self.count, "rows": []}

    def rows(self) -> Any:
        """Return the rows as tensors and plain values."""
        return [pack(rows) for rows in self.pieces]

    def with_rows(self, found: Sequence[Any], layout: ParameterLayout) -> Self:
        """Return the rows of all processes."""
        device = self.count.device
        pieces = (unpack(piece, layout, device) for one in found for piece in one or ())
        return replace(self, pieces=self.pieces + tuple(pieces))

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device, layout: Any) -> Self:
        """Return what :meth:`state_dict` described."""
        empty = cls(state["count"].to(device), ())
        return empty.with_rows([state["rows"]], layout)


@register_structure
@dataclass(frozen=True)
class TwoLevelKronecker(KroneckerFactors):
    """K-FAC with a coarse correction that couples layers.

    The matrix (products, trace, diagonal, eigenvalues, ``to_dense``) is that of K-FAC; its inverse
    is corrected. The factors are averages over updates as K-FAC's are; the Fisher matrix of the
    coarse level is that of the last update alone, whose rows are kept (and saved with the state).
    New rows take effect with the next gradient, new factors with the next refresh.

    Attributes:
        coarse_space: The vectors on each block: ``"nicolaides"``, all ones; ``"spectral"``, the
            Kronecker product of the factors' leading eigenvectors; ``"residual"``, the block's part
            of ``M⁻¹(g − (F + λI)M⁻¹g)``; ``"krylov"``, two, the parts of ``M⁻¹g`` and
            ``M⁻¹FM⁻¹g``. With the last two, which depend on the gradient, the result is not linear
            in it. Only the space of ``"krylov"`` holds ``M⁻¹g`` itself. In the residual form ``u``
            then is the best vector of the space: no further from the exact natural gradient than
            no step at all, and a direction of descent.
        form: ``"residual"``, as above, whose error is never above that of K-FAC, or
            ``"additive"``, ``u = M⁻¹g + R F_c⁻¹ Rᵀg``, without that guarantee.

    Raises:
        ValueError: If an option is out of range.
    """

    name: ClassVar[str] = "two_level"
    object_options: ClassVar[Mapping[str, Any]] = {
        "weight_sharing": "expand",
        "factored_damping": False,
        "coarse_space": "nicolaides",
    }
    companion: ClassVar[str | None] = COARSE
    keeps_means: ClassVar[bool] = False  # The coarse space asks for eigenvectors.

    rows_per_unit: float | None = None
    coarse_space: CoarseSpace = "krylov"
    form: CoarseForm = "residual"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        spaces = ("nicolaides", "residual", "spectral", "krylov")
        check_choice("coarse_space", self.coarse_space, *spaces)
        check_choice("form", self.form, "residual", "additive")

    def parts(
        self, blocks: Mapping[str, BlockLayout], parameters: ParameterLayout
    ) -> dict[str, Part]:
        """Return K-FAC's parts, and one for the rows of all layers."""
        whole = Part(COARSE, dict(blocks), parameters)
        return {**super().parts(blocks, parameters), COARSE: whole}

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> Any:
        """Sum K-FAC's factors, and keep copies of the rows."""
        if part.name == COARSE:
            return KeptRows(count, (copied(rows),))
        return super().statistics(
            part, rows, count, previous=previous, draw=draw, continued=continued
        )

    def vector_layout(self, part: Part) -> Any:
        """Return the layout of a part's operators."""
        return part.layout if part.name == COARSE else part.block

    def coarse_level(self, part: Part, statistics: Statistics | None) -> CoarseLevel | None:
        """Return the coarse level of the rows kept; None if there are none."""
        if not isinstance(statistics, KeptRows):
            return None
        pieces = tuple((1.0, rows) for rows in statistics.pieces)
        return CoarseLevel(
            part.blocks, part.layout, self.coarse_space, self.form, pieces, statistics.count
        )

    def matrix(
        self,
        layout: ParameterLayout,
        parts: Mapping[str, Part],
        operators: Mapping[str, Operator],
        companion: Statistics | None = None,
    ) -> FisherMatrix:
        """Return K-FAC's matrix with the coarse level beside it."""
        members = {name: tuple(parts[name].blocks) for name in operators}
        coarse = self.coarse_level(parts[COARSE], companion)
        return TwoLevelMatrix(layout, dict(operators), members, self.name, coarse)

    # Training.

    def corrected(
        self,
        parts: Mapping[str, Part],
        estimates: Mapping[str, Any],
        source: GradientSource,
        natural: dict[str, Tensor],
        smooth: Callable[[GradientSource], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the corrected natural gradient by the inverses and rows there are.

        Blocks that the rows of the last update do not reach get that of K-FAC.
        """
        coarse = self.coarse_level(parts[COARSE], estimates[COARSE].average)
        inverses = {n: e.inverse for n, e in estimates.items() if e.inverse is not None}
        if coarse is None or not inverses:
            return natural
        damping = {n: estimates[n].damping for n in inverses}

        def smoother(columns: Tensor) -> Tensor:
            gradients = coarse.layout.to_dict(columns[:, 0])
            return coarse.layout.to_column(smooth(GradientSource(gradients)))

        def fixed() -> CoarseSystem:
            basis = coarse.fixed_basis(lambda name: _leading(inverses[name]))
            return coarse.system(basis, damping)

        corrected = coarse.corrected(
            coarse.layout.to_column(source.gradients),
            coarse.layout.to_column(natural),
            damping,
            fixed,
            smoother,
        )
        found = coarse.layout.to_dict(corrected[:, 0])
        return {name: found.get(name, value) for name, value in natural.items()}

    def quadratic(
        self,
        parts: Mapping[str, Part],
        estimates: Mapping[str, Any],
        direction: Mapping[str, Tensor],
        inner: Tensor,
    ) -> Tensor | None:
        """Return the larger of ``|⟨Δ, ∇L⟩|`` and ``‖JΔ‖²/count`` for the rows kept."""
        coarse = self.coarse_level(parts[COARSE], estimates[COARSE].average)
        if coarse is None:
            return inner.abs()
        products = coarse.times(coarse.layout.to_column(direction))
        return torch.maximum(inner.abs(), (products.square().sum() / coarse.count).to(inner))

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return a part's cost, or that of the coarse level.

        Products with the rows, and with them the memory of the rows, are stated for the smaller of
        factored rows and one gradient per row.
        """
        if part.name != COARSE:
            return super().cost(part, workload)
        rows = workload.samples * workload.directions
        memory, product = 0, 0.0
        for name, block in part.blocks.items():
            positions = workload.positions.get(name, 1)
            spots = workload.samples * positions
            outputs = block.groups * block.d_out * workload.directions
            factored = factored_elements(block, workload.samples, workload.directions, positions)
            whole = rows * block.numel
            memory += min(factored, whole)
            product += whole if whole <= factored else float(spots) * (block.numel + outputs)
        blocks = part.blocks.values()
        vectors = len(part.blocks) * (2 if self.coarse_space == "krylov" else 1)
        solving = float(rows) * vectors**2 + float(vectors) ** 3
        size, spectra = part.parameters.numel, 0.0
        if self.coarse_space in ("nicolaides", "spectral"):
            memory += size + rows * vectors
            step = product + 2.0 * size
            solving += product
            if self.coarse_space == "spectral":
                spectra = sum(b.groups * float(b.d_augmented**3 + b.d_out**3) for b in blocks)
        else:
            # J M⁻¹g, Jᵀ, J R; M⁻¹ once more.
            single = {n: Part(n, {n: b}, part.parameters) for n, b in part.blocks.items()}
            smoothing = sum(super(TwoLevelKronecker, self).cost(p, workload).step
                            for p in single.values())  # fmt: skip
            step = (2.0 + vectors / len(part.blocks)) * product + smoothing + solving
            solving = 0.0
        entry = part.parameters.dtype.itemsize
        held = entry * memory + 8 * vectors**2
        return Cost(f"{vectors} x {vectors}", held, solving + spectra, step)


#: Leading eigenvectors of inverses in use, as long as these are.
_LEADING: weakref.WeakKeyDictionary[Operator, Tensor] = weakref.WeakKeyDictionary()


def _leading(inverse: Operator) -> Tensor:
    """Return the leading eigenvector of the matrix of which this is the inverse."""
    if inverse not in _LEADING:
        _LEADING[inverse] = leading_eigenvector(inverse, smallest=True)
    return _LEADING[inverse]
