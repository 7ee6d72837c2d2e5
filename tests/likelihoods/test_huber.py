"""Absolute errors and Huber's: the losses of torch, and their Fisher information by quadrature."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import Huber, as_likelihood, from_loss
from tests import dense
from tests.cases import generator, normal

CRITERIA = [
    nn.L1Loss(),
    nn.L1Loss(reduction="sum"),
    nn.SmoothL1Loss(),
    nn.SmoothL1Loss(beta=0.3, reduction="sum"),
    nn.SmoothL1Loss(beta=0.0),
    nn.HuberLoss(),
    nn.HuberLoss(delta=2.5),
    nn.HuberLoss(delta=0.1, reduction="sum"),
]
LIKELIHOODS = [Huber(0.0), Huber(0.0, 3.0), Huber(), Huber(0.2, 0.7), Huber(3.0, 2.0)]


def density(likelihood: Huber) -> tuple[Tensor, Tensor, Tensor]:
    """Return errors ``y − z`` far into both tails, their probabilities, and their gradients."""
    y = torch.linspace(-60.0, 60.0, 2_400_001, dtype=torch.float64).unsqueeze(0)
    z = torch.zeros_like(y)
    p = (-likelihood._nll(z, y)).exp()
    return y[0], (p / p.sum())[0], likelihood._gradient(z, y)[0]


@given(
    st.sampled_from(CRITERIA), st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.integers(0, 2**20),
)  # fmt: skip
def test_loss_and_gradient_are_torchs(criterion, shape, seed):
    likelihood = from_loss(criterion)
    output, target = 2 * normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    output.requires_grad_()
    loss = criterion(output, target)
    (expected,) = torch.autograd.grad(loss, output)
    samples = len(output)
    found = likelihood.loss(output, target) * (samples if criterion.reduction == "sum" else 1)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-13)
    (autograds,) = torch.autograd.grad(found, output)
    torch.testing.assert_close(autograds, expected, rtol=1e-12, atol=1e-13)
    by_hand = likelihood.gradient(output.detach(), target)
    by_hand = by_hand / (1 if criterion.reduction == "sum" else samples)
    torch.testing.assert_close(by_hand, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_curvature_is_the_fisher_information(likelihood):
    _, p, gradients = density(likelihood)
    information = float((p * gradients.square()).sum())
    found = likelihood.output_hessian(torch.zeros(1, 1, dtype=torch.float64))
    assert abs(float(found) - information) < 2e-4 * information


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_sampled_targets_have_the_density(likelihood):
    y, p, _ = density(likelihood)
    places = normal(1, 4000)
    drawn = (likelihood.sample(places, generator(3)) - places).flatten().sort().values
    expected = p.cumsum(0)[torch.searchsorted(y, drawn).clamp(max=len(y) - 1)]
    found = torch.arange(1, 4001, dtype=torch.float64) / 4000
    # Kolmogorov & Smirnov, at a level of one in a hundred thousand.
    assert float((found - expected).abs().max()) < 2.4 / 4000**0.5


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_sampled_vectors_are_gradients_of_independent_targets(likelihood):
    output = normal(6000, 2)
    (vectors,) = likelihood.sampled_vectors(output, generator(1))
    information = float(likelihood.output_hessian(output[:1])[0, 0, 0, 0])
    moment = vectors.T @ vectors / len(vectors) / information
    assert float((moment - torch.eye(2, dtype=torch.float64)).abs().max()) < 0.1
    assert float(vectors.abs().max()) <= likelihood.slope


def test_matrix_of_absolute_errors_is_that_of_squared_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = normal(7, 3)
    found = natgrad.fisher_matrix(model, [(x, None)], nn.L1Loss(), "full").to_dense()
    rows = dense.jacobian(model, x)[1].flatten(0, 1)
    dense.assert_same(found, rows.T @ rows / 7 / 2, 1e-12)  # A mean over two outputs.


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize("criterion", [nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(delta=0.1)])
def test_outliers_do_not_lead_astray(criterion):
    """A tenth of the targets is far off; the median is what absolute errors find."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    x, weights = torch.randn(200, 4), torch.tensor([1.0, -2.0, 0.5, 3.0])
    y = (x @ weights).unsqueeze(1)
    y[::10] += 50.0
    optimizer = natgrad.KFAC(model, criterion)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=150)
    for _ in range(150):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        schedule.step()
    assert float((model.weight[0] - weights).detach().norm()) < 0.1


@pytest.mark.parametrize("criterion", [nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(delta=0.5)])
@pytest.mark.parametrize("outputs", [1, 5])
def test_targets_far_to_one_side_are_no_foreign_loss(criterion, outputs):
    """Gradients of large errors of one sign are one number, which says nothing against them."""
    z = normal(16, outputs, seed=3).requires_grad_()
    (cotangent,) = torch.autograd.grad(criterion(z, z.detach() + 20 + z.detach().abs()), z)
    assert float(cotangent.max() - cotangent.min()) == 0
    assert from_loss(criterion).seen_with(z, cotangent)[1] == []


def test_functions_and_options():
    for function, module in (
        (functional.l1_loss, nn.L1Loss()),
        (functional.smooth_l1_loss, nn.SmoothL1Loss()),
        (functional.huber_loss, nn.HuberLoss()),
    ):
        assert as_likelihood(function) == as_likelihood(module)
    assert from_loss(nn.SmoothL1Loss(beta=0.0)) == from_loss(nn.L1Loss())
    for options, words in (
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": float("inf")}, "threshold"),
        ({"slope": 0.0}, "slope"),
        ({"reduce_outputs": "max"}, "reduce_outputs"),
    ):
        with pytest.raises(ValueError, match=words):
            Huber(**options)
