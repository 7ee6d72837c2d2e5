"""Lengths that are measured: every step written out in float64, from torch.func's Jacobians."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import MeasuredLength, Refresh, RelativeDamping, StepRule
from natgrad.curvature import KroneckerFactors
from natgrad.optim.step.lengths import LengthState
from tests import pairwise
from tests.cases import labels, normal
from tests.state import flat, same

EXACT_KFAC = KroneckerFactors(factored_damping=False, rows_per_unit=None)
STRUCTURES = {"kfac": EXACT_KFAC, "full": "full", "diagonal": "diagonal"}
EVERY_STEP = Refresh()
NOW_AND_THEN = Refresh(factors=2, inverses=4)
#: All rows of one batch are not averaged over others.
SETTINGS = [
    *((kind, EVERY_STEP) for kind in STRUCTURES),
    *((kind, NOW_AND_THEN) for kind in ("kfac", "diagonal")),
]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches(likelihood: str, steps: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    def target(seed: int) -> Tensor:
        if likelihood == "categorical":
            return labels(size, 3, seed)
        far = 40.0 if likelihood == "huber" else 0.0
        return far * normal(1, 3, seed=99).sign() + normal(size, 3, seed=100 + seed)

    return [(normal(size, 3, seed=seed), target(seed)) for seed in range(steps)]


def loss_of(likelihood: str) -> Callable[[Tensor, Tensor], Tensor]:
    if likelihood == "categorical":
        return functional.cross_entropy
    if likelihood == "huber":
        return lambda z, y: functional.huber_loss(z, y, reduction="sum") / len(z)
    return lambda z, y: 0.5 * (z - y).square().sum() / len(z)


def position(model: nn.Module) -> Tensor:
    return flat(model.parameters())


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Return the Jacobian of the outputs, (N, C, P)."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(values)
    return torch.cat([found[name].flatten(2) for name in values], dim=2)


def output_roots(likelihood: str, z: Tensor) -> Tensor:
    """Return the root of every output Hessian, (N, C, C)."""
    if likelihood != "categorical":
        return torch.eye(z.shape[1], dtype=z.dtype).expand(len(z), -1, -1)
    p = z.softmax(1)
    return torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)


def rows_of(model: nn.Module, x: Tensor, likelihood: str) -> Tensor:
    """Return the rows whose squares sum to N·F, (N, C, P)."""
    z = model(x).detach()
    return torch.einsum("ncp,nck->nkp", jacobian(model, x), output_roots(likelihood, z))


def kronecker(model: nn.Sequential, x: Tensor, rows: Tensor, data: float = 0.0) -> Tensor:
    """Return K-FAC's matrix of a chain of linear layers, in the order of ``parameters()``.

    The factor of the data themselves is ``A + data · tr A/N I``.
    """
    result = torch.zeros(rows.shape[2], rows.shape[2], dtype=torch.float64)
    start, inputs = 0, x
    for layer in model:
        if isinstance(layer, nn.Linear):
            out, ins = layer.weight.shape
            size = out * (ins + 1)
            ones = torch.ones(len(x), 1, dtype=torch.float64)
            a = torch.cat([inputs, ones], dim=1)
            g = rows[:, :, start + out * ins : start + size]  # The bias' rows are G's.
            moment = a.T.contiguous() @ a / len(x)
            if inputs is x:
                moment = moment + data * moment.trace() / len(x) * torch.eye(ins + 1).double()
            matrix = torch.kron(torch.einsum("nki,nkj->ij", g, g) / len(x), moment)
            weight = torch.arange(out * (ins + 1)).reshape(out, ins + 1)
            order = torch.cat([weight[:, :ins].flatten(), weight[:, ins]])
            result[start : start + size, start : start + size] = matrix[order][:, order]
            start += size
        inputs = layer(inputs).detach()
    return result


class Reference:
    """The rule, from dense matrices.

    Attributes:
        length: ``MeasuredLength`` with the options.
        shares: ε of every parameter, (P,).
        rates: η.
        momenta: μ.
        decays: w.
    """

    def __init__(
        self, model: nn.Module, kind: str, likelihood: str, length: MeasuredLength, refresh: Refresh
    ) -> None:
        size = len(position(model))
        self.model, self.kind, self.likelihood = model, kind, likelihood
        self.length, self.refresh = length, refresh
        self.shares = torch.full((size,), 0.2, dtype=torch.float64)
        self.rates, self.momenta = torch.ones(size).double(), torch.zeros(size).double()
        self.decays = torch.zeros(size).double()
        self.v = torch.zeros(size).double()
        self.caution, self.ceiling, self.s = length.start, length.start, None
        self.log_slope, self.mean_slope, self.few, self.least_noise = None, 0.0, 0.0, 0.0
        self.log_k, self.measured, self.count, self.taken_back = None, 0, 0, 0
        self.ceiling, self.usual, self.zeta = 1.0, 0.0, 1.0
        self.long_log_k = 0.0
        self.q, self.pairs, self.ratios = None, 0.0, []
        self.rho, self.log_bend, self.seen, self.made_with = 1.0, None, 0, 1.0
        self.taken_at: list[float] = []
        self.later = 0.0  # q̂
        self.begun: list[float] = []
        self.lengths: list[float] = []  # ηγζρ of the steps of these ratios.
        self.mean, self.matrix, self.inverse, self.renews = None, None, None, False
        self.damped = None  # The matrix as it is inverted, but for λ.
        self.residual, self.largest_residual, self.nu = None, 0.0, 1.0
        self.least_trace = 0.0
        self.bound = False
        self.theta = position(model)
        ends = torch.tensor([p.numel() for p in model.parameters()]).cumsum(0).tolist()
        parts = [slice(i, j) for i, j in zip([0, *ends], ends, strict=False)]
        pairs = zip(parts, model.parameters(), strict=True)
        self.weights = [(part, len(p)) for part, p in pairs if p.dim() > 1]

    def estimate(self, x: Tensor, rows: Tensor) -> Tensor:
        f = torch.einsum("nkp,nkq->pq", rows, rows) / len(x)
        if self.kind == "diagonal":
            return f.diag().diag()
        return kronecker(self.model, x, rows) if self.kind == "kfac" else f

    def step(self, x: Tensor, y: Tensor, scale: float = 1.0) -> str:
        """Take a step, and return what it was."""
        torch.nn.utils.vector_to_parameters(self.theta, list(self.model.parameters()))
        loss = scale * loss_of(self.likelihood)(self.model(x), y)
        g = flat(torch.autograd.grad(loss, list(self.model.parameters())))
        rows = rows_of(self.model, x, self.likelihood)
        saved = self.mean, self.matrix, self.damped, self.inverse
        renews, self.renews = self.renews, False
        if self.count % self.refresh.factors == 0 or renews:
            self.matrix = self.damped = self.estimate(x, rows)
            if self.kind == "kfac":
                self.damped = kronecker(self.model, x, rows, data=1.0)
        if self.mean is None:
            self.mean = float(self.matrix.trace()) / len(g)
            self.note_least_trace(x, y, g / scale)
        damping = self.shares * self.nu * max(self.mean, self.least_trace / len(g))
        if self.count % self.refresh.inverses == 0 or renews:
            joint = self.kind == "full"  # One λ, the largest.
            used = damping.max().expand_as(damping) if joint else damping
            self.inverse = torch.linalg.inv(self.damped + used.diag())
            self.mean = float(self.matrix.trace()) / len(g)
        delta = self.inverse @ g
        along = float(self.v @ g)
        expected = max(self.s or 0.0, self.usual)
        sigma = math.sqrt(self.pairs)
        most = max(self.length.overshoot, min(1.5, self.length.overshoot + 2 * sigma))
        if self.s is not None and along > most * expected:
            self.mean, self.matrix, self.damped, self.inverse = saved
            kept = expected / (expected + along)
            self.usual *= kept
            self.theta = self.theta - (1 - kept) * self.v
            self.v = kept * self.v
            cut = kept if kept < 0.25 else max(kept, 0.5)
            least = 0.01 / max(1.0, float(self.rates.max()))
            self.caution = self.ceiling = max(least, self.caution * cut)
            self.s, self.later = None, 0.0
            self.taken_back += 1
            self.renews = (
                self.taken_back < 6 or 10 * self.taken_back <= self.count + self.taken_back
            )
            return "taken back"
        measures = self.count in {0, 1, 2, 3, 5, 7, 11} or self.is_measured()
        f = torch.einsum("nkp,nkq->pq", rows, rows) / len(x)
        if measures and self.s and self.made_with and float(self.v @ f @ self.v) > 0:
            self.cross(float(scale * self.v @ f @ self.v) / expected)
        if self.s is not None:
            q = min(3.0, max(-3.0, along / expected))
            if self.q is not None:
                self.pairs = 0.9 * self.pairs + 0.1 * (q - self.q) ** 2 / 2
                self.seen += 1
            self.q = q
            self.later = 0.8 * self.later + 0.2 * q
            self.ratios.append(q)
            self.lengths.append(self.made_with)
            if self.log_bend is not None:
                self.begun.append(math.exp(self.log_bend) * self.made_with - q)
            ratio, kappa = min(0.5, max(-0.5, along / expected)), self.length.annealing
            short = 0.8 * min(1.0, float(self.rates.max())) - 1
            if self.zeta > 1 or (self.zeta == 1 and ratio < short):
                if ratio > short or self.caution == 1:
                    self.zeta = max(1.0, self.zeta * math.exp(kappa * (short - ratio)))
            elif self.log_k > self.long_log_k - 0.5:
                self.zeta *= math.exp(-kappa * (ratio - 0.05))
                self.zeta = min(1.0, max(0.01, self.zeta))
            if self.log_bend is not None and self.rates.any():
                self.reach()
        slope = float(delta @ g)
        old = math.log(slope) if self.log_slope is None else self.log_slope
        self.log_slope = self.length.memory * old + (1 - self.length.memory) * math.log(slope)
        self.mean_slope = 0.9 * self.mean_slope + 0.1 * slope if self.mean_slope else slope
        if measures:
            quadratic = float(delta @ (scale * f + scale * damping.diag()) @ delta)
            found = math.log(slope**2 / quadratic)
            if self.likelihood == "categorical":
                found = min(found, math.log(scale * self.deviance(x, y)))
            self.measured += 1
            self.few = min(1.0, (4 / len(x)) ** 2)
            self.least_noise = 2 / max(4, len(x))
            memory = min(self.length.memory, 1 - 1 / self.measured)
            old = found if self.log_k is None else self.log_k
            self.log_k = memory * old + (1 - memory) * found
            memory = min(0.9, 1 - 1 / self.measured)
            self.long_log_k = memory * self.long_log_k + (1 - memory) * found
            self.follow(x, y)
            self.note_least_trace(x, y, g / scale)
        usual = max(slope, math.exp(self.log_slope), self.few * self.mean_slope)
        alpha = self.caution * self.zeta * self.rho * min(1 / scale, math.exp(self.log_k) / usual)
        power = self.length.lengthening * (0.4 if self.steady() else 1)
        alpha *= max(self.nu, self.least_noise) ** -power
        changes = sorted(
            float((self.rates * delta)[part].norm()) / max(float(self.theta[part].norm()),
                                                           math.sqrt(outputs / 3))
            for part, outputs in self.weights
        )  # fmt: skip
        most = 0.3 / changes[-2] if changes[-2] else math.inf
        alpha, self.bound = min(alpha, most), alpha > most
        share = self.rates * (1 - self.momenta)
        kept = float(self.momenta.max())
        self.s = float(share.max()) * alpha * slope + kept * max(0.0, -along)
        self.usual = 0.9 * self.usual + 0.1 * self.s if self.usual else self.s
        self.s = self.s or None
        self.v = self.momenta * self.v - share * alpha * delta
        self.theta = (1 - self.rates * self.decays) * self.theta + self.v
        self.made_with = float(self.rates.max()) * self.caution * self.zeta * self.rho
        previous = self.taken_at[-1] if self.taken_at else 0.0
        self.taken_at.append(float(self.rates.max()))
        growth = max(1.05, min(1.0, previous) / max(1 + self.later, 1e-6))
        fast, slow = (self.caution * min(self.length.growth, f) for f in (math.inf, growth))
        self.caution = min(1.0, max(slow, min(fast, self.ceiling)))
        self.ceiling = max(self.ceiling, self.caution)
        self.count += 1
        return "taken"

    def deviance(self, x: Tensor, y: Tensor) -> float:
        """Return the mean of what twice the losses of samples are above zero, or χ² if less."""
        p = torch.softmax(self.model(x).detach(), 1)
        square = (p - nn.functional.one_hot(y, p.shape[1])).square()
        pearson = (square / p).sum(1)
        return float(torch.minimum(pearson, -2 * p[range(len(y)), y].log()).mean())

    def note_least_trace(self, x: Tensor, y: Tensor, g: Tensor) -> None:
        """Let tr F count as a hundredth of ``‖∇L‖²/R``; of squared errors it is never less."""
        if self.likelihood == "categorical":
            self.least_trace = 0.01 * float(g.square().sum()) / self.deviance(x, y)

    def usual_ratio(self) -> float:
        """Return q̄."""
        usual = 0.0
        for count, q in enumerate(self.ratios, start=1):
            memory = min(0.9, 1 - 1 / count)
            usual = memory * usual + (1 - memory) * q
        return usual

    def recent_ratio(self) -> float:
        """Return q̃."""
        recent, before = 0.0, 0.0
        for count, (q, share) in enumerate(zip(self.ratios, self.lengths, strict=True), start=1):
            memory = min(0.9, 1 - 1 / count)
            if share > before > 0:
                memory *= before / share
            recent, before = memory * recent + (1 - memory) * q, share
        return recent

    def bend(self) -> float:
        """Return C."""
        return (
            math.exp(self.log_bend) * float(self.rates.max()) * self.caution * self.zeta * self.rho
        )

    def cross(self, found: float) -> None:
        """Let ρ follow h/s of a step."""
        own = math.log(found / self.made_with)
        old = own if self.log_bend is None else self.log_bend
        self.log_bend = self.length.memory * old + (1 - self.length.memory) * own

    def reach(self) -> None:
        """Let ρ grow or fall."""
        count, usual, kappa = len(self.ratios), self.usual_ratio(), self.length.annealing
        recent = self.recent_ratio()
        if recent > 0 and self.rho > 1:
            self.rho = max(1.0, self.rho * math.exp(-kappa * min(1.0, recent / self.bend())))
        elif count >= 4 and self.length.reach > 1:
            error = math.sqrt(self.pairs / (1 - 0.9**self.seen) / min(count, 19))
            least, most = (usual - 2 * error) / self.bend(), (usual + 2 * error) / self.bend()
            limit = self.sustained() if self.steady() else 1.0
            if least > 0.5 and self.log_k > self.long_log_k - 0.5:
                self.rho = max(0.01, self.rho * math.exp(-kappa * min(1.0, least - 0.5)))
            elif limit < self.rho <= 1:
                time = self.count + self.taken_back
                self.rho = max(limit, self.rho * (time / (time + 1)) ** (5 * kappa))
            elif self.rho < 1:
                if most < 0.5:
                    self.rho = min(limit, self.rho * math.exp(kappa * min(1.0, 0.5 - most)))
            elif usual <= 0 and not self.bound:
                beta = min(1.0, float(self.rates.max())) * self.caution * (1 - most)
                surely = max(0.0, min(1.0, (beta - 2) / (1 + error / self.bend())))
                if not self.residual or self.residual > self.largest_residual / 2:
                    self.rho *= self.length.reach**surely
                elif beta > 3:
                    self.rho *= self.length.reach
                    self.ratios, self.begun, self.lengths = [], [], []

    def steady(self):
        return len(self.taken_at) > 10 and len(set(self.taken_at[-11:])) == 1

    def sustained(self) -> float:
        """Return the ρ that r and a constant rate allow."""
        agreement = math.exp(self.log_bend)
        if agreement >= 2 / 3:
            return 1.0
        shared = 0.0
        for count, begun in enumerate(self.begun, start=1):
            memory = min(0.9, 1 - 1 / count)
            shared = memory * shared + (1 - memory) * begun
        length = float(self.rates.max()) * self.caution * self.zeta
        return min(1.0, max(0.01, shared / (agreement * length * (1 - 1.5 * agreement))))

    def follow(self, x: Tensor, y: Tensor) -> None:
        """Let R follow the deviance, and ν that of squared errors, N Σ‖∂L/∂z‖² with Λ = I."""
        memory = self.length.memory
        if self.likelihood == "categorical":
            found = self.deviance(x, y)
        else:
            z = self.model(x).detach().requires_grad_()
            (u,) = torch.autograd.grad(loss_of(self.likelihood)(z, y), z)
            found = len(z) * float(u.square().sum())
        old = found if self.residual is None else self.residual
        self.residual = old**memory * found ** (1 - memory)
        self.largest_residual = max(self.largest_residual, self.residual)
        if self.likelihood != "categorical":
            signal = self.largest_residual - self.residual
            self.nu = 1.0 if self.residual >= signal else max(0.01, self.residual / signal)

    def is_measured(self) -> bool:
        free = self.refresh.factors < self.refresh.inverses
        offset = self.refresh.factors if free else self.length.interval - 1
        return self.count % self.length.interval == offset


def optimizer_of(model: nn.Module, kind: str, likelihood: str, length: MeasuredLength, **options):
    options = {
        "damping": RelativeDamping(0.2), "lr": 1.0, "momentum": 0.0, "refresh": EVERY_STEP,
        "step_rule": StepRule(length=length), **options,
    }  # fmt: skip
    return natgrad.NaturalGradient(
        model, likelihood, structure=STRUCTURES[kind], fisher="exact", **options
    )


def take(optimizer: Any, model: nn.Module, likelihood: str, x, y, scale: float = 1.0) -> float:
    optimizer.zero_grad()
    loss = scale * loss_of(likelihood)(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- step by step ----------------------------------------------------------------------------------


@pairwise.parametrize(
    {
        "kind, refresh": SETTINGS,
        "likelihood": ["gaussian", "categorical"],
        "momentum": [0.0, 0.5, 0.9],
    }
)
def test_steps_are_those_of_the_formulas(kind, likelihood, refresh, momentum):
    """Measurements, caution, momentum, schedule of the rate, and steps that are taken back."""
    length = MeasuredLength(interval=4, memory=0.6, start=0.3, growth=1.4, annealing=0.4)
    model = network()
    optimizer = optimizer_of(model, kind, likelihood, length, refresh=refresh, momentum=momentum)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0 / (1 + step % 5))
    reference = Reference(network(), kind, likelihood, length, refresh)
    reference.momenta.fill_(momentum)
    outcomes = []
    for step, (x, y) in enumerate(batches(likelihood, 14)):
        reference.rates.fill_(2.0 / (1 + step % 5))
        outcomes.append(reference.step(x, y))
        take(optimizer, model, likelihood, x, y)
        schedule.step()
        close(position(model), reference.theta)
        state = optimizer._lengths.state
        close(torch.tensor(state.caution).double(), torch.tensor(reference.caution).double())
        close(torch.tensor(state.stretch).double(), torch.tensor(reference.zeta).double())
        close(torch.tensor(state.log_decrement).double(), torch.tensor(reference.log_k).double())
    assert state.measurements == reference.measured
    assert state.taken_back == outcomes.count("taken back") < 14
    assert (state.slope is None) == (reference.s is None)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("kind", ["full", "kfac"])
def test_rates_may_be_zero_for_a_step(kind, likelihood):
    """Momentum moves on, and what the next batch measures along that says nothing of lengths."""
    length = MeasuredLength(interval=1)
    model = network()
    optimizer = optimizer_of(model, kind, likelihood, length, momentum=0.5)
    reference = Reference(network(), kind, likelihood, length, EVERY_STEP)
    reference.momenta.fill_(0.5)
    for step, (x, y) in enumerate(batches(likelihood, 12)):
        rate = 0.0 if step % 4 == 3 else 1.5
        reference.rates.fill_(rate)
        optimizer.param_groups[0]["lr"] = rate
        reference.step(x, y)
        take(optimizer, model, likelihood, x, y)
        close(position(model), reference.theta)
        assert math.isclose(optimizer._lengths.state.log_bend or 0.0, reference.log_bend or 0.0)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_groups_have_rates_momenta_decays_and_shares_of_their_own(kind, likelihood):
    length = MeasuredLength(interval=3, memory=0.5, start=0.5)
    model, options = network(), {"lr": 0.4, "momentum": 0.8, "weight_decay": 0.1, "damping": 0.7}
    groups = [{"modules": [model[0]], **options}]
    optimizer = optimizer_of(model, kind, likelihood, length, params=groups, momentum=0.3)
    reference = Reference(network(), kind, likelihood, length, EVERY_STEP)
    first = slice(0, 16)
    reference.momenta.fill_(0.3)
    reference.rates[first], reference.momenta[first] = 0.4, 0.8
    reference.decays[first], reference.shares[first] = 0.1, 0.7
    for x, y in batches(likelihood, 10):
        reference.step(x, y)
        take(optimizer, model, likelihood, x, y)
        close(position(model), reference.theta)


def test_rate_is_in_the_buffer():
    """A rate of zero leaves the last step to fade by momentum alone, and stretches none."""
    model, data = network(), batches("gaussian", 4)
    optimizer = optimizer_of(model, "full", "gaussian", MeasuredLength(overshoot=math.inf))
    group = optimizer.param_groups[0]
    group["momentum"] = 0.5
    take(optimizer, model, "gaussian", *data[0])
    steps, before = [], position(model)
    group["lr"] = 0.0
    for x, y in data[1:]:
        take(optimizer, model, "gaussian", x, y)
        steps.append(position(model) - before)
        before = position(model)
    assert steps[0].abs().max() > 0
    close(steps[1], steps[0] / 2)
    close(steps[2], steps[0] / 4)


# -- damping by residuals --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kfac", "diagonal"])
def test_damping_falls_with_squared_residuals_by_the_formula(kind):
    """Targets are a network's of the same kind, so that next to nothing is left."""
    length, teacher, seen = MeasuredLength(interval=4, start=0.5, reach=1.0), network(seed=5), []
    model = network()
    optimizer = optimizer_of(model, kind, "gaussian", length, refresh=NOW_AND_THEN)
    reference = Reference(network(), kind, "gaussian", length, NOW_AND_THEN)
    for seed in range(60):
        x = normal(24, 3, seed=seed)
        y = teacher(x).detach() + 3.0
        reference.step(x, y)
        take(optimizer, model, "gaussian", x, y)
        close(position(model), reference.theta, 1e-7)
        seen.append(optimizer._damping_unit / optimizer._mean_eigenvalue)
        assert math.isclose(seen[-1], reference.nu, rel_tol=1e-7)
    assert seen[0] == 1.0 and math.isclose(seen[-1], 0.01)
    assert any(0.02 < ratio < 0.8 for ratio in seen)


