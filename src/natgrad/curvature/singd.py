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
structure of few entries (:mod:`natgrad.operators.structured_matrix`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.arguments import check_choice, check_range
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.kfac import check_factors, rows_by_product
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.jacobians import FIRST_DRAW, Draw, Jacobians, WeightSharing
from natgrad.jacobians.factor_terms import FactorTerm, FactorTerms, factor_terms
from natgrad.layouts import BlockLayout
from natgrad.operators.expanded_matrices import DenseMatrix
from natgrad.operators.inverse_kronecker import (
    EXPANDED,
    InverseKroneckerOperator,
    MetricKroneckerOperator,
    metric_cost,
    metric_takes_rows,
    multiplications,
)
from natgrad.operators.structured_factors import identity_matrix
from natgrad.operators.structured_matrix import FactorStructure, StructuredMatrix
from natgrad.records import Record
from natgrad.statistics import Statistics
from natgrad.statistics.kronecker import merging_weights

InitialScale = Literal["batch", "identity"]
Factors = tuple[StructuredMatrix, StructuredMatrix]


@dataclass(frozen=True, eq=False)
class SeenSums(Statistics):
    """K-FAC's sums of one layer, seen through the factors; ``count`` is of the inputs.

    Attributes:
        inputs: ``Π(Kᵀ Σaaᵀ K)``.
        outputs: ``Π(Cᵀ Σδδᵀ C)``.
        further: The sums of another product, see :class:`natgrad.jacobians.KroneckerSums`.
        traces: Of ``Σaaᵀ`` and ``Σδδᵀ`` themselves, ``(2, G)``.
    """

    inputs: StructuredMatrix | None
    outputs: StructuredMatrix | None
    further: SeenSums | None = None
    traces: Tensor | None = None

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return ``decay · self + other``."""
        return replace(
            self,
            count=self.count * decay + other.count,
            inputs=_added(self.inputs, other.inputs, decay),
            outputs=_added(self.outputs, other.outputs, decay),
            further=_added(self.further, other.further, decay),
            traces=_added(self.traces, other.traces, decay),
        )

    def product_trace(self) -> Tensor:
        """Return the trace of all ``B ⊗ A`` times the count of the outputs."""
        found = torch.zeros((), dtype=torch.float64, device=self.count.device)
        for one in self._products():
            if one.traces is not None:
                inputs, outputs = one.traces.double()
                found = found + (inputs * outputs / one.count.clamp(min=1e-30)).sum()
        return found

    def _products(self) -> list[SeenSums]:
        return [self, *([] if self.further is None else self.further._products())]

    def is_finite(self) -> Tensor:
        """Return whether the sums are finite."""
        sums = [one for one in (self.inputs, self.outputs, self.further) if one is not None]
        return torch.stack([self.count.isfinite().all(), *(x.is_finite() for x in sums)]).all()

    def means(self) -> Factors | None:
        """Return ``Π(Kᵀ A K)`` and ``Π(Cᵀ B C)`` times the count, if there are any."""
        pairs, counts = [], []
        for one in self._products():
            if one.inputs is not None and one.outputs is not None:
                pairs.append((one.inputs, one.outputs))
                counts.append(one.count)
        if not pairs:
            return None
        inputs, outputs = pairs[0]
        if len(pairs) == 1:
            return inputs.scaled(1.0 / counts[0].clamp(min=1e-30)), outputs
        traces = [(a.trace(), b.trace()) for a, b in pairs]
        weights = merging_weights(traces, counts)
        scaled = [(a.scaled(v), b.scaled(w)) for (a, b), (v, w) in zip(pairs, weights, strict=True)]
        return functools.reduce(lambda x, y: (x[0].plus(y[0]), x[1].plus(y[1])), scaled)


@dataclass(frozen=True, eq=False)
class InverseFactorStatistics(Statistics):
    """Factors K and C, their momenta if any, and the sums that wait for a step of theirs.

    Only what waits is additive: a step of the recursion takes its mean and forgets it. ``count`` is
    that of the sums that wait.

    Attributes:
        factors: ``(K, C)``.
        momenta: ``(m_K, m_C)``; None without momentum, or before the first step.
        steps: Steps of the recursion taken.
        waiting: The sums that wait.
        trace: That of ``B ⊗ A`` of the last step, a scalar.
    """

    factors: Factors
    momenta: Factors | None = None
    steps: int = 0
    waiting: SeenSums | None = None
    trace: Tensor | None = None

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return the same factors with ``decay · self + other`` waiting."""
        waiting = _added(self.waiting, other.waiting, decay)
        return replace(self, count=self.count * decay + other.count, waiting=waiting)

    def sums(self) -> dict[str, Any]:
        """Return what waits; factors are the same in all processes."""
        waiting = None if self.waiting is None else self.waiting.state_dict()
        return {"count": self.count, "waiting": waiting}

    def is_finite(self) -> Tensor:
        """Return whether what waits is finite."""
        flag = self.count.isfinite()
        return flag if self.waiting is None else flag & self.waiting.is_finite()


def _added(total: Any, part: Any, decay: float) -> Any:
    """Return ``decay · total + part`` of sums or matrices, of which there may be none."""
    if total is None or part is None:
        return part if total is None else total.scaled(decay)
    if isinstance(total, SeenSums):
        return total.followed_by(part, decay)
    if isinstance(total, Tensor):
        return decay * total + part
    return (total if decay == 1 else total.scaled(decay)).plus(part)


@register_structure
@dataclass(frozen=True)
class InverseFactors(Structure):
    """K-FAC's inverse through structured factors, which steps of products alone keep up to date.

    It stands for ``F_l ≈ (C Cᵀ)⁻¹ ⊗ (K Kᵀ)⁻¹``, with the damping of past refreshes *inside*: where
    the recursion has converged, ``B ⊗ A + λI`` as nearly as a Kronecker product can be (or
    ``(B + λI) ⊗ (A + λI)`` for ``coupled=False``). So ``F.inverse()`` is what training applies, and
    ``F.inverse(damping)`` damps once more. An update does not change the matrix: every refresh
    takes a step with the statistics since the last one. Before the first it is the identity.

    Inspection decomposes factors in full precision; training multiplies only.

    Attributes:
        factor_structures: Structures of K (inputs) and C (outputs): ``"dense"``, ``"diagonal"``,
            ``"block_diagonal"``, ``"lower_triangular"``, ``"upper_triangular"``,
            ``"lower_toeplitz"``, ``"upper_toeplitz"`` or ``"hierarchical"``; one name is for both.
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
        weight_sharing: ``"expand"``, ``"reduce"`` or ``"split"``, as in K-FAC.
        max_factor_size: Larger factors are diagonal, unless their structure is ``"block_diagonal"``
            or ``"hierarchical"``; None for no limit.
        rows_per_unit: If a batch has more rows than this times the size of the larger factor,
            *expand* statistics take a random subset of positions; None for all.
        block_size: Size of the blocks of ``"block_diagonal"``; the last one may be smaller.
        hierarchical_sizes: Dense corners of ``"hierarchical"``.

    Raises:
        ValueError: If an option is out of range.
    """

    name: ClassVar[str] = "singd"
    object_options: ClassVar[Mapping[str, Any]] = {
        "weight_sharing": "expand",
        "rows_per_unit": None,
    }
    recursive: ClassVar[bool] = True

    factor_structures: FactorStructure | tuple[FactorStructure, FactorStructure] = "dense"
    factor_lr: float = 0.05
    early_factor_lr: bool = True
    factor_momentum: float = 0.0
    coupled: bool = True
    max_change: float | None = 0.9
    initial_scale: InitialScale = "batch"
    factor_dtype: torch.dtype | None = None
    weight_sharing: WeightSharing = "split"
    max_factor_size: int | None = 8192
    rows_per_unit: float | None = 4.0
    block_size: int = 32
    hierarchical_sizes: tuple[int, int] = (16, 16)

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.factor_structures, str) and len(self.factor_structures) != 2:
            raise ValueError(
                "factor_structures must be one name, or two for the factors of inputs and outputs, "
                f"got {self.factor_structures!r}"
            )
        if not 0 < self.factor_lr < math.inf:
            raise ValueError(f"factor_lr must be positive and finite, got {self.factor_lr}")
        check_range("factor_momentum", self.factor_momentum, below=1.0)
        if self.max_change is not None and not 0 < self.max_change < 1:
            raise ValueError(f"max_change must be in (0, 1) or None, got {self.max_change}")
        check_choice("initial_scale", self.initial_scale, "batch", "identity")
        check_factors(self.weight_sharing, self.rows_per_unit)
        if self.factor_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                "factor_dtype must be torch.bfloat16, torch.float32, torch.float64 or None (that "
                f"of the parameters), got {self.factor_dtype}"
            )

    # Factors.

    def _structures_of(self, block: BlockLayout) -> list[FactorStructure]:
        """Return the structures of K and C; statistics of one-hot inputs are diagonal anyway."""
        names = self.factor_structures
        both = (names, names) if isinstance(names, str) else names
        large = block.large_factors(self.max_factor_size)
        found: list[FactorStructure] = [
            "diagonal" if too_large and name in EXPANDED else name
            for name, too_large in zip(both, large, strict=True)
        ]
        return ["diagonal", found[1]] if block.one_hot else found

    def initial_factors(
        self, block: BlockLayout, dtype: torch.dtype, device: torch.device
    ) -> Factors:
        """Return the identities that K and C begin as."""
        made = [
            identity_matrix(
                structure,
                block.groups,
                size,
                block_size=self.block_size,
                hierarchical_sizes=self.hierarchical_sizes,
                dtype=dtype,
                device=device,
            )
            for structure, size in zip(
                self._structures_of(block), (block.d_augmented, block.d_out), strict=True
            )
        ]
        return made[0], made[1]

    def _factors_of(self, part: Part) -> Factors:
        """Return the identities of a layer, in its factors' type."""
        return self.initial_factors(part.block, self._dtype_of(part), part.parameters.device)

    def _dtype_of(self, part: Part) -> torch.dtype:
        dtype = self.factor_dtype or part.parameters.dtypes[part.block.names[0]]
        # The range of float16 is small.
        return part.parameters.dtype if dtype == torch.float16 else dtype

    # Statistics.

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> InverseFactorStatistics:
        """Sum ``Π(KᵀAK)`` and ``Π(CᵀBC)`` with the present factors."""
        present = self._present(part, count, previous)
        sharing = self.weight_sharing
        products = rows[part.name].product_rows(sharing, self.rows_per_unit, draw)
        terms = [factor_terms(one, sharing, continued) for one in products]
        joint = functools.reduce(FactorTerms.followed_by, terms)
        return replace(present, count=count, waiting=_seen(joint, present.factors))

    def _present(
        self, part: Part, count: Tensor, previous: Statistics | None
    ) -> InverseFactorStatistics:
        """Return the factors as they are, before the first step the identity."""
        if isinstance(previous, InverseFactorStatistics):
            return previous
        return InverseFactorStatistics(count, self._factors_of(part))

    def united(
        self, part: Part, sums: Any, rows: Sequence[Any], previous: Statistics | None
    ) -> InverseFactorStatistics:
        """Return the sums of all processes, with the present factors."""
        device = part.parameters.device
        waiting = None if sums["waiting"] is None else Record.from_state(sums["waiting"], device)
        present = self._present(part, sums["count"], previous)
        return replace(present, count=sums["count"], waiting=waiting)

    def renewed(
        self, parts: Sequence[Part], statistics: Sequence[Any], dampings: Sequence[float]
    ) -> list[Any]:
        """Take one step of the recursion with what waits, and forget it."""
        return [self._stepped(one, value) for one, value in zip(statistics, dampings, strict=True)]

    def _stepped(self, present: InverseFactorStatistics, damping: float) -> InverseFactorStatistics:
        forgotten = replace(present, count=torch.zeros_like(present.count), waiting=None)
        means = None if present.waiting is None else present.waiting.means()
        if means is None:
            return forgotten
        forgotten = replace(forgotten, trace=self._trace_of(present))
        h_k, h_c = means[0], means[1].scaled(1.0 / present.count.clamp(min=1e-300))
        k, c = present.factors
        if present.steps == 0 and self.initial_scale == "batch":
            scale_k, scale_c = self._initial_scales(h_k, h_c, damping)
            k, h_k = k.scaled(scale_k), h_k.scaled(scale_k.square())
            c, h_c = c.scaled(scale_c), h_c.scaled(scale_c.square())
        step_k, step_c = self._brackets((k, c), (h_k, h_c), damping)
        old = present.momenta or (None, None)
        k, m_k = self._moved(k, old[0], step_k, present.steps)
        c, m_c = self._moved(c, old[1], step_c, present.steps)
        linalg.require(
            torch.stack([x.is_finite() for x in (k, c, m_k, m_c)]).all(),
            "a step of its factors' recursion was not finite: lower factor_lr or max_change",
        )
        momenta = (m_k, m_c) if self.factor_momentum > 0 else None
        return replace(forgotten, factors=(k, c), momenta=momenta, steps=present.steps + 1)

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
        if self.coupled:
            products = means[0] * means[1] + damping
            both = torch.where(products > 0, products, torch.ones_like(products)) ** -0.25
            return both, both
        shifted = [mean + damping for mean in means]
        a, b = (torch.where(x > 0, x, torch.ones_like(x)).rsqrt() for x in shifted)
        return a, b

    def _brackets(self, factors: Factors, statistics: Factors, damping: float) -> Factors:
        """Return the terms in brackets, of K and of C."""
        grams = [factor.gram() for factor in factors]
        results = []
        for own, other in ((0, 1), (1, 0)):
            weight: Tensor | float = 1.0
            shift: Tensor | float = damping
            if self.coupled:
                weight = statistics[other].trace() / statistics[other].size
                shift = grams[other].trace() / grams[other].size * damping
            bracket = statistics[own].scaled(weight).plus(grams[own], shift)
            results.append(bracket.plus(factors[own].identity(), -1.0))
        return results[0], results[1]

    def _moved(
        self,
        factor: StructuredMatrix,
        old: StructuredMatrix | None,
        bracket: StructuredMatrix,
        steps: int,
    ) -> tuple[StructuredMatrix, StructuredMatrix]:
        """Return ``(K (I − β₁m), m)`` for twice the change of m and the last m, None for zero."""
        share = 1.0 if self.max_change is None else 1.0 - self.factor_momentum
        momentum = bracket.scaled(0.5 * share)
        if old is not None:
            momentum = momentum.plus(old, self.factor_momentum)
        rate = max(self.factor_lr, 1.0 / (steps + 2)) if self.early_factor_lr else self.factor_lr
        if self.max_change is None:
            return factor.plus(factor @ momentum, -rate), momentum
        bounded = (self.max_change / momentum.norm_bound()).clamp(max=rate)
        return factor.plus(factor @ momentum, -bounded), momentum

    # The matrix.

    def operator(self, part: Part, statistics: Statistics | None) -> InverseKroneckerOperator:
        """Return ``(C Cᵀ)⁻¹ ⊗ (K Kᵀ)⁻¹``."""
        factors = self._factors_of(part)
        if isinstance(statistics, InverseFactorStatistics):
            factors = statistics.factors
        metric = MetricKroneckerOperator(part.block, *factors, part.parameters.dtype)
        return InverseKroneckerOperator(part.block, metric)

    def trace(self, part: Part, statistics: Statistics | None) -> Tensor:
        """Return the trace of ``B ⊗ A``, of what waits or of the last step; 0 before any.

        It is that of the statistics, not of the matrix that the factors stand for.
        """
        found = statistics
        known = self._trace_of(found) if isinstance(found, InverseFactorStatistics) else None
        return torch.zeros((), device=part.parameters.device) if known is None else known

    def _trace_of(self, present: InverseFactorStatistics) -> Tensor | None:
        if present.waiting is None:
            return present.trace
        return present.waiting.product_trace() / present.count.clamp(min=1e-300)

    def inverse_damping(self, damping: float) -> float:
        """Return 0: damping acts in the recursion."""
        return 0.0

    def takes_rows(self, block: BlockLayout, rows: int) -> bool:
        """Return whether so many rows are cheaper to precondition than the gradient they sum to."""
        return metric_takes_rows(block, self._shapes(block), rows)

    def _shapes(self, block: BlockLayout) -> Factors:
        """Return factors without numbers, for what depends on their shapes alone."""
        return _meta_factors(self, block)

    def cast(self, part: Part, record: Any) -> Any:
        """Return a record of a checkpoint in the factors' type."""
        record = record.to(dtype=self._dtype_of(part))
        if isinstance(record, MetricKroneckerOperator):
            record = replace(record, precision=part.parameters.dtype)
        return record

    def check_restored(self, part: Part, statistics: Any) -> None:
        """Raise a ValueError if factors of a checkpoint have another structure or size."""
        if not isinstance(statistics, InverseFactorStatistics):
            return
        own = self._factors_of(part)
        alike = all(
            found.structure == factor.structure
            and [t.shape for t in found.entries] == [t.shape for t in factor.entries]
            for found, factor in zip(statistics.factors, own, strict=True)
        )
        if not alike:
            k, c = statistics.factors
            raise ValueError(
                f"the checkpoint's factors of {part.name!r} have structures {k.structure} and "
                f"{c.structure} with entries of other shapes than those of this "
                f"{own[0].structure} and {own[1].structure}: make the optimizer with the options "
                "the checkpoint was saved with"
            )

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return what is stored between steps of the factors, and multiplications with factors."""
        block, factors = part.block, self._shapes(part.block)
        count = workload.samples * workload.positions.get(part.name, 1)
        products = rows_by_product(part, workload, self.weight_sharing, self.rows_per_unit)
        shapes, entries, refresh = [], 0, 0.0
        by_rows = self.takes_rows(block, count)
        for factor, times, other in (
            (factors[0], 1, block.d_out),
            (factors[1], workload.directions, block.d_augmented),
        ):
            shapes.append(f"{factor.structure.replace('_', ' ')} {factor.size}")
            copies = 1 + (self.factor_momentum > 0)
            if isinstance(factor, DenseMatrix) and factor.forms_metric(count if by_rows else other):
                copies += 1
            entries += copies * factor.numel
            per_row, product = multiplications(factor)
            refresh += 2 * product
            sums_first = factor.structure in EXPANDED and self._dtype_of(part) != torch.bfloat16
            for rows in products:
                once = float(rows) * times * per_row
                # (X K)ᵀ(X K), or Kᵀ(XᵀX)K where that takes fewer.
                refresh += once + (min(once, 2 * product) if sums_first else once)
        step = metric_cost(factors, block.d_out, block.d_augmented)
        if by_rows:
            step = metric_cost(factors, count, count) + float(count) * block.numel
        prefix = "" if block.groups == 1 else f"{block.groups} of "
        memory = entries * self._factors_of(part)[0].dtype.itemsize
        return Cost(prefix + ", ".join(shapes), memory, refresh, step)


@functools.lru_cache(maxsize=1024)
def _meta_factors(structure: InverseFactors, block: BlockLayout) -> Factors:
    return structure.initial_factors(block, torch.float32, torch.device("meta"))


def _seen(terms: FactorTerms, factors: Factors) -> SeenSums:
    """Return the sums of terms, seen through factors."""
    inputs, outputs = (
        _seen_through(some, factor) if some else None
        for some, factor in zip((terms.inputs, terms.outputs), factors, strict=True)
    )
    further = None if terms.further is None else _seen(terms.further, factors)
    groups, device = factors[0].groups, terms.positions.device
    traces = [_traces(some, groups, device) for some in (terms.inputs, terms.outputs)]
    return SeenSums(terms.positions, inputs, outputs, further, torch.stack(traces))


def _traces(terms: Sequence[FactorTerm], groups: int, device: torch.device) -> Tensor:
    """Return the trace of the sum of some terms in every group, ``(G,)``."""
    found = torch.zeros(groups, dtype=torch.float64, device=device)
    for term in terms:
        if term.diagonal:
            found = found + term.rows.sum(1)
        else:
            for rows in term.chunks(term.rows.dtype):
                found = found + rows.square().sum((1, 2))
    return found


def _seen_through(terms: Sequence[FactorTerm], factor: StructuredMatrix) -> StructuredMatrix:
    """Return ``Π(Kᵀ S K)`` of the sum S of some terms."""

    def pieces() -> Iterator[StructuredMatrix]:
        for term in terms:
            if term.diagonal:
                yield factor.gram(term.rows.to(factor.dtype))
            else:
                yield from (factor.congruence(rows) for rows in term.chunks(factor.dtype))

    return functools.reduce(lambda total, one: total.plus(one), pieces())
