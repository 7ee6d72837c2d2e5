r"""K-FAC: every layer's block as one Kronecker product.

.. math:: F_l \approx B \otimes A, \qquad A = \frac{1}{NT} \sum_{nt} a_{nt} a_{nt}^\top, \quad
          B = \frac{1}{count} \sum_{nkt} \delta_{nkt} \delta_{nkt}^\top

acting on the row-major matrix ``[W | b]`` (Martens & Grosse 2015). Grouped layers have one pair per
group.

Where T positions share the weight, a row is a sum over them, ``M_nk = Σ_t δ_nkt a_ntᵀ``. The above
is the *expand* setting of Eschenhagen et al. (2023), right where the terms are uncorrelated; their
*reduce* replaces every one by the mean. *Split* has both parts of

.. math:: M_{nk} = \Big(\sum_t \delta_{nkt}\Big) \bar a_n^\top
          + \sum_t (\delta_{nkt} - \bar\delta_{nk}) (a_{nt} - \bar a_n)^\top,

a product of means, as in *reduce*, and one of deviations, as in *expand* (with T/(T − 1), as they
have a degree of freedom less), merged into the product with the partial traces of their sum. Its
factors have the size of means that add up over positions, which *expand* misses by up to a factor
of T, and the rank of deviations, which *reduce* lacks. It is exact where either of them is exact
for deep linear networks, and right for terms that are independent with mean 0. A group of one unit,
as in normalisation and depthwise convolutions, has its exact block.

A factor of inputs that would be too large is kept as its diagonal about the mean input μ,

.. math:: A \approx \mu \mu^\top + \operatorname{diag}(E[a^2] - \mu^2),

whose inverse is one product more (Sherman & Morrison 1950): units that are never negative share
their mean, and no diagonal shows that.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from natgrad.arguments import check_choice
from natgrad.curvature.cost import Cost, Elements, Workload
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.jacobians import FIRST_DRAW, Draw, Jacobians, KroneckerSums, WeightSharing
from natgrad.jacobians.positions import enough_rows
from natgrad.layouts import BlockLayout
from natgrad.operators import KroneckerOperator, Operator
from natgrad.operators.kronecker import rows_are_cheaper
from natgrad.statistics import KroneckerStatistics, Statistics
from natgrad.statistics.triangles import kept_entries


@register_structure
@dataclass(frozen=True)
class KroneckerFactors(Structure):
    """One Kronecker product per layer; memory ``d_a² + d_g²`` instead of ``(d_a d_g)²``.

    Attributes:
        weight_sharing: ``"expand"`` takes every position of a shared weight as a sample of its own;
            ``"reduce"`` averages inputs and sums output gradients over positions first; ``"split"``
            does the one for means and the other for deviations from them, as above. Embeddings are
            expanded by ``"split"``, and so are matrices whose rows belong to unequally large
            samples, as tokens routed to experts do. In optimizers ``"split"`` is the default.
        factored_damping: How λ is added: True splits it between the factors, which is cheaper and
            damps somewhat more; False inverts ``B ⊗ A + λI`` exactly, by eigendecompositions (see
            :class:`natgrad.operators.KroneckerOperator`).
        max_factor_size: Larger factors are kept as their diagonal, those of outputs from an eighth
            of it on where they are more than eight times the inputs, and those of inputs, with
            ``factored_damping``, about the mean; None for no limit.
        rows_per_unit: If a batch has more rows (samples times positions) than this times the size
            of the larger factor, an update of *expand* factors takes a random subset of positions,
            the same for all samples, drawn anew every time: unbiased, and neighbouring positions
            tell much the same. None for all rows. Means are taken over all positions.
        product_dtype: Type of the products with factored inverses, such as ``torch.bfloat16``,
            where the hardware multiplies it faster; the factors and their inversion keep theirs,
            which is also the default here.
        fused: Let the backward pass of linear layers with fewer rows than units make their natural
            gradient itself, which saves the plain weight-gradient product. Their ``.grad`` then
            *is* the natural gradient, by the inverses of the last step: gradient clipping bounds
            that, second derivatives through these layers are not available, and ``kl_clip`` uses an
            unbiased estimate of ``⟨Δ, ∇L⟩``. With ``factored_damping`` only.

    Raises:
        ValueError: If an option is out of range.
    """

    name: ClassVar[str] = "kfac"
    shareable: ClassVar[bool] = True
    #: Whether factors of inputs that are too large are kept about the mean.
    keeps_means: ClassVar[bool] = True
    object_options: ClassVar[Mapping[str, Any]] = {
        "weight_sharing": "expand",
        "factored_damping": False,
        "rows_per_unit": None,
    }

    weight_sharing: WeightSharing = "split"
    factored_damping: bool = True
    max_factor_size: int | None = 8192
    rows_per_unit: float | None = 4.0
    product_dtype: torch.dtype | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_factors(self.weight_sharing, self.rows_per_unit)
        if self.fused and not self.factored_damping:
            raise ValueError(
                "fused=True needs factored_damping=True, whose inverses are products of two "
                "matrices"
            )

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> KroneckerStatistics:
        """Sum ``a aᵀ`` and ``δ δᵀ``."""
        sharing, limit = self.weight_sharing, self.max_factor_size
        products = rows[part.name].product_rows(sharing, self.rows_per_unit, draw)
        sums = [one.kronecker_factors(sharing, limit, continued) for one in products]
        merged = functools.reduce(KroneckerSums.followed_by, sums)
        return KroneckerStatistics.of(count, merged, self._about_mean)

    def operator(self, part: Part, statistics: Statistics | None) -> Operator:
        """Return ``B ⊗ A``."""
        if statistics is None:
            (a, b), rows = zero_factors(part), None
        else:
            assert isinstance(statistics, KroneckerStatistics)
            (a, b), rows = statistics.mean_factors(), statistics.mean_rows()
        left, right = rows or (None, None)
        return KroneckerOperator(
            part.block, a, b, self.factored_damping, self.product_dtype, left=left, right=right
        )

    def trace(self, part: Part, statistics: Statistics | None) -> Tensor:
        """Return the trace of ``B ⊗ A``, by the diagonals of the sums."""
        if statistics is None:
            return super().trace(part, statistics)
        assert isinstance(statistics, KroneckerStatistics)
        return statistics.trace()

    @property
    def _about_mean(self) -> bool:
        """Whether large factors of inputs are: the eigenvectors of such are not to be had."""
        return self.keeps_means and self.factored_damping

    def takes_rows(self, block: BlockLayout, rows: int) -> bool:
        """Return whether so many rows are cheaper to precondition than the gradient they sum to."""
        dense = not any(block.large_factors(self.max_factor_size))
        return self.factored_damping and dense and rows_are_cheaper(block, rows)

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the cost of two factors per group, and of the cheaper way to apply them.

        A factor kept as its diagonal costs one multiplication per row and entry.
        """
        block = part.block
        rows = workload.samples * workload.positions.get(part.name, 1)
        summed = sum(rows_by_product(part, workload, self.weight_sharing, self.rows_per_unit))
        shapes, refresh, multiply = [], 0.0, 0.0
        on_rows = float(rows) * block.d_augmented * block.d_out
        sides = ((1, block.d_out), (workload.directions, block.d_augmented))
        for (times, other), (size, diagonal) in zip(sides, self._factors(block), strict=True):
            entries = block.groups * (size if diagonal else size**2)
            shapes.append(f"diag({size})" if diagonal else f"{size} x {size}")
            refresh += float(summed) * times * entries
            refresh += 0 if diagonal else block.groups * float(size) ** 3
            multiply += float(entries) * other
            on_rows += float(rows) * entries
        if self._keeps_mean(block):
            shapes[0] = f"{shapes[0]} + mean"
            multiply += 2.0 * block.groups * block.d_augmented * block.d_out
        by_rows = workload.processes == 1 and self.takes_rows(block, rows)
        step = on_rows if by_rows else multiply
        prefix = "" if block.groups == 1 else f"{block.groups} of "
        memory = part.dtype.itemsize * self.elements(part, workload).kept
        return Cost(prefix + ", ".join(shapes), memory, refresh, step)

    def elements(self, part: Part, workload: Workload) -> Elements:
        """Return the elements of the factors, and of their inverses or eigenbases.

        A parameter used both ways round, as of an embedding tied to the output layer, has a second
        pair of sums, which is left out.
        """
        block = part.block
        sums = kept = triangles = dense = 0
        for size, diagonal in self._factors(block):
            sums += size if diagonal else kept_entries(size)
            kept += size if diagonal else size**2
            triangles += size if diagonal else size * (size + 1) // 2
            dense += 0 if diagonal else size**2
        products = len(rows_by_product(part, workload, self.weight_sharing, self.rows_per_unit))
        if self._keeps_mean(block):
            sums, triangles = sums + block.d_augmented, triangles + block.d_augmented
            kept += 2 * products * block.d_augmented
        inverse = block.groups * (kept if self.factored_damping else dense)
        if not self.factored_damping:
            inverse += block.numel  # One eigenvalue each.
        return Elements(
            statistics=products * block.groups * sums,
            inverse=inverse,
            sums=products * block.groups * triangles,
            rows=0,
            handed_out=inverse,
        )

    def _keeps_mean(self, block: BlockLayout) -> bool:
        """Return whether the factor of a layer's inputs is kept about their mean."""
        large = block.large_factors(self.max_factor_size)[0]
        return self._about_mean and large and block.has_weight and not block.one_hot

    def _factors(self, block: BlockLayout) -> list[tuple[int, bool]]:
        """Return the sizes of A and B, and whether they are kept as their diagonals."""
        inputs, outputs = block.large_factors(self.max_factor_size)
        return [(block.d_augmented, block.one_hot or inputs), (block.d_out, outputs)]


