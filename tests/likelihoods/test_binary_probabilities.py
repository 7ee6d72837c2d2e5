"""Outputs that are probabilities have the curvature of the logits behind them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import Bernoulli, BinaryProbabilities, as_likelihood
from tests.cases import normal
from tests.likelihoods.test_torch_losses import assert_same, loss_hessian, seen_by_optimizer


def models(size: int) -> tuple[nn.Module, nn.Module]:
    """A linear model of logits, and the same with a sigmoid at its end."""
    layer = nn.Linear(3, size).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(normal(*p.shape, seed=size))
    return layer, nn.Sequential(layer, nn.Sigmoid())


def labels(kind: str, *shape: int) -> Tensor:
    y = normal(*shape, seed=1)
    soft = torch.sigmoid(3 * y)
    return {"hard": (y > 0).double(), "soft": soft, "grey": torch.where(y > 0, soft, 0.0)}[kind]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_fisher_matrix_is_that_of_the_logits(reduction, size):
    logits, model = models(size)
    x, y = normal(7, 3), labels("soft", 7, size)
    same = nn.BCEWithLogitsLoss(reduction=reduction)
    expected = loss_hessian(logits, lambda f: same(f(x), y)) / (7 if reduction == "sum" else 1)
    criterion = nn.BCELoss(reduction=reduction)
    assert_same(natgrad.fisher_matrix(model, (x, y), criterion, "full").to_dense(), expected)
    seen = seen_by_optimizer(model, criterion, lambda m: criterion(m(x), y))
    assert_same(seen, expected)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", [True, False])
@pytest.mark.parametrize("kind", ["hard", "grey"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_are_those_at_logits(fisher, name, kind, reduction):
    """The name alone will do: the gradient tells, where some labels are 0 or 1."""
    x, y, found = normal(12, 4), labels(kind, 12, 3), []
    for last, criterion in (
        (None, nn.BCEWithLogitsLoss(reduction=reduction)),
        (nn.Sigmoid(), nn.BCELoss(reduction=reduction)),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        if last is not None:
            model.append(last)
        given = "bernoulli" if name and last is not None else criterion
        optimizer = natgrad.ExactNGD(model, given, fisher=fisher, damping=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("kind", ["hard", "grey"])
def test_the_name_becomes_what_the_loss_shows_and_is_saved(averages, kind):
    _, model = models(4)
    x, y = normal(16, 3), labels(kind, 16, 4)
    optimizer = natgrad.KFAC(model, "bernoulli")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = functional.binary_cross_entropy(model(x), y, reduction="sum") / 16
        (loss / 4 if averages else loss).backward()
        optimizer.step()
    expected = BinaryProbabilities("mean" if averages else "sum")
    assert optimizer.preconditioner.observer.likelihood == expected
    other = natgrad.KFAC(copy.deepcopy(model), "bernoulli")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.preconditioner.observer.likelihood == expected


@pytest.mark.parametrize("kind", ["hard", "soft", "grey"])
def test_logits_between_0_and_1_stay_logits(kind):
    _, model = models(4)
    x, y = normal(16, 3), labels(kind, 16, 4)
    optimizer = natgrad.KFAC(model, nn.BCEWithLogitsLoss())
    functional.binary_cross_entropy_with_logits(model(x), y).backward()
    optimizer.step()
    assert optimizer.preconditioner.observer.likelihood == Bernoulli("mean")


def test_outputs_that_are_no_probabilities_are_named():
    logits, _ = models(4)
    optimizer = natgrad.KFAC(logits, nn.BCELoss())
    with pytest.warns(UserWarning, match="no probabilities"):
        functional.binary_cross_entropy_with_logits(
            logits(normal(16, 3)), labels("hard", 16, 4)
        ).backward()
    optimizer.step()


def test_saturated_outputs_leave_no_trace():
    """Where a sigmoid is 0 or 1 to the last bit nothing comes through it."""
    _, model = models(2)
    x, y = normal(8, 3), labels("hard", 8, 2)
    x[0] *= 1e3
    assert ((model(x)[0] == 0) | (model(x)[0] == 1)).any()
    matrix = natgrad.fisher_matrix(model, (x, y), nn.BCELoss(), "full").to_dense()
    assert matrix.isfinite().all()
    optimizer = natgrad.KFAC(model, nn.BCELoss())
    for _ in range(3):
        optimizer.zero_grad()
        functional.binary_cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_bounds_and_refusals():
    p, y = torch.rand(5, 3, dtype=torch.float64), labels("hard", 5, 3)
    likelihood, logits = as_likelihood(nn.BCELoss()), p.logit()
    same = as_likelihood(nn.BCEWithLogitsLoss())
    torch.testing.assert_close(likelihood.nll(p, y), same.nll(logits, y))
    gradients = likelihood.gradient(p, y), same.gradient(logits, y)
    bounds = [
        one.largest_decrement(z, g, *one.infer_event_weights(z, g, y))
        for one, z, g in zip((likelihood, same), (p, logits), gradients, strict=True)
    ]
    torch.testing.assert_close(*bounds)
    with pytest.raises(ValueError, match="between 0 and 1"):
        likelihood.loss(p, 2 + y)
    with pytest.raises(ValueError, match="weight"):
        as_likelihood(nn.BCELoss(weight=torch.ones(3)))