# -- noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["kfac", "full"])
def test_lengths_are_annealed_by_the_formula(kind, momentum):
    """Targets are noise, so that steps end uphill for the next batch."""
    length = MeasuredLength(interval=4, start=1.0, overshoot=math.inf)
    model = network(2)
    optimizer = optimizer_of(model, kind, "gaussian", length, momentum=momentum)
    reference = Reference(network(2), kind, "gaussian", length, EVERY_STEP)
    reference.momenta.fill_(momentum)
    annealed = []
    for x, y in batches("gaussian", 40):
        reference.step(x, y)
        take(optimizer, model, "gaussian", x, y)
        annealed.append(optimizer._lengths.state.stretch)
        close(torch.tensor(annealed[-1]).double(), torch.tensor(reference.zeta).double())
        close(position(model), reference.theta, 1e-8)
    assert 0.01 < min(annealed) < 0.97
    held = [a == b for a, b in itertools.pairwise(annealed)]
    assert any(held) and not all(held)  # While K falls lengths are left alone.


def student(noise: float, seed: int, **options: float) -> tuple[float, float, float]:
    """Return the error after 400 batches of another network's noisy outputs, the last ζ and ρ."""
    torch.manual_seed(seed)
    teacher, model = (
        nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double() for _ in range(2)
    )
    rule = StepRule(length=MeasuredLength(**options))
    optimizer = natgrad.KFAC(model, "gaussian", step_rule=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Steps are taken back.
        for _ in range(400):
            x = torch.randn(16, 6).double()
            y = teacher(x).detach() + noise * torch.randn(16, 3).double()
            take(optimizer, model, "gaussian", x, y)
    x = torch.randn(1000, 6).double()
    with torch.no_grad():
        error = 0.5 * (model(x) - teacher(x)).square().sum(1).mean()
    return float(error), optimizer._lengths.state.stretch, optimizer._lengths.state.reach


@pytest.mark.parametrize(
    ("likelihood", "kind", "size"),
    [("gaussian", "full", 4), ("gaussian", "kfac", 1), ("categorical", "kfac", 1)],
)
def test_reach_follows_what_the_next_batch_shows_of_a_step(likelihood, kind, size):
    """Batches smaller than the network, whose targets have much in common."""
    length = MeasuredLength(interval=4, reach=8.0)
    model = network()
    optimizer = optimizer_of(model, kind, likelihood, length, momentum=0.5)
    reference = Reference(network(), kind, likelihood, length, EVERY_STEP)
    reference.momenta.fill_(0.5)
    reach = []
    for seed in range(60):
        x = normal(size, 3, seed=seed)
        y = (x[:, 0] > 0).long()
        if likelihood == "gaussian":
            y = 3.0 + 0.1 * normal(size, 3, seed=99 + seed)
        reference.step(x, y)
        take(optimizer, model, likelihood, x, y)
        reach.append(optimizer._lengths.state.reach)
        close(torch.tensor(reach[-1]).double(), torch.tensor(reference.rho).double(), 1e-8)
        close(position(model), reference.theta, 1e-8)
    assert max(reach) >= 2.0
    if likelihood == "gaussian":  # The next batches then want shorter ones.
        assert reach[-1] < 0.96 * max(reach)


@pytest.mark.parametrize(("kind", "size"), [("kfac", 48), ("full", 6)])
def test_reach_falls_where_steps_harm_others_and_rises_again(kind, size):
    """Targets are noise; then the rate is so low that steps average over many batches."""
    length = MeasuredLength(interval=4, start=1.0, overshoot=math.inf)
    model = network()
    optimizer = optimizer_of(model, kind, "gaussian", length, momentum=0.5)
    reference = Reference(network(), kind, "gaussian", length, EVERY_STEP)
    reference.momenta.fill_(0.5)
    reach = []
    for step in range(120):
        reference.rates.fill_(1.5 if step < 80 else 0.2)
        optimizer.param_groups[0]["lr"] = 1.5 if step < 80 else 0.2
        x, y = normal(size, 3, seed=step), normal(size, 3, seed=999 + step)
        reference.step(x, y)
        take(optimizer, model, "gaussian", x, y)
        reach.append(optimizer._lengths.state.reach)
        close(torch.tensor(reach[-1]).double(), torch.tensor(reference.rho).double(), 1e-8)
        close(position(model), reference.theta, 1e-8)
    assert min(reach[:80]) < 0.9
    rises = reach[-1] > 1.05 * min(reach)
    assert rises == (kind == "kfac")  # Six samples say nothing of noise at any length.


def test_reach_stays_where_batches_say_all():
    """With more samples than parameters, a batch is as good a judge of its steps as the next."""
    model = network()
    optimizer = optimizer_of(model, "full", "gaussian", MeasuredLength(interval=4))
    for step, (x, y) in enumerate(batches("gaussian", 40, size=200)):
        optimizer.param_groups[0]["lr"] = 1.0 - 0.001 * step
        take(optimizer, model, "gaussian", x, y)
    assert optimizer._lengths.state.measurements > 8 and optimizer._lengths.state.reach == 1.0


@pytest.mark.parametrize("falling", [False, True])
def test_reach_falls_at_a_constant_rate_as_far_as_the_next_batch_asks(falling):
    """Targets have noise, so that what a batch says is its own for the most part."""
    length = MeasuredLength(interval=4, overshoot=math.inf)
    model = network()
    optimizer = optimizer_of(model, "kfac", "gaussian", length, momentum=0.5)
    reference = Reference(network(), "kfac", "gaussian", length, EVERY_STEP)
    reference.momenta.fill_(0.5)
    reach = []
    for step in range(60):
        rate = 1.0 - 0.001 * step * falling
        reference.rates.fill_(rate)
        optimizer.param_groups[0]["lr"] = rate
        x = normal(12, 3, seed=step)
        y = x.cumsum(1) + normal(12, 3, seed=999 + step)
        reference.step(x, y)
        take(optimizer, model, "gaussian", x, y)
        reach.append(optimizer._lengths.state.reach)
        close(torch.tensor(reach[-1]).double(), torch.tensor(reference.rho).double(), 1e-8)
        close(position(model), reference.theta, 1e-8)
    assert (min(reach) < 0.9) == (not falling)
    for step, (earlier, later) in enumerate(itertools.pairwise(reach), start=1):
        assert later >= earlier * (1 - 1 / (step + 1)) * (1 - 1e-12)  # No faster than 1/t.


def test_noise_that_stays_anneals_lengths_at_a_constant_rate():
    plain, annealed, shortened = (
        [student(1.0, seed, annealing=kappa, reach=reach) for seed in range(2)]
        for kappa, reach in ((0.0, 1.0), (0.2, 1.0), (0.2, 2.0))
    )
    assert sum(error for error, *_ in annealed) < 0.75 * sum(error for error, *_ in plain)
    assert all(zeta < 0.8 for _, zeta, _ in annealed)
    # Where steps harm other batches, these say so sooner than slopes alone.
    assert sum(error for error, *_ in shortened) < 0.75 * sum(error for error, *_ in annealed)
    assert all(rho < 0.8 for *_, rho in shortened)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["kfac", "full"])
