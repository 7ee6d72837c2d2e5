"""Implicit SGD: closed forms on quadratics, what it reports, what it takes back."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from natgrad.first_order.implicit_sgd import ImplicitSGD
from tests import dense


def quadratic(size: int = 5) -> tuple[Tensor, nn.Parameter]:
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    values = torch.logspace(-2, 1, size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, nn.Parameter(torch.randn(size).double())


def closure_of(optimizer: ImplicitSGD, loss_of):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e3, 1e9])
def test_step_on_a_quadratic_is_the_resolvent_for_every_rate(lr):
    hessian, parameter = quadratic()
    start = parameter.detach().clone()
    optimizer = ImplicitSGD([parameter], lr=lr, inner_steps=100, tolerance=1e-8)
    loss = optimizer.step(closure_of(optimizer, lambda: 0.5 * parameter @ hessian @ parameter))
    expected = torch.linalg.solve(torch.eye(5).double() + lr * hessian, start)
    assert float((parameter.detach() - expected).norm() / start.norm()) < 1e-5
    assert loss == pytest.approx(float(0.5 * start @ hessian @ start))
    assert optimizer.converged


def test_explicit_step_of_the_same_rate_explodes():
    hessian, parameter = quadratic()
    optimizer = torch.optim.SGD([parameter], lr=1e3)
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * parameter @ hessian @ parameter).backward()
        optimizer.step()
    assert float(parameter.detach().norm()) > 1e10


@pytest.mark.parametrize("inner", ["adam", "gradient"])
def test_other_inner_optimizers_solve_the_same_problem(inner):
    hessian, parameter = quadratic()
    start = parameter.detach().clone()
    optimizer = ImplicitSGD(
        [parameter], lr=1.0, inner=inner, inner_steps=5000, inner_lr=0.05, tolerance=1e-6
    )
    optimizer.step(closure_of(optimizer, lambda: 0.5 * parameter @ hessian @ parameter))
    expected = torch.linalg.solve(torch.eye(5).double() + hessian, start)
    dense.assert_same(parameter.detach(), expected, 1e-4)
    assert optimizer.converged


def test_groups_have_rates_of_their_own():
    left, right = (nn.Parameter(torch.ones(2).double()) for _ in range(2))
    optimizer = ImplicitSGD(
        [{"params": [left], "lr": 1.0}, {"params": [right], "lr": 3.0}], tolerance=1e-12
    )
    optimizer.step(closure_of(optimizer, lambda: 0.5 * (left @ left + right @ right)))
    dense.assert_same(left.detach(), torch.full((2,), 1 / 2).double(), 1e-10)
    dense.assert_same(right.detach(), torch.full((2,), 1 / 4).double(), 1e-10)


def test_small_rate_agrees_with_gradient_descent_on_a_network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(7, 3).double()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = ImplicitSGD(net.parameters(), lr=1e-4)
    closure = closure_of(optimizer, lambda: net(x).square().mean())
    closure()
    gradients = [p.grad.clone() for p in net.parameters()]
    optimizer.step(closure)
    for p, old, gradient in zip(net.parameters(), before, gradients, strict=True):
        dense.assert_same((old - p.detach()) / 1e-4, gradient, 1e-2)


def test_inner_problem_that_is_not_solved_is_reported_once():
    hessian, parameter = quadratic(8)
    optimizer = ImplicitSGD([parameter], lr=1e3, inner_steps=1, tolerance=1e-12)
    closure = closure_of(optimizer, lambda: 0.5 * parameter @ hessian @ parameter)
    with pytest.warns(UserWarning, match="did not converge within 1 iterations"):
        optimizer.step(closure)
    assert not optimizer.converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)


def test_step_to_nan_is_taken_back():
    parameter = nn.Parameter(torch.ones(2).double())
    optimizer = ImplicitSGD([parameter])
    closure = closure_of(optimizer, lambda: parameter.sum() * float("nan"))
    with pytest.warns(UserWarning, match="taken back"):
        optimizer.step(closure)
    assert torch.equal(parameter.detach(), torch.ones(2).double())


def test_resumes_by_its_state():
    hessian, parameter = quadratic()
    optimizer = ImplicitSGD([parameter], lr=0.3)
    other = nn.Parameter(parameter.detach().clone())
    resumed = ImplicitSGD([other], lr=9.0)
    resumed.load_state_dict(optimizer.state_dict())
    for p, o in ((parameter, optimizer), (other, resumed)):
        o.step(closure_of(o, lambda p=p: 0.5 * p @ hessian @ p))
    assert torch.equal(parameter.detach(), other.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number > 0"),
        ({"inner": "newton"}, "inner must be 'lbfgs', 'adam' or 'gradient'"),
        ({"inner_steps": 0}, "inner_steps must be an integer of at least 1"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"inner_lr": 0.0}, "inner_lr must be a finite number > 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ImplicitSGD([nn.Parameter(torch.ones(1))], **options)


def test_step_needs_a_closure():
    with pytest.raises(ValueError, match="needs a closure"):
        ImplicitSGD([nn.Parameter(torch.ones(1))]).step()


def test_parameters_stay_where_a_schedule_has_brought_their_rate_to_zero():
    left, right = (nn.Parameter(torch.ones(2).double()) for _ in range(2))
    optimizer = ImplicitSGD(
        [{"params": [left], "lr": 1.0}, {"params": [right], "lr": 3.0}], tolerance=1e-12
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 0.0, lambda k: float(k < 2)])
    for step in range(3):
        loss = optimizer.step(closure_of(optimizer, lambda: 0.5 * (left @ left + right @ right)))
        assert loss == pytest.approx(1 + 16.0 ** -min(step, 2), rel=1e-9)
        schedule.step()
    assert torch.equal(left.detach(), torch.ones(2).double())
    dense.assert_same(right.detach(), torch.full((2,), 1 / 16).double(), 1e-10)


def test_every_evaluation_of_a_step_draws_the_same_dropout_masks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x, start = torch.randn(7, 3).double(), [p.detach().clone() for p in net.parameters()]
    optimizer = ImplicitSGD(net.parameters(), lr=0.3, inner_steps=100)
    torch.manual_seed(1)
    optimizer.step(closure_of(optimizer, lambda: (net(x) - 1).square().mean()))
    state = torch.random.get_rng_state()
    assert optimizer.converged
    torch.manual_seed(1)
    optimizer.zero_grad()
    (net(x) - 1).square().mean().backward()
    assert torch.equal(state, torch.random.get_rng_state())  # As after one evaluation.
    for p, old in zip(net.parameters(), start, strict=True):
        dense.assert_same(p.detach(), old - 0.3 * p.grad, 1e-5)


def test_a_closure_that_does_not_return_the_loss_is_refused():
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="must return the loss"):
        ImplicitSGD([parameter]).step(lambda: parameter.square().sum().backward())
