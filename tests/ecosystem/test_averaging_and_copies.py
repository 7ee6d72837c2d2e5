"""Averages of weights, copies, pickles and files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import natgrad
from tests.ecosystem.loops import REPRESENTATIVES, batches, make, network, train
from tests.state import flat, same


def normalized(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models(name, kind):
    """The average is that of the weights seen; neither training nor curvature notices it."""
    data = batches(6)
    alone, model = normalized(), normalized()
    optimizer = make(name, alone)
    train(alone, optimizer, data)
    rule = None if kind == "swa" else swa_utils.get_ema_multi_avg_fn(0.5)
    average = swa_utils.AveragedModel(model, multi_avg_fn=rule)
    optimizer = make(name, model)
    expected = None
    for index, batch in enumerate(data):
        train(model, optimizer, [batch])
        average.update_parameters(model)
        weight = 1 / (index + 1) if kind == "swa" else 0.5
        now = flat(model)
        expected = now if expected is None else expected + weight * (now - expected)
    assert torch.equal(flat(alone), flat(model))
    torch.testing.assert_close(flat(average.module), expected)
    before = copy.deepcopy(optimizer.state_dict())
    swa_utils.update_bn([x for x, _ in data], average)
    swa_utils.update_bn([x for x, _ in data], model)  # Even of the watched model itself.
    assert same(optimizer.state_dict(), before)
    train(model, optimizer, data)


def test_swa_schedule():
    model = normalized()
    optimizer = make("kfac", model)
    average = swa_utils.AveragedModel(model)
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    for batch in batches(5):
        train(model, optimizer, [batch], scheduler=schedule)
        average.update_parameters(model)
    assert all(g["lr"] == pytest.approx(0.02) for g in optimizer.param_groups)
    assert flat(average).isfinite().all()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_model_and_optimizer_are_copied_together(name, how):
    """The copy watches its own model and goes on exactly as the original does."""
    data = batches(9)
    model = network()
    optimizer = make(name, model)
    train(model, optimizer, data[:4])
    pair = (model, optimizer)
    if how == "deepcopy":
        other, second = copy.deepcopy(pair)
    elif how == "pickle":
        other, second = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        other, second = torch.load(file, weights_only=False)
    assert name == "padam" or second.model is other
    assert {id(p) for g in second.param_groups for p in g["params"]} == {
        id(p) for p in other.parameters()
    }
    start = flat(model)
    train(other, second, data[4:])
    assert torch.equal(flat(model), start)  # The original does not move with it.
    train(model, optimizer, data[4:])
    assert torch.equal(flat(model), flat(other))
    assert same(optimizer.state_dict(), second.state_dict())


@pytest.mark.parametrize("name", ["kfac", "exact"])
def test_copies_of_groups_and_fallback(name):
    """Groups named by modules follow the copied model, as do uncovered parameters."""
    data = batches(6)
    model = network()
    groups = [
        {"modules": [model[0]], "lr": 0.02},
        {"params": [model[3].bias], "preconditioned": False},
    ]
    optimizer = make(name, model, params=groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, data[:2], scheduler=schedule)
    other, second = copy.deepcopy((model, optimizer))
    assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in optimizer.param_groups]
    train(other, second, data[2:])
    train(model, optimizer, data[2:])
    assert torch.equal(flat(model), flat(other))


def test_copies_of_a_preconditioner():
    data = batches(6)
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = natgrad.Preconditioner(model)
    everything = (model, sgd, preconditioner)
    runs = []
    for net, first_order, curvature in (everything, copy.deepcopy(everything)):
        for x, y in data:
            first_order.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            curvature.step()
            first_order.step()
        runs.append(flat(net))
    assert curvature.model is net and curvature is not preconditioner
    assert torch.equal(runs[0], flat(model)) and curvature.observer.steps == len(data)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["kfac", "exact"])
def test_a_copy_of_the_model_alone_is_free(name, how):
    data = batches(4)
    model = network()
    optimizer = make(name, model)
    train(model, optimizer, data[:2])
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    before = copy.deepcopy(optimizer.state_dict())
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), data)
    assert same(optimizer.state_dict(), before)
    fresh = make(name, other)
    train(other, fresh, data)
    assert fresh.preconditioner.observer.steps == len(data)


@pytest.mark.parametrize("name", [*REPRESENTATIVES, "singd", "thermodynamic"])
def test_safetensors_of_the_model_and_weights_only_state(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    data = batches(8)
    model = network()
    optimizer = make(name, model)
    train(model, optimizer, data[:4])
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = network(seed=3)
    second = make(name, other, seed=3)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, optimizer, data[4:])
    train(other, second, data[4:])
    assert torch.equal(flat(model), flat(other))