def test_lengths_are_stretched_by_the_formula(kind, momentum):
    """Residuals of 40 have gradients of 1, until they are as small as that."""
    length = MeasuredLength(interval=4, reach=1.0)
    model = network()
    optimizer = optimizer_of(model, kind, "gaussian", length, momentum=momentum)
    reference = Reference(network(), kind, "huber", length, EVERY_STEP)
    reference.momenta.fill_(momentum)
    stretch = []
    for step, (x, y) in enumerate(batches("huber", 70)):
        reference.rates.fill_(0.5 if step < 5 else 1.0)
        optimizer.param_groups[0]["lr"] = 0.5 if step < 5 else 1.0
        reference.step(x, y)
        take(optimizer, model, "huber", x, y)
        stretch.append(optimizer._lengths.state.stretch)
        close(torch.tensor(stretch[-1]).double(), torch.tensor(reference.zeta).double())
        close(position(model), reference.theta, 1e-8)
    assert stretch[5] <= 1.0  # Steps are short because the rate is low.
    assert 2.0 < max(stretch) and stretch[-1] < 0.8 * max(stretch)


@pytest.mark.parametrize("seed", range(4))
def test_a_step_behind_a_weight_that_starts_at_zero_promises_no_more_than_the_loss(seed):
    """The layer that shows by what gradients were multiplied, here the smallest, has none yet."""
    torch.manual_seed(seed)
    body, head = nn.Linear(5, 8), nn.Linear(8, 10)
    nn.init.zeros_(head.weight)
    model = nn.Sequential(body, nn.Tanh(), head)
    optimizer = natgrad.KFAC(model)  # With labels that are sampled, which see a part of F alone.
    loss = take(optimizer, model, "categorical", torch.randn(4, 5), labels(4, 10, seed))
    assert optimizer.preconditioner.observer.probe_layer == "0"
    assert body.weight.grad.count_nonzero() == 0
    assert 0.1 < math.exp(optimizer._lengths.state.log_decrement) <= 2.001 * loss


