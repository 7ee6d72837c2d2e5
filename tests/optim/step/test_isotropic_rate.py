"""lr="isotropic": the learning rate 1/α, measured on the first batch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import natgrad
from natgrad import ntk
from tests.cases import normal
from tests.methods import make_optimizer

OPTIMIZERS = {
    "full": natgrad.ExactNGD,
    "block_diagonal": natgrad.BlockDiagonalNGD,
    "block_tridiagonal": natgrad.BlockTridiagonalNGD,
    "kfac": natgrad.KFAC,
    "unit_wise": natgrad.UnitWiseNGD,
}


def network(outputs: int = 2, width: int = 40) -> nn.Module:
    torch.manual_seed(3)
    return ntk.MLP([12, width, width, outputs], "tanh").double()


def make(structure: str, model: nn.Module, likelihood="gaussian", **options):
    options = {"fisher": "exact", "kl_clip": None, "damping": 0.0, "momentum": 0.0} | options
    return make_optimizer(OPTIMIZERS[structure], model, likelihood, lr="isotropic", **options)


def backward(model: nn.Module, x, y) -> float:
    loss = 0.5 * (model(x) - y).square().sum() / len(x)
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("structure", OPTIMIZERS)
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_unit_is_one_over_the_alpha_of_isotropy(structure, likelihood):
    """In a network wide enough for exact isotropy every draw of signs gives α itself.

    Unit-wise curvature is isotropic in the limit only, K-FAC's for cross-entropy nearly: there the
    mean over draws is within a few standard errors √(2/R) · deviation / √draws.
    """
    model = network(3)
    x, y = normal(4, 12), normal(4, 3, seed=1)
    expected = ntk.isotropy(model, x, structure, likelihood=likelihood)
    optimizer = make(structure, model, likelihood)
    if likelihood == "gaussian":
        backward(model, x, y)
    else:
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    with warnings.catch_warnings():
        # Unit-wise is isotropic only in the limit.
        warnings.simplefilter("ignore" if structure == "unit_wise" else "error")
        optimizer.step()
    error = 5 * (2 / expected.rows / 8) ** 0.5 * expected.deviation
    tolerance = max(error, 1e-6)
    assert optimizer.param_groups[0]["unit"] * expected.alpha == pytest.approx(1, rel=tolerance)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_the_step_is_that_of_the_learning_rate_given_as_a_number():
    x, y = normal(4, 12), normal(4, 2, seed=1)
    models = [network(), network()]
    isotropic = make("block_diagonal", models[0])
    plain = natgrad.BlockDiagonalNGD(models[1], "gaussian", lr=1 / 3, damping=0.0, kl_clip=None)
    scheduler = torch.optim.lr_scheduler.StepLR(isotropic, 1, gamma=0.5)
    for step in range(3):
        for model, optimizer in zip(models, (isotropic, plain), strict=True):
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
        scheduler.step()
        plain.param_groups[0]["lr"] = 0.5 ** (step + 1) / 3
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_rate_survives_checkpoints_before_and_after_it_is_measured():
    x, y = normal(4, 12), normal(4, 2, seed=1)
    model = network()
    optimizer = make("kfac", model)
    fresh = copy.deepcopy(optimizer.state_dict())
    backward(model, x, y)
    optimizer.step()
    unit = optimizer.param_groups[0]["unit"]
    other = make("kfac", network())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["unit"] == unit
    assert other.preconditioner.observer.isotropy_probe is None
    again = make("kfac", network())
    again.load_state_dict(fresh)
    assert again.param_groups[0]["unit"] is None
    backward(again.model, x, y)
    again.step()
    assert again.param_groups[0]["unit"] == pytest.approx(unit)


def test_accumulated_passes_count_as_one_batch():
    x, y = normal(6, 12), normal(6, 2, seed=1)
    models = [network(), network()]
    whole, parts = (make("kfac", m) for m in models)
    backward(models[0], x, y)
    for half in (slice(0, 2), slice(2, 6)):
        (0.5 * (models[1](x[half]) - y[half]).square().sum() / 6).backward()
    whole.step()
    parts.step()
    assert parts.param_groups[0]["unit"] == pytest.approx(whole.param_groups[0]["unit"], rel=1e-5)


def test_a_skipped_first_step_measures_nothing():
    x, y = normal(4, 12), normal(4, 2, seed=1)
    model = network()
    optimizer = make("block_diagonal", model)
    backward(model, x, y * float("nan"))
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert optimizer.param_groups[0]["unit"] is None
    optimizer.zero_grad()
    backward(model, x, y)
    optimizer.step()
    assert optimizer.param_groups[0]["unit"] == pytest.approx(1 / 3)


def test_empirical_curvature_and_random_state():
    x, y = normal(4, 12), normal(4, 2, seed=1)
    model = network()
    optimizer = make("kfac", model, fisher="empirical", damping=0.1)
    state = torch.random.get_rng_state()
    backward(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 0 < optimizer.param_groups[0]["unit"] < float("inf")
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()


def test_far_from_isotropy_it_warns():
    x, y = normal(12, 12).abs(), normal(12, 2, seed=1)
    model = network(width=6)
    assert ntk.isotropy(model, x, "diagonal", 1e-6).deviation > 1
    optimizer = natgrad.DiagonalNGD(
        model, "gaussian", lr="isotropic", damping=1e-6, fisher="exact", kl_clip=None
    )
    backward(model, x, y)
    with pytest.warns(UserWarning, match="not backed by theory"):
        optimizer.step()


def test_without_a_positive_alpha_it_says_so_and_changes_nothing():
    x, y = normal(4, 12), normal(4, 2, seed=1)
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make("kfac", model)
    optimizer.preconditioner.observer.isotropy_probe.observe = lambda *args: None
    backward(model, x, y)
    with pytest.raises(ValueError, match="give lr as a number"):
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(ValueError, match="'isotropic'"):
        natgrad.KFAC(model, lr="fast")


def test_the_explicit_routes_measure_it_too():
    x, y = normal(4, 12), torch.tensor([0, 1, 1, 0])
    units = []
    for route in ("plain", "loss", "update_fisher"):
        model = network()
        optimizer = make("block_diagonal", model, "categorical")
        if route == "loss":
            optimizer.loss(nn.functional.cross_entropy, model(x), y).backward()
        else:
            output = model(x)
            if route == "update_fisher":
                optimizer.update_fisher(output)
            nn.functional.cross_entropy(output, y).backward()
        optimizer.step()
        units.append(optimizer.param_groups[0]["unit"])
    assert units == pytest.approx([1 / 3] * 3, rel=1e-6)


def test_measuring_leaves_warm_starts_alone():
    x, y = normal(4, 12), normal(4, 2, seed=1)
    models = [network(), network()]
    options = {"damping": 0.1, "kl_clip": None, "tolerance": 1e-10, "max_iterations": 100}
    measured = make_optimizer(
        natgrad.ConjugateGradientNGD, models[0], "gaussian", lr="isotropic", **options
    )
    plain = make_optimizer(natgrad.ConjugateGradientNGD, models[1], "gaussian", lr=1.0, **options)
    for model, optimizer in zip(models, (measured, plain), strict=True):
        backward(model, x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    last = [
        o.preconditioner.curvature.estimates["all layers"].inverse.state["last"]
        for o in (measured, plain)
    ]
    torch.testing.assert_close(last[0], last[1])
