r"""An exact diagonal part of the Fisher matrix, in sample space or in parameter space.

With rows ``J`` (weighted, ``R`` of them) and ``F = JᵀJ/count``, whichever of ``R`` and ``P`` is
smaller decides what is factorised: the Gram matrix ``JJᵀ`` or ``F``. In sample space the Woodbury
identity gives

.. math:: (F + \lambda I)^{-1} v = \tfrac1\lambda
          \left(v - J^\top (JJ^\top + count\,\lambda I)^{-1} J v\right)

and for a gradient ``∇L = Jᵀu`` with known ``u`` the push-through form
``Jᵀ (JJᵀ/count + λI)⁻¹ u``, which divides by nothing small and has a limit at λ = 0.

Rows may come with scales t (:class:`ScaledRows`): damping is then added to the Gram matrix of the
scaled rows ``TJ``, ``T = diag(t)``, that is λ/t² instead of λ to each row of ``JJᵀ/count``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import GradientSource
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.partitioned import CurvaturePart
from natgrad.jacobians import CHUNK_ELEMENTS, Jacobians, LayerJacobian
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["ExactRows", "ScaledRows"]


class ScaledRows(Jacobians):
    r"""Rows that are damped in other units than their own.

    With ``T = diag(scales)`` and the gradient ``∇L = Jᵀu`` they are preconditioned by

    .. math:: J^\top (JJ^\top/count + \lambda T^{-2})^{-1} u
              = J^\top T (T JJ^\top T/count + \lambda I)^{-1} T u,

    the right side of which has a limit where a scale is 0. What a gradient holds beside ``Jᵀu``
    (penalties in the loss) is multiplied by the mean of the squared scales and solved for with
    ``JᵀT²J/count + λI``, which is the same where all scales are equal.

    Args:
        rows: The rows J, of the same blocks, samples and directions.
        scales: t ≥ 0, ``(N·K,)``.
        coordinates: u up to a common factor, ``(N·K,)``.
    """

    def __init__(self, rows: Jacobians, scales: Tensor, coordinates: Tensor) -> None:
        super().__init__(rows.layout, dict(rows), rows.samples, rows.directions)
        self.scales, self.coordinates = scales, coordinates


class ExactRows(CurvaturePart):
    """The exact Fisher matrix of a set of blocks.

    Args:
        blocks: Block name → layout.
        layout: Order of all trainable parameters; the part keeps theirs.
        row_limit: Most rows kept before they are summed into ``P × P``; ``P`` by default.
    """

    def __init__(
        self,
        blocks: Mapping[str, BlockLayout],
        layout: ParameterLayout,
        row_limit: int | None = None,
    ) -> None:
        self.block_names = tuple(blocks)
        self.layout = layout.subset(n for block in blocks.values() for n in block.names)
        self.names = self.layout.names
        self.sizes = tuple(torch.Size(self.layout.shapes[n]).numel() for n in self.names)
        self.numel = self.layout.numel
        self.row_limit = self.numel if row_limit is None else row_limit
        self.count = 0.0
        # Rows as (weight, Jacobians), or their sum JᵀJ once there are more rows than parameters.
        self.rows: list[tuple[float, Jacobians]] = []
        self.moment: Tensor | None = None
        self._gram: Tensor | None = None
        self._factor: tuple[str, Tensor, Tensor | None, float] | None = None
        self._applied_rows: tuple[list[tuple[float, Jacobians]], float] | None = None

    # Accumulation.

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add rows; they are kept until there are more than parameters, then summed."""
        mine = {name: jacobians[name] for name in self.block_names if name in jacobians}
        if not all(block.is_finite() for block in mine.values()):
            return
        self.count += float(count)
        self._gram = None
        if not mine:
            return
        rows = Jacobians(self.layout, mine, jacobians.samples, jacobians.directions)
        number = self._row_count() + rows.rows
        scaled = isinstance(jacobians, ScaledRows)
        if isinstance(jacobians, ScaledRows):
            rows = ScaledRows(rows, jacobians.scales, jacobians.coordinates)
        size = number if scaled else min(number, self.numel)
        linalg.check_memory(size, 2, self.layout.dtype, self.layout.device)
        # Scaled rows are damped one by one, so they cannot be summed.
        if self.moment is None and (scaled or number <= self.row_limit):
            self.rows = [*self.rows, (1.0, rows)]
            return
        if self.moment is None:
            first = next(iter(mine.values()))
            self.moment = torch.zeros(
                self.numel, self.numel, dtype=first.dtype, device=first.device
            )
            for weight, kept in self.rows:
                self._accumulate(kept, weight)
            self.rows = []
        self._accumulate(rows, 1.0)

    def _accumulate(self, rows: Jacobians, weight: float) -> None:
        assert self.moment is not None
        step = max(1, CHUNK_ELEMENTS // max(1, self.numel * rows.directions))
        for start in range(0, rows.samples, step):
            stop = min(start + step, rows.samples)
            dense = self.moment.new_zeros((stop - start) * rows.directions, self.numel)
            for block in rows.values():
                flat = block.layout.flat(block.per_sample_gradients(start, stop)).flatten(0, 1)
                pieces = flat.split(list(block.layout.sizes), dim=1)
                for segment, piece in zip(self.layout.slices(block.layout), pieces, strict=True):
                    dense[:, segment] = piece
            self.moment = torch.addmm(self.moment, dense.T, dense, alpha=weight)

    def _row_count(self) -> int:
        return sum(rows.rows for _, rows in self.rows)

    def discount(self, factor: float) -> None:
        """Discount sums, or forget the rows for factor 0."""
        self.count *= factor
        self._gram = None
        if factor == 0.0:
            self.rows, self.moment = [], None
            return
        self.rows = [(weight * factor, rows) for weight, rows in self.rows]
        if self.moment is not None:
            self.moment = self.moment * factor

    # Products with the weighted rows.

    @staticmethod
    def _times(rows: list[tuple[float, Jacobians]], columns: Tensor) -> Tensor:
        """Return ``J V``, ``(R, k)``, each row scaled by the root of its weight."""
        parts = []
        for weight, jacobians in rows:
            total = columns.new_zeros(jacobians.rows, columns.shape[1])
            for block in jacobians.values():
                total += block.matvec(jacobians.layout.gather(block.layout, columns))
            parts.append(total * weight**0.5)
        return torch.cat(parts)

    @staticmethod
    def _transposed_times(rows: list[tuple[float, Jacobians]], weights: Tensor) -> Tensor:
        """Return ``Jᵀ W``, ``(P_l, k)``."""
        layout = rows[0][1].layout
        result = weights.new_zeros(layout.numel, weights.shape[1])
        pieces = weights.split([jacobians.rows for _, jacobians in rows])
        for (weight, jacobians), piece in zip(rows, pieces, strict=True):
            for block in jacobians.values():
                value = block.rmatvec(piece * weight**0.5)
                layout.add(block.layout, value, result)
        return result

    def gram(self) -> Tensor:
        """Return ``JJᵀ``, ``(R, R)``."""
        if self._gram is None:
            if len(self.rows) == 1:
                weight, rows = self.rows[0]
                gram = rows.gram()
                self._gram = gram if weight == 1.0 else gram * weight
            else:
                self._gram = torch.cat(
                    [
                        torch.cat([cross_gram(a, b) * (v * w) ** 0.5 for w, b in self.rows], 1)
                        for v, a in self.rows
                    ]
                )
        return self._gram

    def _mean_moment(self) -> Tensor:
        assert self.moment is not None
        return self.moment / self.count

    # The matrix.

    def matvec(self, columns: Tensor) -> Tensor:
        """Return ``F_l V``."""
        if self.moment is not None:
            return self._mean_moment() @ columns
        if not self.rows:
            return torch.zeros_like(columns)
        return self._transposed_times(self.rows, self._times(self.rows, columns)) / self.count

    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Factorise in the smaller space; the pseudo-inverse at 0."""
        if self.moment is None and not self.rows:
            return lambda v: v / damping if damping else torch.zeros_like(v)
        matrix = self._mean_moment() if self.moment is not None else self.gram()
        if damping == 0:
            values, vectors = linalg.eigh(matrix)
        else:
            shift = damping if self.moment is not None else self.count * damping
            factor = linalg.cholesky(linalg.add_to_diagonal(matrix, shift))
        if self.moment is not None:
            if damping == 0:
                return lambda v: linalg.symmetric_pseudo_solve(values, vectors, v)
            return lambda v: torch.cholesky_solve(v, factor)
        rows, count = self.rows, self.count
        if damping > 0:
            return lambda v: self._woodbury(rows, factor, v, damping, count)

        def pseudo_inverse(columns: Tensor) -> Tensor:
            weights = self._times(rows, columns)
            weights = linalg.symmetric_pseudo_solve(values, vectors, weights, power=2)
            return self._transposed_times(rows, weights) * count

        return pseudo_inverse

    def inverse_root(self, damping: float) -> Callable[[Tensor], Tensor]:
        r"""Return the symmetric root from the eigenvalues a of the smaller of the two matrices.

        In sample space, with ``JJᵀ/count = U diag(a) Uᵀ``,

        .. math:: (F + \lambda I)^{-1/2} = \lambda^{-1/2} I - \frac{1}{count} J^\top U
                  \, \mathrm{diag}\Big(\frac{1}{\sqrt{\lambda} \sqrt{a + \lambda}
                  (\sqrt{\lambda} + \sqrt{a + \lambda})}\Big) U^\top J,

        which divides by no eigenvalue.
        """
        if self.moment is None and not self.rows:
            return lambda v: v / damping**0.5
        matrix = self._mean_moment() if self.moment is not None else self.gram() / self.count
        values, vectors = linalg.eigh(matrix)
        root, shifted = damping**0.5, (values.clamp(min=0.0) + damping).sqrt().unsqueeze(1)
        if self.moment is not None:
            return lambda v: vectors @ ((vectors.mT @ v) / shifted)
        scale = 1.0 / (self.count * root * shifted * (root + shifted))
        rows = self.rows

        def apply(columns: Tensor) -> Tensor:
            weights = vectors @ (scale * (vectors.mT @ self._times(rows, columns)))
            return columns / root - self._transposed_times(rows, weights)

        return apply

    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'_l Jᵀ_l (JJᵀ/count + λI)⁻¹``, by push-through, if ``J`` are the rows kept."""
        mine = [name for name in self.block_names if name in rows and name in other]
        kept = self.rows[0][1] if len(self.rows) == 1 else None
        if kept is not None and all(rows.get(name) is kept[name] for name in kept):
            apply = self._sample_space_inverse(damping)
            return {name: apply(cross_gram(other[name], rows[name])) for name in mine}
        solver, layout = self.solver(damping), self.layout
        pieces: dict[str, list[Tensor]] = {name: [] for name in mine}
        step = max(1, CHUNK_ELEMENTS // max(1, self.numel * rows.directions))
        for start in range(0, rows.samples if mine else 0, step):
            stop = min(start + step, rows.samples)
            columns = layout.zeros(self.numel, (stop - start) * rows.directions)
            for name in mine:
                block = rows[name]
                flat = block.layout.flat(block.per_sample_gradients(start, stop)).flatten(0, 1)
                layout.scatter(block.layout, flat.T, columns)
            solution = solver(columns)
            for name in mine:
                block = other[name]
                pieces[name].append(block.matvec(layout.gather(block.layout, solution)))
        return {name: torch.cat(columns, dim=1) for name, columns in pieces.items()}

    def _sample_space_inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Return ``M ↦ M (JJᵀ/count + λI)⁻¹``."""
        gram = self.gram() / self.count
        if damping == 0:
            values, vectors = linalg.eigh(gram)
            scale = linalg.inverse_on_range(values)
            return lambda m: ((m @ vectors) * scale) @ vectors.mT
        factor = linalg.cholesky(linalg.add_to_diagonal(gram, damping))
        return lambda m: torch.cholesky_solve(m.mT, factor).mT

    def _woodbury(
        self,
        rows: list[tuple[float, Jacobians]],
        factor: Tensor,
        columns: Tensor,
        damping: float,
        count: float,
        scales: Tensor | float = 1.0,
    ) -> Tensor:
        """Solve with the Cholesky factor of ``JJᵀ + count·λI``, refined once.

        The subtraction loses digits when λ is small beside F; one step of iterative refinement
        brings them back. With ``scales`` ``(R, 1)`` the rows are those times their scales.
        """

        def times(v: Tensor) -> Tensor:
            return scales * self._times(rows, v)

        def transposed_times(weights: Tensor) -> Tensor:
            return self._transposed_times(rows, scales * weights)

        def once(v: Tensor) -> Tensor:
            return (v - transposed_times(torch.cholesky_solve(times(v), factor))) / damping

        solution = once(columns)
        product = transposed_times(times(solution)) / count
        return solution + once(columns - product - damping * solution)

    def trace(self) -> Tensor:
        """Return the trace."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        if self.moment is not None:
            return self._mean_moment().diagonal()
        result: Tensor | None = None
        for weight, rows in self.rows:
            for block in rows.values():
                value = block.diagonal() * (weight / self.count)
                if result is None:
                    result = value.new_zeros(self.numel)
                self.layout.add(block.layout, value, result)
        return self.layout.zeros(self.numel) if result is None else result

    def eigenvalues(self) -> Tensor:
        """Return ``P_l`` eigenvalues, padded with exact zeros beyond the number of rows."""
        if self.moment is not None:
            return torch.linalg.eigvalsh(self._mean_moment()).clamp(min=0.0)
        if not self.rows:
            return self.layout.zeros(self.numel)
        values = torch.linalg.eigvalsh(self.gram() / self.count).clamp(min=0.0)
        return torch.cat([values, values.new_zeros(self.numel - values.shape[0])])

    def to_dense(self) -> Tensor:
        """Return ``(P_l, P_l)``."""
        if self.moment is not None:
            return self._mean_moment()
        if not self.rows:
            return self.layout.zeros(self.numel, self.numel)
        dense = torch.cat([rows.to_dense() * weight**0.5 for weight, rows in self.rows])
        return dense.T @ dense / self.count

    def row_products(self, direction: dict[str, Tensor]) -> Tensor | None:
        """Return ``JΔ``, ``(R,)``, for the rows of the last refresh; None in parameter space."""
        if self._applied_rows is None or self._factor is None or self._factor[0] != "sample":
            return None
        tensors = {name: direction[name] for name in self.names}
        columns = self.layout.to_flat(tensors).to(self.layout.dtype).unsqueeze(1)
        return self._times(self._applied_rows[0], columns)[:, 0]

    # Training.

    def smaller_matrix(self) -> tuple[str, Tensor] | None:
        """Return ``("sample", JJᵀ/count)`` or ``("parameter", F)``; None without rows."""
        if self.moment is not None:
            return "parameter", self._mean_moment()
        return ("sample", self.gram() / self.count) if self.rows else None

    def refresh(self, damping: float) -> None:
        """Factorise ``JJᵀ/count + λI`` or ``F + λI``; eigendecompose where λ = 0."""
        found = self.smaller_matrix()
        if found is None:
            return
        kind, matrix = found
        if damping > 0:
            scaled = scaled_rows(self.rows)
            if scaled is not None:
                matrix = scaled[0] * matrix * scaled[0].mT
            factor = linalg.cholesky(linalg.add_to_diagonal(matrix, damping))
            self._factor = (kind, factor, None, damping)
        else:
            values, vectors = linalg.eigh(matrix)
            self._factor = (kind, vectors, values, damping)
        self._applied_rows = (self.rows, self.count)

    def _apply(self, rhs: Tensor, power: int = 1) -> Tensor:
        assert self._factor is not None
        _, factor, values, _ = self._factor
        if values is not None:
            return linalg.symmetric_pseudo_solve(values, factor, rhs, power)
        return torch.cholesky_solve(rhs, factor)

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return the natural gradient of the part's parameters."""
        if self._factor is None or self._applied_rows is None:
            return {name: source.gradients[name] for name in self.names}
        kind, factor, values, damping = self._factor
        rows, count = self._applied_rows
        gradients = {name: source.gradients[name] for name in self.names}
        if kind == "parameter":
            flat = self._apply(self.layout.to_flat(gradients).to(factor.dtype).unsqueeze(1))
            return self.layout.to_dict(flat[:, 0])
        columns = self.layout.to_flat(gradients).to(factor.dtype).unsqueeze(1)
        known: Tensor | None = None
        coordinates = matching_coordinates(source, rows, factor.dtype)
        scales: Tensor | float = 1.0
        scaled = scaled_rows(rows)
        if scaled is not None:
            coordinates = scaled[1].to(factor.dtype)
            if values is None:
                scales = scaled[0].to(factor.dtype)
        if coordinates is not None:
            columns, share = split_gradient(columns, self._transposed_times(rows, coordinates))
            solution = scales * self._apply(scales * coordinates * share)
            known = self._transposed_times(rows, solution)
            if not bool(columns.any()):
                return self.layout.to_dict(known[:, 0])
        if values is not None:
            # Pseudo-inverse of JᵀJ/count through the Gram matrix JJᵀ/count.
            inner = self._apply(self._times(rows, columns), power=2)
            flat = self._transposed_times(rows, inner) / count
        else:
            if isinstance(scales, Tensor):
                columns = columns * scales.square().mean()
            flat = self._woodbury(rows, factor * count**0.5, columns, damping, count, scales)
        return self.layout.to_dict((flat if known is None else flat + known)[:, 0])

    def cost(self, workload: Workload) -> Cost:
        """Return the cost in the space the rows would be handled in."""
        rows = workload.samples * workload.directions
        size = min(rows, self.numel)
        widths = sum(torch.Size(self.layout.shapes[n]).numel() for n in self.names)
        if rows <= self.row_limit:
            # Gram products of every layer cost about R² (d_in + d_out); rows·P bounds a product.
            forming = float(rows) ** 2 * sum(sum(self.layout.shapes[n][:2]) for n in self.names)
            step = 2.0 * rows * widths + 2.0 * rows**2
        else:
            forming = float(rows) * self.numel**2
            step = float(self.numel) ** 2
        entry = self.layout.dtype.itemsize
        return Cost(f"{size} x {size}", entry * size**2, forming + size**3 / 3, step)

    def state_dict(self) -> dict[str, Any]:
        """Return counts, moment and factorisation.

        Rows in sample space belong to one batch and are not kept: a resumed run recomputes them at
        its next update.
        """
        return {"count": self.count, "moment": self.moment}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore counts and moment."""
        self.count = state["count"]
        moment = state["moment"]
        self.moment = None if moment is None else moment.to(device)
        self._gram = None


def exact_quadratic(parts: Iterable[CurvaturePart], direction: dict[str, Tensor]) -> Tensor | None:
    """Return ``‖Σ_l J_l Δ_l‖²/count`` over parts with rows of the same batch, or None.

    Parameters without a direction, trained by another rule or without a gradient, do not move.
    """
    total: Tensor | None = None
    count = 0.0
    for part in parts:
        assert isinstance(part, ExactRows)
        column = part.layout.to_column(direction)[:, 0]
        products = part.row_products(part.layout.to_dict(column))
        if products is None or (total is not None and products.shape != total.shape):
            return None
        total = products if total is None else total + products
        assert part._applied_rows is not None
        count = part._applied_rows[1]
    return None if total is None else total.square().sum() / count


def matching_coordinates(
    source: GradientSource, rows: list[tuple[float, Jacobians]], dtype: torch.dtype
) -> Tensor | None:
    """Return the gradient's coordinates ``(R, 1)`` if they belong to exactly these rows."""
    if source.coordinates is None or len(rows) != 1 or rows[0][0] != 1.0:
        return None
    coordinates = source.coordinates.reshape(-1, 1).to(dtype)
    return coordinates if coordinates.shape[0] == rows[0][1].rows else None


def scaled_rows(rows: list[tuple[float, Jacobians]]) -> tuple[Tensor, Tensor] | None:
    """Return scales and coordinates, ``(R, 1)`` each, of rows that all have them, or None."""
    found = [part for _, part in rows if isinstance(part, ScaledRows)]
    if not found or len(found) < len(rows):
        return None
    scales = torch.cat([part.scales for part in found])
    return scales.unsqueeze(1), torch.cat([part.coordinates for part in found]).unsqueeze(1)


def split_gradient(gradient: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``g = c·Jᵀu + h`` into the remainder ``h`` and the share ``c``.

    ``h`` holds what the output's gradient does not explain: penalties in the loss, or changes
    made to ``.grad`` after the backward pass; clipping only changes ``c``. A remainder at the level
    of rounding is returned as zero.

    Args:
        gradient: ``(P, 1)``.
        known: ``Jᵀu``, ``(P, 1)``.
    """
    norm = known.square().sum()
    share = torch.where(norm > 0, (gradient * known).sum() / norm, torch.zeros_like(norm))
    remainder = gradient - share * known
    limit = 100 * torch.finfo(gradient.dtype).eps * gradient.norm()
    return torch.where(remainder.norm() <= limit, torch.zeros_like(remainder), remainder), share


_Rows = TypeVar("_Rows", Jacobians, LayerJacobian)


def cross_gram(left: _Rows, right: _Rows) -> Tensor:
    """Return ``J J'ᵀ``, by the symmetric route where both are the same."""
    return left.gram() if left is right else left.gram(right)