@pytest.mark.parametrize("method", [natgrad.KFAC, natgrad.EKFAC])
def test_two_samples_a_step_train(method):
    """Of most of these the loss is small, and so is the slope, but never the average decrement."""
    features = normal(512, 12, seed=0)
    classes = torch.tanh(features @ normal(12, 5, seed=1)).argmax(1)
    left = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                              nn.Linear(32, 5)).double()  # fmt: skip
        optimizer = method(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Steps are taken back.
            for _ in range(400):
                some = torch.randint(512, (2,))
                take(optimizer, model, "categorical", features[some], classes[some])
        with torch.no_grad():
            left.append(float(functional.cross_entropy(model(features), classes)))
    assert sum(left) / 2 < 0.5 * math.log(5)


def test_bounded_gradients_do_not_bound_the_way():
    """The unit of targets does not matter where only signs of residuals do."""
    torch.manual_seed(0)
    x, far = torch.randn(256, 6).double(), 100 * torch.randn(6, 2).double()
    shares = []
    for annealing in (0.0, 0.2):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2)).double()
        rule = StepRule(length=MeasuredLength(annealing=annealing))
        optimizer = natgrad.KFAC(model, "gaussian", step_rule=rule)
        losses = []
        for _ in range(150):
            chosen = torch.randint(256, (64,))
            optimizer.zero_grad()
            loss = functional.huber_loss(model(x[chosen]), torch.tanh(x[chosen]) @ far)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        shares.append(sum(losses[-10:]) / sum(losses[:10]))
    assert shares[1] < 0.2 < shares[0]


