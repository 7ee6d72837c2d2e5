"""Exact Gauss-Newton against an independent step-by-step computation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad.optim.step.line_search import LineSearch
from tests import dense
from tests.cases import generator, normal
from tests.methods import make_optimizer
from tests.state import flat


def problem(samples: int = 5) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, normal(samples, 3), torch.randint(0, 3, (samples,), generator=generator())


def starting_at(damping: float) -> dict:
    return {"damping": natgrad.LevenbergMarquardt(damping, interval=1, decay=0.5)}


def reference(model, x, y, steps: int, options: dict) -> list[tuple[torch.Tensor, float]]:
    """Steps by the non-symmetric sample-space form d = Jᵀ(ΛJJᵀ + NλI)⁻¹r of the source."""
    theta, damping = flat(model), options["damping"]
    momentum, count = torch.zeros_like(theta), 0
    n, history = len(x), []

    def loss_at(value: torch.Tensor) -> float:
        nn.utils.vector_to_parameters(value, model.parameters())
        return float(functional.cross_entropy(model(x), y).detach())

    for _ in range(steps):
        before = loss_at(theta)
        z, jac = dense.jacobian(model, x)
        jac = jac.flatten(0, 1)
        p = torch.softmax(z, 1)
        residual = (p - functional.one_hot(y, 3)).flatten()
        hessian = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p))
        system = hessian @ jac @ jac.T + n * damping * torch.eye(len(jac)).double()
        d = jac.T @ torch.linalg.solve(system, residual)
        gradient = jac.T @ residual / n
        beta = options.get("momentum", 0.0)
        if beta:
            momentum, count = beta * momentum + (1 - beta) * d, count + 1
            corrected = momentum / (1 - beta**count)
            if float(corrected @ gradient) > 0:
                d = corrected
            else:
                momentum, count = (1 - beta) * d, 1
        slope = float(d @ gradient)
        curvature = float((jac @ d) @ hessian @ (jac @ d)) / n
        length = options.get("lr", 1.0)
        for _ in range(10):
            after = loss_at(theta - length * d)
            if after <= before - 1e-4 * length * slope:
                theta = theta - length * d
                break
            length *= 0.5
        else:
            length, after = 0.0, before
            momentum, count = torch.zeros_like(theta), 0
        damped = curvature + damping * float(d @ d)
        predicted = length * slope - 0.5 * length**2 * damped
        ratio = (before - after) / predicted if length else 0.0
        damping *= 0.5 if ratio > 0.75 else 2.0 if ratio < 0.25 else 1.0
        history.append((theta.clone(), damping))
    return history


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.05},
        {"damping": 1e-3, "momentum": 0.6},
        {"damping": 1e-6, "lr": 4.0},
        {"damping": 1e-4, "lr": 3.0, "momentum": 0.3},
    ],
)
def test_steps_are_those_of_the_source(options):
    model, x, y = problem()
    start = flat(model)
    history = reference(model, x, y, 6, options)
    nn.utils.vector_to_parameters(start, model.parameters())
    optimizer = make_optimizer(natgrad.EGN, model, **(options | starting_at(options["damping"])))
    assert len({damping for _, damping in history}) > 1
    for theta, damping in history:
        optimizer.step(lambda: functional.cross_entropy(model(x), y))
        dense.assert_same(flat(model), theta, 1e-6)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping)


def test_without_search_it_is_damped_exact_natural_gradient_descent():
    model, x, y = problem()
    other, _, _ = problem()
    egn = make_optimizer(natgrad.EGN, model, lr=0.5, damping=0.1, length="lr")
    exact = natgrad.ExactNGD(other, lr=0.5, damping=0.1, kl_clip=None)
    for _ in range(3):
        egn.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        egn.step()
        exact.zero_grad()
        functional.cross_entropy(other(x), y).backward()
        exact.step()
    dense.assert_same(flat(model), flat(other), 1e-9)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli", "poisson"])
def test_no_step_ever_raises_the_loss(likelihood):
    model, x, y = problem(12)
    targets = {
        "categorical": y,
        "gaussian": normal(12, 3, seed=4),
        "bernoulli": torch.randint(0, 2, (12, 3), generator=generator()).double(),
        "poisson": torch.randint(0, 4, (12, 3), generator=generator()).double(),
    }[likelihood]
    loss = natgrad.likelihoods.as_likelihood(likelihood)
    optimizer = natgrad.EGN(model, likelihood, lr=2.0, **starting_at(1e-6))
    losses = [optimizer.step(lambda: loss.loss(model(x), targets)) for _ in range(15)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0]


def test_a_search_that_fails_moves_nothing_and_raises_the_damping():
    model, x, y = problem()
    optimizer = make_optimizer(natgrad.EGN, model, max_trials=3, **starting_at(0.1))
    start, calls = flat(model), []

    def closure():
        calls.append(1)
        offset = 0.0 if len(calls) == 1 else 100.0
        return functional.cross_entropy(model(x), y) + offset

    optimizer.step(closure)
    assert len(calls) == 4
    assert torch.equal(flat(model), start)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.2)


def test_a_search_given_as_an_object_is_used():
    losses = []
    for options in (
        {"length": LineSearch("armijo", 0.3, 0.2, 4)},
        {"backtracking": 0.3, "armijo": 0.2, "max_trials": 4},
    ):
        model, x, y = problem()
        optimizer = make_optimizer(natgrad.EGN, model, lr=8.0, **starting_at(1e-5), **options)
        losses.append(
            [optimizer.step(lambda: functional.cross_entropy(model(x), y)) for _ in range(4)]  # noqa: B023
        )
    assert losses[0] == losses[1] and len(set(losses[0])) > 1


def test_trials_see_the_same_masks_and_leave_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    ).double()
    x, y = normal(8, 3), torch.randint(0, 3, (8,), generator=generator())
    twin, losses = copy.deepcopy(model), []
    optimizer = natgrad.EGN(model, lr=1e-7)

    def closure():
        losses.append(functional.cross_entropy(model(x), y))
        return losses[-1] + (0.0 if len(losses) == 1 else 1.0)

    state = torch.get_rng_state()
    optimizer.step(closure)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    twin(x)
    assert torch.equal(after, torch.get_rng_state())
    values = [loss.item() for loss in losses]
    assert len(values) == 11 and max(values) - min(values) < 1e-5
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)


def test_bad_batches_are_skipped_and_runs_resume():
    model, x, y = problem(8)
    optimizer = natgrad.EGN(model, momentum=0.5)
    optimizer.step(lambda: functional.cross_entropy(model(x), y))
    start, damping = flat(model), optimizer.param_groups[0]["damping"]
    with pytest.warns(UserWarning, match="skipped"):
        loss = optimizer.step(lambda: functional.cross_entropy(model(x * float("nan")), y))
    assert math.isnan(loss) and torch.equal(flat(model), start)
    assert optimizer.param_groups[0]["damping"] == damping
    other, _, _ = problem()
    nn.utils.vector_to_parameters(start, other.parameters())
    resumed = natgrad.EGN(other, momentum=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        a = optimizer.step(lambda: functional.cross_entropy(model(x), y))
        b = resumed.step(lambda: functional.cross_entropy(other(x), y))
        assert a == b


def test_it_is_exact_natural_gradient_descent_with_a_search_and_adaptive_damping():
    """The named method is nothing but its composition."""
    runs = []
    for kind, options in (
        (natgrad.EGN, {}),
        (natgrad.ExactNGD, {"length": LineSearch(), "kl_clip": None}),
    ):
        model, x, y = problem()
        optimizer = make_optimizer(kind, model, **options, **starting_at(0.01))
        for _ in range(5):
            optimizer.step(lambda: functional.cross_entropy(model(x), y))  # noqa: B023
        runs.append(flat(model))
    assert torch.equal(*runs)


def test_closures_may_call_backward_themselves():
    runs = []
    for calls in (True, False):
        model, x, y = problem()
        optimizer = natgrad.EGN(model)

        def closure():
            loss = functional.cross_entropy(model(x), y)  # noqa: B023
            if calls:  # noqa: B023
                loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        runs.append(flat(model))
    assert torch.equal(*runs)


def test_wrong_use_is_explained():
    model, x, y = problem()
    optimizer = natgrad.EGN(model)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="neither"):
        optimizer.step(lambda: float(functional.cross_entropy(model(x), y)))
    for made in (optimizer, natgrad.KFAC(model, damping=natgrad.LevenbergMarquardt())):
        with pytest.raises(ValueError, match="must return the loss"):
            made.step(lambda: functional.cross_entropy(model(x), y).backward())
    for options in (
        {"damping": natgrad.LevenbergMarquardt},
        {"backtracking": 1.0},
        {"armijo": 1.0},
        {"max_trials": 0},
        {"weight_decay": -0.1},
    ):
        with pytest.raises((ValueError, TypeError)):
            make_optimizer(natgrad.EGN, model, **options)
