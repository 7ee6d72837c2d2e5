"""Samples and entries that a loss leaves out or weighs: Fisher matrices against its own Hessian."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import Bernoulli, Gaussian, Poisson
from tests.cases import generator, normal
from tests.likelihoods.test_torch_losses import assert_same, loss_hessian, seen_by_optimizer

LIKELIHOODS = {"gaussian": Gaussian, "bernoulli": Bernoulli, "poisson": Poisson}


def elements(name: str, z: Tensor, y: Tensor) -> Tensor:
    """The loss of every entry."""
    if name == "gaussian":
        return (z - y).square() / 2
    if name == "bernoulli":
        return functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    return functional.poisson_nll_loss(z, y, reduction="none")


def targets(name: str, *shape: int, seed: int = 1) -> Tensor:
    y = normal(*shape, seed=seed)
    return {"gaussian": y, "bernoulli": (y > 0).double(), "poisson": y.square().round()}[name]


@st.composite
def masked(draw):
    """A likelihood, a linear model, inputs, targets, a mask, and what the loss divides by."""
    name = draw(st.sampled_from(sorted(LIKELIHOODS)))
    averages = draw(st.booleans())
    samples, size = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    model = nn.Linear(3, size).double()
    mask = torch.rand(samples, size, generator=generator(seed)) < 0.7
    if draw(st.booleans()):  # Whole samples.
        mask = mask[:, :1].expand_as(mask).clone()
    mask[0] = True
    likelihood = LIKELIHOODS[name](reduce_outputs="mean" if averages else "sum")
    count = mask.sum() if averages else mask.any(1).sum()
    return name, likelihood, model, normal(samples, 3, seed=seed), mask, count, size


@given(masked())
@settings(deadline=None, max_examples=60)
def test_missing_targets_leave_the_loss_and_the_fisher_matrix(case):
    name, likelihood, model, x, mask, count, _ = case
    y = targets(name, *mask.shape)
    expected = loss_hessian(model, lambda f: (elements(name, f(x), y) * mask).sum() / count)
    missing = y.masked_fill(~mask, torch.nan)
    for structure in ("full", "block_diagonal"):
        fisher = natgrad.fisher_matrix(model, (x, missing), likelihood, structure)
        assert_same(fisher.to_dense(), expected)
    z = model(x)
    loss = (elements(name, z, y) * mask).sum() / count
    torch.testing.assert_close(likelihood.loss(z, missing), loss)
    (cotangent,) = torch.autograd.grad(loss * count, z)
    gradient = likelihood.gradient(z.detach(), missing)
    scale = mask.shape[1] if likelihood.reduce_outputs == "mean" else 1
    torch.testing.assert_close(gradient * scale, cotangent)


@given(masked(), st.sampled_from([1.0, 0.25, 1024.0]))
@settings(deadline=None, max_examples=60)
def test_an_optimizer_sees_masks_in_the_gradient(case, factor):
    name, likelihood, model, x, mask, count, _ = case
    y = targets(name, *mask.shape)

    def loss(f):
        return factor * (elements(name, f(x), y) * mask).sum() / count

    expected = loss_hessian(model, loss) / factor
    assert_same(seen_by_optimizer(model, likelihood, loss), expected)


@given(masked(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_weights_are_seen_where_the_target_is_told(case, entries):
    name, likelihood, model, x, mask, _, size = case
    y = targets(name, *mask.shape)
    weights = (1 + normal(*mask.shape, seed=7).square()) * mask
    if not entries:
        weights = weights[:, :1] * mask.all(1, keepdim=True)
    weights = weights.expand_as(mask)

    def criterion(z, y):
        return (elements(name, z, y) * weights).sum()

    optimizer = natgrad.ExactNGD(model, likelihood, lr=0.0, kl_clip=None)
    optimizer.loss(criterion, model(x), y).backward()
    optimizer.step()
    fisher = optimizer.preconditioner.curvature.matrix().to_dense()
    # The common factor of the weights is one of the loss: their mean is 1 where there are any.
    kept = weights > 0
    rows = kept.any(1)
    if entries:
        mean, count = weights.sum() / kept.sum(), kept.sum().double() / size
        count = count if likelihood.reduce_outputs == "mean" else rows.sum()
    else:
        mean, count = weights[rows, 0].mean(), rows.sum()
    divisor = mean * count * (size if likelihood.reduce_outputs == "mean" else 1)
    expected = loss_hessian(model, lambda f: criterion(f(x), y)) / divisor
    assert_same(fisher, expected)


def test_every_optimizer_and_fisher_type_takes_masks():
    torch.manual_seed(0)
    x, y, mask = normal(16, 3), normal(16, 2), torch.rand(16, 2) < 0.6
    for kind in (natgrad.KFAC, natgrad.EKFAC, natgrad.DiagonalNGD, natgrad.FNGD, natgrad.SINGD):
        for fisher in ("exact", "mc", "empirical", "improved"):
            model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
            options = {} if kind is natgrad.FNGD else {"fisher": fisher}
            optimizer = kind(model, "gaussian", **options)
            losses = []
            for _ in range(5):
                optimizer.zero_grad()
                loss = ((model(x) - y).square() * mask).sum() / (2 * 16)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[-1] < losses[0], (kind, fisher)


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_a_single_entry_may_be_masked(name):
    likelihood, z = LIKELIHOODS[name](), normal(8, 5)
    gradient = likelihood.gradient(z, targets(name, 8, 5))
    gradient[3, 2] = 0.0
    weights, _ = likelihood.infer_event_weights(z, gradient / 8)
    assert weights.shape == (8, 1, 5) and not weights[3, 0, 2]
    assert weights.sum() == 39


def test_saturated_outputs_are_no_mask():
    z = torch.tensor([[60.0, -1.0], [0.5, -80.0], [1.0, 2.0]])
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        output = z.to(dtype).requires_grad_()
        loss = functional.binary_cross_entropy_with_logits(output, y.to(output.dtype))
        (cotangent,) = torch.autograd.grad(loss, output)
        weights, _ = Bernoulli().infer_event_weights(output.detach(), cotangent)
        assert torch.equal(weights, torch.ones(3, 1))


@pytest.mark.parametrize("last", [nn.Tanh(), nn.Sigmoid(), nn.ReLU()])
def test_outputs_fitted_to_the_last_bit_are_no_mask(last):
    # Images whose background is the end of the range of a last layer that saturates.
    z = last(torch.cat([torch.full((8, 6), -200.0), torch.randn(8, 4, generator=generator(0))], 1))
    y = z.clone()
    y[:, 6:] = torch.rand(8, 4, generator=generator(1))
    output = z.requires_grad_()
    (cotangent,) = torch.autograd.grad(functional.mse_loss(output, y), output)
    assert not cotangent[:, :6].any()
    weights, _ = Gaussian(0.5, "mean").infer_event_weights(output.detach(), cotangent)
    assert torch.equal(weights, torch.ones(8, 1))
