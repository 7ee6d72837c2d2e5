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

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.arguments import check_choice
from natgrad.curvature.block_diagonal import BlockDiagonal
from natgrad.curvature.structure import Part
from natgrad.linalg import FactorizationError
from natgrad.operators import GradientSource
from natgrad.operators.rows import RowsOperator, split_gradient, transposed_times
from natgrad.optim.preconditioner import Preconditioner
from natgrad.records import Record
from natgrad.statistics.rows import Pieces, RowStatistics

Share = Literal["sample", "iteration", "position", "mean"]
DampingScale = Literal["relative", "absolute"]
Normalization = Literal["none", "layer", "model"]


@dataclass(frozen=True)
class SharedCoefficients(BlockDiagonal):
    """The block of every layer for one batch, in sample space, where the coefficients live.

    Rows must be multiples of the per-sample gradients, so the Fisher type is ``"empirical"`` or
    ``"improved"``.

    Attributes:
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

    Raises:
        ValueError: If an option has an unknown value.
    """

    name: ClassVar[str] = "shared_coefficients"
    rows_stay: ClassVar[bool] = False

    share: Share = "position"
    damping_scale: DampingScale = "absolute"
    normalization: Normalization = "none"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("share", self.share, "sample", "iteration", "position", "mean")
        check_choice("damping_scale", self.damping_scale, "relative", "absolute")
        check_choice("normalization", self.normalization, "none", "layer", "model")

    def row_limit(self, part: Part) -> None:
        """Return None: rows are never summed, as the coefficients live in sample space."""

    def solved_coefficients(
        self, matrix: RowsOperator, damping: float, coordinates: Tensor
    ) -> Tensor | None:
        """Return the coefficients of some rows, ``(R,)``; None if they are not finite.

        The matrix is ``GᵀG/N``, coordinates are ``u`` with ``∇L = Gᵀu``, ``(R, 1)``, zero for
        samples that do not count, which get the mean coefficient of those that do. A damped Gram
        matrix that cannot be factorised is a FactorizationError.
        """
        gram = matrix.mean_gram
        u = coordinates.reshape(-1, 1).to(gram.dtype)
        if len(u) != len(gram):
            return None
        counts = (u != 0)[:, 0]
        number = counts.sum().clamp(min=1)
        shift: Tensor | float = damping
        if self.damping_scale == "relative":
            shift = damping * gram.diagonal().sum() / number
        factor = linalg.cholesky(linalg.add_to_diagonal(gram, shift))
        solution = torch.cholesky_solve(u, factor)
        ratio = torch.where(counts, (solution / u)[:, 0], 0.0)
        mean = torch.where(counts.any(), ratio.sum() / number, 1.0)
        ratio = torch.where(counts, ratio, mean)
        return ratio if bool(ratio.isfinite().all()) else None


@dataclass(frozen=True, eq=False)
class Coefficients(Record):
    """The coefficients kept of one block; further ones make a new record.

    Attributes:
        share: What they are for; see :class:`SharedCoefficients`.
        mean_sum: Sum of the batches' mean coefficients.
        batches: Their number.
        position_sum: Sum of coefficients by position in the batch.
        position_batches: Their number.
        iterations: Coefficients batch by batch.
        table: Coefficients by index in the data set; NaN for samples not seen.
    """

    share: Share
    mean_sum: Tensor | None = None
    batches: int = 0
    position_sum: Tensor | None = None
    position_batches: int = 0
    iterations: tuple[Tensor, ...] = ()
    table: Tensor | None = None

    def with_batches(
        self, passes: Sequence[Tensor], mean: Tensor | None, indices: Tensor | None
    ) -> Coefficients:
        """Return the record with the coefficients of a step, ``(N,)`` for each backward pass.

        The mean is one with the samples of other processes, by default that of each pass. The
        samples' indices in the data set, ``(R,)``, are for ``share="sample"``.
        """
        result = self
        for piece in passes:
            own = piece.mean() if mean is None else mean
            total = own if result.mean_sum is None else result.mean_sum + own
            result = replace(result, mean_sum=total, batches=result.batches + 1)
            if self.share == "iteration":
                result = replace(result, iterations=(*result.iterations, piece))
            elif self.share == "position":
                if result.position_sum is None:
                    result = replace(result, position_sum=piece, position_batches=1)
                elif len(piece) == len(result.position_sum):
                    result = replace(
                        result,
                        position_sum=result.position_sum + piece,
                        position_batches=result.position_batches + 1,
                    )
        if self.share == "sample" and indices is not None and passes:
            found = torch.cat(list(passes))
            result = replace(result, table=self._grown_table(found, indices.to(found.device)))
        return result

    def _grown_table(self, found: Tensor, indices: Tensor) -> Tensor:
        known = 0 if self.table is None else len(self.table)
        grown = found.new_full((max(int(indices.max()) + 1, known),), float("nan"))
        if self.table is not None:
            grown[:known] = self.table
        grown[indices] = found
        return grown

    @cached_property
    def mean(self) -> Tensor | None:
        """The mean coefficient, a scalar, or None if none are kept."""
        return None if self.mean_sum is None else self.mean_sum / self.batches

    @cached_property
    def _by_position(self) -> Tensor | None:
        return None if self.position_sum is None else self.position_sum / self.position_batches

    def of_batch(
        self, samples: int, iteration: int, indices: Tensor | None = None
    ) -> Tensor | None:
        """Return the coefficients of a batch, ``(N,)``, or ``(1,)`` where all are the mean.

        Batches of another size than the kept ones, and samples without a coefficient, get the mean.
        After as many iterations as are kept the first one comes again.
        """
        mean = self.mean
        if mean is None:
            return None
        found: Tensor | None = None
        if self.share == "position":
            found = self._by_position
        elif self.share == "iteration" and self.iterations:
            found = self.iterations[iteration % len(self.iterations)]
        elif self.share == "sample" and self.table is not None and indices is not None:
            indices = indices.to(self.table.device)
            known = self.table[indices.clamp(max=len(self.table) - 1)]
            known = torch.where(indices < len(self.table), known, torch.full_like(known, torch.nan))
            found = torch.where(known.isnan(), mean, known)
        return mean.reshape(1) if found is None or len(found) != samples else found


