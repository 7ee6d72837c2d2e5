"""Natural gradient descent on residual losses, full batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.arguments import check_choice, check_interval, check_range, check_rate
from natgrad.curvature import Curvature, Structure, as_structure
from natgrad.curvature.full import ExactRows
from natgrad.jacobians import Jacobians
from natgrad.linalg import FactorizationError
from natgrad.operators import GradientSource, Operator
from natgrad.operators.rows import RowsInverse
from natgrad.optim.checkpoints import CheckpointedOptimizer, only_initialises
from natgrad.optim.copying import CopiedByState
from natgrad.optim.step.line_search import LineSearch
from natgrad.residuals.residual import Residual, as_residuals
from natgrad.residuals.rows import CapturedRows, FunctionRows, ResidualRows
from natgrad.residuals.taylor import TaylorNetwork

__all__ = ["ResidualNGD", "ResidualStep"]

#: Share of Δ at which residuals are evaluated for their second derivative along it.
PROBE = 0.1

#: ``‖Δ'‖/‖Δ‖`` beyond which Δ' is no correction (Transtrum & Sethna 2012).
LARGEST_BEND = 0.75

#: The first λ, as a share of ``‖∇L‖²/‖ρ‖²``, the mean of ``JJᵀ`` along ρ.
FIRST_DAMPING = 1e-3

#: Factor on λ after steps of at least half their length; by its inverse λ rises.
DECAY = 0.1

#: Lengths tried with one λ, where the points are those of the last step, and where they are others:
#: shorter steps with little damping fit these and no others.
SEARCHES = {False: LineSearch(max_trials=6), True: LineSearch(max_trials=1)}

#: Values of λ that one step tries at most, and steps without success after which that is said.
MOST_TRIALS, PATIENCE = 10, 10


@dataclass(frozen=True)
class ResidualStep:
    """What the last step did.

    Attributes:
        loss: ``L(θ)`` before it.
        loss_after: The loss at its end; that before it if nothing moved.
        length: t, how far it went along its curve; 0 if nothing moved.
        damping: λ it was computed with, or the last one tried if nothing moved.
        trials: Values of λ that were tried.
    """

    loss: float
    loss_after: float
    length: float
    damping: float
    trials: int


class ResidualNGD(CheckpointedOptimizer, CopiedByState):
    r"""Natural gradient descent on a loss of residuals at points, as of physics-informed networks.

    .. math:: L = \sum_b \frac{w_b}{2N_b} \sum_n \|r_{bn}\|^2 = \tfrac12 \|\rho\|^2, \qquad
              F = \sum_b \frac{w_b}{N_b} \sum_n J_{bn}^\top J_{bn} = J^\top J, \qquad
              \theta \leftarrow \theta - t \Delta - \tfrac{t^2}{2} \Delta', \quad
              \Delta = (\hat F + \lambda I)^{-1} \nabla L, \quad
              \Delta' = (\hat F + \lambda I)^{-1} J^\top \rho''

    ``step()`` needs neither a closure nor a backward pass: the loss, its gradient and the exact
    rows come from the residuals themselves.

    There is nothing to tune. λ begins at ``10⁻³ ‖∇L‖²/‖ρ‖²``. Lengths ``lr, lr/2, …, lr/32`` are
    tried until the loss falls by 10⁻⁴ of what the slope promises. After lengths of at least lr/2 λ
    falls to a tenth, to rounding errors of F at least; after those below lr/4 it rises tenfold. If
    none lowers the loss, or the matrix cannot be factorised, the step is computed anew with ten
    times the λ, from the same rows. So multiplying all residuals by a number, or choosing other
    units, changes no step. Where points, data or weights are others than those of the last step,
    the first length is the only one: short steps with little damping would fit these points and no
    others. Where residuals are not finite, or 10 values of λ do not help, nothing moves and λ is
    raised; the first is said once, the second after 10 such steps in a row.

    Full-batch problems of this kind are badly conditioned: use float64.

    Args:
        model: The network: any module for ``jacobians="vmap"``, a :class:`natgrad.TaylorNetwork`
            for either way.
        residuals: The parts of the loss by name, or one :class:`natgrad.Residual`. Their points
            and weights may be changed between steps.
        structure: Structure of the Fisher matrix, or its name: ``"full"``, ``"block_diagonal"``,
            or with captured rows any other. An instance may name a solver:
            ``natgrad.curvature.Full(solver=ConjugateGradient(1e-6, 500))`` forms no matrix.
        jacobians: ``"captured"`` takes factored rows from a network that propagates derivatives,
            much the faster; ``"vmap"`` differentiates the residual functions by
            :mod:`torch.func`, point by point in batches. By default captured where the model is a
            TaylorNetwork.
        lr: First length tried; for schedules, as where points change.
        damping: λ to begin with, in the units of F; by default in those of the problem, see above.
        momentum: μ of the last step Δ₀: Δ minimises ``½‖JΔ − ρ‖² + ½λ‖Δ − μΔ₀‖²`` (Goldshlager,
            Abrahamsen & Lin 2024, "SPRING"). It accumulates what single batches of changing points
            tell; with fixed points it changes little. Where it does not lower the loss, the step is
            computed without.
        acceleration: Bend steps by Δ', with ρ″ the second derivative of the residuals along Δ, from
            one more evaluation of them (Transtrum & Sethna 2012, "geodesic acceleration"). It is
            left out where ``‖Δ'‖ > ¾‖Δ‖``, and with solvers that iterate. Far from a solution it
            changes little, near to one it saves most of the steps.
        chunk_size: Points differentiated at a time; by default so many that a chunk takes 2²⁵
            numbers (256 MiB in float64) while it is differentiated, eight times its rows. A step of
            R residuals and P parameters takes about ``8 min(R, P)²`` numbers beside, for matrix and
            factors. Where R ≤ P the rows stay: factored, or ``R·P`` numbers by ``"vmap"``.

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
    ) -> None:
        check_rate("lr", lr)
        if damping is not None and not 0 < damping < math.inf:
            raise ValueError(f"damping must be a finite number above 0, or None, got {damping}")
        check_range("momentum", momentum, below=1.0)
        if chunk_size is not None:
            check_interval("chunk_size", chunk_size)
        if jacobians is None:
            jacobians = "captured" if isinstance(model, TaylorNetwork) else "vmap"
        check_choice("jacobians", jacobians, "captured", "vmap")
        self.residuals: dict[str, Residual] = as_residuals(residuals)
        source = CapturedRows if jacobians == "captured" else FunctionRows
        self.rows: ResidualRows = source(model, self.residuals, chunk_size)
        blocks = {name: block.layout for name, block in self.rows.blocks.items()}
        chosen = as_structure(structure, training=True)
        self.curvature: Curvature = Curvature(chosen, blocks, self.rows.layout)
        iterates = isinstance(chosen, ExactRows) and chosen.is_iterative
        self.acceleration: bool = acceleration and not iterates
        self.last: ResidualStep | None = None
        self._warned, self._without_success = False, 0
        self._seen: tuple[Any, list[Tensor]] | None = None
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "points_change": False}
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
        if self._seen is not None:  # What a checkpoint says goes on.
            self.param_groups[0]["points_change"] = signature != self._seen[0]
        self._seen = signature, tensors  # Kept, so that others get no number of theirs.

    # The linear model of the residuals.

    def _linearised(self) -> _Linearised | None:
        """Sum the rows at the present parameters; None where something is not finite."""
        layout, momentum = self.rows.layout, self.param_groups[0]["momentum"]
        previous = self._previous() if momentum else None
        gradient, adjusted = layout.zeros(layout.numel), layout.zeros(layout.numel)
        chunks: list[tuple[Tensor, Jacobians, Tensor] | None] = []
        square = 0.0
        for share, values, rows in self.rows.chunks():
            square += float(values.square().sum())
            if not math.isfinite(square):
                return None
            gradient, rest = gradient + rows.rmatvec(values), values
            if previous is not None:
                rest = values - momentum * rows.matvec(previous)
                adjusted = adjusted + rows.rmatvec(rest)
            self.curvature.observe(rows, share)
            chunks = [None] if chunks else [(values, rows, rest)]  # Only sums of several are kept.
        if not bool(torch.isfinite(gradient).all()):
            return None
        whole = chunks[0]
        plain = right = _RightSide(gradient, None if whole is None else whole[0], None)
        if previous is not None:
            coordinates = None if whole is None else whole[2]
            right = _RightSide(adjusted, coordinates, momentum * previous)
        return _Linearised(0.5 * square, plain, right, None if whole is None else whole[:2])

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
        if damping is None:
            damping = FIRST_DAMPING * float(gradient.square().sum()) / (2 * loss)
        matrices, epsilon = self._matrices(), torch.finfo(start.dtype).eps
        for trial in range(1, MOST_TRIALS + 1):
            tried = damping
            if self._factorise(matrices, tried):
                step, slope, curvature = self._direction(right, gradient, tried)
                if not slope > 0 and right is not here.plain:  # Momentum leads uphill.
                    right = here.plain
                    step, slope, curvature = self._direction(right, gradient, tried)
                bend = self._bend(step, start, here)
                length, after = self._walk(start, step, bend, slope, loss, lr)
                if length and after < loss:  # Not equal, as after steps lost in rounding.
                    if length >= 0.5 * lr:  # Less than rounding errors of F would not be felt.
                        damping = max(tried * DECAY, epsilon * curvature)
                    elif length < 0.25 * lr:
                        damping = tried / DECAY
                    group["damping"] = damping
                    self.last = ResidualStep(loss, after, length, tried, trial)
                    self._without_success = 0
                    return length * step + 0.5 * length**2 * bend
                if torch.equal(start - lr * step, start):
                    break  # More damping would change nothing.
            right = here.plain  # With λ a step with momentum tends to μΔ₀, which need not descend.
            damping = tried / DECAY
        self._set(start)
        group["damping"] = damping
        self.last = ResidualStep(loss, loss, 0.0, tried, trial)
        self._count_failure()
        return nothing

    def _walk(
        self, start: Tensor, step: Tensor, bend: Tensor, slope: float, before: float, lr: float
    ) -> tuple[float, float]:
        """Move along a step and its bend; return how far and the loss there."""

        def move(length: float) -> None:
            self._set(start - length * step - 0.5 * length**2 * bend)

        if not slope > 0 or not bool(torch.isfinite(step).all()):
            move(0.0)
            return 0.0, before
        search = SEARCHES[self.param_groups[0]["points_change"]]
        return search.search(move, self.loss, before, slope, lr)

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
        """Return Δ, ``⟨Δ, ∇L⟩`` and ``ΔᵀFΔ/‖Δ‖²``.

        ``(F + λI)Δ = ∇L + λμΔ₀``, so that ``ΔᵀFΔ`` needs no product with F.
        """
        step = self._precondition(lambda: right.gradient, right.coordinates)
        rest = step
        if right.shift is not None:
            step, rest = step + right.shift, step
        slope, square = float(step @ gradient), float(step.square().sum())
        return step, slope, (slope - damping * float(step @ rest)) / square if square else 0.0

    def _precondition(self, gradient: Callable[[], Tensor], coordinates: Tensor | None) -> Tensor:
        """Return ``(F + λI)⁻¹Jᵀu``.

        Args:
            gradient: Computes ``Jᵀu``, flat; in sample space that is not needed.
            coordinates: u, where all rows were had at once.
        """
        layout = self.rows.layout
        natural = None if coordinates is None else self._in_sample_space(coordinates)
        if natural is None:
            source = GradientSource(layout.to_dict(gradient()), coordinates=coordinates)
            natural = self.curvature.natural_gradient(source)
        return layout.to_flat({name: natural[name] for name in layout.names}).to(layout.dtype)

    def _in_sample_space(self, coordinates: Tensor) -> dict[str, Tensor] | None:
        """Return ``Jᵀ(JJᵀ + λI)⁻¹u``, part by part; None where an inverse is of another form."""
        natural: dict[str, Tensor] = {}
        for name in self.curvature.parts:
            inverse = self.curvature.estimates[name].inverse
            found = None
            if isinstance(inverse, RowsInverse):
                found = inverse.of_coordinates(coordinates.reshape(-1, 1))
            if found is None:
                return None
            natural |= found
        return natural

    def _bend(self, step: Tensor, start: Tensor, here: _Linearised) -> Tensor:
        """Return Δ', or zero where it is not finite or too long to be a correction."""
        straight = torch.zeros_like(start)
        if not self.acceleration:
            return straight
        self._set(start - PROBE * step)
        ahead = list(self.rows.scaled_values())
        self._set(start)

        def second(values: Tensor, rows: Jacobians, after: Tensor) -> Tensor:
            return (2.0 / PROBE) * ((after - values) / PROBE + rows.matvec(step))

        if here.rows is not None:
            (values, rows), (after,) = here.rows, ahead
            along = second(values, rows, after)
            bend = self._precondition(lambda: rows.rmatvec(along), along)
        else:  # Rows of several chunks are had once more.
            bent = torch.zeros_like(start)
            for (_, values, rows), after in zip(self.rows.chunks(), ahead, strict=True):
                bent = bent + rows.rmatvec(second(values, rows, after))
            bend = self._precondition(lambda: bent, None)
        size = float(bend.norm())
        fits = math.isfinite(size) and size <= LARGEST_BEND * float(step.norm())
        return bend if fits else straight

    def _set(self, flat: Tensor) -> None:
        for name, value in self.rows.layout.to_dict(flat).items():
            self.rows.parameters[name].copy_(value)

    # Steps that move nothing.

    def _refuse(self) -> float:
        """Damp more, say once that residuals are not finite, and return the loss."""
        group, loss = self.param_groups[0], self.loss()
        damping = group["damping"]
        self.last = ResidualStep(loss, loss, 0.0, math.nan if damping is None else damping, 0)
        if damping is not None:
            group["damping"] = damping / DECAY
        if group["momentum"]:
            self._keep(self.rows.layout.zeros(self.rows.layout.numel))
        if self._warned:
            return loss
        self._warned = True
        bad = [n for n, v in self.rows.values().items() if not bool(torch.isfinite(v).all())]
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


@dataclass(frozen=True)
class _RightSide:
    """What a step is computed from: ``Δ = (F + λI)⁻¹ gradient + shift``.

    Attributes:
        gradient: ``∇L``, or ``Jᵀ(ρ − μJΔ₀)``, flat.
        coordinates: What J is multiplied by there, where all rows were had at once.
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
        rows: ρ and J, where all rows were had at once.
    """

    loss: float
    plain: _RightSide
    right: _RightSide
    rows: tuple[Tensor, Jacobians] | None
