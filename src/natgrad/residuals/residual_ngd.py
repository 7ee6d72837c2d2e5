"""Natural gradient descent on residual losses, full batch."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.arguments import check_choice, check_interval, check_range, check_rate
from natgrad.curvature import Curvature, Structure, as_structure
from natgrad.curvature.full import ExactRows
from natgrad.jacobians import Jacobians
from natgrad.operators import GradientSource
from natgrad.optim.checkpoints import CheckpointedOptimizer, only_initialises
from natgrad.optim.copying import CopiedByState
from natgrad.optim.step.levenberg_marquardt import by_reduction_ratio
from natgrad.optim.step.line_search import LineSearch
from natgrad.residuals.residual import Residual, as_residuals
from natgrad.residuals.rows import CapturedRows, FunctionRows, ResidualRows
from natgrad.residuals.taylor import TaylorNetwork
from natgrad.solvers import ConjugateGradient, IterativeSolver, Solver, TruncatedEigh

__all__ = ["ResidualNGD", "ResidualStep"]

#: Share of Δ at which residuals are evaluated for their second derivative along it.
PROBE = 0.1

#: ``‖Δ'‖/‖Δ‖`` beyond which Δ' is no correction (Transtrum & Sethna 2012).
LARGEST_BEND = 0.75

DampingRule = Literal["step_length", "reduction_ratio", "loss", "fixed"]


@dataclass(frozen=True)
class ResidualStep:
    """What the last step did.

    Attributes:
        loss: ``L(θ)`` before it.
        loss_after: The loss at its end; that before it if nothing moved.
        length: How far it went along the direction; 0 if nothing moved.
        damping: λ it was computed with.
        slope: ``⟨Δ, ∇L⟩``, the decrease per unit of length at the start.
    """

    loss: float
    loss_after: float
    length: float
    damping: float
    slope: float


class ResidualNGD(CheckpointedOptimizer, CopiedByState):
    r"""Natural gradient descent on a loss of residuals at points, as of physics-informed networks.

    .. math:: L = \sum_b \frac{w_b}{2N_b} \sum_n \|r_{bn}\|^2, \qquad
              F = \sum_b \frac{w_b}{N_b} \sum_n J_{bn}^\top J_{bn}, \qquad
              \theta \leftarrow \theta - t \Delta - \tfrac{t^2}{2} \Delta', \quad
              \Delta = (\hat F + \lambda I)^{-1} \nabla L, \quad
              \Delta' = (\hat F + \lambda I)^{-1} J^\top \rho''

    ``step()`` needs neither a closure nor a backward pass: the loss, its gradient and the exact
    rows come from the residuals themselves. The step length t is searched for, and λ follows it. A
    step that meets NaN or infinite numbers, or finds no descent, moves nothing, raises λ and says
    so once.

    Full-batch problems of this kind are badly conditioned: use float64.

    Args:
        model: The network: any module for ``jacobians="vmap"``, a :class:`natgrad.TaylorNetwork`
            for either way.
        residuals: The parts of the loss by name, or one :class:`natgrad.Residual`. Their points
            and weights may be changed between steps.
        structure: Structure of the Fisher matrix, or its name: ``"full"``, ``"block_diagonal"``,
            or with captured rows any other.
        jacobians: ``"captured"`` takes factored rows from a network that propagates derivatives,
            much the faster; ``"vmap"`` differentiates the residual functions by
            :mod:`torch.func`, point by point in batches. By default captured where the model is a
            TaylorNetwork.
        solver: ``"direct"``; ``"eigh"``, an eigendecomposition without the eigenvalues below 1e-12
            of the largest; ``"conjugate_gradient"``, which forms no matrix, to a residual of 1e-6
            in 500 iterations at most; or a :class:`natgrad.solvers.Solver` with options of its own.
            All but the first are for the exact structures.
        lr: First step length tried.
        damping: λ to begin with, in the units of F.
        damping_rule: ``"step_length"``: λ falls after steps of at least half of ``lr`` and rises
            after those below a quarter; ``"reduction_ratio"``: it falls where the loss fell by more
            than ¾ of what the quadratic model predicts for a step of length ``lr``, and rises below
            ¼ (Levenberg and Marquardt; for the full matrix, as steps of others are longer than that
            model trusts); ``"loss"``: ``λ = damping · L``, which vanishes with the loss (Yamashita
            & Fukushima 2001); ``"fixed"``.
        damping_decay: Factor on λ where it falls, and by whose inverse it rises.
        damping_range: Least and largest λ.
        momentum: μ of the last step Δ₀: Δ minimises ``½‖JΔ − ρ‖² + ½λ‖Δ − μΔ₀‖²`` (Goldshlager,
            Abrahamsen & Lin 2024, "SPRING"). It accumulates what single batches of changing points
            tell; with fixed points it changes little.
        line_search: How the step length is searched for, or None for steps of length ``lr``.
        acceleration: Bend steps by Δ', with ρ″ the second derivative of the residuals along Δ, from
            one more evaluation of them (Transtrum & Sethna 2012, "geodesic acceleration"). It is
            left out where ``‖Δ'‖ > ¾‖Δ‖``, and with solvers that iterate. Far from a solution it
            changes little, near to one it saves most of the steps.
        chunk_size: Points differentiated at a time, which bounds memory; chosen by the number of
            parameters by default.

    Attributes:
        last: What the last step did, a :class:`ResidualStep`; None before the first.

    Raises:
        TypeError: If model or residuals are of the wrong kind.
        ValueError: If an option is out of range or two exclude each other.

    Source: Müller & Zeinhofer, Achieving high accuracy with PINNs via energy natural gradient
    descent (2023); for squared residuals it is the Gauss-Newton method.

    Example:
        >>> def poisson(u, x, f):
        ...     return -u.laplacian - f
        >>> model = natgrad.TaylorNetwork(network.double(), laplacian=True)
        >>> optimizer = natgrad.ResidualNGD(model, natgrad.Residual(poisson, points, source))
        >>> for _ in range(100):
        ...     loss = optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        residuals: Residual | Mapping[str, Residual],
        *,
        structure: str | Structure = "full",
        jacobians: Literal["captured", "vmap"] | None = None,
        solver: str | Solver = "direct",
        lr: float | Tensor = 1.0,
        damping: float = 1e-2,
        damping_rule: DampingRule = "step_length",
        damping_decay: float = 0.3,
        damping_range: tuple[float, float] = (1e-14, 1e3),
        momentum: float = 0.0,
        line_search: LineSearch | None = LineSearch(max_trials=30),  # noqa: B008, frozen
        acceleration: bool = True,
        chunk_size: int | None = None,
    ) -> None:
        check_rate("lr", lr)
        check_range("damping", damping)
        check_range("momentum", momentum, below=1.0)
        check_choice("damping_rule", damping_rule, "step_length", "reduction_ratio", "loss",
                     "fixed")  # fmt: skip
        if not 0 < damping_decay < 1:
            raise ValueError(f"damping_decay must be in (0, 1), got {damping_decay}")
        if not 0 <= damping_range[0] <= damping_range[1] < math.inf:
            raise ValueError(f"damping_range must hold 0 <= least <= largest, got {damping_range}")
        if chunk_size is not None:
            check_interval("chunk_size", chunk_size)
        if jacobians is None:
            jacobians = "captured" if isinstance(model, TaylorNetwork) else "vmap"
        check_choice("jacobians", jacobians, "captured", "vmap")
        if line_search is not None and not isinstance(line_search, LineSearch):
            raise ValueError(
                f"line_search must be a natgrad.LineSearch or None, got {line_search!r}"
            )
        self.residuals = as_residuals(residuals)
        source = CapturedRows if jacobians == "captured" else FunctionRows
        self.rows: ResidualRows = source(model, self.residuals, chunk_size)
        blocks = {name: block.layout for name, block in self.rows.blocks.items()}
        self.curvature = Curvature(_structure(structure, solver), blocks, self.rows.layout)
        self.line_search = line_search
        iterates = isinstance(self.curvature.structure.solver, IterativeSolver)
        self.acceleration = acceleration and not iterates
        self.damping_rule, self.damping_decay = damping_rule, damping_decay
        self.damping_range = damping_range
        self.last: ResidualStep | None = None
        self._warned = False
        defaults = {"lr": lr, "damping": damping, "momentum": momentum}
        super().__init__(list(self.rows.parameters.values()), defaults)
        if self.rows.layout.dtype != torch.float64:
            warnings.warn(
                "ResidualNGD solves badly conditioned systems: in float32 it stops far from the "
                "solution; use model.double() and points in float64",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse further groups: the step is one for all parameters.

        Raises:
            ValueError: If there is a group already.
        """
        if self.param_groups:
            raise ValueError("ResidualNGD takes one step for all parameters: it has no groups")
        super().add_param_group(param_group)

    def loss(self) -> float:
        """Return ``L(θ)`` at the present parameters, without a graph."""
        return float(self.rows.loss())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: None: the residuals are all there is to evaluate.

        Returns:
            The loss before the step.

        Raises:
            ValueError: If a closure is given.
        """
        if closure is not None:
            raise ValueError("ResidualNGD.step() takes no closure: it evaluates the residuals")
        if only_initialises(self):
            self._mark()
            if self.param_groups[0]["momentum"]:
                self._keep(self.rows.layout.zeros(self.rows.layout.numel))
            return self.loss()
        saved = self.curvature.snapshot()
        group = self.param_groups[0]
        damping, lr = group["damping"], float(group["lr"])
        previous = self._previous() if group["momentum"] else None
        try:
            gathered = self._gather(group["momentum"], previous)
            loss = gathered.loss
            if self.damping_rule == "loss":
                damping = self._clipped(damping * loss) if math.isfinite(loss) else damping
            direction = slope = bend = None
            if gathered.finite:
                self.curvature.join(0.0)
                self.curvature.refresh(damping)
                direction, slope = self._direction(gathered, group["momentum"], previous)
            if direction is not None and self.acceleration:
                bend = self._bend(direction, gathered)
        except BaseException:
            self.curvature.rollback(saved)  # Of no step may rows be left over for the next one.
            raise
        if direction is None or slope is None:
            self.curvature.rollback(saved)
            self._refuse(loss, damping)
            return loss
        length, after = self._move(direction, bend, slope, loss, lr)
        if group["momentum"]:
            moved = length * direction
            self._keep(moved if bend is None else moved + 0.5 * length**2 * bend)
        self.last = ResidualStep(loss, after, length, damping, slope)
        self._adapt(direction, gathered)
        return loss

    # Parts of a step.

    def _gather(self, momentum: float, previous: Tensor | None) -> _Gathered:
        """Sum the rows; return loss, gradient and what momentum makes of it."""
        layout = self.rows.layout
        gradient, adjusted = layout.zeros(layout.numel), layout.zeros(layout.numel)
        chunks: list[tuple[Jacobians | None, Tensor | None, Tensor | None]] = []
        square = 0.0
        for share, values, rows in self.rows.chunks():
            square += float(values.square().sum())
            if not math.isfinite(square):
                return _Gathered(0.5 * square, False, gradient, adjusted, None, None, None)
            rho = values
            gradient = gradient + rows.rmatvec(values)
            if previous is not None:
                rho = values - momentum * rows.matvec(previous)
                adjusted = adjusted + rows.rmatvec(rho)
            self.curvature.observe(rows, share)
            chunks.append((rows, rho, values))
            if len(chunks) > 1:  # Only their sums are kept.
                chunks = [(None, None, None)]
        if previous is None:
            adjusted = gradient
        finite = bool(torch.isfinite(gradient).all())
        at_once, coordinates, residuals = chunks[0]
        return _Gathered(0.5 * square, finite, gradient, adjusted, coordinates, at_once, residuals)

    def _direction(
        self, gathered: _Gathered, momentum: float, previous: Tensor | None
    ) -> tuple[Tensor | None, float | None]:
        """Return Δ and ``⟨Δ, ∇L⟩``, or Nones where it is not finite or does not descend."""
        direction = self._precondition(gathered.adjusted, gathered.coordinates)
        if previous is not None:
            direction = direction + momentum * previous
        slope = float(direction @ gathered.gradient)
        if previous is not None and not slope > 0:  # Momentum that leads uphill is dropped.
            direction = self._precondition(gathered.gradient, None)
            slope = float(direction @ gathered.gradient)
        if not (math.isfinite(slope) and slope >= 0 and bool(torch.isfinite(direction).all())):
            return None, None
        return direction, slope

    def _precondition(self, gradient: Tensor, coordinates: Tensor | None) -> Tensor:
        layout = self.rows.layout
        source = GradientSource(layout.to_dict(gradient), coordinates=coordinates)
        natural = self.curvature.natural_gradient(source)
        return layout.to_flat({name: natural[name] for name in layout.names}).to(layout.dtype)

    def _bend(self, direction: Tensor, gathered: _Gathered) -> Tensor | None:
        """Return Δ', or None where it is not finite or too long to be a correction."""
        start = self.rows.layout.to_flat(self.rows.parameters).clone()
        try:
            self._set(start - PROBE * direction)
            ahead = list(self.rows.scaled_values())
        finally:
            self._set(start)
        bent, second = self.rows.layout.zeros(self.rows.layout.numel), None
        chunks: Iterable[tuple[Tensor, Jacobians]] = (one[1:] for one in self.rows.chunks())
        if gathered.rows is not None and gathered.values is not None:
            chunks = [(gathered.values, gathered.rows)]
        for (values, rows), after in zip(chunks, ahead, strict=True):
            second = (2.0 / PROBE) * ((after - values) / PROBE + rows.matvec(direction))
            bent = bent + rows.rmatvec(second)
        if not bool(torch.isfinite(bent).all()):
            return None
        bend = self._precondition(bent, None if gathered.rows is None else second)
        return bend if bool(bend.norm() <= LARGEST_BEND * direction.norm()) else None

    def _set(self, flat: Tensor) -> None:
        for name, value in self.rows.layout.to_dict(flat).items():
            self.rows.parameters[name].copy_(value)

    def _move(
        self, direction: Tensor, bend: Tensor | None, slope: float, before: float, lr: float
    ) -> tuple[float, float]:
        """Move along the direction and its bend; return how far and the loss there."""
        start = self.rows.layout.to_flat(self.rows.parameters).clone()

        def move(length: float) -> None:
            end = start - length * direction
            self._set(end if bend is None else end - 0.5 * length**2 * bend)

        if self.line_search is not None:
            return self.line_search.search(move, self.loss, before, slope, lr)
        move(lr)
        after = self.loss()
        if math.isfinite(after):
            return lr, after
        move(0.0)
        return 0.0, before

    def _adapt(self, direction: Tensor, gathered: _Gathered) -> None:
        """Choose the next λ by what the step did."""
        assert self.last is not None
        length, group = self.last.length, self.param_groups[0]
        lr = float(group["lr"])
        if self.damping_rule in ("fixed", "loss"):
            return
        damping, decay = group["damping"], self.damping_decay
        if self.damping_rule == "step_length":
            relative = length / lr if lr else 0.0
            factor = decay if relative >= 0.5 else 1 / decay if relative < 0.25 else 1.0
            damping *= factor
        else:
            curvature = self._curvature(direction, gathered)
            # Of a whole step: short ones always keep what the model promises.
            predicted = 0.5 * lr**2 * curvature - lr * self.last.slope
            actual = self.last.loss_after - self.last.loss
            damping = by_reduction_ratio(damping, actual, predicted, decay)
        if damping != group["damping"]:
            group["damping"] = self._clipped(damping)

    def _curvature(self, direction: Tensor, gathered: _Gathered) -> float:
        """Return ``ΔᵀFΔ`` with the exact Fisher matrix where its rows are at hand."""
        if gathered.rows is not None:
            return float(gathered.rows.matvec(direction).square().sum())
        return float(direction @ (self.curvature.matrix() @ direction))

    def _clipped(self, damping: float) -> float:
        least, largest = self.damping_range
        return min(largest, max(least, damping))

    def _refuse(self, loss: float, damping: float) -> None:
        """Move nothing, damp more, and say so once."""
        group = self.param_groups[0]
        if self.damping_rule not in ("fixed", "loss"):
            group["damping"] = self._clipped(damping / self.damping_decay)
        self.last = ResidualStep(loss, loss, 0.0, damping, math.nan)
        if self._warned:
            return
        self._warned = True
        bad = [n for n, v in self.rows.values().items() if not bool(torch.isfinite(v).all())]
        why = f"residuals of {', '.join(map(repr, bad))} are" if bad else "the natural gradient is"
        warnings.warn(
            f"a step of ResidualNGD was skipped, as {why} not finite; parameters are as before",
            stacklevel=4,
        )

    # Momentum and checkpoints.

    def _previous(self) -> Tensor | None:
        """Return the last step Δ₀, flat, or None before the first."""
        states = [self.state[p] for p in self.rows.parameters.values()]
        if not all("previous_step" in state for state in states):
            return None
        return torch.cat([s["previous_step"].reshape(-1) for s in states]).to(
            self.rows.layout.dtype
        )

    def _keep(self, moved: Tensor) -> None:
        for name, step in self.rows.layout.to_dict(moved).items():
            self.state[self.rows.parameters[name]]["previous_step"] = step.clone()

    def _own_state(self) -> dict[str, Any]:
        """Return what solvers start from: with the same residuals a resumed run is the same."""
        return self.curvature.state_dict()

    def _checked(self, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Callable[[], None]:
        estimates = self.curvature.restored(own)

        def restore() -> None:
            self.curvature.estimates = estimates

        return restore


@dataclass(frozen=True)
class _Gathered:
    """What the residuals say at the present parameters.

    Attributes:
        loss: ``L(θ)``.
        finite: Whether residuals and gradient are.
        gradient: ``∇L = Jᵀρ``, flat.
        adjusted: ``Jᵀ(ρ − μJΔ₀)``, what is preconditioned.
        coordinates: ``ρ − μJΔ₀``, where all rows were had at once.
        rows: J, likewise.
        values: ρ, likewise.
    """

    loss: float
    finite: bool
    gradient: Tensor
    adjusted: Tensor
    coordinates: Tensor | None
    rows: Jacobians | None
    values: Tensor | None


def _structure(structure: str | Structure, solver: str | Solver) -> Structure:
    """Return the structure with the solver asked for.

    Raises:
        ValueError: If the structure does not take the solver.
    """
    chosen = as_structure(structure, training=True)
    if solver == "direct":
        return chosen
    if not isinstance(chosen, ExactRows):
        raise ValueError(
            f"solver={solver!r} needs structure 'full' or 'block_diagonal', got {structure!r}: use "
            "solver='direct'"
        )
    known: dict[str, Solver] = {
        "eigh": TruncatedEigh(1e-12),
        "conjugate_gradient": ConjugateGradient(1e-6, 500),
    }
    if isinstance(solver, str):
        solver = known.get(solver, solver)
    return dataclasses.replace(chosen, solver=solver)
