"""Whatever happens to a step, parameters and state stay finite and training goes on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import random
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import pairwise, processes
from tests.methods import make_optimizer, measures
from tests.optim import interrupted_run
from tests.state import flat, same, tensors

AVERAGING: dict[str, Any] = {
    "kfac": natgrad.KFAC,
    "ekfac": natgrad.EKFAC,
    "tkfac": natgrad.TKFAC,
    "tekfac": natgrad.TEKFAC,
    "kpsvd": natgrad.KPSVD,
    "unit_wise": natgrad.UnitWiseNGD,
    "diagonal": natgrad.DiagonalNGD,
    "singd": natgrad.SINGD,
}
OPTIMIZERS: dict[str, Any] = AVERAGING | {
    "exact": natgrad.ExactNGD,
    "block_diagonal": natgrad.BlockDiagonalNGD,
    "improved": natgrad.ImprovedEmpiricalNGD,
    "improved_gram": functools.partial(
        natgrad.ImprovedEmpiricalNGD, fisher=natgrad.ImprovedFisher(damping_on="gram")
    ),
    "conjugate_gradient": natgrad.ConjugateGradientNGD,
    "thermodynamic": functools.partial(natgrad.ThermodynamicNGD, delay=5.0),
    "thermodynamic_noise": functools.partial(
        natgrad.ThermodynamicNGD, temperature=1e-8, burn_in=10.0
    ),
    "egn": natgrad.EGN,
    "fngd": functools.partial(natgrad.FNGD, coefficient_steps=2),
}
#: Settings of others, which meet the same data alike.
VARIANTS = ("improved_gram", "thermodynamic_noise")
#: Their steps hold something of those before, as with momentum, even where the gradient is zero.
MOVED_BY_THE_PAST = ("conjugate_gradient", "thermodynamic", "thermodynamic_noise")


def make(name: str, model: nn.Module, **options: Any) -> Any:
    """Make an optimizer that updates and factorises at every step."""
    if name in AVERAGING:
        options = {"factors": 1, "inverses": 1} | options
    elif name == "egn":
        options.pop("momentum", None)
    return make_optimizer(OPTIMIZERS[name], model, **options)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def data(samples: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()


def assert_finite(model: nn.Module, optimizer: Any) -> None:
    """Parameters, momentum and curvature have no NaN and no infinity."""
    assert flat(model).isfinite().all()
    for tensor in tensors(optimizer.state_dict()):
        assert not tensor.is_floating_point() or tensor.isfinite().all()


def step(name: str, optimizer: Any, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> float:
    """Take one step the way the optimizer wants it."""
    if name == "egn":
        return float(optimizer.step(lambda: loss(model)))
    optimizer.zero_grad()
    value = loss(model)
    if value.requires_grad:
        value.backward()
    optimizer.step()
    return float(value.detach())


def fit(x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: functional.cross_entropy(model(x), y)


# -- degenerate data and models --------------------------------------------------------------------


def degenerate(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    model = network()
    x, y = data()
    if kind == "rank one":
        x = x[:, :1] * torch.ones(1, 6)
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "repeated sample":
        x, y = x[:1].expand(16, 6).contiguous(), y[:1].expand(16).contiguous()
    elif kind == "dead units":
        with torch.no_grad():
            model[0].bias.fill_(-100.0)
    elif kind == "zero weights":
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    elif kind == "saturated":
        with torch.no_grad():
            model[4].weight.mul_(1e4)
    elif kind == "batch of one":
        x, y = x[:1], y[:1]
    elif kind == "one class":
        y = torch.zeros_like(y)
    elif kind == "huge features":
        x = x * torch.logspace(-15, 15, 6)
    return model, x, y


KINDS = [
    "rank one", "constant", "zero", "repeated sample", "dead units", "zero weights", "saturated",
    "batch of one", "one class", "huge features",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*could not be factorised:UserWarning")
@pytest.mark.filterwarnings("ignore:.*skipped a step:UserWarning")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in OPTIMIZERS
        for kind in (("zero", "huge features") if name in VARIANTS else KINDS)
    ],
)
def test_degenerate_problems(name, kind):
    model, x, y = degenerate(kind)
    optimizer = make(name, model)
    first = float(fit(x, y)(model).detach())
    for _ in range(6):
        step(name, optimizer, model, fit(x, y))
        assert_finite(model, optimizer)
    if kind not in ("huge features", "saturated"):
        assert float(fit(x, y)(model).detach()) <= first * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_problems_of_padam(kind):
    model, x, y = degenerate(kind)
    optimizer = natgrad.Padam(model.parameters(), lr=0.01)
    first = float(fit(x, y)(model).detach())
    for _ in range(30):
        step("padam", optimizer, model, fit(x, y))
        assert flat(model).isfinite().all()
        for tensor in tensors(optimizer.state_dict()):
            # Squares of gradients may exceed the range; they then stop their own entry alone.
            assert not tensor.isnan().any()
    if kind not in ("huge features", "saturated"):
        assert float(fit(x, y)(model).detach()) <= first * (1 + 1e-4) + 1e-6


@pytest.mark.filterwarnings("ignore:.*skipped a step:UserWarning")
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in MOVED_BY_THE_PAST])
def test_all_targets_ignored(name):
    model, (x, y) = network(), data()
    optimizer = make(name, model, momentum=0.0)
    step(name, optimizer, model, fit(x, y))
    before = flat(model)
    step(name, optimizer, model, fit(x, torch.full_like(y, -100)))
    assert torch.equal(flat(model), before)
    assert_finite(model, optimizer)
    step(name, optimizer, model, fit(x, y))
    assert not torch.equal(flat(model), before)


@pytest.mark.filterwarnings("ignore:.*skipped a step:UserWarning")
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in MOVED_BY_THE_PAST])
def test_batches_of_no_samples(name):
    """The first one, too, at which nothing of the model is known, and the last of an epoch."""
    x, y = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.Tanh(), nn.Linear(64, 3)).to(x.dtype)
    optimizer = make(name, model, momentum=0.0)
    nothing = (lambda x, y: lambda model: fit(x, y)(model).nan_to_num())(x[:0], y[:0])
    for fits in (False, True):
        before = flat(model)
        step(name, optimizer, model, nothing)
        assert torch.equal(flat(model), before)
        for _ in range(2 if fits else 1):
            step(name, optimizer, model, fit(x, y))
        assert not torch.equal(flat(model), before)
        assert_finite(model, optimizer)


def test_all_targets_ignored_by_solvers_that_start_from_the_last_step():
    """Conjugate gradients find the zero up to their rounding; without a warm start it is exact."""
    for name, options, size in (
        ("conjugate_gradient", {"warm_start": False}, 0.0),
        ("conjugate_gradient", {}, 1e-5),
        ("thermodynamic", {"delay": 0.0, "start": "zero"}, 0.0),
        ("thermodynamic", {"delay": 0.0, "start": "gradient"}, 0.0),
    ):
        model, (x, y) = network(), data()
        optimizer = make(name, model, momentum=0.0, **options)
        step(name, optimizer, model, fit(x, y))
        before = flat(model)
        step(name, optimizer, model, fit(x, torch.full_like(y, -100)))
        assert (flat(model) - before).abs().max() <= size
        assert_finite(model, optimizer)


@pytest.mark.filterwarnings("ignore:.*skipped a step:UserWarning")
@pytest.mark.filterwarnings("ignore:.*could not be factorised:UserWarning")
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in VARIANTS])
def test_exploding_losses(name):
    """A loss that grows a hundredfold at every step, up to overflow, and comes back."""
    model, (x, y) = network(), data()
    optimizer = make(name, model)
    for power in range(0, 48, 4):
        step(name, optimizer, model, lambda m: 10.0**power * fit(x, y)(m))  # noqa: B023
        assert_finite(model, optimizer)
    for _ in range(5):
        step(name, optimizer, model, fit(x, y))
    assert_finite(model, optimizer)


# -- faults ----------------------------------------------------------------------------------------


class Faulty:
    """Injects one value into one place of a forward or backward pass."""

    def __init__(self, model: nn.Sequential, where: str, value: float) -> None:
        self.model, self.where, self.value = model, where, value

    def _spoil(self, tensor: Tensor) -> Tensor:
        spoiled = tensor.clone()
        spoiled.view(-1)[0] = self.value
        return spoiled

    def __call__(self, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> Tensor:
        if self.where == "input":
            x = self._spoil(x)
        layers = {"activation": 1, "first output": 0, "middle gradient": 2, "last gradient": 4}
        handle = None
        if self.where in ("activation", "first output"):
            handle = self.model[layers[self.where]].register_forward_hook(
                lambda module, args, output: self._spoil(output)
            )
        elif self.where.endswith("gradient"):

            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                if output.requires_grad:
                    output.register_hook(self._spoil)

            handle = self.model[layers[self.where]].register_forward_hook(hook)
        try:
            if self.where == "target":
                y = functional.one_hot(y, 3).float()
                y[0, 0] = self.value
            value = loss(self.model(x), y)
            if self.where == "loss":
                value = value * self.value
            return value
        finally:
            if handle is not None:
                handle.remove()


PLACES = [
    "input", "first output", "activation", "middle gradient", "last gradient", "target", "loss",
]  # fmt: skip
#: One of each kind of step: what others do with a fault is in their base class.
KINDS_OF_STEPS = ("kfac", "exact", "egn", "fngd")
FAULTS = pairwise.pairwise(KINDS_OF_STEPS, PLACES, map(float, ("nan", "inf", "-inf")))
#: Others meet two of the places, one before the loss and one behind it.
FAULTS += [
    (name, where, float("nan"))
    for index, name in enumerate(name for name in OPTIMIZERS if name not in KINDS_OF_STEPS)
    for where in (PLACES[index % 3], PLACES[3 + index % 4])
]


@pytest.mark.filterwarnings("ignore:.*could not be factorised:UserWarning")
@pytest.mark.parametrize(("name", "where", "value"), FAULTS)
def test_a_fault_changes_nothing(name, where, value):
    """A step of which anything is not finite leaves everything as it was, but for a count."""
    model, (x, y) = network(), data()
    optimizer = make(name, model)
    step(name, optimizer, model, fit(x, y))
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    faulty = Faulty(model, where, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(name, optimizer, model, lambda m: faulty(x, y, functional.cross_entropy))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if all(g.isfinite().all() for g in gradients):
        # The value did not reach a gradient: tanh(∞) = 1, relu(-∞) = 0.
        assert_finite(model, optimizer)
    else:
        assert torch.equal(flat(model), before)
        assert same(optimizer.state_dict(), state)
        assert any("skipped" in str(w.message) for w in caught)
    for _ in range(3):
        step(name, optimizer, model, fit(x, y))
        assert_finite(model, optimizer)
    assert not torch.equal(flat(model), before)


@pytest.mark.filterwarnings("ignore:.*skipped a step:UserWarning")
@pytest.mark.parametrize(
    ("name", "where"),
    [(name, where) for name in KINDS_OF_STEPS for where in ("input", "last gradient", "loss")]
    + [(name, "last gradient") for name in OPTIMIZERS if name not in KINDS_OF_STEPS],
)
def test_a_fault_of_the_first_batch_changes_nothing(name, where):
    """There is no curvature yet to fall back on, nor a unit of damping."""
    model, (x, y) = network(), data()
    optimizer = make(name, model)
    before, faulty = flat(model), Faulty(model, where, float("nan"))
    step(name, optimizer, model, lambda m: faulty(x, y, functional.cross_entropy))
    assert torch.equal(flat(model), before)
    for _ in range(3):
        step(name, optimizer, model, fit(x, y))
        assert_finite(model, optimizer)
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, float("nan")) for name in ("kfac", "ekfac", "diagonal", "unit_wise", "exact",
     "block_diagonal", "conjugate_gradient", "thermodynamic", "egn")]
    + [(name, float("inf")) for name in ("kfac", "exact", "egn")],
)  # fmt: skip
def test_a_fault_in_curvature_alone(name, value):
    """A fault that hits natgrad's own backward pass but not the user's spoils no factor."""
    model, (x, y) = network(), data()
    # Few sampled labels of one batch do not carry steps of the length that exact methods take.
    optimizer = make(name, model, fisher="mc" if name in AVERAGING else "exact")
    for _ in range(3):  # Looks at samples take passes, too; the fourth step has none.
        step(name, optimizer, model, fit(x, y))
    passes = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        def spoil(gradient: Tensor) -> Tensor | None:
            passes.append(None)
            if len(passes) > 1:  # natgrad's pass comes first, the user's second.
                return None
            spoiled = gradient.clone()
            spoiled.view(-1)[0] = value
            return spoiled

        if output.requires_grad:  # Not in a line search.
            output.register_hook(spoil)

    handle = model[2].register_forward_hook(hook)
    step(name, optimizer, model, fit(x, y))
    handle.remove()
    assert len(passes) == 2
    assert_finite(model, optimizer)
    losses = [step(name, optimizer, model, fit(x, y)) for _ in range(15)]
    assert_finite(model, optimizer)
    assert losses[-1] < losses[0]


def spoil(optimizer, change) -> None:
    """Change sums of the factors of layer 2."""
    estimates = optimizer.preconditioner.curvature.estimates
    average = estimates["2"].average
    factors = getattr(average, "factors", average)
    spoilt = dataclasses.replace(factors, **change(factors))
    average = spoilt if factors is average else dataclasses.replace(average, factors=spoilt)
    estimates["2"] = dataclasses.replace(estimates["2"], average=average)


@pytest.mark.parametrize("name", ["kfac", "tkfac", "ekfac", "tekfac"])
def test_factors_that_cannot_be_factorised_keep_the_last_and_name_the_layer(name):
    """Factors between 1e-30 and 1e30, and one spoiled by hand."""
    model, (x, y) = network(), data()
    optimizer = make(name, model)
    for _ in range(2):
        step(name, optimizer, model, fit(x, y))
    scale = torch.logspace(-30, 30, 1 + next(model[2].parameters()).shape[1])
    spoil(optimizer, lambda f: {"inputs": f.inputs * scale.sqrt() * scale.sqrt().unsqueeze(-1)})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not be factorised")
        for _ in range(3):
            step(name, optimizer, model, fit(x, y))
            assert_finite(model, optimizer)

    model = network()
    optimizer = make(name, model)
    for _ in range(2):
        step(name, optimizer, model, fit(x, y))
    spoil(optimizer, lambda f: {"outputs": torch.full_like(f.outputs, float("nan"))})
    before = flat(model)
    with pytest.warns(UserWarning, match="'2' could not be factorised"):
        step(name, optimizer, model, fit(x, y))
    assert flat(model).isfinite().all() and not torch.equal(before, flat(model))


# -- long runs -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*could not be factorised:UserWarning")
@pytest.mark.filterwarnings("ignore:.*skipped a step:UserWarning")
@pytest.mark.parametrize(("name", "steps"), [("kfac", 2000), ("ekfac", 1000)])
def test_thousands_of_steps_with_faults(name, steps):
    model = network()
    plain = dict(momentum=0.9, damping=1e-4, kl_clip=5e-5, nesterov=True)
    plain = plain if measures(OPTIMIZERS[name]) else {}
    optimizer = make(name, model, lr=0.05, factors=5, inverses=10, **plain)
    dice = random.Random(0)
    x, y = data(256)
    first = float(fit(x, y)(model).detach())
    memory = []
    for index in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - index / steps)
        picked = torch.tensor(dice.sample(range(256), dice.choice([1, 7, 16])))
        batch = x[picked], y[picked]
        if dice.random() < 0.05:
            value = dice.choice([float("nan"), float("inf"), float("-inf")])
            faulty = Faulty(model, dice.choice(PLACES), value)
            step(name, optimizer, model, lambda m: faulty(*batch, functional.cross_entropy))  # noqa: B023
        else:
            step(name, optimizer, model, fit(*batch))
        if index % 100 == 0:
            assert_finite(model, optimizer)
        if index in (steps // 5, steps - 1):
            gc.collect()
            live = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
            memory.append((len(gc.get_objects()), live))
    assert_finite(model, optimizer)
    assert float(fit(x, y)(model).detach()) < 0.35 * first
    assert memory[1][0] < memory[0][0] + 0.4 * steps
    assert memory[1][1] <= memory[0][1] + 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_data_that_are_nearly_fitted_go_on_being_fitted(seed):
    """There the slopes of batches are mostly noise, which must not stop the steps."""
    torch.manual_seed(seed)
    model = network()
    optimizer = natgrad.KFAC(model)
    dice = random.Random(seed)
    x, y = data(256)
    for _ in range(1000):
        picked = torch.tensor(dice.sample(range(256), 64))
        step("kfac", optimizer, model, fit(x[picked], y[picked]))
    # Where the slope of each batch counts alone, it is 0.013.
    assert float(fit(x, y)(model).detach()) < 0.009


# -- crashes ---------------------------------------------------------------------------------------


def worker(path: Path, total: int) -> tuple[BaseProcess, Connection]:
    """Start a run; return its process and what it reports."""
    reports, report = processes.CONTEXT.Pipe(duplex=False)
    process = processes.start(interrupted_run.train, path, total, report)
    report.close()
    return process, reports


def finished(path: Path, total: int) -> dict[str, Any]:
    """Run to the end; return what was saved."""
    process, reports = worker(path, total)
    assert processes.finish(process) == 0
    assert reports.poll()
    return torch.load(path, weights_only=True)


def killed_run(folder: Path, kills: int, total: int) -> None:
    whole = finished(folder / "whole.pt", total)
    path, dice, reached = folder / "parted.pt", random.Random(1), 0
    for _ in range(kills):
        process, reports = worker(path, 10**6)
        last = int(reports.recv_bytes())
        assert last == reached
        time.sleep(dice.uniform(0.0, 0.03))
        process.kill()
        assert processes.finish(process) == -signal.SIGKILL
        with contextlib.suppress(EOFError, OSError):  # The last report may be cut in two.
            while True:
                last = int(reports.recv_bytes())
        if path.exists():
            state = torch.load(path, weights_only=True)
            # What was said to be saved is there, or the save after it.
            assert state["step"] in (last, last + 1)
            reached = state["step"]
        else:
            assert last == 0
    end = max(total, reached)
    parted = finished(path, end)
    if end > total:
        whole = finished(folder / "whole.pt", end)
    assert whole["step"] == parted["step"] == end
    assert same(whole["model"], parted["model"])
    assert same(whole["optimizer"], parted["optimizer"])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_loses_nothing_that_was_saved(tmp_path):
    killed_run(tmp_path, 1, 20)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_run_killed_many_times(tmp_path):
    killed_run(tmp_path, 6, 40)