def test_a_low_learning_rate_stays_low():
    """Steps that are short by intention are not stretched."""
    for rate in (0.01, 0.1, 0.4):
        model = network()
        optimizer = natgrad.KFAC(model, "gaussian", lr=rate)
        for x, y in batches("gaussian", 40, size=32):
            take(optimizer, model, "gaussian", x, 10 * torch.tanh(x) + 0 * y)
            assert optimizer._lengths.state.stretch <= 1.0


def test_what_can_be_fitted_keeps_its_lengths():
    """The noise of batches vanishes with the error."""
    for seed in range(2):
        error, zeta, _ = student(0.0, seed)
        assert error < 0.01
        assert zeta > 0.8


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "kfac"])
def test_linear_regression_is_solved_in_one_step(kind):
    """α is 1 where F is exact; of a single output K-FAC's is."""
    torch.manual_seed(0)
    outputs = 3 if kind == "full" else 1
    model = nn.Linear(4, outputs).double()
    x, y = normal(20, 4), normal(20, outputs, seed=1)
    optimizer = optimizer_of(model, kind, "gaussian", MeasuredLength(start=1.0), damping=0.0)
    take(optimizer, model, "gaussian", x, y)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1)], dim=1), y).solution
    close(torch.cat([model.weight.T, model.bias[None]]).detach(), solution)
    usual = dataclasses.replace(optimizer._lengths.state, log_slope=math.log(1e-3))
    assert usual.length(1e-3) == 1.0


