"""Steps of measured length do not depend on how the loss is scaled, summed or accumulated."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import KFAC, MeasuredLength, RelativeDamping, StepRule
from natgrad.operators import GradientSource
from tests.cases import labels, normal
from tests.pairwise import pairwise

KINDS = [natgrad.KFAC, natgrad.EKFAC, natgrad.SINGD]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(likelihood: str, seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    x = normal(size, 5, seed=seed)
    if likelihood == "categorical":
        return x, labels(size, 3, seed)
    noise = normal(size, 3, seed=100 + seed)
    return x, (noise > 0).double() if likelihood == "bernoulli" else noise


def mean_loss(likelihood: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss that is a sum over outputs and a mean over samples."""
    if likelihood == "categorical":
        return functional.cross_entropy
    if likelihood == "gaussian":
        return lambda z, y: 0.5 * (z - y).square().sum() / len(z)
    binary = functional.binary_cross_entropy_with_logits
    return lambda z, y: binary(z, y, reduction="sum") / len(z)


def plain(model, loss, x, y) -> None:
    loss(model(x), y).backward()


def thousandfold(model, loss, x, y) -> None:
    (1000.0 * loss(model(x), y)).backward()


def accumulated(model, loss, x, y) -> None:
    for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
        (loss(model(part), target) / 4).backward()


def added_up(model, loss, x, y) -> None:
    for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
        loss(model(part), target).backward()


def scaler(model, loss, x, y) -> None:
    (65536.0 * loss(model(x), y)).backward()
    for p in model.parameters():
        p.grad.div_(65536.0)


def scaler_and_accumulated(model, loss, x, y) -> None:
    for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
        (65536.0 * loss(model(part), target) / 4).backward()
    for p in model.parameters():
        p.grad.div_(65536.0)


def mean_over_outputs(model, loss, x, y) -> None:
    functional.binary_cross_entropy_with_logits(model(x), y).backward()


def trained(kind, likelihood: str, backward, steps: int = 8, **options) -> list[Tensor]:
    """Return the parameters after every step, all of them shorter than the natural gradient."""
    model = network()
    optimizer = kind(model, likelihood, damping=RelativeDamping(0.02), **options)
    path = []
    for seed in range(steps):
        optimizer.zero_grad()
        backward(model, mean_loss(likelihood), *batch(likelihood, seed))
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return path


@functools.cache
def trained_plainly(kind, likelihood: str, fisher: str) -> list[Tensor]:
    return trained(kind, likelihood, plain, fisher=fisher)


WAYS = [
    *[("categorical", way) for way in (thousandfold, accumulated, added_up, scaler)],
    *[("bernoulli", way) for way in (thousandfold, accumulated, scaler, mean_over_outputs)],
    *[("gaussian", way) for way in (accumulated, scaler)],
    *[(name, scaler_and_accumulated) for name in ("categorical", "bernoulli", "gaussian")],
]
#: Normal numbers drawn for two samples are not the first of those drawn for eight.
CASES = [
    pytest.param(kind, fisher, *way, id=f"{kind.__name__}, {fisher}, {way[0]}, {way[1].__name__}")
    for kind, fisher, way in pairwise(KINDS, ["exact", "mc"], WAYS)
    for fisher in [fisher if way[0] != "gaussian" or way[1] is scaler else "exact"]
]


@pytest.mark.parametrize(("kind", "fisher", "likelihood", "way"), CASES)
def test_steps_are_the_same(kind, fisher, likelihood, way):
    expected = trained_plainly(kind, likelihood, fisher)
    found = trained(kind, likelihood, way, fisher=fisher)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert (expected[-1] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("bound", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_clipped_gradients_make_no_step_longer_than_their_natural_gradient(likelihood, bound, rate):
    """α is at most 1, however small clipping leaves ``⟨Δ, g⟩``."""
    model = network()
    rule = StepRule(length=MeasuredLength(start=1.0))
    optimizer = KFAC(
        model, likelihood, lr=rate, momentum=0.0, fisher="exact", step_rule=rule,
        damping=RelativeDamping(data=0.0),
    )  # fmt: skip
    for seed in range(15):
        optimizer.zero_grad()
        plain(model, mean_loss(likelihood), *batch(likelihood, seed))
        torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        taken_back = optimizer._lengths.state.taken_back
        optimizer.step()
        if optimizer._lengths.state.taken_back > taken_back:
            continue
        source = GradientSource(gradients)
        natural = optimizer.preconditioner.curvature.natural_gradient(source)
        for name, p in model.named_parameters():
            step = (p.detach() - before[name]).norm()
            assert step <= rate * natural[name].norm() * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("norm_clip", [1e-3, 1e-2])
def test_norm_clip_bounds_new_directions(norm_clip):
    model = network()
    rule = StepRule(length=MeasuredLength(start=1.0), norm_clip=norm_clip)
    optimizer = KFAC(model, momentum=0.0, fisher="exact", step_rule=rule)
    for seed in range(8):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer.zero_grad()
        plain(model, mean_loss("categorical"), *batch("categorical", seed))
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert (after - before).norm() <= norm_clip * (1 + 1e-9)


@pytest.mark.parametrize("way", [plain, added_up, accumulated])
def test_probabilities_of_classes_show_the_scale_that_logits_do(way):
    paths = []
    for ends in (False, True):
        model = network()
        if ends:
            model.append(nn.Softmax(-1))
        optimizer = KFAC(model, fisher="exact")
        own = (lambda p, y: functional.nll_loss(p.log(), y)) if ends else functional.cross_entropy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for seed in range(4):
                optimizer.zero_grad()
                way(model, own, *batch("categorical", seed))
                optimizer.step()
        paths.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-7, atol=1e-8)
