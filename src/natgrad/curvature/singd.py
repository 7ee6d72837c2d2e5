r"""SINGD: structured factors of the inverse of K-FAC, updated by products alone.

A layer's block is represented through factors K and C of its inverse,

.. math:: (F_l + λI)^{-1} \approx C C^\top \otimes K K^\top,

which a step of Riemannian gradient descent moves towards the statistics of a batch. With K-FAC's
factors A and B, and :math:`\overline{tr}` the trace over the dimension (Lin et al. 2024, arXiv
2312.05705),

.. math::
    m_K &\leftarrow α_1 m_K + ½ Π\bigl(\overline{tr}(H_C) H_K
          + λ \overline{tr}(C^\top C) K^\top K - I\bigr), \quad H_K = K^\top A K \\
    m_C &\leftarrow α_1 m_C + ½ Π\bigl(\overline{tr}(H_K) H_C
          + λ \overline{tr}(K^\top K) C^\top C - I\bigr), \quad H_C = C^\top B C \\
    K &\leftarrow K (I - β_1 m_K), \qquad C \leftarrow C (I - β_1 m_C)

Where the brackets vanish, with dense factors, :math:`C C^\top ⊗ K K^\top` is the Gaussian
covariance of that form nearest to :math:`(B ⊗ A + λI)^{-1}` by Kullback-Leibler divergence; only
the scale that the two factors may exchange is left open. IKFAC drops what couples the factors,

.. math:: m_K \leftarrow α_1 m_K + ½ Π(H_K + λ K^\top K - I)

whose brackets vanish at :math:`K K^\top = (A + λI)^{-1}`, :math:`C C^\top = (B + λI)^{-1}`: K-FAC
with λ added to each factor. Without momentum a step takes :math:`K K^\top = S^{-1}` to
:math:`((1 - β_1) S + β_1 (A + λI))^{-1} + O(β_1^2)`, the moving average of K-FAC.

Nothing is inverted or decomposed, so all of it works in bfloat16, and Π keeps the factors in a
structure of few entries (:mod:`natgrad.curvature.structured_factors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad.curvature.base import GradientSource, check_choice, refuse_options
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.factor_terms import factor_terms, sum_through
from natgrad.curvature.factors import (
    enough_rows,
    multiply_left,
    multiply_right,
    rotate,
    rotate_back,
    with_enough_rows,
)
from natgrad.curvature.function_space import map_by_columns
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure
from natgrad.curvature.structured_factors import (
    DenseMatrix,
    DiagonalMatrix,
    FactorStructure,
    StructuredMatrix,
    identity_matrix,
)
from natgrad.jacobians import (
    Jacobians,
    LinearJacobian,
    WeightSharing,
)
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.linalg import FactorizationError

if TYPE_CHECKING:
    from natgrad.capture import Block

__all__ = ["InitialScale", "SINGDFisher", "SINGDOptions", "StructuredPart"]

InitialScale = Literal["batch", "identity"]

#: Structures whose products take of the order of d² entries.
EXPANDED = ("dense", "lower_triangular", "upper_triangular", "lower_toeplitz", "upper_toeplitz")


@dataclass(frozen=True)
class SINGDOptions:
    """How the factors of every layer are kept and moved.

    Attributes:
        factor_structures: Structures of K (inputs) and C (outputs).
        factor_lr: β₁ > 0, the step size of the recursion.
        early_factor_lr: Let step k = 0, 1, … take ``max(β₁, 1/(k + 2))``, so that the first
            statistics weigh about the same, as in an average. Meant for ``max_change``.
        factor_momentum: α₁ in [0, 1), its momentum.
        coupled: Whether each factor's step depends on the other's (SINGD) or not (IKFAC).
        max_change: c in (0, 1): brackets are multiplied by ``1 − α₁``, and β₁ is lowered to
            ``c/‖m‖`` where it is larger, with an upper bound of the spectral norm for ``‖m‖``. Then
            ``I − β₁m`` is regular whatever the statistics. ``max_change=factor_lr`` divides β₁ by
            ``max(1, ‖m‖)``. None is the recursion as it stands, for β₁ of the order of 0.01.
        initial_scale: Factors before the first step: ``"identity"``, or ``"batch"``, the multiples
            of it at which the mean of the brackets' diagonals vanishes.
        factor_dtype: Type of factors, momenta and products with them: bfloat16, float32 or float64;
            that of the layer's parameters for None.
        weight_sharing: ``"expand"`` or ``"reduce"``, as in K-FAC.
        max_factor_size: Larger factors are diagonal, unless their structure is ``"block_diagonal"``
            or ``"hierarchical"``; None for no limit.
        rows_per_unit: If a batch has more rows than this times the size of the larger factor,
            *expand* statistics take a random subset of positions; None for all.
        block_size: Size of the blocks of ``"block_diagonal"``; the last one may be smaller.
        hierarchical_sizes: Dense corners of ``"hierarchical"``.
    """

    factor_structures: tuple[FactorStructure, FactorStructure] = ("dense", "dense")
    factor_lr: float = 0.05
    early_factor_lr: bool = True
    factor_momentum: float = 0.0
    coupled: bool = True
    max_change: float | None = 0.9
    initial_scale: InitialScale = "batch"
    factor_dtype: torch.dtype | None = None
    weight_sharing: WeightSharing = "expand"
    max_factor_size: int | None = 8192
    rows_per_unit: float | None = None
    block_size: int = 32
    hierarchical_sizes: tuple[int, int] = (16, 16)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If an option is out of range.
        """
        if not 0 < self.factor_lr < math.inf:
            raise ValueError(f"factor_lr must be positive and finite, got {self.factor_lr}")
        if not 0 <= self.factor_momentum < 1:
            raise ValueError(f"factor_momentum must be in [0, 1), got {self.factor_momentum}")
        if self.max_change is not None and not 0 < self.max_change < 1:
            raise ValueError(f"max_change must be in (0, 1) or None, got {self.max_change}")
        check_choice("initial_scale", self.initial_scale, "batch", "identity")
        check_choice("weight_sharing", self.weight_sharing, "expand", "reduce")
        if self.rows_per_unit is not None and not self.rows_per_unit > 0:
            raise ValueError(f"rows_per_unit must be positive or None, got {self.rows_per_unit}")
        if self.factor_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                "factor_dtype must be torch.bfloat16, torch.float32, torch.float64 or None (that "
                f"of the parameters), got {self.factor_dtype}"
            )

    def structure_of(self, side: int, size: int, one_hot: bool) -> FactorStructure:
        """Return the structure of a factor.

        Args:
            side: 0 for inputs, 1 for outputs.
            size: d.
            one_hot: Whether its statistics are diagonal anyway.
        """
        structure = self.factor_structures[side]
        limited = self.max_factor_size is not None and size > self.max_factor_size
        return "diagonal" if one_hot or (limited and structure in EXPANDED) else structure


