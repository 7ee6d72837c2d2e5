r"""K-FAC: every layer's block as one Kronecker product.

.. math:: F_l \approx B \otimes A, \qquad A = \frac{1}{NT} \sum_{nt} a_{nt} a_{nt}^\top, \quad
          B = \frac{1}{count} \sum_{nkt} \delta_{nkt} \delta_{nkt}^\top

acting on the row-major matrix ``[W | b]`` (Martens & Grosse 2015; for shared weights the *expand*
and *reduce* settings of Eschenhagen et al. 2023). Grouped layers have one pair per group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import GradientSource, check_choice, refuse_options
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.factors import (
    discounted_sum,
    eigenbasis,
    enough_rows,
    factor_diagonal,
    multiply_left,
    multiply_right,
    pi_shifts,
    rotate,
    rotate_back,
    shifted_inverse,
    solve_rows,
    with_enough_rows,
)
from natgrad.curvature.function_space import map_by_columns
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure
from natgrad.jacobians import Jacobians, LinearJacobian, WeightSharing
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["DampingRule", "KFACFisher", "KroneckerPart"]

DampingRule = Literal["tikhonov", "pi"]


class KroneckerPart(CurvaturePart):
    """One layer's Kronecker factors and their inverses.

    A factor is ``(G, d, d)``, or ``(G, d)`` where only its diagonal is kept.

    Args:
        name: Block name.
        layout: Its layout.
        parameters: Order, dtype and device of all parameters.
        weight_sharing: ``"expand"`` or ``"reduce"``.
        damping_rule: ``"tikhonov"`` inverts ``B ⊗ A + λI`` exactly through the eigenbases;
            ``"pi"`` inverts ``(B + √λ/π I) ⊗ (A + π√λ I)`` with
            ``π² = (tr A / d_a) / (tr B / d_g)``, which is cheaper and damps somewhat more.
        max_factor_size: Larger factors are kept as their diagonal.
        rows_per_unit: If a batch has more rows (samples times positions) than this times the size
            of the larger factor, an update of *expand* factors takes a random subset of positions,
            the same for all samples, drawn anew every time: unbiased, and neighbouring positions
            tell much the same. None for all rows.
        precondition_dtype: Type of the products with factored inverses, such as
            ``torch.bfloat16``, where the hardware multiplies it faster; the factors and their
            inversion keep theirs, which is also the default here.
    """

    def __init__(
        self,
        name: str,
        layout: BlockLayout,
        parameters: ParameterLayout,
        weight_sharing: WeightSharing = "expand",
        damping_rule: DampingRule = "tikhonov",
        max_factor_size: int | None = 8192,
        rows_per_unit: float | None = None,
        precondition_dtype: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self.layout = layout
        self.parameters = parameters
        self.names, self.sizes, self.numel = layout.names, layout.sizes, layout.numel
        self.weight_sharing: WeightSharing = weight_sharing
        self.damping_rule: DampingRule = damping_rule
        self.max_factor_size = max_factor_size
        if rows_per_unit is not None and not rows_per_unit > 0:
            raise ValueError(f"rows_per_unit must be positive or None, got {rows_per_unit}")
        self.rows_per_unit = rows_per_unit
        self.precondition_dtype = precondition_dtype
        self.draws = 0
        self.count = 0.0
        self.inputs: Tensor | None = None
        self.positions: Tensor | None = None
        self.outputs: Tensor | None = None
        self._discount = 1.0  # Still to be applied to the three sums.
        self._inverse: tuple[Tensor, ...] | None = None
        self._split: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    # Accumulation.

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add second moments; batches with NaN or infinite entries are left out."""
        if self.name not in jacobians:
            self.count += float(count)
            return
        continued = float(count) == 0
        self.draws += not continued
        rows = with_enough_rows(
            jacobians[self.name], self.rows_per_unit, self.weight_sharing, self.draws
        )
        sums = rows.kronecker_factors(
            self.weight_sharing, self.max_factor_size, continued=continued
        )
        # Σ x xᵀ is finite exactly if its diagonal is.
        finite = torch.isfinite(factor_diagonal(sums.outputs)).all()
        if sums.inputs is not None:
            finite = finite & torch.isfinite(factor_diagonal(sums.inputs)).all()
        if not bool(finite) or (sums.inputs is None and self.inputs is None):
            return
        self.count += float(count)
        self.inputs = discounted_sum(self.inputs, sums.inputs, self._discount)
        self.positions = discounted_sum(self.positions, sums.positions, self._discount)
        self.outputs = discounted_sum(self.outputs, sums.outputs, self._discount)
        self._discount = 1.0

    def discount(self, factor: float) -> None:
        """Discount counts at once, sums together with the next update; with 0 forget them."""
        self.count *= factor
        self._discount *= factor
        if factor == 0.0:
            self.inputs = self.positions = self.outputs = None
            self._discount = 1.0

    def kronecker_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(A, B)``, zero where nothing was seen yet."""
        a, b = (linalg.symmetric(x) if x.dim() == 3 else x for x in self.lower_factors())
        return a, b

    def lower_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(A, B)``, right in their lower triangles, which factorisations read."""
        if self.inputs is None or self.positions is None or self.outputs is None:
            d_in, d_out = self.layout.d_augmented, self.layout.d_out
            groups, zeros = self.layout.groups, self.parameters.zeros
            return zeros(groups, d_in, d_in), zeros(groups, d_out, d_out)
        if self.count == 0:
            return torch.zeros_like(self.inputs), torch.zeros_like(self.outputs)
        outputs = self.outputs * (self._discount / self.count)
        return self.inputs / self.positions.clamp(min=1e-30), outputs

    # The matrix.

    def _matrices(self, columns: Tensor) -> Tensor:
        return self.layout.matrix(columns.T)

    def _columns(self, matrices: Tensor) -> Tensor:
        return self.layout.flat(matrices).T

    def matvec(self, columns: Tensor) -> Tensor:
        """Return ``(B ⊗ A) V``, that is ``B V A``."""
        a, b = self.kronecker_factors()
        return self._columns(multiply_right(multiply_left(b, self._matrices(columns)), a))

    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Invert by the damping rule; zero damping is the pseudo-inverse in both."""
        inverse = self._factorwise_inverse(damping)
        if inverse is not None:
            return lambda v: self._columns(
                multiply_right(multiply_left(inverse[1], self._matrices(v)), inverse[0])
            )
        return self._in_eigenbasis(damping, lambda damped: 1.0 / damped)

    def inverse_root(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Divide by the root of the damped eigenvalues in the eigenbases."""
        return self._in_eigenbasis(damping, torch.rsqrt)

    def _in_eigenbasis(
        self, damping: float, function: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """Return a function of the matrix damped by the damping rule, ``V ↦ f(F̂) V``."""
        a, b = self.lower_factors()
        basis_a, values_a = eigenbasis(a)
        basis_b, values_b = eigenbasis(b)
        shifts = self._shifts(damping)
        if shifts is None:
            damped = values_b.unsqueeze(-1) * values_a.unsqueeze(-2) + damping
        else:
            values_a = values_a + shifts[0].unsqueeze(-1)
            values_b = values_b + shifts[1].unsqueeze(-1)
            damped = values_b.unsqueeze(-1) * values_a.unsqueeze(-2)
        scale = function(damped)

        def apply(columns: Tensor) -> Tensor:
            rotated = rotate(basis_b, self._matrices(columns), basis_a) * scale
            return self._columns(rotate_back(basis_b, rotated, basis_a))

        return apply

    def _factorwise_inverse(self, damping: float) -> tuple[Tensor, Tensor] | None:
        """Return ``(Â⁻¹, B̂⁻¹)``, or None under the Tikhonov rule, whose inverse is no product."""
        shifts = self._shifts(damping)
        if shifts is None:
            return None
        a, b = self.lower_factors()
        return shifted_inverse(a, shifts[0]), shifted_inverse(b, shifts[1])

    def _shifts(self, damping: float) -> tuple[Tensor, Tensor] | None:
        """Return what is added to A and B, ``(G,)`` each; None where it cannot be split."""
        a, b = self.lower_factors()
        if damping > 0 and self.damping_rule != "pi":
            return None
        return pi_shifts(a, b, damping)

    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'(B̂⁻¹ ⊗ Â⁻¹)Jᵀ``: the Gram matrix of ``J'`` and the preconditioned rows."""
        shifts = self._shifts(damping)
        left, right = other.get(self.name), rows.get(self.name)
        if shifts is None or type(left) is not LinearJacobian or type(right) is not LinearJacobian:
            return map_by_columns(self.name, rows, other, self.solver(damping))
        right = right.augmented()
        a, b = self.kronecker_factors()
        assert self.positions is not None
        inputs = solve_rows(right.inputs, a, shifts[0], self.positions)
        gradients = solve_rows(right.output_gradients, b, shifts[1], self.count)
        return {self.name: left.augmented().gram(right.replaced(inputs, gradients))}

    def trace(self) -> Tensor:
        """Return ``Σ_g tr A_g tr B_g``."""
        a, b = self.lower_factors()
        return (factor_diagonal(a).sum(-1) * factor_diagonal(b).sum(-1)).sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        a, b = self.lower_factors()
        return self.layout.flat(factor_diagonal(b).unsqueeze(-1) * factor_diagonal(a).unsqueeze(-2))

    def eigenvalues(self) -> Tensor:
        """Return all products of the factors' eigenvalues."""
        a, b = self.lower_factors()
        (_, values_a), (_, values_b) = eigenbasis(a), eigenbasis(b)
        return (values_b.unsqueeze(-1) * values_a.unsqueeze(-2)).flatten()

    def to_dense(self) -> Tensor:
        """Return the block in flat parameter order."""
        a, _ = self.kronecker_factors()
        return self.matvec(torch.eye(self.numel, dtype=a.dtype, device=a.device))

    # Training.

    def refresh(self, damping: float) -> None:
        """Invert the damped factors (π rule) or eigendecompose them (Tikhonov)."""
        if self.inputs is None or self.count == 0:
            return
        self._split = None
        a, b = self.lower_factors()
        if self.damping_rule == "pi":
            self._inverse = self._factorwise_inverse(damping)
            return
        basis_a, values_a = eigenbasis(a)
        basis_b, values_b = eigenbasis(b)
        product = values_b.unsqueeze(-1) * values_a.unsqueeze(-2)
        if damping > 0:
            scale = 1.0 / (product + damping)
        else:
            scale = linalg.inverse_on_range(values_b).unsqueeze(-1) * linalg.inverse_on_range(
                values_a
            ).unsqueeze(-2)
        empty = a.new_zeros(0)
        self._inverse = (
            empty if basis_a is None else basis_a,
            empty if basis_b is None else basis_b,
            scale,
        )

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return ``B̂⁻¹ G Â⁻¹``, multiplying whichever is cheaper, the gradient or its rows.

        The gradient of a layer is ``G = δᵀa`` with ``R = N·T`` rows. Inverses of sizes ``d_g`` and
        ``d_a`` cost ``d_g d_a (d_g + d_a)`` multiplications on ``G`` but ``R (d_g² + d_a² +
        d_g d_a)`` when applied to δ and a before the weight-gradient product; with fewer rows than
        units the second is cheaper. It needs the rows of the present gradient, so it is taken only
        while ``.grad`` is exactly what the backward pass left.
        """
        if self._inverse is None:
            return {name: source.gradients[name] for name in self.names}
        rows = None if source.rows is None else source.rows.get(self.name)
        if (
            rows is not None
            and isinstance(rows, LinearJacobian)
            and self.rows_are_cheaper(rows.samples * rows.positions)
        ):
            return self._precondition_rows(rows)
        if self._is_plain():
            return self._precondition_plain([source.gradients[name] for name in self.names])
        gradients = [source.gradients[name] for name in self.names]
        dtype = self._inverse[0].dtype
        matrix = self.layout.matrix(self.layout.gather(gradients).to(dtype))
        if self.damping_rule == "pi":
            matrix = multiply_right(multiply_left(self._inverse[1], matrix), self._inverse[0])
        else:
            basis_a, basis_b, scale = self._inverse
            a = basis_a if basis_a.numel() else None
            b = basis_b if basis_b.numel() else None
            matrix = rotate_back(b, rotate(b, matrix, a) * scale, a)
        return dict(zip(self.names, self.layout.scatter(self.layout.flat(matrix)), strict=True))

    def _is_plain(self) -> bool:
        """Return whether the layer is one weight matrix whose inverses are two dense matrices."""
        layout = self.layout
        return (
            self.damping_rule == "pi"
            and layout.groups == 1
            and layout.has_weight
            and len(layout.names) == 1 + layout.has_bias
            and not layout.transposed
            and not self._too_large(layout.d_augmented)
            and not self._too_large(layout.d_out)
        )

    def _precondition_plain(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return ``B̂⁻¹ G Â⁻¹`` without copying weight and bias into one matrix."""
        layout = self.layout
        core, border, corner, inverse_b = self._split_inverse()
        weight = self.cast(gradients[0].reshape(layout.d_out, layout.d_in))
        if not layout.has_bias:
            return self._named(inverse_b @ (weight @ core))
        bias = self.cast(gradients[1])
        right = torch.addmm(torch.outer(bias, border), weight, core)
        right_bias = torch.addmv(bias * corner, weight, border)
        return self._named(inverse_b @ right, inverse_b @ right_bias)

    def _named(self, *values: Tensor) -> dict[str, Tensor]:
        """Return weight and bias under their names, in their shapes and the factors' dtype."""
        assert self._inverse is not None
        dtype = self._inverse[0].dtype
        return {
            name: value.reshape(shape).to(dtype)
            for name, shape, value in zip(self.names, self.layout.shapes, values, strict=True)
        }

    def rows_are_cheaper(self, rows: int) -> bool:
        """Return whether applying the inverses to ``rows`` rows beats applying them to ``G``."""
        layout = self.layout
        if not self._is_plain():
            return False
        d_in, d_out = layout.d_augmented, layout.d_out
        return rows * (d_in**2 + d_out**2 + d_in * d_out) < d_in * d_out * (d_in + d_out)

    def _too_large(self, size: int) -> bool:
        return self.max_factor_size is not None and size > self.max_factor_size

    def can_fuse(self, rows: int) -> bool:
        """Return whether a weight-gradient product may take preconditioned rows, and should."""
        return self._inverse is not None and self.rows_are_cheaper(rows)

    def cast(self, rows: Tensor) -> Tensor:
        """Return rows in the dtype of products with the inverses."""
        return rows.to(self._split_inverse()[0].dtype)

    def precondition_rows(
        self, a: Tensor, delta: Tensor, bias_value: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``B̂⁻¹ δᵀa Â⁻¹`` of a plain layer as weight and bias, from its rows.

        Args:
            a: Inputs without the bias coordinate, ``(R, d_in)``.
            delta: Output gradients, ``(R, d_out)``.
            bias_value: The input a bias sees.
        """
        core, border, corner, inverse_b = self._split_inverse()
        solved = delta @ inverse_b
        if not self.layout.has_bias:
            return solved.T @ (a @ core), None
        weight = solved.T @ torch.addmm(border, a, core, beta=bias_value)
        return weight, solved.T @ torch.addmv(bias_value * corner, a, border)

    def _precondition_rows(self, rows: LinearJacobian) -> dict[str, Tensor]:
        a = self.cast(rows.inputs.flatten(0, 2))  # (N·T, d_in)
        delta = self.cast(rows.output_gradients.flatten(0, 3))  # (N·T, d_out), as K = G = 1
        weight, bias = self.precondition_rows(a, delta, rows.bias_value)
        return self._named(weight) if bias is None else self._named(weight, bias)

    def _split_inverse(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``Â⁻¹`` as ``[[core, border], [borderᵀ, corner]]``, and ``B̂⁻¹``.

        The bias row and column lie apart, as products with an odd leading dimension are slower.
        """
        assert self._inverse is not None
        if self._split is None:
            kind = self.precondition_dtype or self._inverse[0].dtype
            inverse_a, inverse_b = self._inverse[0][0].to(kind), self._inverse[1][0].to(kind)
            d = self.layout.d_in
            self._split = (
                inverse_a[:d, :d].contiguous(),
                inverse_a[:d, -1].contiguous(),
                inverse_a[-1:, -1],
                inverse_b,
            )
        return self._split

    def cost(self, workload: Workload) -> Cost:
        """Return the cost of two factors per group, and of the cheaper way to apply them."""
        layout = self.layout
        d_in, d_out, groups = layout.d_augmented, layout.d_out, layout.groups
        rows = workload.samples * workload.positions.get(self.name, 1)
        enough = enough_rows(layout, self.rows_per_unit) or rows
        shapes, memory, refresh = [], 0, 0.0
        for size, times in ((d_in, 1), (d_out, workload.directions)):
            diagonal = self._too_large(size) or (layout.one_hot and size == layout.d_in)
            entries = groups * (size if diagonal else size**2)
            shapes.append(f"diag({size})" if diagonal else f"{size} x {size}")
            memory += 2 * self.parameters.dtype.itemsize * entries
            summed = min(rows, max(enough, workload.samples))
            refresh += float(summed) * times * entries + (0 if diagonal else groups * size**3)
        on_rows = float(rows) * (d_in**2 + d_out**2 + d_in * d_out)
        on_gradient = float(groups) * d_in * d_out * (d_in + d_out)
        step = on_rows if self.rows_are_cheaper(rows) else on_gradient
        prefix = "" if groups == 1 else f"{groups} of "
        return Cost(prefix + ", ".join(shapes), memory, refresh, step)

    def state_dict(self) -> dict[str, Any]:
        """Return sums, counts and inverses."""
        return {
            "count": self.count,
            "draws": self.draws,
            "discount": self._discount,
            "inputs": self.inputs,
            "positions": self.positions,
            "outputs": self.outputs,
            "inverse": None if self._inverse is None else list(self._inverse),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self.count, self._discount = state["count"], state["discount"]
        self.draws = state["draws"]
        for key in ("inputs", "positions", "outputs"):
            value = state[key]
            setattr(self, key, None if value is None else value.to(device))
        inverse = state["inverse"]
        self._inverse = None if inverse is None else tuple(t.to(device) for t in inverse)
        self._split = None


@register_structure
class KFACFisher(PartitionedFisher):
    """One Kronecker product per layer; memory ``d_a² + d_g²`` instead of ``(d_a d_g)²``.

    Options: ``weight_sharing``, ``damping_rule``, ``max_factor_size``, ``rows_per_unit`` and
    ``precondition_dtype`` of :class:`KroneckerPart`.
    """

    structure: ClassVar[str] = "kfac"
    training_options: ClassVar[Mapping[str, Any]] = {"damping_rule": "pi"}

    def make_parts(
        self,
        weight_sharing: WeightSharing = "expand",
        damping_rule: DampingRule = "tikhonov",
        max_factor_size: int | None = 8192,
        rows_per_unit: float | None = None,
        precondition_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> dict[str, CurvaturePart]:
        """Return one Kronecker part per block.

        Raises:
            ValueError: If an option has an unknown value.
            TypeError: If an option is unknown.
        """
        refuse_options(self.structure, options)
        check_choice("weight_sharing", weight_sharing, "expand", "reduce")
        check_choice("damping_rule", damping_rule, "tikhonov", "pi")
        return {
            name: KroneckerPart(
                name,
                block,
                self.layout,
                weight_sharing,
                damping_rule,
                max_factor_size,
                rows_per_unit,
                precondition_dtype,
            )
            for name, block in self.blocks.items()
        }