def check_factors(weight_sharing: str, rows_per_unit: float | None, *, splits: bool = True) -> None:
    """Raise a ValueError if an option of Kronecker factors is out of range."""
    known = ("expand", "reduce", "split") if splits else ("expand", "reduce")
    check_choice("weight_sharing", weight_sharing, *known)
    if rows_per_unit is not None and not rows_per_unit > 0:
        raise ValueError(f"rows_per_unit must be positive or None, got {rows_per_unit}")


def rows_by_product(
    part: Part, workload: Workload, weight_sharing: WeightSharing, rows_per_unit: float | None
) -> list[int]:
    """Return of how many rows of inputs each of a layer's products is made.

    They are means and deviations, or one for all.
    """
    block, samples = part.block, workload.samples
    positions = workload.positions.get(part.name, 1)
    if weight_sharing == "reduce" or positions == 1:
        return [samples]
    rows = samples * positions
    rows = min(rows, max(enough_rows(block, rows_per_unit) or rows, samples))
    splits = weight_sharing == "split" and not block.one_hot and block.d_out > 1
    return [samples, rows] if splits else [rows]


def zero_factors(part: Part) -> tuple[Tensor, Tensor]:
    """Return the factors of a layer that has seen nothing."""
    block, zeros = part.block, part.parameters.zeros
    a = zeros(block.groups, block.d_augmented, block.d_augmented)
    return a, zeros(block.groups, block.d_out, block.d_out)
