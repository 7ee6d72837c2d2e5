"""Outputs that are probabilities of classes have the curvature of the logits behind them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import Categorical, ClassProbabilities
from tests.cases import normal

#: Shapes of logits → the dimension of the classes.
SHAPES = {(12, 4): 1, (6, 5, 4): 2, (5, 3, 2, 2): 1}


def labels(shape: tuple[int, ...], dim: int) -> Tensor:
    """Return hard labels, the last of which are left out by the loss."""
    y = normal(*shape, seed=1).argmax(dim)
    y[-1] = -100
    return y


def negative_log(p: Tensor, y: Tensor, dim: int, reduction: str) -> Tensor:
    """Return the loss of probabilities, of the labels that are not left out."""
    kept = y >= 0
    chosen = p.gather(dim, y.clamp_min(0).unsqueeze(dim)).squeeze(dim)[kept]
    return -chosen.log().mean() if reduction == "mean" else -chosen.log().sum()


class Ends(nn.Module):
    """A net whose logits lie along a dimension, and may be made probabilities."""

    def __init__(self, classes: int, dim: int, softmax: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, classes))
        self.dim, self.softmax = dim, softmax

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x).movedim(-1, self.dim)
        return z.softmax(self.dim) if self.softmax else z


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_are_those_at_logits(fisher, shape, reduction):
    dim, found = SHAPES[shape], []
    events = [size for d, size in enumerate(shape) if d != dim]
    x, y = normal(*events, 3), labels(shape, dim)
    for softmax in (False, True):
        torch.manual_seed(0)
        model = Ends(shape[dim], dim, softmax).double()
        given = Categorical(class_dim=dim, reduction=reduction)
        optimizer = natgrad.ExactNGD(model, given, fisher=fisher, damping=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            z = model(x)
            p = z if softmax else z.softmax(dim)
            negative_log(p, y, dim, reduction).backward()
            optimizer.step()
        taken = optimizer.preconditioner.observer.likelihood
        assert isinstance(taken, ClassProbabilities) == softmax
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*found)


def test_normalising_again_makes_no_difference():
    """As ``torch.distributions.Categorical(probs=...)`` does, for a policy's losses."""
    y, reward, found = torch.arange(16) % 3, normal(16, seed=2), []
    for again in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).double()
        optimizer = natgrad.KFAC(model)
        for _ in range(3):
            optimizer.zero_grad()
            p = model(normal(16, 4))
            policy = torch.distributions.Categorical(probs=p)
            log_p = policy.log_prob(y) if again else p.gather(1, y[:, None])[:, 0].log()
            (-log_p * reward).mean().backward()
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1])
def test_a_single_state_of_an_untrained_policy_will_do(classes, spread):
    """With its first, nearly equal probabilities the gradient nearly sums to zero."""
    model = nn.Sequential(nn.Linear(4, classes), nn.Softmax(-1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(spread)
    optimizer = natgrad.KFAC(model)
    chosen = torch.distributions.Categorical(probs=model(normal(1, 4))).log_prob(torch.zeros(1))
    (-2.5 * chosen).sum().backward()
    optimizer.step()
    assert isinstance(optimizer.preconditioner.observer.likelihood, ClassProbabilities)


def test_a_softmax_before_cross_entropy_stays_as_it_is():
    """Its outputs are logits to the loss, which takes another softmax of them."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).double()
    optimizer = natgrad.KFAC(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.cross_entropy(model(normal(9, 4)), torch.arange(9) % 3).backward()
        optimizer.step()
    assert optimizer.preconditioner.observer.likelihood == Categorical()


def test_what_the_gradient_showed_is_saved():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).double()
    optimizer = natgrad.KFAC(model, nn.CrossEntropyLoss())
    negative_log(model(normal(9, 4)), torch.arange(9) % 3, 1, "mean").backward()
    optimizer.step()
    expected = ClassProbabilities(Categorical(class_dim=1))
    assert optimizer.preconditioner.observer.likelihood == expected
    other = natgrad.KFAC(copy.deepcopy(model), nn.CrossEntropyLoss())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.preconditioner.observer.likelihood == expected


def test_a_policy_and_its_value_are_heads():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 5)
            self.policy, self.value = nn.Linear(5, 3), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.body(x))
            return self.policy(h).softmax(-1), self.value(h)

    model = Both().double()
    optimizer = natgrad.KFAC(model, {0: "categorical", 1: "gaussian"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, value = model(normal(9, 4))
        chosen = torch.distributions.Categorical(probs=p).log_prob(torch.arange(9) % 3)
        (-chosen.mean() + functional.mse_loss(value, normal(9, 1))).backward()
        optimizer.step()


def test_bounds_and_refusals():
    z, y = normal(7, 3), torch.arange(7) % 3
    p = z.softmax(1)
    likelihood, same = ClassProbabilities(Categorical()), Categorical()
    torch.testing.assert_close(likelihood.nll(p, y), same.nll(z, y))
    torch.testing.assert_close(likelihood.count(p, y), same.count(z, y))
    gradients = likelihood.gradient(p, y), same.gradient(z, y)
    bounds = [
        one.largest_decrement(at, g, *one.infer_event_weights(at, g, y))
        for one, at, g in zip((likelihood, same), (p, z), gradients, strict=True)
    ]
    torch.testing.assert_close(*bounds)
    root, through = likelihood.output_hessian_root(p), torch.diag_embed(p)
    through = (through - p.unsqueeze(-1) * p.unsqueeze(-2)).unsqueeze(1)
    torch.testing.assert_close(through @ root, same.output_hessian_root(z))
    coordinates = likelihood.root_inverse_apply(p, gradients[0])
    torch.testing.assert_close(coordinates, same.root_inverse_apply(z, gradients[1]))
    assert likelihood.seen_with(p, gradients[0]) == (likelihood, [])
    assert "no probabilities" in likelihood.seen_with(z, gradients[0])[1][0]


def test_saturated_probabilities_leave_no_trace():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    x = normal(9, 4).float()
    x[0] *= 1e4
    y = model(x).argmax(-1)
    assert (model(x)[0] == 0).any()
    optimizer = natgrad.KFAC(model)
    for _ in range(3):
        optimizer.zero_grad()
        negative_log(model(x), y, 1, "mean").backward()
        optimizer.step()
    assert all(q.isfinite().all() for q in model.parameters())


def test_a_single_class_is_named():
    """Its probability is 1 whatever the model says, so the Fisher matrix is zero."""
    model = nn.Linear(4, 1)
    optimizer = natgrad.KFAC(model)
    with pytest.warns(UserWarning, match="single class"):
        functional.binary_cross_entropy_with_logits(
            model(torch.randn(9, 4)), torch.rand(9, 1)
        ).backward()
    optimizer.step()


def test_heads_of_probabilities_show_the_scale_that_heads_of_logits_do():
    """The other head's gradient is three times that of its likelihood, which is unusual."""
    value, z, y = normal(6, 2, seed=3), normal(6, 4, seed=4), normal(6, 4, seed=5).argmax(-1)
    scales = []
    for head, own in ((Categorical(), z), (ClassProbabilities(Categorical()), z.softmax(-1))):
        heads = natgrad.likelihoods.Heads({"value": natgrad.Bernoulli(), "class": head})
        joined = heads.of_shapes({"value": value.shape, "class": own.shape})
        hard = (value > 0).double()
        gradient = torch.cat([3 * (value.sigmoid() - hard), head.gradient(own, y)], -1) / 6
        output = torch.cat([value, own], -1)
        scales.append(joined.infer_event_weights(output, gradient)[1])
    torch.testing.assert_close(scales[0], torch.tensor(2 / 6, dtype=torch.float64))
    torch.testing.assert_close(scales[1], scales[0])