class CoefficientPreconditioner(Preconditioner):
    """Weighs gradients by coefficients: those of the present rows, or those kept.

    Attributes:
        coefficients: Block name → what is kept.
        indices: Indices of the present step's samples in the data set, for ``share="sample"``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        structure = self.curvature.structure
        assert isinstance(structure, SharedCoefficients)
        self.structure = structure
        self.indices: Tensor | None = None
        self._kept: dict[str, Coefficients] | None = None

    def forget(self) -> None:
        """Drop all coefficients kept so far."""
        self.coefficients: dict[str, Coefficients] = {}
        self._plan_layers()

    def _plan_layers(self) -> None:
        super()._plan_layers()
        structure, known = self.curvature.structure, getattr(self, "coefficients", {})
        assert isinstance(structure, SharedCoefficients)
        # Those of layers that are frozen now stay.
        empty = dict.fromkeys(self.curvature.blocks, Coefficients(structure.share))
        self.coefficients = {**empty, **known}

    def means(self) -> dict[str, Tensor]:
        """Return block name → mean coefficient, where there is one."""
        means = {name: self.coefficients[name].mean for name in self.curvature.blocks}
        return {name: mean for name, mean in means.items() if mean is not None}

    def _weighted_mean(self, means: Mapping[str, Tensor]) -> Tensor:
        """Return the mean coefficient over all parameters whose layers have one; 1 if none has."""
        sizes = {name: float(self.curvature.blocks[name].numel) for name in means}
        if not means:
            return torch.ones((), device=self.capture.layout.device)
        total = torch.stack([value * sizes[name] for name, value in means.items()]).sum()
        return total / sum(sizes.values())

    def natural_gradient(
        self,
        gradients: dict[str, Tensor],
        *,
        backpropagated: bool = True,
        carefully: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return weighted gradients, and keep the coefficients of fresh rows.

        Layers without rows are scaled by their mean coefficient, or by that of the model.
        """
        complete = {
            name: gradients[name] if name in gradients else torch.zeros_like(p)
            for name, p in self.parameters.items()
            if name in self.capture.layout.offsets
        }
        source = GradientSource(complete)
        with torch.no_grad():
            self.update_curvature()
            self.drop_unusable()
            self._complete_source(source, backpropagated, by_rows=False)
            fresh, rows = self._fresh(source.coordinates)
            if fresh and self.structure.share == "sample":
                self._check_indices(sum(self._own_samples()))
            result: dict[str, Tensor] = {}
            if self._kept is None:
                self._kept = self.coefficients
            for name, found in fresh.items():
                assert source.coordinates is not None
                result.update(_weighted(rows[name], complete, source.coordinates, found))
                passes, mean = self._own_passes(rows[name].pieces, found)
                kept = self.coefficients[name].with_batches(passes, mean, self.indices)
                self.coefficients = {**self.coefficients, name: kept}
            natural = {**self.scaled(complete, source.natural | set(fresh)), **result}
            for name, present in self.curvature.estimates.items():  # Only coefficients outlive it.
                self.curvature.estimates[name] = replace(present, average=None, batch=None)
        return natural, torch.tensor(0.0)

    def scaled(self, gradients: dict[str, Tensor], weighted: Set[str]) -> dict[str, Tensor]:
        """Return gradients times their layers' mean coefficients, or the model's where none is.

        Blocks that are weighted already stay as they are.
        """
        result = dict(gradients)
        typical: Tensor | None = None
        for name, block in self.curvature.blocks.items():
            if name in weighted:
                continue
            mean = self.coefficients[name].mean
            if mean is None:
                typical = self._weighted_mean(self.means()) if typical is None else typical
                mean = typical
            result.update({n: gradients[n] * mean for n in block.names if n in gradients})
        return result

    def _fresh(
        self, coordinates: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, RowsOperator]]:
        """Return the coefficients of this step's rows, and the rows, by block."""
        fresh: dict[str, Tensor] = {}
        rows: dict[str, RowsOperator] = {}
        if coordinates is None:
            return fresh, rows
        for name, present in self.curvature.estimates.items():
            if not isinstance(present.average, RowStatistics):
                continue
            operator = self.curvature.operator(name)
            assert isinstance(operator, RowsOperator)
            damping = self.damping[name] if isinstance(self.damping, dict) else self.damping
            try:
                found = self.structure.solved_coefficients(operator, damping, coordinates)
            except FactorizationError as error:
                self.curvature.warn_kept(name, error)
                continue
            if found is not None:
                fresh[name], rows[name] = found, operator
        if self.structure.normalization == "layer":
            fresh = {name: value / value.mean() for name, value in fresh.items()}
        elif self.structure.normalization == "model" and fresh:
            scale = self._weighted_mean({name: value.mean() for name, value in fresh.items()})
            fresh = {name: value / scale for name, value in fresh.items()}
        return fresh, rows

    def _own_samples(self) -> list[int]:
        """Return the numbers of samples of the passes of this process."""
        outputs = (one.recorded.output for one in self.observer.seen if not one.is_empty)
        return [len(output) for output in outputs if output is not None]

    def _own_passes(self, pieces: Pieces, found: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return the coefficients of this process's passes, and the mean of all processes'."""
        each = found.split([rows.samples for _, rows in pieces])
        if self.replicas.are_alone:
            return each, None
        passes = [count for (count,) in self.replicas.told([len(self._own_samples())], self.device)]
        first = sum(passes[: self.replicas.rank])
        return each[first : first + len(self._own_samples())], found.mean()

    def _check_indices(self, count: int) -> None:
        given = 0 if self.indices is None else len(self.indices)
        if given != count:
            raise ValueError(
                f"share='sample' got indices of {given} samples for {count}: tell the samples' "
                "indices in the data set before every forward pass"
            )

    # The end of a step.

    def finish(self) -> None:
        """End the step: keep what it found."""
        self._kept = None
        super().finish()

    def skip(self) -> None:
        """Abandon the step: take back what it found."""
        if self._kept is not None:
            self.coefficients, self._kept = self._kept, None
        super().skip()

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return the state, coefficients included."""
        state = super().state_dict()
        kept = {name: one.state_dict() for name, one in self.coefficients.items()}
        return {**state, "coefficients": kept}

    def blocks_without_rows(self) -> dict[str, str]:
        """Return block name → why it has no gradient; layers without rows take the mean."""
        return self.capture.sources.unavailable

    def checked(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Return what restores a state; see :meth:`natgrad.Preconditioner.checked`."""
        rest, device = super().checked(state), self.capture.layout.device
        types = {name: part.dtype for name, part in self.curvature.parts.items()}
        coefficients = {
            name: Record.from_state(one, device).to(dtype=types.get(name))
            for name, one in state["coefficients"].items()
        }

        def restore() -> None:
            rest()
            self.coefficients = coefficients

        return restore


def _weighted(
    operator: RowsOperator,
    gradients: dict[str, Tensor],
    coordinates: Tensor,
    found: Tensor,
) -> dict[str, Tensor]:
    """Return ``Σ_n c_n u_n g_n``, beside what the rows do not explain of the gradient."""
    u = coordinates.reshape(-1, 1).to(found.dtype)
    plain = transposed_times(operator.pieces, u)
    column = operator.layout.to_flat({name: gradients[name] for name in operator.layout.names})
    rest, share = split_gradient(column.to(plain.dtype).unsqueeze(1), plain)
    weighted = transposed_times(operator.pieces, u * found.unsqueeze(1) * share)
    return operator.layout.to_dict((weighted + rest)[:, 0])
