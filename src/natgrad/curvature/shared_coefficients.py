r"""Natural gradients as weighted sums of per-sample gradients, whose weights are kept.

With the rows ``g_n`` of one layer the natural gradient of the layer's empirical Fisher matrix is,
by the Woodbury identity, a weighted sum of them,

.. math:: \left(\tfrac1N G^\top G + \lambda I\right)^{-1} \tfrac1N G^\top 1
          = \tfrac1N \sum_n c_n g_n, \qquad c = \left(\tfrac1N G G^\top + \lambda I\right)^{-1} 1,

where the plain gradient has ``c = 1``. The coefficients of a few steps are kept and weigh the
samples of all later ones, which then need neither rows nor inverses (Ou, Zhu, Huang & Liu, Fast
natural gradient descent, 2024).
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import GradientSource, check_choice, refuse_options
from natgrad.curvature.block_diagonal import BlockDiagonalFisher
from natgrad.curvature.exact_rows import ExactRows, split_gradient
from natgrad.curvature.partitioned import CurvaturePart
from natgrad.curvature.registry import register_structure
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.replicas import average_over_replicas

__all__ = ["DampingScale", "Normalization", "Share", "SharedCoefficientFisher"]

Share = Literal["sample", "iteration", "position", "mean"]
DampingScale = Literal["relative", "absolute"]
Normalization = Literal["none", "layer", "model"]

#: Rows are never summed into P × P: the coefficients live in sample space.
NO_LIMIT = 2**62


class CoefficientPart(ExactRows):
    """One layer's rows and the coefficients they gave.

    Args:
        name: The block's name.
        block: Its layout.
        layout: Order of all trainable parameters.
        share: How coefficients are kept; see :class:`SharedCoefficientFisher`.
        damping_scale: What damping is a multiple of.
    """

    def __init__(
        self,
        name: str,
        block: BlockLayout,
        layout: ParameterLayout,
        share: Share,
        damping_scale: DampingScale,
    ) -> None:
        super().__init__({name: block}, layout, NO_LIMIT)
        self.share, self.damping_scale = share, damping_scale
        self._cholesky: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Drop the coefficients kept so far."""
        #: Sum and number of the batches' mean coefficients.
        self.mean_sum: Tensor | None = None
        self.batches = 0
        #: Sum and number of coefficients by position in the batch.
        self.position_sum: Tensor | None = None
        self.position_batches = 0
        #: Coefficients batch by batch.
        self.iterations: list[Tensor] = []
        #: Coefficients by index in the data set; NaN for samples not seen.
        self.table: Tensor | None = None
        # Means of what is kept, made when first needed: over all samples, and by position.
        self._mean: Tensor | None = None
        self._ready: Tensor | None = None

    def refresh(self, damping: float) -> None:
        """Factorise ``GGᵀ/N + λI``.

        Raises:
            FactorizationError: If that is impossible; the step then keeps no coefficients.
        """
        self._cholesky = None
        if not self.rows:
            return
        gram = self.gram() / self.count
        if self.damping_scale == "relative":
            shift = damping * gram.diagonal().mean()
        else:
            shift = torch.as_tensor(damping, dtype=gram.dtype, device=gram.device)
        self._cholesky = linalg.cholesky(linalg.add_to_diagonal(gram, shift))

    def solve_coefficients(self, coordinates: Tensor | None) -> Tensor | None:
        """Return the coefficients of the present rows, ``(R,)``; None if there are none.

        Args:
            coordinates: ``u`` with ``∇L = Gᵀu``, ``(R, 1)``.
        """
        if self._cholesky is None or coordinates is None:
            return None
        u = coordinates.reshape(-1, 1).to(self._cholesky.dtype)
        if len(u) != len(self._cholesky):
            return None
        solution = torch.cholesky_solve(u, self._cholesky)
        ratio = torch.where(u != 0, solution / u, torch.ones_like(u))[:, 0]
        return ratio if bool(ratio.isfinite().all()) else None

    def weighted_gradient(
        self, gradients: dict[str, Tensor], coordinates: Tensor, coefficients: Tensor
    ) -> dict[str, Tensor]:
        """Return ``Σ_n c_n u_n g_n``, beside what the rows do not explain of the gradient."""
        u = coordinates.reshape(-1, 1).to(coefficients.dtype)
        plain = self._transposed_times(self.rows, u)
        average_over_replicas({"plain": plain})
        column = self.layout.to_flat({name: gradients[name] for name in self.names})
        rest, share = split_gradient(column.to(plain.dtype).unsqueeze(1), plain)
        weighted = self._transposed_times(self.rows, u * coefficients.unsqueeze(1) * share)
        return self.layout.to_dict((weighted + rest)[:, 0])

    def keep(self, coefficients: Tensor, indices: Tensor | None) -> None:
        """Keep the coefficients of a step.

        Args:
            coefficients: ``(R,)``, one backward pass after the other.
            indices: The samples' indices in the data set, ``(R,)``, for ``share="sample"``.
        """
        self._mean = self._ready = None
        for piece in coefficients.split([rows.samples for _, rows in self.rows]):
            mean = piece.mean()
            self.mean_sum = mean if self.mean_sum is None else self.mean_sum + mean
            self.batches += 1
            if self.share == "iteration":
                self.iterations = [*self.iterations, piece]
            elif self.share == "position":
                if self.position_sum is None:
                    self.position_sum, self.position_batches = piece, 1
                elif len(piece) == len(self.position_sum):
                    self.position_sum = self.position_sum + piece
                    self.position_batches += 1
        if self.share == "sample" and indices is not None:
            indices = indices.to(coefficients.device)
            size, table = int(indices.max()) + 1, self.table
            grown = coefficients.new_full(
                (max(size, 0 if table is None else len(table)),), float("nan")
            )
            if table is not None:
                grown[: len(table)] = table
            grown[indices] = coefficients
            self.table = grown

    def mean(self) -> Tensor | None:
        """Return the mean coefficient, a scalar, or None if none are kept."""
        if self._mean is None and self.mean_sum is not None:
            self._mean = self.mean_sum / self.batches
        return self._mean

    def coefficients(
        self, samples: int, iteration: int, indices: Tensor | None = None
    ) -> Tensor | None:
        """Return the coefficients of a batch, ``(N,)``, or ``(1,)`` where all are the mean.

        Args:
            samples: N. Batches of another size than the kept ones get the mean coefficient.
            iteration: Which batch it is, for ``share="iteration"``; after as many as are kept the
                first one comes again.
            indices: The samples' indices, for ``share="sample"``; those without a coefficient get
                the mean.
        """
        if self._ready is not None and len(self._ready) == samples:
            return self._ready
        mean = self.mean()
        if mean is None:
            return None
        found: Tensor | None = None
        if self.share == "position" and self.position_sum is not None:
            found = self._ready = self.position_sum / self.position_batches
        elif self.share == "iteration" and self.iterations:
            found = self.iterations[iteration % len(self.iterations)]
        elif self.share == "sample" and self.table is not None and indices is not None:
            indices = indices.to(self.table.device)
            known = self.table[indices.clamp(max=len(self.table) - 1)]
            known = torch.where(indices < len(self.table), known, torch.full_like(known, torch.nan))
            found = torch.where(known.isnan(), mean, known)
        return mean.reshape(1) if found is None or len(found) != samples else found

    def release(self) -> None:
        """Drop the rows of the step; only coefficients outlive it."""
        self.rows, self._gram, self._cholesky = [], None, None

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients."""
        return {
            "mean_sum": self.mean_sum,
            "batches": self.batches,
            "position_sum": self.position_sum,
            "position_batches": self.position_batches,
            "iterations": list(self.iterations),
            "table": self.table,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self._mean = self._ready = None
        self.batches, self.position_batches = state["batches"], state["position_batches"]
        self.iterations = [piece.to(device) for piece in state["iterations"]]
        for name in ("mean_sum", "position_sum", "table"):
            value = state[name]
            setattr(self, name, None if value is None else value.to(device))


@register_structure
class SharedCoefficientFisher(BlockDiagonalFisher):
    """The block of every layer for one batch; when it preconditions, its coefficients are kept.

    As an object it is the block-diagonal Fisher matrix. Rows must be multiples of the per-sample
    gradients, so ``fisher`` is ``"empirical"`` or ``"improved"``.

    Options:
        share: Which sample of a later batch a coefficient is for: ``"position"``, the one at the
            same position in the batch, by the mean over all batches seen; ``"iteration"``, the one
            at the same position of the same batch of an epoch, for loaders that do not shuffle;
            ``"sample"``, the same sample; or ``"mean"``, all, which is gradient descent with a
            learning rate for every layer.
        damping_scale: ``"absolute"``: λ is the damping; ``"relative"``: λ is damping times the
            mean of ``GGᵀ/N``'s diagonal, the mean eigenvalue.
        normalization: ``"layer"`` divides the coefficients of each batch and layer by their mean,
            ``"model"`` by their mean over all parameters, which keeps the layers' proportions, so
            that learning rates are those of gradient descent; ``"none"`` leaves them.
    """

    structure: ClassVar[str] = "shared_coefficients"

    def make_parts(
        self,
        share: Share = "position",
        damping_scale: DampingScale = "absolute",
        normalization: Normalization = "none",
        **options: Any,
    ) -> dict[str, CurvaturePart]:
        """Return one part per block.

        Raises:
            ValueError: If an option has an unknown value.
            TypeError: If an option is unknown.
        """
        refuse_options(self.structure, options)
        check_choice("share", share, "sample", "iteration", "position", "mean")
        check_choice("damping_scale", damping_scale, "relative", "absolute")
        check_choice("normalization", normalization, "none", "layer", "model")
        self.share, self.normalization = share, normalization
        #: Indices of the present step's samples in the data set, for ``share="sample"``.
        self.indices: Tensor | None = None
        self.coefficient_parts = {
            name: CoefficientPart(name, block, self.layout, share, damping_scale)
            for name, block in self.blocks.items()
        }
        return dict(self.coefficient_parts)

    def forget(self) -> None:
        """Drop all coefficients kept so far."""
        for part in self.coefficient_parts.values():
            part.forget()

    def means(self) -> dict[str, Tensor]:
        """Return block name → mean coefficient, where there is one."""
        means = {name: part.mean() for name, part in self.coefficient_parts.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def mean(self) -> Tensor:
        """Return the mean coefficient over all parameters whose layers have one; 1 if none has."""
        return self._weighted_mean(self.means())

    def _weighted_mean(self, means: dict[str, Tensor]) -> Tensor:
        sizes = {name: float(self.coefficient_parts[name].numel) for name in means}
        if not means:
            return torch.ones((), device=self.layout.device)
        total = torch.stack([value * sizes[name] for name, value in means.items()]).sum()
        return total / sum(sizes.values())

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return weighted gradients, and keep the coefficients of fresh rows.

        Layers without rows are scaled by their mean coefficient, or by that of the model.
        """
        result: dict[str, Tensor] = {}
        fresh = self._fresh_coefficients(source.coordinates)
        if fresh and self.share == "sample":
            count = len(next(iter(fresh.values())))
            if self.indices is None or len(self.indices) != count:
                given = 0 if self.indices is None else len(self.indices)
                raise ValueError(
                    f"share='sample' got indices of {given} samples for {count}: tell the samples' "
                    "indices in the data set before every forward pass"
                )
        for name, part in self.coefficient_parts.items():
            if name in fresh:
                assert source.coordinates is not None
                result.update(
                    part.weighted_gradient(source.gradients, source.coordinates, fresh[name])
                )
                part.keep(fresh[name], self.indices)
            part.release()
        return {**self.scaled(source.gradients, source.natural | set(fresh)), **result}

    def scaled(self, gradients: dict[str, Tensor], weighted: Set[str]) -> dict[str, Tensor]:
        """Return gradients times their layers' mean coefficients, or the model's where none is.

        Args:
            gradients: Parameter name → gradient; missing ones stay away.
            weighted: Blocks whose gradients are weighted already and stay as they are.
        """
        result = dict(gradients)
        typical: Tensor | None = None
        for name, part in self.coefficient_parts.items():
            if name in weighted:
                continue
            mean = part.mean()
            if mean is None:
                typical = mean = self.mean() if typical is None else typical
            result.update({n: gradients[n] * mean for n in part.names if n in gradients})
        return result

    def _fresh_coefficients(self, coordinates: Tensor | None) -> dict[str, Tensor]:
        solved = {n: p.solve_coefficients(coordinates) for n, p in self.coefficient_parts.items()}
        fresh = {name: value for name, value in solved.items() if value is not None}
        if self.normalization == "layer":
            fresh = {name: value / value.mean() for name, value in fresh.items()}
        elif self.normalization == "model" and fresh:
            scale = self._weighted_mean({name: value.mean() for name, value in fresh.items()})
            fresh = {name: value / scale for name, value in fresh.items()}
        return fresh
