"""Kronecker products, ``B ⊗ A`` on the matrices of one layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.jacobians import Jacobians, LinearJacobian
from natgrad.layouts import BlockLayout
from natgrad.operators.eigen_kronecker import EigenKroneckerOperator, eigenbasis, eigenvalues
from natgrad.operators.operator import GradientSource, Operator, map_by_columns
from natgrad.statistics.kronecker import factor_diagonal


@dataclass(frozen=True, eq=False)
class KroneckerOperator(Operator):
    """``B ⊗ A``: a layer's matrix G becomes ``B G A``, in every group.

    A factor is ``(G, d, d)``, or ``(G, d)`` where it is diagonal, but for a few rows of A.

    Attributes:
        layout: Layout of the layer's block.
        inputs: A, or its diagonal.
        outputs: B.
        factored_damping: How it is damped. False inverts ``B ⊗ A + λI`` exactly through the
            eigenbases; True inverts ``(B + √λ/π I) ⊗ (A + π√λ I)`` with
            ``π² = (tr A / d_a) / (tr B / d_g)``, which is cheaper and damps somewhat more (Martens
            & Grosse 2015, section 6.3).
        product_dtype: Type of the products with its factors when it preconditions gradients; their
            own by default.
        lower: Whether only the lower triangles of the factors are right, as sums leave them.
        left: l, ``(G, m, d)``, where A is ``lᵀr`` but for its diagonal, which ``inputs`` is.
        right: r, ``(G, m, d)``.
    """

    layout: BlockLayout
    inputs: Tensor
    outputs: Tensor
    factored_damping: bool = False
    product_dtype: torch.dtype | None = None
    lower: bool = True
    left: Tensor | None = None
    right: Tensor | None = None

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``(A, B)``, whole."""
        a, b = self._stored
        if self.left is not None and self.right is not None:
            a = torch.diag_embed(self._off_rows) + self.left.mT @ self.right
        return a, b

    @cached_property
    def _stored(self) -> tuple[Tensor, Tensor]:
        """``inputs`` and ``outputs``, whole."""
        whole = [
            linalg.symmetric(x) if self.lower and x.dim() == 3 else x
            for x in (self.inputs, self.outputs)
        ]
        return whole[0], whole[1]

    @cached_property
    def _off_rows(self) -> Tensor:
        """The diagonal of ``A − lᵀr``."""
        assert self.left is not None and self.right is not None
        return self.inputs - (self.left * self.right).sum(1)

    def multiply(self, columns: Tensor) -> Tensor:
        """Return ``B V A``."""
        a, b = self._stored
        matrices = multiply_left(b, self.layout.matrix(columns.T))
        if self.left is not None and self.right is not None:
            by_rows = (matrices @ self.left.mT) @ self.right
            return self.layout.flat(matrices * self._off_rows.unsqueeze(-2) + by_rows).T
        return self.layout.flat(multiply_right(matrices, a)).T

    def trace(self) -> Tensor:
        """Return ``Σ_g tr A_g tr B_g``."""
        a, b = (factor_diagonal(x).sum(-1) for x in (self.inputs, self.outputs))
        return (a * b).sum()

    def diagonal(self) -> Tensor:
        """Return the products of the factors' diagonals."""
        a, b = factor_diagonal(self.inputs), factor_diagonal(self.outputs)
        return self.layout.flat(b.unsqueeze(-1) * a.unsqueeze(-2))

    def eigenvalues(self) -> Tensor:
        """Return all products of the factors' eigenvalues, negatives cut to 0."""
        a, b = (eigenvalues(factor) for factor in self.factors)
        return (b.unsqueeze(-1) * a.unsqueeze(-2)).flatten()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(B ⊗ A + damping I)``; each factor by itself decides what is singular."""
        check_damping(damping)
        if damping > 0:
            return super().logdet(damping)
        (_, a), (_, b) = eigenbasis(self.factors)
        log_a, log_b = linalg.log_determinant(a), linalg.log_determinant(b)
        return log_a * b.shape[-1] + log_b * a.shape[-1]

    def __add__(self, other: Operator) -> Operator:
        """Return the sum, as a sum of Kronecker products where the other is one, too."""
        from natgrad.operators.kronecker_sum import KroneckerSumOperator

        return KroneckerSumOperator.of(self, other) or super().__add__(other)

    def with_damped_inputs(self, share: Tensor) -> KroneckerOperator:
        """Return ``B ⊗ (A + share · (tr A/d_a) I)``."""
        shift = (share * factor_diagonal(self.inputs).mean(-1)).to(self.inputs.dtype)
        return replace(self, inputs=_shifted(self.inputs, shift))

    # Inverses.

    def shifts(self, damping: float) -> tuple[Tensor, Tensor] | None:
        """Return what is added to A and B, ``(G,)`` each; None where damping is not split."""
        if damping > 0 and not self.factored_damping:
            return None
        return pi_shifts(self.inputs, self.outputs, damping)

    def direct_inverse(self, damping: float) -> Operator:
        """Invert by the damping rule; zero damping is the pseudo-inverse in both."""
        return self.inverses([self], [damping])[0]

    @classmethod
    def inverses(cls, operators: Sequence[Self], dampings: Sequence[float]) -> list[Operator]:
        """Return the inverses of several; factors of one shape are factorised together."""
        factored: list[tuple[int, Tensor]] = []  # Which operator, and a damped factor of it.
        results: list[Operator | None] = [None] * len(operators)
        by_rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        exact: list[int] = []
        for index, (one, damping) in enumerate(zip(operators, dampings, strict=True)):
            if damping == 0 or not one.factored_damping:
                exact.append(index)
                continue
            shifts = pi_shifts(one.inputs, one.outputs, damping)
            for factor, shift in zip((one.inputs, one.outputs), shifts, strict=True):
                factored.append((index, _shifted(factor, shift)))
            if one.left is not None:
                by_rows[index] = one._inverse_rows(shifts[0])
        matrices = [factor for _, factor in factored if factor.dim() == 3]
        inverted = iter(linalg.map_stacked(linalg.inverse, matrices))
        found: dict[int, list[Tensor]] = {}
        for index, factor in factored:
            inverse = next(inverted) if factor.dim() == 3 else factor.reciprocal()
            found.setdefault(index, []).append(inverse)
        for index, (a, b) in found.items():
            a, left, right = by_rows.get(index, (a, None, None))
            results[index] = replace(
                operators[index], inputs=a, outputs=b, lower=False, left=left, right=right
            )
        pairs = [x for i in exact for x in operators[i].factors]
        bases = eigenbasis(pairs) if pairs else []
        for place, index in enumerate(exact):
            one, damping = operators[index], dampings[index]
            (basis_a, values_a), (basis_b, values_b) = bases[2 * place : 2 * place + 2]
            if damping > 0:
                scale = 1.0 / (values_b.unsqueeze(-1) * values_a.unsqueeze(-2) + damping)
            else:
                on_range = [linalg.inverse_on_range(v) for v in (values_b, values_a)]
                scale = on_range[0].unsqueeze(-1) * on_range[1].unsqueeze(-2)
            results[index] = EigenKroneckerOperator(one.layout, basis_a, basis_b, scale)
        return [result for result in results if result is not None]

    def _inverse_rows(self, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the diagonal, l and r of ``(A + shift I)⁻¹``, by Woodbury's formula."""
        assert self.left is not None and self.right is not None
        core = self._off_rows.clamp(min=0) + shift.unsqueeze(-1)
        right = self.right / core.unsqueeze(-2)
        eye = torch.eye(right.shape[1], dtype=right.dtype, device=right.device)
        small = eye + self.left @ right.mT
        # Never singular; and nothing waits for the device to be told so.
        left = -torch.linalg.solve_ex(small, self.left / core.unsqueeze(-2))[0]
        return core.reciprocal() + (left * right).sum(1), left, right

    def inverse_root(self, damping: float) -> EigenKroneckerOperator:
        """Divide by the root of the eigenvalues, damped by the damping rule, in the eigenbases."""
        (basis_a, values_a), (basis_b, values_b) = eigenbasis(self.factors)
        shifts = self.shifts(damping)
        if shifts is None:
            damped = values_b.unsqueeze(-1) * values_a.unsqueeze(-2) + damping
        else:
            values_a = values_a + shifts[0].unsqueeze(-1)
            values_b = values_b + shifts[1].unsqueeze(-1)
            damped = values_b.unsqueeze(-1) * values_a.unsqueeze(-2)
        return EigenKroneckerOperator(self.layout, basis_a, basis_b, damped.rsqrt())

    def function_space_map(
        self, names: Collection[str], rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'(B̂⁻¹ ⊗ Â⁻¹)Jᵀ``: the Gram matrix of ``J'`` and the preconditioned rows."""
        (name,) = names
        shifts = None if self.left is not None else self.shifts(damping)
        left, right = other.get(name), rows.get(name)
        if shifts is None or type(left) is not LinearJacobian or type(right) is not LinearJacobian:
            return map_by_columns(name, rows, other, self.direct_inverse(damping))
        right = right.augmented()
        a, b = self.factors
        inputs = _solve_rows(right.inputs, a, shifts[0])
        gradients = _solve_rows(right.output_gradients, b, shifts[1])
        return {name: left.augmented().gram(right.replaced(inputs, gradients))}

    def sample_forms(
        self, names: Collection[str], rows: Jacobians, diagonal: bool = False
    ) -> Tensor:
        """Return ``(δ_n B δ_nᵀ) (a_nᵀ A a_n)``, summed over groups, for linear maps."""
        return self._spectral.sample_forms(names, rows, diagonal)

    @cached_property
    def _spectral(self) -> EigenKroneckerOperator:
        """The same matrix in the eigenvectors of its factors."""
        (basis_a, a), (basis_b, b) = eigenbasis(self.factors)
        scale = b.unsqueeze(-1) * a.unsqueeze(-2)
        return EigenKroneckerOperator(self.layout, basis_a, basis_b, scale)

    # Preconditioning gradients.

    @cached_property
    def is_plain(self) -> bool:
        """Whether the layer is one weight matrix, with bias or without, and both factors dense."""
        return is_weight_matrix(self.layout) and self.inputs.dim() == self.outputs.dim() == 3

    def natural_gradient(self, source: GradientSource) -> dict[str, Tensor]:
        """Return ``B G A``, multiplying whichever is cheaper, the gradient or its rows.

        The gradient of a layer is ``G = δᵀa`` with ``R = N·T`` rows. Factors of sizes ``d_g`` and
        ``d_a`` cost ``d_g d_a (d_g + d_a)`` multiplications on ``G`` but ``R (d_g² + d_a² +
        d_g d_a)`` when applied to δ and a before the weight-gradient product; with fewer rows than
        units the second is cheaper. It needs the rows of the present gradient, so it is taken only
        while ``.grad`` is exactly what the backward pass left.
        """
        if not self.is_plain:
            return super().natural_gradient(source)
        layout = self.layout
        rows = None if source.rows is None else source.rows.get(layout.names[0])
        if isinstance(rows, LinearJacobian) and rows_are_cheaper(
            layout, rows.samples * rows.positions
        ):
            a = self.cast(rows.inputs.flatten(0, 2))  # (N·T, d_in)
            delta = self.cast(rows.output_gradients.flatten(0, 3))  # (N·T, d_out), as K = G = 1
            return self._named(*self.multiply_rows(a, delta, rows.bias_value))
        return self._multiply_plain([source.gradients[name] for name in layout.names])

    def _multiply_plain(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return ``B G A`` without copying weight and bias into one matrix."""
        layout = self.layout
        core, border, corner, b = self._split
        weight = self.cast(gradients[0].reshape(layout.d_out, layout.d_in))
        if not layout.has_bias:
            return self._named(b @ (weight @ core))
        bias = self.cast(gradients[1])
        right = torch.addmm(torch.outer(bias, border), weight, core)
        right_bias = torch.addmv(bias * corner, weight, border)
        return self._named(b @ right, b @ right_bias)

    def multiply_rows(
        self, a: Tensor, delta: Tensor, bias_value: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``B δᵀa A`` of a plain layer as weight and bias, from its rows.

        Args:
            a: Inputs without the bias coordinate, ``(R, d_in)``.
            delta: Output gradients, ``(R, d_out)``.
            bias_value: The input a bias sees.
        """
        core, border, corner, b = self._split
        solved = delta @ b
        if not self.layout.has_bias:
            return solved.T @ (a @ core), None
        weight = solved.T @ torch.addmm(border, a, core, beta=bias_value)
        return weight, solved.T @ torch.addmv(bias_value * corner, a, border)

    def cast(self, rows: Tensor) -> Tensor:
        """Return rows in the type of products with the factors."""
        return rows.to(self.product_dtype or self.inputs.dtype)

    def _named(self, *values: Tensor | None) -> dict[str, Tensor]:
        """Return weight and bias under their names, in their shapes and the factors' type."""
        named = zip(self.layout.names, self.layout.shapes, values, strict=False)  # A bias or none.
        return {name: value.reshape(shape).to(self.inputs.dtype)
                for name, shape, value in named if value is not None}  # fmt: skip

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A as ``[[core, border], [borderᵀ, corner]]``, and B.

        On accelerators the core is copied, as products with an odd leading dimension are slower
        there; processors do not mind.
        """
        (a,), (b,) = self.factors
        d = self.layout.d_in
        core, border, corner, b = map(self.cast, (a[:d, :d], a[:d, -1], a[-1:, -1], b))
        core = core if core.device.type == "cpu" else core.contiguous()
        return core, border.contiguous(), corner, b


def is_weight_matrix(layout: BlockLayout) -> bool:
    """Return whether a block is one weight matrix, with a bias or without."""
    return (
        layout.groups == 1
        and layout.has_weight
        and len(layout.names) == 1 + layout.has_bias
        and not layout.transposed
    )


def rows_are_cheaper(layout: BlockLayout, rows: int) -> bool:
    """Return whether multiplying two dense factors with so many rows beats doing so with ``G``."""
    if not is_weight_matrix(layout):
        return False
    d_in, d_out = layout.d_augmented, layout.d_out
    return rows * (d_in**2 + d_out**2 + d_in * d_out) < d_in * d_out * (d_in + d_out)


def multiply_left(factor: Tensor, matrices: Tensor) -> Tensor:
    """Return ``X M`` for matrices ``(..., G, d, e)``."""
    return factor @ matrices if factor.dim() == 3 else factor.unsqueeze(-1) * matrices


def multiply_right(matrices: Tensor, factor: Tensor) -> Tensor:
    """Return ``M X`` for matrices ``(..., G, e, d)``."""
    return matrices @ factor if factor.dim() == 3 else matrices * factor.unsqueeze(-2)


def pi_shifts(a: Tensor, b: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return ``π√λ`` for A and ``√λ/π`` for B, ``π² = (tr A/d_a)/(tr B/d_g)``, ``(G,)`` each."""
    mean_a, mean_b = factor_diagonal(a).mean(-1), factor_diagonal(b).mean(-1)
    both = (mean_a > 0) & (mean_b > 0)
    one = torch.ones_like(mean_a)
    pi = torch.where(both, (mean_a / torch.where(both, mean_b, one)).sqrt(), one)
    root = damping**0.5
    return root * pi, root / pi


def _shifted(factor: Tensor, shift: Tensor) -> Tensor:
    """Return ``X + shift I`` per group."""
    if factor.dim() == 2:
        return factor + shift.unsqueeze(-1)
    return linalg.add_to_diagonal(factor, shift)


def _shifted_inverse(factor: Tensor, shift: Tensor) -> Tensor:
    """Return ``(X + shift I)⁻¹`` per group; the pseudo-inverse where nothing is added."""
    if bool((shift == 0).all()):
        ((basis, values),) = eigenbasis([factor])
        inverse = linalg.inverse_on_range(values)
        return inverse if basis is None else (basis * inverse.unsqueeze(-2)) @ basis.mT
    shifted = _shifted(factor, shift)
    return shifted.reciprocal() if shifted.dim() == 2 else linalg.inverse(shifted)


def _solve_rows(rows: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """Return ``x (X + shift I)⁻¹`` for rows x, ``(..., G, d)``, of a factor per group.

    Where the factor is ``Σ x xᵀ/n`` of just these rows, and they are fewer than d, their Gram
    matrix is inverted instead: ``x (xᵀx/n + ρI)⁻¹ = (xxᵀ/n + ρI)⁻¹x``.
    """
    grouped = rows.movedim(-2, 0)
    x = grouped.flatten(1, -2)  # (G, R, d)
    share = _share_of_moment(factor, x) if factor.dim() == 3 and x.shape[1] < x.shape[2] else None
    if share is not None:
        solved = _shifted_inverse(x @ x.mT * share, shift) @ x
    else:
        inverse = _shifted_inverse(factor, shift)
        solved = x @ inverse if inverse.dim() == 3 else x * inverse.unsqueeze(-2)
    return solved.view(grouped.shape).movedim(0, -2)


def _share_of_moment(factor: Tensor, x: Tensor) -> Tensor | None:
    """Return ``1/n`` if a factor is ``xᵀx/n``, checked with a random vector; None if it is not."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(x.shape[2], 1, generator=generator, dtype=x.dtype).to(x.device)
    found, moment = factor @ probe, x.mT @ (x @ probe)
    share = (found * moment).sum() / moment.square().sum()
    exact = (found - share * moment).norm() <= torch.finfo(x.dtype).eps ** 0.5 * found.norm()
    return share if bool(exact) else None