def test_length_is_the_minimum_along_the_line():
    """With squared error, a linear model and no damping the step minimises the loss."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = normal(9, 4) + 1.0, normal(9, 3, seed=1)  # Correlated, which the diagonal ignores.
    optimizer = optimizer_of(model, "diagonal", "gaussian", MeasuredLength(start=1.0), damping=0.0)
    before = position(model)
    take(optimizer, model, "gaussian", x, y)
    start = flat(p.grad for p in model.parameters())
    step = position(model) - before
    optimizer.zero_grad()
    loss_of("gaussian")(model(x), y).backward()
    end = flat(p.grad for p in model.parameters())
    assert float(start @ step) < 0
    assert abs(float(end @ step)) < 1e-12 * abs(float(start @ step))


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("size", [1, 4, 60])
def test_decrement_is_at_most_the_residuals_in_the_metric_of_outputs(kind, likelihood, size):
    model = network(1)
    ((x, y),) = batches(likelihood, 1, size)
    optimizer = optimizer_of(
        model, kind, likelihood, MeasuredLength(), damping=RelativeDamping(1e-6)
    )
    z = model(x).detach().requires_grad_()
    (r,) = torch.autograd.grad(loss_of(likelihood)(z, y) * size, z)
    roots = output_roots(likelihood, z.detach())
    hessians = roots @ roots.mT
    squares = (r.unsqueeze(1) @ torch.linalg.pinv(hessians) @ r.unsqueeze(2)).flatten()
    if likelihood == "categorical":
        nll = nn.functional.cross_entropy(z.detach(), y, reduction="none")
        squares = torch.minimum(squares, 2 * nll)
    bound = squares.mean()
    take(optimizer, model, likelihood, x, y)
    found = math.exp(optimizer._lengths.state.log_decrement)
    assert 0 < found <= float(bound) * (1 + 1e-9)
    if size == 1 and kind == "full":  # One sample explains itself, but for the damping.
        assert found > 0.999 * float(bound)


def test_average_is_in_the_logarithm():
    rule, state = MeasuredLength(memory=0.75), LengthState()
    decrements = [4.0, 1.0, 0.25, 8.0, 2.0]
    logs = [math.log(k) for k in decrements]
    weights = [1.0]
    for count, k in enumerate(decrements, start=1):
        state = state.measured(rule, math.sqrt(k * 3.0), 3.0, 1.0)
        memory = min(0.75, 1 - 1 / count)
        weights = [w * memory for w in weights[: count - 1]] + [1 - memory]
        expected = sum(w * x for w, x in zip(weights, logs, strict=False))
        assert math.isclose(state.log_decrement, expected, rel_tol=1e-12, abs_tol=1e-12)
    for slope, quadratic in ((-1.0, 1.0), (1.0, 0.0), (1.0, -2.0), (math.nan, 1.0)):
        assert state.measured(rule, slope, quadratic, 1.0) == state


# -- taking back -----------------------------------------------------------------------------------


def settled(momentum: float = 0.0, steps: int = 3, **options: Any):
    """Return a model with a parameter of the fallback, its optimizer and data, some steps on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    groups = [{"modules": [model[2]], "preconditioned": False}]
    length = MeasuredLength(start=0.5)
    optimizer = natgrad.KFAC(
        model, "gaussian", params=groups, fisher="mc", momentum=momentum,
        refresh=Refresh(factors=1, inverses=2, decay=0.5),
        step_rule=StepRule(length=length), **options,
    )  # fmt: skip
    x, y = normal(8, 3), normal(8, 3, seed=1)
    for _ in range(steps):
        take(optimizer, model, "gaussian", x, y)
    return model, optimizer, x, y


