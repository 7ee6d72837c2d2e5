"""Outputs that are rates of counts have the curvature of their logarithms."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import Poisson, PoissonRates, as_likelihood
from tests.cases import normal
from tests.likelihoods.test_torch_losses import assert_same, loss_hessian, seen_by_optimizer


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def models(size: int) -> tuple[nn.Module, nn.Module]:
    """A linear model of logarithms, and the same with an exponential at its end."""
    layer = nn.Linear(3, size).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(normal(*p.shape, seed=size))
    return layer, nn.Sequential(layer, Exponential())


def counts(*shape: int) -> Tensor:
    return (normal(*shape, seed=1) + 1).square().round()


def loss_of(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return functional.poisson_nll_loss(z, y, log_input=False, reduction=reduction, eps=0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_fisher_matrix_is_that_of_the_logarithms(reduction, size):
    logarithms, model = models(size)
    x, y = normal(9, 3), counts(9, size)
    same = nn.PoissonNLLLoss(reduction=reduction)
    expected = loss_hessian(logarithms, lambda f: same(f(x), y)) / (9 if reduction == "sum" else 1)
    criterion = nn.PoissonNLLLoss(log_input=False, reduction=reduction, eps=0.0)
    assert_same(natgrad.fisher_matrix(model, (x, y), criterion, "full").to_dense(), expected)
    assert_same(seen_by_optimizer(model, criterion, lambda m: criterion(m(x), y)), expected)
    assert_same(seen_by_optimizer(model, "poisson", lambda m: criterion(m(x), y)), expected)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", [True, False])
def test_steps_are_those_at_logarithms(fisher, name):
    x, y, found = normal(12, 4), counts(12, 3), []
    for last in (None, Exponential()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        if last is not None:
            model.append(last)
        criterion = nn.PoissonNLLLoss(log_input=last is None, eps=0.0)
        given = "poisson" if name else criterion
        optimizer = natgrad.ExactNGD(model, given, fisher=fisher, damping=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_name_becomes_what_the_loss_shows_and_is_saved(averages, dtype):
    model, (x, y) = models(4)[1].to(dtype), (normal(16, 3).to(dtype), counts(16, 4).to(dtype))
    optimizer = natgrad.KFAC(model, "poisson")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (loss_of(model(x), y, "sum") / (64 if averages else 16)).backward()
        optimizer.step()
    expected = PoissonRates("mean" if averages else "sum")
    assert optimizer.preconditioner.observer.likelihood == expected
    other = natgrad.KFAC(copy.deepcopy(model), "poisson")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.preconditioner.observer.likelihood == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [1, 4])
def test_logarithms_that_are_positive_stay_logarithms(size, seed):
    z, y = normal(16, size, seed=seed).abs().requires_grad_(), counts(16, size)
    functional.poisson_nll_loss(z, y).backward()
    found, _ = Poisson().seen_with(z.detach(), z.grad)
    assert isinstance(found, Poisson)


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("rate", [20.0, 300.0])
def test_rates_of_another_distribution_are_no_logarithms(rate, size, averages):
    """As of a negative binomial, where F of the logarithms is e^20 times too large and more."""
    torch.manual_seed(0)
    z = (rate * (1.0 + 0.3 * torch.rand(32, size))).requires_grad_()
    y = torch.distributions.NegativeBinomial(torch.tensor(2.0), probs=z.detach() / (z.detach() + 2))
    loss = -torch.distributions.NegativeBinomial(torch.tensor(2.0), probs=z / (z + 2)).log_prob(
        y.sample()
    )
    (loss.mean() if averages else loss.sum() / len(z)).backward()
    found, said = Poisson().seen_with(z.detach(), z.grad)
    assert isinstance(found, PoissonRates)
    assert "look like rates" in said[0]


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("off", [0.01, 0.1, 1.0])
def test_targets_that_are_no_counts_leave_logarithms_what_they_are(off, averages):
    torch.manual_seed(0)
    z = (3.0 + torch.rand(32, 4)).requires_grad_()
    y = z.detach().exp() * (1.0 + off * (torch.rand(32, 4) - 0.5))
    loss = functional.poisson_nll_loss(z, y, reduction="sum") / (z.numel() if averages else len(z))
    loss.backward()
    found, said = Poisson().seen_with(z.detach(), z.grad)
    assert isinstance(found, Poisson)
    assert not any("rates" in sentence for sentence in said)


def test_the_scale_of_the_loss_is_seen():
    z, y = (normal(16, 4).abs() + 0.1).requires_grad_(), counts(16, 4)
    (cotangent,) = torch.autograd.grad(7.0 * loss_of(z, y), z)
    _, scale = PoissonRates("mean").infer_event_weights(z.detach(), cotangent)
    torch.testing.assert_close(scale, scale.new_tensor(7.0 / 16))


def test_bounds_and_refusals():
    z, y = normal(5, 3).exp(), counts(5, 3)
    likelihood = as_likelihood(nn.PoissonNLLLoss(log_input=False))
    same = as_likelihood(nn.PoissonNLLLoss())
    torch.testing.assert_close(likelihood.nll(z, y), same.nll(z.log(), y))
    drawn = [one.sample(w, torch.Generator().manual_seed(3)) for one, w in
             ((likelihood, z), (same, z.log()))]  # fmt: skip
    torch.testing.assert_close(*drawn)
    assert likelihood.gradient(torch.zeros(2, 1), torch.ones(2, 1)).isfinite().all()
    bounds = []
    for one, w in ((likelihood, z), (same, z.log())):
        w = w.detach().requires_grad_()
        one.loss(w, y).backward()
        weights, scale = one.infer_event_weights(w.detach(), w.grad)
        bounds.append(one.largest_decrement(w.detach(), w.grad, weights, scale))
    torch.testing.assert_close(*bounds)
    with pytest.raises(ValueError, match="counts"):
        likelihood.nll(z, -y - 1)
    _, said = PoissonRates().seen_with(-z, torch.ones_like(z))
    assert "no rates" in said[0]
