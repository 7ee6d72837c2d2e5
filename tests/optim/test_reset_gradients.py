"""``zero_grad`` between the backward passes of a step, whose gradients are kept elsewhere."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import natgrad

HEADS = {0: "categorical", 1: nn.MSELoss()}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
        self.label, self.value = nn.Linear(10, 3), nn.Linear(10, 1)

    def forward(self, x):
        h = self.body(x)
        return self.label(h), self.value(h)


def batches(steps=8):
    torch.manual_seed(1)
    return [(torch.randn(32, 6), torch.randint(0, 3, (32,))) for _ in range(steps)]


def losses(model, x, y):
    label, value = model(x)
    return [F.cross_entropy(label, y), F.mse_loss(value, x[:, :1])]


def plain(model, optimizer, x, y):
    optimizer.zero_grad()
    sum(losses(model, x, y)).backward()


def one_by_one(model, optimizer, x, y):
    """As PCGrad and others do that look for conflicts of gradients."""
    kept = {p: torch.zeros_like(p) for p in model.parameters()}
    for loss in losses(model, x, y):
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        for p, total in kept.items():
            total += 0.0 if p.grad is None else p.grad
    for p, total in kept.items():
        p.grad = total


def asked_then_reset(model, optimizer, x, y):
    parameters = list(model.parameters())
    found = torch.autograd.grad(sum(losses(model, x, y)), parameters)
    optimizer.zero_grad()
    for p, gradient in zip(parameters, found, strict=True):
        p.grad = gradient


def left_from_before(model, optimizer, x, y):
    """Of a batch that is passed over."""
    optimizer.zero_grad()
    sum(losses(model, x.flip(0) + 1.0, y)).backward()
    plain(model, optimizer, x, y)


def left_and_reset_by_the_model(model, optimizer, x, y):
    """As programs do that hold a batch to be broken."""
    model.zero_grad()
    sum(losses(model, x.flip(0) + 1.0, y)).backward()
    model.zero_grad()
    sum(losses(model, x, y)).backward()


def left_and_reset_by_hand(model, optimizer, x, y):
    for step in (x.flip(0) + 1.0, x):
        for p in model.parameters():
            p.grad = None
        sum(losses(model, step, y)).backward()


def trained(way, likelihood=HEADS, model=None, steps=8):
    model = TwoHeads() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = natgrad.KFAC(model, likelihood)
        for x, y in batches(steps):
            way(model, optimizer, x, y)
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "way",
    [asked_then_reset, left_from_before, left_and_reset_by_the_model, left_and_reset_by_hand],
)
def test_resets_do_not_change_how_it_trains(way):
    expected = trained(plain)
    assert torch.allclose(trained(way), expected, rtol=1e-4, atol=1e-5)


def test_losses_one_by_one_make_the_same_first_step():
    """Later lengths are measured with the gradient of one loss at a time, in another rounding."""
    expected = trained(plain, steps=1)
    assert torch.allclose(trained(one_by_one, steps=1), expected, rtol=1e-4, atol=1e-6)


def test_losses_one_by_one_train_as_their_sum():
    model = TwoHeads()
    before = [float(loss.detach()) for loss in losses(model, *batches()[0])]
    trained(one_by_one, model=model, steps=30)
    after = [float(loss.detach()) for loss in losses(model, *batches()[0])]
    reference = TwoHeads()
    trained(plain, model=reference, steps=30)
    expected = [float(loss.detach()) for loss in losses(reference, *batches()[0])]
    assert all(new < old for new, old in zip(after, before, strict=True))
    assert sum(after) < 1.1 * sum(expected)


def test_another_loss_through_a_network_that_is_not_detached():
    """A generator whose images a discriminator is trained on, in the same graph."""

    def made(how):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
        judge = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = natgrad.KFAC(generator, natgrad.likelihoods.Gaussian(reduce_outputs="sum"))
        other = torch.optim.SGD(judge.parameters(), lr=0.0)
        for x, _ in batches():
            images = generator(x)
            other.zero_grad()
            F.softplus(judge(images if how == "one graph" else images.detach())).mean().backward(
                retain_graph=how == "one graph"
            )
            other.step()
            optimizer.zero_grad()
            F.softplus(-judge(images)).mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in generator.parameters()])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(made("one graph"), made("detached"), rtol=1e-4, atol=1e-6)