def against(model: nn.Module, step: list[Tensor], x: Tensor) -> Tensor:
    """Return targets whose loss rises steeply along a step of the first parameters."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, v in zip(moved.parameters(), step, strict=False):
            p.add_(v)
        return model(x) - 100.0 * (moved(x) - model(x))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_step_that_went_too_far_ends_at_the_minimum_of_the_parabola(momentum):
    model, optimizer, x, y = settled(momentum)
    state = optimizer._lengths.state
    first = [model[0].weight, model[0].bias]
    step = [optimizer.state[p]["previous_step"].clone() for p in first]
    before = copy.deepcopy(optimizer.state_dict())
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    target = against(model, step, x)
    optimizer.zero_grad()
    loss_of("gaussian")(model(x), target).backward()
    slope = sum(float((v * p.grad).sum()) for v, p in zip(step, first, strict=True))
    expected = max(state.slope, state.usual_slope)
    share = expected / (expected + slope)
    assert slope > state.slope
    optimizer.step()
    for v, p, name in zip(step, first, ("0.weight", "0.bias"), strict=True):
        close(p.detach(), parameters[name] - (1 - share) * v, 1e-12)
        close(optimizer.state[p]["previous_step"], share * v, 1e-12)
    for name in ("2.weight", "2.bias"):  # What the fallback trains.
        assert torch.equal(model.get_parameter(name), parameters[name])
    after = optimizer.state_dict()
    assert same(before["param_groups"], after["param_groups"])
    assert not before["natgrad"].pop("renews")
    assert after["natgrad"].pop("renews")
    assert same(*({**one["natgrad"], "lengths": None} for one in (before, after)))
    assert same(*(one["natgrad"]["lengths"]["deviance"] for one in (before, after)))
    cut = share if share < 0.25 else max(share, 0.5)
    assert math.isclose(optimizer._lengths.state.caution, state.caution * cut)
    now = optimizer._lengths.state
    assert now == dataclasses.replace(
        state, caution=now.caution, ceiling=now.caution, slope=None, later_ratio=0.0,
        usual_slope=now.usual_slope, steps=state.steps + 1,
        taken_back=state.taken_back + 1,
    )  # fmt: skip
    # The next one is taken, whatever it meets.
    at = position(model)
    optimizer.zero_grad()
    loss_of("gaussian")(model(x), target).backward()
    optimizer.step()
    assert optimizer._lengths.state.taken_back == state.taken_back + 1
    assert optimizer._lengths.state.slope is not None
    assert not torch.equal(position(model), at)


def meet_a_wall(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    """Let the next batch show that the last step went too far."""
    steps = [optimizer.state[p]["previous_step"] for p in model.parameters()]
    before = optimizer._lengths.state.taken_back
    take(optimizer, model, "gaussian", x, against(model, steps, x))
    assert optimizer._lengths.state.taken_back == before + 1


def estimates_of(optimizer: Any) -> list[tuple[Any, Any]]:
    """Return every average and inverse: what an optimizer has replaced is another object."""
    found = optimizer.preconditioner.curvature.estimates.values()
    return [(one.average, one.inverse) for one in found]


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("steps", [5, 13])
def test_the_step_after_one_taken_back_is_on_curvature_of_the_day(steps, stagger):
    """Once, then its turns go on; and a checkpoint made in between takes the same step."""
    refresh = Refresh(factors=10, inverses=10, decay=0.5, stagger=stagger)
    model = network()
    optimizer = optimizer_of(model, "kfac", "gaussian", MeasuredLength(), refresh=refresh)
    data = [normal(12, 3, seed=seed) for seed in range(steps + 3)]
    for x in data[:steps]:
        take(optimizer, model, "gaussian", x, x.sin())
    old = estimates_of(optimizer)
    meet_a_wall(model, optimizer, data[steps])
    assert estimates_of(optimizer) == old  # Of a batch whose step was not taken.
    other = copy.deepcopy(model)
    resumed = optimizer_of(other, "kfac", "gaussian", MeasuredLength(), refresh=refresh)
    resumed.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (other, resumed)):
        x = data[steps + 1]
        take(its, one, "gaussian", x, x.sin())
    close(position(model), position(other), 1e-12)
    new = estimates_of(optimizer)
    for (average, inverse), (before, inverted) in zip(new, old, strict=True):
        assert average is not before
        assert inverse is not inverted
    if not stagger:
        x = data[steps + 2]
        take(optimizer, model, "gaussian", x, x.sin())
        found = zip(estimates_of(optimizer), new, strict=True)
        assert all(a is b for pair in found for a, b in zip(*pair, strict=True))


def test_curvature_is_not_renewed_where_steps_are_taken_back_all_the_time():
    model = network()
    refresh = Refresh(factors=10, inverses=10, decay=0.5)
    optimizer = optimizer_of(model, "kfac", "gaussian", MeasuredLength(), refresh=refresh)
    x = normal(12, 3)
    for _ in range(4):
        take(optimizer, model, "gaussian", x, x.sin())
    lengths, old = optimizer._lengths, estimates_of(optimizer)
    lengths.state = dataclasses.replace(lengths.state, steps=98, taken_back=9)
    with pytest.warns(UserWarning, match="took back 10 of its 99 steps"):
        meet_a_wall(model, optimizer, x)
    take(optimizer, model, "gaussian", x, x.sin())
    found = zip(estimates_of(optimizer), old, strict=True)
    assert all(a is b for pair in found for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("start", ["ordinary", "zero"])
def test_one_weight_at_most_changes_by_more_than_a_share_of_its_norm(start):
    """Targets a thousand times the outputs ask for more of all of them."""
    torch.manual_seed(0)
    sizes = (3, 8, 8, 2)
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).double()
    if start == "zero":
        nn.init.zeros_(layers[1].weight)
    optimizer = optimizer_of(model, "kfac", "gaussian", MeasuredLength(start=1.0), lr=2.0)
    found = []
    for seed in range(12):
        before = [layer.weight.detach().clone() for layer in layers]
        x = normal(16, 3, seed=seed)
        take(optimizer, model, "gaussian", x, 1000 * x[:, :2].sin())
        changes = [
            float((layer.weight.detach() - old).norm())
            / max(float(old.norm()), math.sqrt(len(old) / 3))
            for layer, old in zip(layers, before, strict=True)
        ]
        found.append(sorted(changes))
    assert max(second for _, second, _ in found) == pytest.approx(0.3, rel=1e-9)
    assert max(first for _, _, first in found) > 0.5


def test_loss_that_is_scaled_up_makes_no_step_longer():
    """A hundredfold loss after the last measurement: the step is as long as before."""
    lengths = {}
    for scale in (1.0, 100.0):
        model = network()
        refresh = Refresh(decay=0.9)
        length = MeasuredLength(interval=50)
        optimizer = optimizer_of(model, "kfac", "gaussian", length, refresh=refresh)
        data = batches("gaussian", 14)
        for x, y in data[:13]:
            take(optimizer, model, "gaussian", x, y)
        before, taken_back = position(model), optimizer._lengths.state.taken_back
        take(optimizer, model, "gaussian", *data[13], scale=scale)
        assert optimizer._lengths.state.taken_back == taken_back  # It is a step forward.
        lengths[scale] = float((position(model) - before).norm())
    assert lengths[100.0] <= 1.01 * lengths[1.0]


def test_warning_of_many_steps_taken_back_comes_once():
    model = network()
    optimizer = optimizer_of(
        model, "full", "gaussian", MeasuredLength(overshoot=1e-3), lr=3.0, momentum=0.9
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(80):
            x, y = normal(3, 3, seed=seed), 30 * normal(3, 3, seed=500 + seed)
            take(optimizer, model, "gaussian", x, y)
    assert optimizer._lengths.state.taken_back >= 12
    said = [str(one.message) for one in caught if "took back" in str(one.message)]
    assert len(said) == 1
    assert "NaturalGradient took back 6 of its" in said[0]


def test_caution_grows_fast_up_to_where_steps_went_too_far_and_slowly_beyond():
    rule, state = MeasuredLength(growth=2.0), LengthState()
    state = dataclasses.replace(state.taken(rule, 1.0, rate=1.0), caution=0.8, ceiling=1.0)
    state = state.shortened(0.5, rate=1.0)
    assert state.caution == state.ceiling == 0.4
    state = state.shortened(0.1, rate=1.0)
    assert math.isclose(state.caution, 0.04)
    assert dataclasses.replace(state, caution=0.5).shortened(0.4, rate=1.0).caution == 0.25
    assert state.shortened(0.1, rate=1.0).caution == 0.01
    cautions = []
    for _ in range(6):
        state = state.taken(rule, 1.0, rate=1.0)
        cautions.append(state.caution)
    expected = [0.04 * 1.05**k for k in range(1, 7)]  # The ceiling fell as well.
    assert all(math.isclose(a, b) for a, b in zip(cautions, expected, strict=True))
    fresh = dataclasses.replace(state, caution=0.1, ceiling=0.5)
    grown = []
    for _ in range(4):
        fresh = fresh.taken(rule, 1.0, rate=1.0)
        grown.append(fresh.caution)
    assert all(math.isclose(a, b) for a, b in zip(grown, (0.2, 0.4, 0.5, 0.5 * 1.05), strict=True))


@pytest.mark.parametrize(
    ("ratio", "rate", "growth"),
    [
        (0.2, 1.0, 1.05), (-0.2, 1.0, 1.25), (-0.2, 5.0, 1.25), (-0.9, 1.0, 2.0), (-3.0, 1.0, 2.0),
        (-0.9, 0.1, 1.05), (-0.9, 0.15, 1.5), (-3.0, 0.0, 1.05),
    ],
)  # fmt: skip
def test_caution_grows_by_what_slopes_ask_for(ratio, rate, growth):
    """A rate below 1 leaves a share of its slope by intention."""
    rule, state = MeasuredLength(growth=2.0), LengthState()
    state = dataclasses.replace(state.taken(rule, 1.0, rate), caution=0.2, ceiling=0.2)
    for count in range(1, 60):  # q̂ begins at 0.
        state = dataclasses.replace(state, caution=0.2, ceiling=0.2, usual_slope=1.0, slope=1.0)
        state = state.answered(rule, ratio, rate)
        assert math.isclose(state.later_ratio, max(-3.0, ratio) * (1 - 0.8**count))
        state = state.taken(rule, 1.0, rate)
    assert math.isclose(state.caution, 0.2 * growth, rel_tol=1e-4)
    again = state.shortened(0.5, rate)
    assert math.isclose(again.taken(rule, 1.0, rate).caution, 0.1 * growth * 1.05, rel_tol=1e-4)


@pytest.mark.parametrize(("rate", "least"), [(0.1, 0.01), (1.0, 0.01), (2.0, 0.005), (1e3, 1e-5)])
def test_caution_never_falls_to_a_standstill(rate, least):
    state = LengthState()
    for _ in range(40):
        state = state.shortened(0.5, rate)
    assert math.isclose(state.caution, least)
    tiny = dataclasses.replace(state, caution=1e-9).shortened(0.1, rate)
    assert tiny.caution == 1e-9  # What was chosen as a start is not raised.


def test_second_gradient_that_is_not_finite_takes_all_of_the_last_step_back():
    model, optimizer, x, y = settled(0.5)
    first = [model[0].weight, model[0].bias]
    steps = [optimizer.state[p]["previous_step"].clone() for p in first]
    at = [p.detach().clone() for p in first]
    bad = torch.full_like(x, math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take(optimizer, model, "gaussian", bad, y)
        assert all(torch.equal(p, value) for p, value in zip(first, at, strict=True))
        take(optimizer, model, "gaussian", bad, y)
    for p, value, step in zip(first, at, steps, strict=True):
        close(p.detach(), value - step, 1e-12)
        assert not optimizer.state[p]["previous_step"].any()
    taken = optimizer._lengths.state.taken_back
    take(optimizer, model, "gaussian", x, y)
    assert optimizer._lengths.state.taken_back == taken
    assert all(p.isfinite().all() for p in model.parameters())


# -- options and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"interval": 0}, "interval"), ({"interval": 1.5}, "interval"), ({"memory": 1.0}, "memory"),
        ({"memory": -0.1}, "memory"), ({"start": 0.0}, "start"), ({"start": 1.1}, "start"),
        ({"growth": 0.9}, "growth"), ({"growth": math.inf}, "growth"),
        ({"growth": math.nan}, "growth"), ({"overshoot": 0.0}, "overshoot"),
        ({"overshoot": math.nan}, "overshoot"), ({"start": math.nan}, "start"),
        ({"reach": 0.5}, "reach"), ({"reach": math.inf}, "reach"), ({"reach": math.nan}, "reach"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(options, word):
    with pytest.raises((ValueError, TypeError), match=word):
        MeasuredLength(**options)


@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_checkpoint_goes_on_bit_for_bit(at):
    length = MeasuredLength(interval=3, start=0.5)
    options = {"momentum": 0.5, "refresh": NOW_AND_THEN, "lr": 2.0}
    model, data = network(), batches("categorical", 14)
    optimizer = optimizer_of(model, "kfac", "categorical", length, **options)
    for x, y in data[:at]:
        take(optimizer, model, "categorical", x, y)
    other = copy.deepcopy(model)
    again = optimizer_of(other, "kfac", "categorical", length, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, y in data[at:]:
        take(optimizer, model, "categorical", x, y)
        take(again, other, "categorical", x, y)
        assert torch.equal(position(model), position(other))
    assert again._lengths.state == optimizer._lengths.state


def test_measurements_leave_the_global_random_state_alone():
    model, data = network(), batches("categorical", 3)
    optimizer = natgrad.KFAC(model)
    state = torch.get_rng_state()
    for x, y in data:
        take(optimizer, model, "categorical", x, y)
    assert torch.equal(torch.get_rng_state(), state)
