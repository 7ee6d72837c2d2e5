"""Stochastic reconfiguration: the natural gradient of a variational energy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.arguments import check_choice, check_damping, check_integer, check_range, check_rate
from natgrad.jacobians import Jacobians
from natgrad.linalg import FactorizationError
from natgrad.operators import DenseOperator, GradientSource, Operator
from natgrad.operators.rows import RowsOperator
from natgrad.optim.checkpoints import CheckpointedOptimizer, CopiedByState, only_initialises
from natgrad.optim.observer import ModelWatch
from natgrad.solvers import IterativeSolver, Solver, as_solver
from natgrad.wave_functions.amplitude import LogAmplitude
from natgrad.wave_functions.configurations import distinct
from natgrad.wave_functions.hamiltonian import Hamiltonian, LocalValues
from natgrad.wave_functions.rows import AmplitudeJacobian
from natgrad.wave_functions.tangent_space import TangentSpace, tangent_space

Space = Literal["samples", "parameters"]


#: Dampings of the tangents tried together where none is given, as shares of the trace of S.
SHARES = (1e-2, 1e-4, 1e-6)
#: Damping of steps of fixed length where none is given, likewise.
FIXED_SHARE = 1e-4
#: Trust region: first and largest distance of a step, and how often it may be cut in one step.
FIRST_DISTANCE, LARGEST_DISTANCE, MOST_CUTS = 0.3, 1.0, 8


@dataclass(frozen=True)
class ReconfigurationStep:
    """What the last step did.

    Attributes:
        energy: Real part of the mean local energy before it.
        variance: ``Σ p |E_loc − E|²``, which vanishes in an eigenstate.
        norm: ``‖Δ‖`` of the direction; NaN if the step was skipped.
        length: How far it went along the direction; 0 if nothing moved.
        trials: How many steps were tried; 1 where the length is fixed.
    """

    energy: float
    variance: float
    norm: float
    length: float
    trials: int = 1


class StochasticReconfiguration(CheckpointedOptimizer, CopiedByState):
    r"""Natural gradient descent on the energy of a wave function, by variational Monte Carlo.

    .. math:: \nabla E = 2\, \mathrm{Re} \langle (E_{loc} - E)\, O_c^* \rangle, \qquad
              S = \mathrm{Re} \langle O_c^* O_c^\top \rangle, \qquad
              O_c = \partial_\theta \log\psi - \langle \partial_\theta \log\psi \rangle

    S is the metric of states up to norm and phase, for a real ``log ψ`` a quarter of the Fisher
    matrix of ``|ψ|²``; a step along ``(S + λI)⁻¹∇E`` is one of imaginary time, projected on the
    states that the model can represent. Complex amplitudes have two real rows per sample. With
    fewer rows than parameters the Gram matrix of the rows is factorised ("MinSR"), else S; the
    direction is the same. What is not finite moves nothing and is said once.

    **Without** ``lr`` no setting is needed. Natural gradients of three dampings (1e-2, 1e-4 and
    1e-6 of the trace of S) and the step before span a space of tangents of ψ, and the step is
    where the energy in it is lowest ("linear method"; with the last step in the span the method
    of eigenvalue solvers that is known as LOBPCG). It is kept within a distance that the model of
    the energy can be trusted for, measured by S plus the largest of the dampings: steps that do
    not lower the energy of the same samples, reweighted, are cut. Tangents come from one half of
    the samples and all that is decided from the other, so that noise is not taken for a slope. H
    is applied to four tangents and once or more to ψ anew. Where signs of ψ must be learned from
    samples such steps can get stuck in another state: give ``lr`` there.

    **With** ``lr`` the step is the textbook's, ``θ ← θ − η Δ``, momentum in the way of SPRING:

    .. math:: \Delta_t = \arg\min_\Delta \|X\Delta - u\|^2 + \lambda \|\Delta - \mu\Delta_{t-1}\|^2
              = \mu\Delta_{t-1} + (S + \lambda I)^{-1} X^\top (u - \mu X \Delta_{t-1})

    with ``S = XᵀX`` and ``∇E = Xᵀu``.

    Memory beside model and samples: ``min(R, P)²`` entries for R rows and P parameters, and the
    rows of two chunks, ``2·chunk_size·K·P`` with K = 2 for complex amplitudes and 1 for real ones.
    Rows of all samples are never held at once where there are more of them than fit a chunk; in the
    space of samples m chunks are then differentiated ``m(m + 1)/2`` times. Iterative solvers form
    no matrix and, with more than one chunk, no rows.

    Args:
        model: Takes configurations ``(N, sites)``; returns ``log ψ``, ``(N,)``, real or complex.
            Its parameters are real.
        hamiltonian: H; None if ``lr`` and, at every step, local energies are given.
        lr: η, in units of inverse energy; None for steps of the best length.
        damping: λ, in the units of S; None for shares of its trace: those above, or 1e-4 with
            ``lr``.
        momentum: μ in [0, 1), for steps with ``lr``; above 0 the method is SPRING.
        norm_constraint: C; steps with ``lr`` are shortened to ``‖ηΔ‖² ≤ C``. None for no limit.
        space: ``"samples"``, ``"parameters"``, or None for the smaller one.
        solver: ``"direct"``; ``"eigh"``, without the eigenvalues that vanish;
            ``"conjugate_gradient"``; or a :class:`natgrad.solvers.Solver` with options of its own.
        chunk_size: Samples differentiated at a time; chosen by the number of parameters by default.

    Attributes:
        last: What the last step did, a :class:`ReconfigurationStep`; None before the first.

    Raises:
        ValueError: If an option is out of range or two exclude each other, the model treats
            configurations jointly or at random, or has complex parameters or none to train.

    Source: Sorella, Green function Monte Carlo with stochastic reconfiguration (1998); Chen & Heyl,
    Empowering deep neural quantum states through efficient optimization (2024), MinSR; Goldshlager,
    Abrahamsen & Lin, A Kaczmarz-inspired approach to accelerate the optimization of neural network
    wavefunctions (2024), SPRING and the norm constraint. Their damping of the constant direction of
    the Gram matrix is needless here: u has no part in it. Umrigar et al., Alleviation of the
    Fermion-sign problem by optimization of many-body wave functions (2007), the linear method;
    Knyazev, Toward the optimal preconditioned eigensolver (2001), the last step in the span.

    Example:
        >>> hamiltonian = natgrad.wave_functions.TransverseFieldIsing(12)
        >>> sampler = natgrad.wave_functions.Metropolis(model, sites=12, chains=64)
        >>> optimizer = natgrad.StochasticReconfiguration(model, hamiltonian)
        >>> for _ in range(50):
        ...     energy = optimizer.step(sampler.sample(16))
    """

    def __init__(
        self,
        model: nn.Module,
        hamiltonian: Hamiltonian | None = None,
        *,
        lr: float | Tensor | None = None,
        damping: float | None = None,
        momentum: float = 0.0,
        norm_constraint: float | None = None,
        space: Space | None = None,
        solver: str | Solver = "direct",
        chunk_size: int | None = None,
    ) -> None:
        if lr is not None:
            check_rate("lr", lr)
        elif hamiltonian is None or momentum or norm_constraint is not None:
            raise ValueError(
                "steps of the best length need a hamiltonian, and have the last step and a limit "
                "of their own: give the hamiltonian and no momentum or norm_constraint, or an lr"
            )
        if damping is not None:
            check_damping(damping)
        check_range("momentum", momentum, below=1.0)
        if norm_constraint is not None and not 0 < norm_constraint < math.inf:
            raise ValueError(
                f"norm_constraint must be None or a finite number > 0, got {norm_constraint}"
            )
        if space is not None:
            check_choice("space", space, "samples", "parameters")
        if chunk_size is not None:
            check_integer("chunk_size", chunk_size)
        as_solver(solver)
        self._take_model(model)
        self.hamiltonian: Hamiltonian | None = hamiltonian
        self.chunk_size: int | None = chunk_size
        self.space = space
        self.solver: str | Solver = solver
        self.last: ReconfigurationStep | None = None
        self._distance = FIRST_DISTANCE
        self._keeps_direction = lr is None or momentum > 0
        self._warned = False
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "norm_constraint": norm_constraint,
        }
        super().__init__(list(self.amplitude.parameters.values()), defaults)

    def _take_model(self, model: nn.Module) -> None:
        """Take the model as it is now, with what is trained of it in its type and place."""
        self.amplitude: LogAmplitude = LogAmplitude(model)
        self._watch = ModelWatch(model)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse further groups: the step is one for all parameters.

        Raises:
            ValueError: If there is a group already.
        """
        if self.param_groups:
            raise ValueError(
                "StochasticReconfiguration takes one step for all parameters: it has no groups"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        samples: Tensor | None = None,
        local_energies: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        closure: Callable[[], Any] | None = None,
    ) -> float:
        """Take one step.

        Args:
            samples: Configurations drawn from ``|ψ|²``, ``(..., sites)``.
            local_energies: ``⟨σ|H|ψ⟩/⟨σ|ψ⟩`` of each, ``(...)``, real or complex. Needed where
                there is no Hamiltonian, and of no use to steps of the best length.
            weights: ``|ψ|²`` of all configurations, ``(...)``, in any unit, for sums without
                noise. By default all count the same, and are samples.
            closure: None: samples are all there is to know.

        Returns:
            The real part of the mean local energy, before the step.

        Raises:
            ValueError: If something needed is missing, shapes or weights are wrong, or a closure
                is given.
        """
        if closure is not None:
            raise ValueError(
                "StochasticReconfiguration.step() takes no closure: give it samples of |ψ|²"
            )
        if self._watch.sees_change():  # Layers were frozen, unfrozen, moved or replaced.
            self._take_model(self.amplitude.model)
            self.param_groups[0]["params"] = list(self.amplitude.parameters.values())
        if samples is None and only_initialises(self):
            self._mark()
            if self._keeps_direction:
                self._keep(self.amplitude.layout.zeros(self.amplitude.layout.numel))
            return math.nan
        batch = self._batch(samples, weights)
        if self.param_groups[0]["lr"] is not None:
            return self._fixed_step(batch, local_energies)
        if local_energies is not None:
            raise ValueError("steps of the best length take no local_energies: give samples alone")
        return self._best_step(batch, is_exact=weights is not None)

    # Parts of a step.

    def _batch(self, samples: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return configurations ``(N, sites)`` and shares of the weight, ``(N,)``."""
        if samples is None:
            raise ValueError("StochasticReconfiguration.step() needs samples of |ψ|²")
        if samples.dim() < 2 or not samples.numel():
            raise ValueError(f"samples must have shape (..., sites), got {tuple(samples.shape)}")
        weights = torch.ones(samples.shape[:-1]) if weights is None else weights.detach()
        if weights.shape != samples.shape[:-1]:
            raise ValueError(
                f"weights must have one entry for each sample, {tuple(samples.shape[:-1])}, got "
                f"{tuple(weights.shape)}"
            )
        weights = weights.reshape(-1).to(self.amplitude.layout.device, self.amplitude.layout.dtype)
        total = weights.sum()
        if bool((weights < 0).any()) or not (math.isfinite(float(total)) and float(total) > 0):
            raise ValueError("weights must be finite numbers >= 0, and not all zero")
        return samples.detach().reshape(-1, samples.shape[-1]), weights / total

    def _fixed_step(self, batch: tuple[Tensor, Tensor], local_energies: Tensor | None) -> float:
        """Go the given length along one natural gradient."""
        configurations, shares = batch
        if local_energies is None:
            if self.hamiltonian is None:
                raise ValueError(
                    "StochasticReconfiguration.step() needs local_energies, as there is no "
                    "hamiltonian to compute them from"
                )
            local_energies = self._local_values(configurations).energies
        if local_energies.numel() != len(configurations):
            raise ValueError(
                f"local_energies must have one entry for each sample, {len(configurations)} in "
                f"all, got shape {tuple(local_energies.shape)}"
            )
        energies = local_energies.detach().reshape(-1).to(shares.device)
        energy, variance = _mean(energies, shares)
        group, layout = self.param_groups[0], self.amplitude.layout
        momentum, damping = group["momentum"], group["damping"]
        previous = self._previous() if momentum else None
        direction = None
        if math.isfinite(variance):
            rows = AmplitudeJacobian(self.amplitude, configurations, shares, self.chunk_size)
            target = _target(rows, energies)
            if previous is not None:
                target = target - momentum * rows.matvec(previous.unsqueeze(1))
            if damping is None:
                damping = FIXED_SHARE * float(rows.trace())
            direction = next(iter(self._natural_gradients(rows, target, [damping])), None)
        if direction is None:
            return self._refuse(energy, variance)
        if previous is not None:
            direction = direction + momentum * previous
        norm, length = float(torch.linalg.vector_norm(direction)), float(group["lr"])
        if group["norm_constraint"] is not None and norm > 0:
            length = min(length, math.sqrt(group["norm_constraint"]) / norm)
        for name, step in layout.to_dict(direction).items():
            parameter = self.amplitude.parameters[name]
            parameter.sub_(step.to(parameter.dtype), alpha=length)
        if momentum:
            self._keep(direction)
        self.last = ReconfigurationStep(energy, variance, norm, length)
        return energy

    def _best_step(self, batch: tuple[Tensor, Tensor], is_exact: bool) -> float:
        """Go where the energy in a space of tangents is lowest.

        Where samples are noise, the tangents come from one half of them and all that is decided
        from the other: what only one half says has no slope in the other.
        """
        configurations, shares = batch
        count = len(configurations)
        half = slice(None) if is_exact else slice(0, max(1, count // 2))
        rest = half if is_exact or count == 1 else slice(half.stop, None)
        some, weights = _merged(configurations[half], shares[half])
        energies = self._local_values(some).energies
        energy, variance = _mean(energies, weights)
        columns: list[Tensor] = []
        if math.isfinite(variance):
            rows = AmplitudeJacobian(self.amplitude, some, weights, self.chunk_size)
            trace, damping = float(rows.trace()), self.param_groups[0]["damping"]
            dampings = [share * trace for share in SHARES] if damping is None else [damping]
            if trace > 0:
                columns = self._natural_gradients(rows, _target(rows, energies), dampings)
        if not columns:
            return self._refuse(energy, variance)
        previous = self._previous()
        directions = torch.stack(columns if previous is None else [*columns, previous], 1)
        others, other_weights = _merged(configurations[rest], shares[rest])
        present = self._local_values(others, directions)
        if not is_exact:
            other_energy, other_variance = _mean(present.energies, other_weights)
            energy, variance = (energy + other_energy) / 2, (variance + other_variance) / 2
        try:
            # Far in parameters is not linear, however near the tangents say it is.
            lengths = max(dampings) * directions.mT @ directions
            space = tangent_space(present, other_weights, lengths)
        except FactorizationError:
            return self._refuse(energy, variance)
        noise = 0.0 if is_exact else 1 / math.sqrt(max(1, count // 2))
        step, trials = self._lowest(others, other_weights, present, space, directions, noise)
        norm = float(torch.linalg.vector_norm(step))
        if norm > 0:
            self._keep(step)
        self.last = ReconfigurationStep(energy, variance, norm, float(norm > 0), trials)
        return energy

    def _lowest(
        self,
        configurations: Tensor,
        shares: Tensor,
        present: LocalValues,
        space: TangentSpace,
        directions: Tensor,
        noise: float,
    ) -> tuple[Tensor, int]:
        """Move the parameters within the distance trusted; return the step and trials."""
        layout = self.amplitude.layout
        before = {name: p.clone() for name, p in self.amplitude.parameters.items()}
        rounding = 10 * torch.finfo(layout.dtype).eps * abs(space.energy)
        distance = self._distance
        for trial in range(1, MOST_CUTS + 1):
            minimum = space.minimum(distance)
            predicted = space.energy - minimum.energy
            if not predicted > rounding:
                return layout.zeros(layout.numel), trial
            step = directions @ minimum.coefficients
            for name, change in layout.to_dict(step).items():
                parameter = self.amplitude.parameters[name]
                parameter.copy_(before[name] + change.to(parameter.dtype))
            gain, error = _gain(present, self._local_values(configurations), shares)
            if gain > min(0.1 * predicted, -2 * noise * error):
                if gain > 0.75 * predicted and minimum.is_bounded:
                    self._distance = min(2 * self._distance, LARGEST_DISTANCE)
                return step, trial
            # One unlucky batch shall not stop all that follow.
            self._distance /= 4 if trial == 1 else 1
            distance = minimum.distance / 4
            for name, parameter in self.amplitude.parameters.items():
                parameter.copy_(before[name])
        return layout.zeros(layout.numel), trial

    def _local_values(
        self, configurations: Tensor, directions: Tensor | None = None
    ) -> LocalValues:
        """Return what ψ, its derivatives along directions ``(P, k)`` and H are."""
        assert self.hamiltonian is not None
        layout = self.amplitude.layout
        columns = layout.zeros(layout.numel, 0) if directions is None else directions
        return self.hamiltonian.local_values(
            lambda some: self.amplitude.tangents(some, columns),
            configurations,
            self.chunk_size or 1024,
        )

    def _natural_gradients(
        self, rows: AmplitudeJacobian, target: Tensor, dampings: list[float]
    ) -> list[Tensor]:
        """Return ``(XᵀX + λI)⁻¹Xᵀu``, ``(P,)``, for every damping where it can be computed."""
        layout = self.amplitude.layout
        source = GradientSource(layout.to_dict(rows.rmatvec(target)[:, 0]), coordinates=target)
        matrix, found = self._matrix(rows), []
        for damping in dampings:
            try:
                inverse = matrix.inverse(damping, self.solver).continuing(None)
                direction = layout.to_flat(inverse.natural_gradient(source))
            except FactorizationError:
                continue
            if bool(torch.isfinite(direction).all()):
                found.append(direction)
        return found

    def _matrix(self, rows: AmplitudeJacobian) -> Operator:
        """Return S in the space that it is solved in."""
        layout = self.amplitude.layout
        space = self.space or ("samples" if rows.rows <= layout.numel else "parameters")
        if space == "parameters" and not isinstance(as_solver(self.solver), IterativeSolver):
            return DenseOperator(layout, rows.moment())
        joint = Jacobians(layout, {"log amplitude": rows}, rows.samples, rows.directions)
        return RowsOperator(layout, ((1.0, joint),), rows.shares.new_ones(()))

    def _refuse(self, energy: float, variance: float) -> float:
        """Move nothing, and say so once."""
        self.last = ReconfigurationStep(energy, variance, math.nan, 0.0)
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a step of StochasticReconfiguration was skipped, as local energies, derivatives "
                "of log ψ or the solution are not finite; parameters are as before",
                stacklevel=5,
            )
        return energy

    # Momentum and checkpoints.

    def _previous(self) -> Tensor | None:
        """Return the last direction, flat, or None before the first."""
        found = {n: self.state[p].get("direction") for n, p in self.amplitude.parameters.items()}
        if any(one is None for one in found.values()):
            return None
        return self.amplitude.layout.to_flat(found).to(self.amplitude.layout.dtype)

    def _keep(self, direction: Tensor) -> None:
        for name, value in self.amplitude.layout.to_dict(direction).items():
            self.state[self.amplitude.parameters[name]]["direction"] = value.clone()

    def _own_state(self) -> dict[str, Any]:
        """Return what tells whose parameters the state is of, and the distance trusted."""
        shapes = {n: list(s) for n, s in self.amplitude.layout.shapes.items()}
        return {"shapes": shapes, "distance": self._distance}

    def _checked(self, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Callable[[], None]:
        if own.get("shapes") != self._own_state()["shapes"]:
            raise ValueError(
                f"the checkpoint is of parameters {own.get('shapes')}, and this model's are "
                f"{self._own_state()['shapes']}"
            )

        def restore() -> None:
            self._distance = float(own["distance"])

        return restore


def _merged(configurations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return configurations without repetition and their shares of the weight."""
    found, places = distinct(configurations)
    return found, weights.new_zeros(len(found)).index_add(0, places, weights) / weights.sum()


def _mean(energies: Tensor, shares: Tensor) -> tuple[float, float]:
    """Return the real part of the mean, and the variance."""
    mean = (shares * energies).sum()
    return float(mean.real), float((shares * (energies - mean).abs().square()).sum())


def _target(rows: AmplitudeJacobian, energies: Tensor) -> Tensor:
    """Return u, ``(R, 1)``, by which ``∇E = Xᵀu``."""
    centred = energies - (rows.shares[:, 0] * energies).sum()
    centred = (2 * rows.roots[:, 0] * centred).to(rows.dtype.to_complex())
    return torch.view_as_real(centred)[:, : rows.directions].reshape(-1, 1)


def _gain(present: LocalValues, now: LocalValues, shares: Tensor) -> tuple[float, float]:
    """Return how much the energy fell, by reweighting, and the deviation of one sample's part."""
    ratios = torch.exp(2 * (now.logs - present.logs).real)
    weights = shares * ratios
    before, _ = _mean(present.energies, shares)
    after, _ = _mean(now.energies, weights / weights.sum())
    parts = present.energies.real - before
    parts = parts - ratios / weights.sum() * (now.energies.real - after)
    return before - after, float((shares * parts.square()).sum().sqrt())