class StructuredPart(CurvaturePart):
    """One layer's factors K and C, their momenta if any, and the statistics of the next step.

    ``update`` sums ``Π(KᵀAK)`` and ``Π(CᵀBC)``; ``refresh`` takes one step of the recursion with
    their mean and forgets them. So it is updates and refreshes together that move the factors:
    ``discount`` concerns statistics that no step has used yet, and a refresh without any leaves
    everything as it is.

    Args:
        name: Block name.
        layout: Its layout.
        parameters: Order, dtype and device of all parameters.
        options: How factors are kept and moved.
        dtype: Type of the factors.

    Attributes:
        inputs: K.
        outputs: C.
        steps: Steps of the recursion taken.
    """

    def __init__(
        self,
        name: str,
        layout: BlockLayout,
        parameters: ParameterLayout,
        options: SINGDOptions,
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.layout = layout
        self.parameters = parameters
        self.options = options
        self.names, self.sizes, self.numel = layout.names, layout.sizes, layout.numel
        sides = ((0, layout.d_augmented, layout.one_hot), (1, layout.d_out, False))
        self.inputs, self.outputs = (
            identity_matrix(
                options.structure_of(side, size, one_hot),
                layout.groups,
                size,
                block_size=options.block_size,
                hierarchical_sizes=options.hierarchical_sizes,
                dtype=dtype,
                device=parameters.device,
            )
            for side, size, one_hot in sides
        )
        self._input_momentum: StructuredMatrix | None = None
        self._output_momentum: StructuredMatrix | None = None
        self.steps = 0
        self.draws = 0
        self._forget()

    def _forget(self) -> None:
        """Drop the statistics that wait for a step."""
        self.count = 0.0
        self.positions: Tensor | None = None
        self._input_sum: StructuredMatrix | None = None
        self._output_sum: StructuredMatrix | None = None

    # Accumulation.

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add ``Π(KᵀAK)`` and ``Π(CᵀBC)``; batches with NaN or infinite entries are left out."""
        if self.name not in jacobians:
            self.count += float(count)
            return
        continued = float(count) == 0
        self.draws += not continued
        options = self.options
        rows = with_enough_rows(
            jacobians[self.name], options.rows_per_unit, options.weight_sharing, self.draws
        )
        terms = factor_terms(rows, options.weight_sharing, continued)
        outputs = sum_through(terms.outputs, self.outputs)
        finite, inputs = outputs.is_finite(), None
        if terms.inputs is not None:
            inputs = sum_through(terms.inputs, self.inputs)
            finite = finite & inputs.is_finite()
        if not bool(finite) or (inputs is None and self._input_sum is None):
            return
        self.count += float(count)
        self._output_sum = _total(self._output_sum, outputs)
        if inputs is not None:
            self._input_sum = _total(self._input_sum, inputs)
        held = terms.positions
        self.positions = held if self.positions is None else self.positions + held

    def discount(self, factor: float) -> None:
        """Discount the statistics that wait for a step, not the factors; with 0 forget them."""
        if factor == 0.0:
            self._forget()
            return
        self.count *= factor
        if self._input_sum is None or self._output_sum is None or self.positions is None:
            return
        self._input_sum = self._input_sum.scaled(factor)
        self._output_sum = self._output_sum.scaled(factor)
        self.positions = self.positions * factor

    # The recursion.

    def refresh(self, damping: float) -> None:
        """Take one step of the recursion with the statistics since the last one.

        Raises:
            FactorizationError: If a factor is not finite after it; the present ones are kept.
        """
        if (
            self._input_sum is None
            or self._output_sum is None
            or self.positions is None
            or self.count == 0
        ):
            self._forget()
            return
        h_k = self._input_sum.scaled(1.0 / self.positions.clamp(min=1e-30))
        h_c = self._output_sum.scaled(1.0 / self.count)
        k, c = self.inputs, self.outputs
        self._forget()
        if self.steps == 0 and self.options.initial_scale == "batch":
            scale_k, scale_c = self._initial_scales(h_k, h_c, damping)
            k, h_k = k.scaled(scale_k), h_k.scaled(scale_k.square())
            c, h_c = c.scaled(scale_c), h_c.scaled(scale_c.square())
        step_k, step_c = self._brackets((k, c), (h_k, h_c), damping)
        k, m_k = self._moved(k, self._input_momentum, step_k)
        c, m_c = self._moved(c, self._output_momentum, step_c)
        finite = torch.stack([x.is_finite() for x in (k, c, m_k, m_c)]).all()
        if not bool(finite):
            raise FactorizationError(
                "a step of its factors' recursion was not finite: lower factor_lr or max_change"
            )
        self.inputs, self.outputs = k, c
        if self.options.factor_momentum > 0:
            self._input_momentum, self._output_momentum = m_k, m_c
        self.steps += 1

    def _initial_scales(
        self, h_k: StructuredMatrix, h_c: StructuredMatrix, damping: float
    ) -> tuple[Tensor, Tensor]:
        """Return multiples of the identity at which the means of the brackets vanish, ``(G,)``.

        They are ``κ² γ² (āb̄ + λ) = 1`` of the coupled recursion, split evenly, and
        ``κ² (ā + λ) = γ² (b̄ + λ) = 1`` without coupling, with ā and b̄ the mean diagonals of A
        and B. A mean of zero gives 1.
        """
        precise = torch.promote_types(h_k.dtype, torch.float32)
        means = [h.trace().to(precise) / h.size for h in (h_k, h_c)]
        if self.options.coupled:
            products = means[0] * means[1] + damping
            both = torch.where(products > 0, products, torch.ones_like(products)) ** -0.25
            return both, both
        shifted = [mean + damping for mean in means]
        a, b = (torch.where(x > 0, x, torch.ones_like(x)).rsqrt() for x in shifted)
        return a, b

    def _brackets(
        self,
        factors: tuple[StructuredMatrix, StructuredMatrix],
        statistics: tuple[StructuredMatrix, StructuredMatrix],
        damping: float,
    ) -> tuple[StructuredMatrix, StructuredMatrix]:
        """Return the terms in brackets, of K and of C."""
        grams = [factor.gram() for factor in factors]
        results = []
        for own, other in ((0, 1), (1, 0)):
            weight: Tensor | float = 1.0
            shift: Tensor | float = damping
            if self.options.coupled:
                weight = statistics[other].trace() / statistics[other].size
                shift = grams[other].trace() / grams[other].size * damping
            bracket = statistics[own].scaled(weight).plus(grams[own], shift)
            results.append(bracket.plus(factors[own].identity(), -1.0))
        return results[0], results[1]

    def _moved(
        self, factor: StructuredMatrix, old: StructuredMatrix | None, bracket: StructuredMatrix
    ) -> tuple[StructuredMatrix, StructuredMatrix]:
        """Return ``(K (I − β₁m), m)``.

        Args:
            factor: K.
            old: The last m; None for zero.
            bracket: Its change, doubled.
        """
        options = self.options
        share = 1.0 if options.max_change is None else 1.0 - options.factor_momentum
        momentum = bracket.scaled(0.5 * share)
        if old is not None:
            momentum = momentum.plus(old, options.factor_momentum)
        rate = options.factor_lr
        if options.early_factor_lr:
            rate = max(rate, 1.0 / (self.steps + 2))
        if options.max_change is None:
            return factor.plus(factor @ momentum, -rate), momentum
        bounded = (options.max_change / momentum.norm_bound()).clamp(max=rate)
        return factor.plus(factor @ momentum, -bounded), momentum

    # The matrix.

    def inverse_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(K Kᵀ, C Cᵀ)``, ``(G, d, d)`` or, of diagonal ones, ``(G, d)``.

        They are in the precision of the parameters' layout.
        """
        both = []
        for factor in (self.inputs, self.outputs):
            if isinstance(factor, DiagonalMatrix):
                both.append(self._precise(factor.entries[0]).square())
                continue
            full = self._precise(factor.to_dense())
            both.append(full @ full.mT)
        return both[0], both[1]

    def _precise(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, self.parameters.dtype))

    def _spectra(self) -> tuple[tuple[Tensor | None, Tensor], tuple[Tensor | None, Tensor]]:
        """Return eigenvectors (None for the identity) and eigenvalues of ``K Kᵀ`` and ``C Cᵀ``."""
        both: list[tuple[Tensor | None, Tensor]] = []
        for factor in (self.inputs, self.outputs):
            if isinstance(factor, DiagonalMatrix):
                both.append((None, self._precise(factor.entries[0]).square()))
                continue
            basis, values, _ = torch.linalg.svd(self._precise(factor.to_dense()))
            both.append((basis, values.square()))
        return both[0], both[1]

    def _through_spectra(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return ``V ↦ U f(pq) Uᵀ V``, with ``pq`` the eigenvalues of the block's inverse."""
        (basis_a, values_a), (basis_b, values_b) = self._spectra()
        scale = function(values_b.unsqueeze(-1) * values_a.unsqueeze(-2))

        def apply(columns: Tensor) -> Tensor:
            rotated = rotate(basis_b, self.layout.matrix(columns.T), basis_a) * scale
            return self.layout.flat(rotate_back(basis_b, rotated, basis_a)).T

        return apply

    def matvec(self, columns: Tensor) -> Tensor:
        """Return ``((C Cᵀ)⁻¹ ⊗ (K Kᵀ)⁻¹) V``; the damping of past steps is part of it."""
        return self._through_spectra(torch.reciprocal)(columns)

    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Return the inverse of the matrix with *further* damping added.

        Zero damping is ``C Cᵀ ⊗ K Kᵀ`` itself, which training applies.
        """
        if damping > 0:
            return self._through_spectra(lambda values: values / (1.0 + damping * values))
        a, b = self.inverse_factors()

        def apply(columns: Tensor) -> Tensor:
            matrices = self.layout.matrix(columns.T)
            return self.layout.flat(multiply_right(multiply_left(b, matrices), a)).T

        return apply

    def inverse_root(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Return the symmetric root of :meth:`solver`, by the factors' singular values."""
        return self._through_spectra(lambda values: (values / (1.0 + damping * values)).sqrt())

    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'(F_l + λI)⁻¹Jᵀ``, by columns."""
        return map_by_columns(self.name, rows, other, self.solver(damping))

    def trace(self) -> Tensor:
        """Return the trace."""
        (_, a), (_, b) = self._spectra()
        return (a.reciprocal().sum(-1) * b.reciprocal().sum(-1)).sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        diagonals = []
        for basis, values in self._spectra():
            inverse = values.reciprocal()
            if basis is not None:
                inverse = (basis.square() @ inverse.unsqueeze(-1)).squeeze(-1)
            diagonals.append(inverse)
        return self.layout.flat(diagonals[1].unsqueeze(-1) * diagonals[0].unsqueeze(-2))

    def eigenvalues(self) -> Tensor:
        """Return all products of the factors' eigenvalues."""
        (_, a), (_, b) = self._spectra()
        return (b.unsqueeze(-1) * a.unsqueeze(-2)).reciprocal().flatten()

    def to_dense(self) -> Tensor:
        """Return the block in flat parameter order."""
        dtype = torch.promote_types(self.inputs.dtype, self.parameters.dtype)
        return self.matvec(torch.eye(self.numel, dtype=dtype, device=self.parameters.device))

    # Training.

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return ``C Cᵀ G K Kᵀ``, the gradient itself before the first step.

        Where ``G = δᵀa`` has fewer rows than the layer has units, δ and a are multiplied instead,
        while ``.grad`` is exactly what the backward pass left.
        """
        gradients = [source.gradients[name] for name in self.names]
        if self.steps == 0:
            return dict(zip(self.names, gradients, strict=True))
        rows = None if source.rows is None else source.rows.get(self.name)
        if isinstance(rows, LinearJacobian) and self.rows_are_cheaper(
            rows.samples * rows.positions
        ):
            return self._precondition_rows(rows)
        matrix = self.layout.matrix(self.layout.gather(gradients).to(self.inputs.dtype))
        natural = self.outputs.multiply_metric(self.inputs.multiply_metric(matrix).mT).mT
        return dict(zip(self.names, self.layout.scatter(self.layout.flat(natural)), strict=True))

    def rows_are_cheaper(self, rows: int) -> bool:
        """Return whether applying the factors to ``rows`` rows beats applying them to ``G``.

        Only layers that are one weight matrix, with a bias or without, can take the rows.
        """
        layout = self.layout
        weight_matrix = layout.groups == 1 and layout.has_weight and not layout.transposed
        if not weight_matrix or len(layout.names) != 1 + layout.has_bias:
            return False
        product = float(rows) * layout.d_augmented * layout.d_out
        return self._metric_cost(rows, rows) + product < self._metric_cost(
            layout.d_out, layout.d_augmented
        )

    def _metric_cost(self, rows_in: int, rows_out: int) -> float:
        """Return the multiplications of ``K Kᵀ`` with some rows and ``C Cᵀ`` with others."""
        total = 0.0
        for factor, rows in ((self.inputs, rows_in), (self.outputs, rows_out)):
            total += (1 if factor.forms_metric(rows) else 2) * rows * _multiplications(factor)[0]
        return total

    def _precondition_rows(self, rows: LinearJacobian) -> dict[str, Tensor]:
        dtype = self.inputs.dtype
        a = rows.augmented_inputs().flatten(0, 2).to(dtype)  # (N·T, d_in + bias), as G = 1
        delta = rows.output_gradients.flatten(0, 3).to(dtype)  # (N·T, d_out), as K = G = 1
        a = self.inputs.multiply_metric(a.unsqueeze(0))
        matrix = self.outputs.multiply_metric(delta.unsqueeze(0)).mT @ a
        return dict(zip(self.names, self.layout.scatter(self.layout.flat(matrix)), strict=True))

    def cost(self, workload: Workload) -> Cost:
        """Return what is stored between steps of the factors, and multiplications with factors."""
        layout, options = self.layout, self.options
        positions = workload.positions.get(self.name, 1)
        count = workload.samples * positions
        rows = float(count)
        if options.weight_sharing == "expand":
            enough = enough_rows(layout, options.rows_per_unit) or count
            rows = min(rows, max(float(enough), float(workload.samples)))
        shapes, entries, refresh = [], 0, 0.0
        by_rows = self.rows_are_cheaper(count)
        for factor, times, other in (
            (self.inputs, 1, layout.d_out),
            (self.outputs, workload.directions, layout.d_augmented),
        ):
            name = factor.structure.replace("_", " ")
            shapes.append(f"{name} {factor.size}")
            copies = 1 + (options.factor_momentum > 0)
            applied = count if by_rows else other
            if isinstance(factor, DenseMatrix) and factor.forms_metric(applied):
                copies += 1
            entries += copies * factor.numel
            per_row, product = _multiplications(factor)
            refresh += 2 * rows * times * per_row + 2 * product
        step = self._metric_cost(layout.d_out, layout.d_augmented)
        if by_rows:
            step = self._metric_cost(count, count) + float(count) * self.numel
        prefix = "" if layout.groups == 1 else f"{layout.groups} of "
        memory = entries * self.inputs.dtype.itemsize
        return Cost(prefix + ", ".join(shapes), memory, refresh, step)

    _MATRICES: ClassVar[tuple[str, ...]] = (
        "inputs",
        "outputs",
        "_input_momentum",
        "_output_momentum",
        "_input_sum",
        "_output_sum",
    )

    def state_dict(self) -> dict[str, Any]:
        """Return factors, momenta, and the statistics that wait for a step."""
        matrices: dict[str, Any] = {}
        for key in self._MATRICES:
            matrix = getattr(self, key)
            matrices[key] = None if matrix is None else list(matrix.entries)
        return {
            "structures": [self.inputs.structure, self.outputs.structure],
            "matrices": matrices,
            "steps": self.steps,
            "draws": self.draws,
            "count": self.count,
            "positions": self.positions,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them, in the present type of the factors.

        Raises:
            ValueError: If the factors have another structure or size.
        """
        found = state["structures"], [_shapes(state["matrices"][k]) for k in self._MATRICES[:2]]
        own = [self.inputs, self.outputs]
        if found != ([f.structure for f in own], [_shapes(f.entries) for f in own]):
            raise ValueError(
                f"the checkpoint's factors of {self.name!r} have structures "
                f"{' and '.join(state['structures'])} with entries of other shapes than those of "
                f"this {own[0].structure} and {own[1].structure}: make the optimizer with the "
                "options the checkpoint was saved with"
            )
        for key, like in zip(self._MATRICES, own * 3, strict=True):
            entries = state["matrices"][key]
            matrix: StructuredMatrix | None = None
            unused = "momentum" in key and self.options.factor_momentum == 0
            if entries is not None and not unused:
                moved = tuple(tensor.to(device, like.dtype) for tensor in entries)
                matrix = replace(like, entries=moved)
            setattr(self, key, matrix)
        self.steps, self.draws, self.count = state["steps"], state["draws"], state["count"]
        positions = state["positions"]
        self.positions = None if positions is None else positions.to(device)


def _total(left: StructuredMatrix | None, right: StructuredMatrix) -> StructuredMatrix:
    return right if left is None else left.plus(right)


def _shapes(entries: Any) -> list[list[int]]:
    return [list(tensor.shape) for tensor in entries]


def _multiplications(factor: StructuredMatrix) -> tuple[float, float]:
    """Return how many one row, all groups together, and a product of two matrices take."""
    if factor.structure in EXPANDED:
        row = float(factor.groups) * factor.size**2
        return row, row * factor.size
    if factor.structure == "block_diagonal":
        return float(factor.numel), float(factor.numel) * factor.entries[0].shape[-1]
    if factor.structure == "hierarchical":
        return float(factor.numel), float(factor.numel) * max(1, factor.entries[0].shape[-1])
    return float(factor.numel), float(factor.numel)


@register_structure
class SINGDFisher(PartitionedFisher):
    """K-FAC's inverse through structured factors, which steps of products alone keep up to date.

    It stands for ``F_l ≈ (C Cᵀ)⁻¹ ⊗ (K Kᵀ)⁻¹``, with the damping of past refreshes *inside*: where
    the recursion has converged, ``B ⊗ A + λI`` as nearly as a Kronecker product can be (or
    ``(B + λI) ⊗ (A + λI)`` for ``coupled=False``). So ``solve(v)`` is what training applies, and
    ``solve(v, damping)`` damps once more. ``update`` does not change the matrix: every ``refresh``
    takes a step with the statistics since the last one. Before the first it is the identity.

    Inspection (``@``, ``solve`` with damping, ``trace``, ``diagonal``, ``eigenvalues``,
    ``to_dense``) decomposes factors in full precision; ``update``, ``refresh``, ``precondition``
    and ``solve(v)`` multiply only.

    Options: those of :class:`SINGDOptions`; ``factor_structures`` may be one name for both factors.
    """

    structure: ClassVar[str] = "singd"

    def __init__(
        self, blocks: Mapping[str, Block], layout: ParameterLayout, **options: Any
    ) -> None:
        self._parameter_dtypes = {
            name: _parameter_dtype(block, layout.dtype) for name, block in blocks.items()
        }
        super().__init__(blocks, layout, **options)

    def make_parts(
        self,
        factor_structures: FactorStructure | tuple[FactorStructure, FactorStructure] = "dense",
        **options: Any,
    ) -> dict[str, CurvaturePart]:
        """Return one part per block.

        Raises:
            ValueError: If an option has an unknown value.
            TypeError: If an option is unknown.
        """
        known = SINGDOptions.__dataclass_fields__
        refuse_options(self.structure, {k: v for k, v in options.items() if k not in known})
        pair = (
            (factor_structures, factor_structures)
            if isinstance(factor_structures, str)
            else tuple(factor_structures)
        )
        if len(pair) != 2:
            raise ValueError(
                "factor_structures must be one name, or two for the factors of inputs and outputs, "
                f"got {factor_structures!r}"
            )
        made = SINGDOptions(pair, **options)
        return {
            name: StructuredPart(
                name, block, self.layout, made, made.factor_dtype or self._parameter_dtypes[name]
            )
            for name, block in self.blocks.items()
        }


def _parameter_dtype(block: Block, default: torch.dtype) -> torch.dtype:
    """Return the type of a block's parameters; float16, whose range is small, gives the default."""
    for use in block.uses:
        dtype = use.module.get_parameter(use.names[0]).dtype
        return default if dtype == torch.float16 else dtype
    return default
