"""Natural gradient descent on residual losses, full batch."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.arguments import check_choice, check_integer, check_range, check_rate
from natgrad.capture.model_output import unwrap
from natgrad.curvature import Curvature, Structure, as_structure
from natgrad.curvature.full import ExactRows
from natgrad.distributed import Replicas
from natgrad.distributed.replicas import Place
from natgrad.jacobians import DenseJacobian, Jacobians, LayerJacobian
from natgrad.linalg import FactorizationError
from natgrad.operators import GradientSource, Operator
from natgrad.operators.rows import RowsInverse
from natgrad.optim.checkpoints import CheckpointedOptimizer, CopiedByState, only_initialises
from natgrad.optim.observer import ModelWatch
from natgrad.residuals.corrected_step import (
    CURVED_DECAY,
    STRAIGHT_DECAY,
    FoundStep,
    LinearStep,
    corrected,
    shortened,
)
from natgrad.residuals.residual import Residual, as_residuals
from natgrad.residuals.rows import CapturedRows, FunctionRows, ResidualRows
from natgrad.residuals.taylor import TaylorNetwork

#: The first λ, as a share of ``‖∇L‖²/‖ρ‖²``, the mean of ``JJᵀ`` along ρ, and the least one, as a
#: share of its largest value times the rounding error of 1.
FIRST_DAMPING, LEAST_DAMPING = 1e-3, 1e-2

#: Values of λ that one step tries at most, and steps without success after which that is said.
MOST_TRIALS, PATIENCE = 10, 10


@dataclass(frozen=True)
class ResidualStep:
    """What the last step did.

    Attributes:
        loss: ``L(θ)`` before it.
        loss_after: The loss at its end; that before it if nothing moved.
        length: t; 0 if nothing moved.
        damping: λ it was computed with, or the last one tried if nothing moved.
        trials: Values of λ that were tried.
        corrections: How often it was corrected.
    """

    loss: float
    loss_after: float
    length: float
    damping: float
    trials: int
    corrections: int = 0


class ResidualNGD(CheckpointedOptimizer, CopiedByState):
    r"""Natural gradient descent on a loss of residuals at points, as of physics-informed networks.

    .. math:: L = \sum_b \frac{w_b}{2N_b} \sum_n \|r_{bn}\|^2 = \tfrac12 \|\rho\|^2, \qquad
              F = \sum_b \frac{w_b}{N_b} \sum_n J_{bn}^\top J_{bn} = J^\top J, \qquad
              \theta \leftarrow \theta + d

    .. math:: d \leftarrow -t\Delta
              - (\hat F + \lambda I)^{-1} J^\top (\rho(\theta + d) - \rho(\theta) - J d), \qquad
              \Delta = (\hat F + \lambda I)^{-1} \nabla L

    ``step()`` needs neither a closure nor a backward pass: the loss, its gradient and the exact
    rows come from the residuals themselves.

    There is nothing to tune. λ begins at ``10⁻³ ‖∇L‖²/‖ρ‖²``. A step begins as ``−tΔ − ½t²Δ'``, Δ'
    being its geodesic acceleration, and is then corrected by what residuals do beyond their linear
    model, with the matrix that is factorised already, until the loss falls by 0.9 of what the model
    promises or corrections help no more; ten at most. Where at most four were needed, λ falls by
    √10, to rounding errors of F at least. Where the loss does not fall, or the matrix cannot be
    factorised, the step is computed anew with √10 times the λ, from the same rows. So multiplying
    all residuals by a number, or choosing other units, changes no step. Where residuals are not
    finite, or 10 values of λ do not help, nothing moves and λ is raised; the first is said once,
    the second after 10 such steps in a row.

    Full-batch problems of this kind are badly conditioned: use float64.

    Several processes that have points of their own, each any number of them, take together the step
    that one takes with all points. All call ``step()`` and ``loss()``, and decide by the same
    numbers. Rows stay where they are made; each process has the whole matrix.

    Args:
        model: The network: any module for ``jacobians="vmap"``, a :class:`natgrad.TaylorNetwork`
            for either way; or either inside DistributedDataParallel.
        residuals: The parts of the loss by name, or one :class:`natgrad.Residual`. Their points
            and weights may be changed between steps.
        structure: Structure of the Fisher matrix, or its name: ``"full"``, ``"block_diagonal"``,
            or with captured rows any other. An instance may name a solver:
            ``natgrad.curvature.Full(solver=ConjugateGradient(1e-6, 500))`` forms no matrix.
        jacobians: ``"captured"`` takes factored rows from a network that propagates derivatives,
            all at once at all points, much the faster in few dimensions; ``"vmap"`` differentiates
            the residual functions by :mod:`torch.func`, point by point in batches. By default
            captured where the model is a TaylorNetwork, unless it has 32 derivatives or more and
            rows with more numbers factored than entry by entry, and the structure takes these: in
            many dimensions derivatives that no residual asks for are most of the work.
        lr: t; for schedules, as where points change.
        damping: λ to begin with, in the units of F; by default in those of the problem, see above.
        momentum: μ of the last step Δ₀: Δ minimises ``½‖JΔ − ρ‖² + ½λ‖Δ − μΔ₀‖²`` (Goldshlager,
            Abrahamsen & Lin 2024, "SPRING"). It accumulates what single batches of changing points
            tell; with fixed points it changes little. Where it does not lower the loss, the step is
            computed without.
        acceleration: Bend and correct steps, at one evaluation of the residuals and one solution
            each. Δ' is ``(F̂ + λI)⁻¹ Jᵀρ''`` with ρ'' the second derivative of the residuals along Δ
            (Transtrum & Sethna 2012, "geodesic acceleration"); with ``‖Δ'‖ > ¾‖Δ‖`` the step stays
            straight. The corrections are the simplified Newton iteration for
            ``min ½‖ρ(θ + d)‖² + ½λ‖d‖²`` (Deuflhard 2004): in narrow curved valleys, as those of
            physics-informed networks, they allow a λ that is smaller by orders of magnitude. False,
            and solvers that iterate: straight steps, whose lengths ``lr, lr/2, …, lr/32`` are tried
            until the loss falls by 10⁻⁴ of what the slope promises, where points are those of the
            last step, else lr alone; λ falls to a tenth after lengths of at least lr/2, and rises
            tenfold after those below lr/4 and where none lowers the loss.
        chunk_size: Points differentiated at a time; by default so many that a chunk takes 2²⁵
            numbers (256 MiB in float64) while it is differentiated, eight times its rows. A step of
            R residuals and P parameters takes about ``8 min(R, P)²`` numbers beside, for matrix and
            factors. Where R ≤ P the rows stay: factored, or ``R·P`` numbers by ``"vmap"``. Of
            several processes each has its own share of the rows alone, and R is that of all.
        process_group: Processes that train replicas of the model, each with points of its own; by
            default those that it is wrapped for in DistributedDataParallel, else none but this one.
            All have the same parts, weights and parameters.

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
        lr: float | Tensor = 1.0,
        damping: float | None = None,
        momentum: float = 0.0,
        acceleration: bool = True,
        chunk_size: int | None = None,
        process_group: Any = None,
    ) -> None:
        check_rate("lr", lr)
        if damping is not None and not 0 < damping < math.inf:
            raise ValueError(f"damping must be a finite number above 0, or None, got {damping}")
        check_range("momentum", momentum, below=1.0)
        if chunk_size is not None:
            check_integer("chunk_size", chunk_size)
        self.replicas: Replicas = Replicas.of(model, process_group)
        model = unwrap(model)
        chosen = as_structure(structure, training=True)
        if jacobians is None:
            jacobians = "vmap"
            if isinstance(model, TaylorNetwork) and not (
                isinstance(chosen, ExactRows) and model.has_large_stacks
            ):
                jacobians = "captured"
        check_choice("jacobians", jacobians, "captured", "vmap")
        self.residuals: dict[str, Residual] = as_residuals(residuals)
        source = CapturedRows if jacobians == "captured" else FunctionRows
        self._take_model(source(model, self.residuals, chunk_size, self.replicas), chosen)
        iterates = isinstance(chosen, ExactRows) and chosen.is_iterative
        self.acceleration: bool = acceleration and not iterates
        self._takes_dense_rows: bool = isinstance(chosen, ExactRows) and not iterates
        self.last: ResidualStep | None = None
        self._warned, self._without_success = False, 0
        self._seen: tuple[Any, list[Tensor]] | None = None
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "points_change": False}
        defaults |= {"scale": 0.0}
        super().__init__(list(self.rows.parameters.values()), defaults)
        if self.rows.layout.dtype != torch.float64:
            warnings.warn(
                "ResidualNGD solves badly conditioned systems: in float32 it stops far from the "
                "solution; use model.double() and points in float64",
                stacklevel=2,
            )

    def _take_model(self, rows: ResidualRows, structure: Structure) -> None:
        """Take the model as it is now, with what is trained of it in its type and place."""
        self.rows: ResidualRows = rows
        blocks = {name: block.layout for name, block in rows.blocks.items()}
        self.curvature: Curvature = Curvature(structure, blocks, rows.layout)
        self.curvature.replicas, self.curvature.rows_stay = self.replicas, structure.rows_stay
        self._watch = ModelWatch(rows.model)

    def _follow_model(self) -> None:
        """Look whether layers were frozen, unfrozen, moved or replaced since the last step."""
        if self._watch.sees_change():
            old = self.rows
            if isinstance(old, CapturedRows):
                old.capture.remove()
            rows = type(old)(old.model, self.residuals, old.chunk_size, self.replicas)
            self._take_model(rows, self.curvature.structure)
            self.param_groups[0]["params"] = list(rows.parameters.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse further groups: the step is one for all parameters.

        Raises:
            ValueError: If there is a group already.
        """
        if self.param_groups:
            raise ValueError("ResidualNGD takes one step for all parameters: it has no groups")
        super().add_param_group(param_group)

    def loss(self) -> float:
        """Return ``L(θ)`` at the present parameters, without a graph; all processes ask for it."""
        self.rows.agree()
        return self._loss()

    def _loss(self) -> float:
        """Return the loss at the points that processes have agreed on."""
        return float(self.rows.loss())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: None: the residuals are all there is to evaluate.

        Returns:
            The loss before the step.

        Raises:
            ValueError: If a closure is given, or processes have other parts or weights.
        """
        if closure is not None:
            raise ValueError("ResidualNGD.step() takes no closure: it evaluates the residuals")
        self._follow_model()
        keeps = bool(self.param_groups[0]["momentum"])
        if only_initialises(self):
            self._mark()
            if keeps:
                self._keep(self.rows.layout.zeros(self.rows.layout.numel))
            return self.loss()
        self._look_at_points()
        saved = self.curvature.snapshot()
        start = self.rows.layout.to_flat(self.rows.parameters).clone()
        try:
            here = self._linearised()
            if here is None:
                self.curvature.rollback(saved)
                return self._refuse()
            self.curvature.join(0.0)
            moved = self._search(start, here)
        except BaseException:
            self._set(start)
            self.curvature.rollback(saved)  # Of no step may rows be left over for the next one.
            raise
        if keeps:
            self._keep(moved)
        return here.loss

    def _look_at_points(self) -> None:
        """Note whether points, data or weights are others than those of the last step."""
        parts = list(self.residuals.values())
        tensors = [t for one in parts for t in (one.points, one.data) if t is not None]
        signature = [(id(t), t._version) for t in tensors], [one.weight for one in parts]
        change = self.rows.agree(self._seen is not None and signature != self._seen[0])
        if self._seen is not None:  # What a checkpoint says goes on.
            self.param_groups[0]["points_change"] = change
        self._seen = signature, tensors  # Kept, so that others get no number of theirs.
        each = [sum(own.values()) for own in self.rows.joint.each]
        rank = self.replicas.rank
        self.curvature.place = Place(sum(each[:rank]), each[rank], sum(each))

    # The linear model of the residuals.

    def _linearised(self) -> _Linearised | None:
        """Sum the rows at the present parameters; None where something is not finite."""
        layout, momentum = self.rows.layout, self.param_groups[0]["momentum"]
        previous = self._previous() if momentum else None
        gradient, adjusted = layout.zeros(layout.numel), layout.zeros(layout.numel)
        chunks: list[tuple[Tensor, Jacobians, Tensor] | None] = []
        square, at_once = 0.0, self.rows.come_at_once()
        for share, values, rows in self.rows.chunks():
            square += float(values.square().sum())
            if not math.isfinite(square):
                break  # So is the sum over processes, in all of them.
            if self._takes_dense_rows and rows.rows > layout.numel:
                rows = _formed(rows)
            gradient, rest = gradient + rows.rmatvec(values), values
            if previous is not None:
                rest = values - momentum * rows.matvec(previous)
                adjusted = adjusted + rows.rmatvec(rest)
            self.curvature.observe(rows, share)
            chunks = [None] if chunks else [(values, rows, rest)]  # Only sums of several are kept.
        square, gradient, adjusted = self._of_all(square, gradient, adjusted)
        if not math.isfinite(square) or not bool(torch.isfinite(gradient).all()):
            return None
        whole = chunks[0] if chunks else None
        known = whole if at_once else None
        plain = right = _RightSide(gradient, None if known is None else known[0], None)
        if previous is not None:
            coordinates = None if known is None else known[2]
            right = _RightSide(adjusted, coordinates, momentum * previous)
        rows_here = None if whole is None else whole[:2]
        return _Linearised(0.5 * square, plain, right, rows_here, at_once)

    def _of_all(
        self, square: float, gradient: Tensor, adjusted: Tensor
    ) -> tuple[float, Tensor, Tensor]:
        """Return ``‖ρ‖²``, ``∇L`` and the gradient that momentum adjusts, of all processes."""
        if self.replicas.are_alone:
            return square, gradient, adjusted
        total = self.replicas.added_up(gradient.new_tensor(square, dtype=torch.float64))
        gradients = self.replicas.added_up(torch.stack([gradient, adjusted]))
        return float(total), gradients[0], gradients[1]

    def _matrices(self) -> dict[str, Operator] | None:
        """Return the parts of F, from rows that all trials share; None for sums of other forms."""
        if not isinstance(self.curvature.structure, ExactRows):
            return None
        return {name: self.curvature.operator(name) for name in self.curvature.parts}

    # Trials.

    def _search(self, start: Tensor, here: _Linearised) -> Tensor:
        """Try values of λ until a step lowers the loss; return that step, or zero."""
        group = self.param_groups[0]
        lr, loss, right = float(group["lr"]), here.loss, here.right
        gradient, nothing = here.plain.gradient, torch.zeros_like(start)
        damping: float | None = group["damping"]
        if lr == 0 or not bool(gradient.any()):
            self.last = ResidualStep(loss, loss, 0.0, math.nan if damping is None else damping, 0)
            return nothing
        mean = float(gradient.square().sum()) / (2 * loss)  # Of JJᵀ along ρ.
        group["scale"] = max(group.get("scale", 0.0), mean)  # Older checkpoints have none.
        if damping is None:
            damping = FIRST_DAMPING * mean
        matrices, decay = self._matrices(), CURVED_DECAY if self.acceleration else STRAIGHT_DECAY
        least = LEAST_DAMPING * torch.finfo(start.dtype).eps * group["scale"]
        for trial in range(1, MOST_TRIALS + 1):
            tried = damping
            if self._factorise(matrices, tried):
                step, slope, square = self._direction(right, gradient, tried)
                if not slope > 0 and right is not here.plain:  # Momentum leads uphill.
                    right = here.plain
                    step, slope, square = self._direction(right, gradient, tried)
                found = None
                if slope > 0 and bool(torch.isfinite(step).all()):
                    found = self._found(LinearStep(start, step, slope, square, lr), here)
                if found is not None:
                    self._set(start + found.moved)
                    # Less than rounding errors of F would not be felt.
                    group["damping"] = max(tried * found.factor, least)
                    self.last = ResidualStep(
                        loss, found.loss, found.length, tried, trial, found.corrections
                    )
                    self._without_success = 0
                    return -found.moved
                if torch.equal(start - lr * step, start):
                    break  # More damping would change nothing.
            right = here.plain  # With λ a step with momentum tends to μΔ₀, which need not descend.
            damping = tried / decay
        self._set(start)
        group["damping"] = damping
        self.last = ResidualStep(loss, loss, 0.0, tried, trial)
        self._count_failure()
        return nothing

    def _found(self, linear: LinearStep, here: _Linearised) -> FoundStep | None:
        """Return what becomes of a linear step; None where the loss does not fall."""

        def move(moved: Tensor) -> None:
            self._set(linear.start + moved)

        def residuals_at(moved: Tensor) -> list[Tensor]:
            move(moved)
            return list(self.rows.scaled_values())

        if self.acceleration:
            deviation = functools.partial(self._deviation, linear.start, here)
            return corrected(linear, residuals_at, self._loss_of, deviation, here.loss)
        points_change = self.param_groups[0]["points_change"]
        return shortened(linear, move, self._loss, here.loss, points_change)

    def _loss_of(self, scaled: list[Tensor]) -> float:
        return float(self.rows.loss_of(scaled))

    def _factorise(self, matrices: dict[str, Operator] | None, damping: float) -> bool:
        """Make the inverses for a λ; return whether that was possible."""
        if matrices is None:
            self.curvature.refresh(damping)
            return True
        solver, estimates = self.curvature.structure.solver, self.curvature.estimates
        try:
            for name, matrix in matrices.items():
                inverse = matrix.inverse(damping, solver).continuing(estimates[name].inverse)
                estimates[name] = replace(estimates[name], inverse=inverse, damping=damping)
        except FactorizationError:
            return False
        return True

    def _direction(
        self, right: _RightSide, gradient: Tensor, damping: float
    ) -> tuple[Tensor, float, float]:
        """Return Δ, ``⟨Δ, ∇L⟩`` and ``ΔᵀFΔ``.

        ``(F + λI)Δ = ∇L + λμΔ₀``, so that ``ΔᵀFΔ`` needs no product with F.
        """
        step = self._precondition(lambda: right.gradient, right.coordinates)
        rest = step
        if right.shift is not None:
            step, rest = step + right.shift, step
        slope = float(step @ gradient)
        return step, slope, slope - damping * float(step @ rest)

    def _precondition(self, gradient: Callable[[], Tensor], coordinates: Tensor | None) -> Tensor:
        """Return ``(F + λI)⁻¹Jᵀu``; where u is known, in sample space, without ``Jᵀu``."""
        layout, natural = self.rows.layout, None
        if coordinates is not None:
            own = coordinates.reshape(-1, 1)
            coordinates = self.replicas.laid_end_to_end(own, self.rows.lengths())
            natural = self._in_sample_space(coordinates)
        in_sample_space = natural is not None
        if natural is None:
            source = GradientSource(layout.to_dict(gradient()), coordinates=coordinates)
            natural = self.curvature.natural_gradient(source)
        flat = layout.to_flat({name: natural[name] for name in layout.names}).to(layout.dtype)
        if not in_sample_space and not self.replicas.are_alone:
            # Processors that round differently would decide differently; sums agree as they are.
            self.replicas.follow_first([flat])
        return flat

    def _in_sample_space(self, coordinates: Tensor) -> dict[str, Tensor] | None:
        """Return ``Jᵀ(JJᵀ + λI)⁻¹u``, part by part; None where an inverse is of another form."""
        natural: dict[str, Tensor] = {}
        for name in self.curvature.parts:
            inverse = self.curvature.estimates[name].inverse
            found = None
            if isinstance(inverse, RowsInverse):
                found = inverse.of_coordinates(coordinates)
            if found is None:
                return None
            natural |= found
        return natural

    def _deviation(
        self, start: Tensor, here: _Linearised, moved: Tensor, ahead: list[Tensor]
    ) -> Tensor:
        """Return ``(F + λI)⁻¹Jᵀ(ρ(θ + d) − ρ − Jd)``, against what d does beyond its model."""
        if here.rows is not None:
            (values, rows), (after,) = here.rows, ahead
            beyond = after - values - rows.matvec(moved)
            return self._precondition(
                lambda: self.replicas.added_up(rows.rmatvec(beyond)),
                beyond if here.at_once else None,
            )
        self._set(start)  # Rows of several chunks are had once more.
        total = torch.zeros_like(start)
        for (_, values, rows), after in zip(self.rows.chunks(), ahead, strict=True):
            total = total + rows.rmatvec(after - values - rows.matvec(moved))
        total = self.replicas.added_up(total)
        return self._precondition(lambda: total, None)

    def _set(self, flat: Tensor) -> None:
        for name, value in self.rows.layout.to_dict(flat).items():
            self.rows.parameters[name].copy_(value)

    # Steps that move nothing.

    def _refuse(self) -> float:
        """Damp more, say once that residuals are not finite, and return the loss."""
        group, loss = self.param_groups[0], self._loss()
        damping = group["damping"]
        self.last = ResidualStep(loss, loss, 0.0, math.nan if damping is None else damping, 0)
        if damping is not None:
            group["damping"] = damping / CURVED_DECAY
        if group["momentum"]:
            self._keep(self.rows.layout.zeros(self.rows.layout.numel))
        if self._warned:
            return loss
        self._warned = True
        found = self.rows.values()
        flags = torch.stack([(~v.isfinite()).any().long() for v in found.values()])
        flags = self.replicas.added_up(flags)
        bad = [name for name, flag in zip(found, flags.tolist(), strict=True) if flag]
        why = f"residuals of {', '.join(map(repr, bad))} are" if bad else "their gradient is"
        warnings.warn(
            f"a step of ResidualNGD was skipped, as {why} not finite; parameters are as before",
            stacklevel=4,
        )
        return loss

    def _count_failure(self) -> None:
        """Say it once if no step has lowered the loss for a while."""
        self._without_success += 1
        if self._without_success == PATIENCE:
            assert self.last is not None
            warnings.warn(
                f"the last {PATIENCE} steps of ResidualNGD found no decrease of the loss "
                f"{self.last.loss:.3g}: training has come as far as the accuracy of "
                f"{self.rows.layout.dtype} allows, or the residuals are not smooth here",
                stacklevel=5,
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


def _formed(rows: Jacobians) -> Jacobians:
    """Return rows entry by entry: those that are summed are formed anyway, once is enough."""
    dense: dict[str, LayerJacobian] = {
        name: block
        if isinstance(block, DenseJacobian)
        else DenseJacobian(
            block.layout, block.to_dense().unflatten(0, (rows.samples, rows.directions))
        )
        for name, block in rows.items()
    }
    return Jacobians(rows.layout, dense, rows.samples, rows.directions)


@dataclass(frozen=True)
class _RightSide:
    """What a step is computed from: ``Δ = (F + λI)⁻¹ gradient + shift``.

    Attributes:
        gradient: ``∇L``, or ``Jᵀ(ρ − μJΔ₀)``, flat.
        coordinates: What the rows of this process are multiplied by there, where all were had at
            once.
        shift: ``μΔ₀``, or None.
    """

    gradient: Tensor
    coordinates: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True)
class _Linearised:
    """What the residuals say at the present parameters.

    Attributes:
        loss: ``L(θ)``.
        plain: The right-hand side ``∇L``.
        right: That with momentum; the plain one without.
        rows: ρ and J of this process, where they are one chunk.
        at_once: Whether all rows were had at once, in all processes.
    """

    loss: float
    plain: _RightSide
    right: _RightSide
    rows: tuple[Tensor, Jacobians] | None
    at_once: bool
