"""Mixed precision: autocast, loss scaling, and models in bfloat16 throughout."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.nn import functional

from tests.ecosystem.loops import (
    AVERAGING,
    OPTIMIZERS,
    REPRESENTATIVES,
    assert_curvature_everywhere,
    batches,
    images,
    make,
    network,
    train,
)
from tests.methods import measures
from tests.state import flat, same, tensors


def assert_float32(name, optimizer):
    """Curvature is computed and kept in float32, but for SINGD, which needs no more than it has."""
    if name == "padam":
        return
    if name == "singd" and optimizer.model[0].weight.dtype == torch.bfloat16:
        estimates = optimizer.preconditioner.curvature.estimates.values()
        assert {f.dtype for e in estimates for f in e.average.factors} == {torch.bfloat16}
        return
    curvature = optimizer.state_dict()["natgrad"]["curvature"]
    found = {t.dtype for t in tensors(curvature) if t.is_floating_point() and t.dim()}
    assert found == {torch.float32} if name in AVERAGING else found <= {torch.float32}
    if name == "fngd":
        return
    matrix = optimizer.preconditioner.curvature.matrix()
    assert {part.trace().dtype for part in matrix.parts.values()} == {torch.float32}


def rate_of(name):
    """Return a rate for the plain steps of a method that takes any."""
    return {} if measures(OPTIMIZERS.get(name)) else {"lr": 0.05}


#: SINGD keeps types of its own.
NAMES = [*REPRESENTATIVES, "singd"]


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    model = network(dtype=torch.float32)
    x, y = images(32, dtype=torch.float32)
    optimizer = make(name, model, **rate_of(name))

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.cross_entropy(model(batch[0]), batch[1])

    losses = train(model, optimizer, [(x, y)] * 32, loss)
    assert losses[-1] < 0.7 * losses[0]
    assert_curvature_everywhere(optimizer)
    assert_float32(name, optimizer)


def with_fisher(names, fishers):
    """Pair names and Fisher types; one method has its own, one takes rows of gradients alone."""
    pairs = [(n, f) for n in names for f in fishers if n != "improved"]
    return [p for p in pairs if p not in (("fngd", "mc"), ("fngd", "exact"))] + [
        ("improved", "improved")
    ]


def options_of(name, fisher):
    return {} if name == "improved" else {"fisher": fisher}


@pytest.mark.parametrize(
    ("name", "fisher"),
    with_fisher(("kfac", "singd", "exact", "fngd"), ["mc", "exact", "empirical", "improved"]),
)
def test_the_scale_of_the_loss_does_not_change_the_steps(name, fisher):
    """A power of two scales exactly, so the steps agree to the last bit but for ratios of sums."""
    data = batches(6)
    models = [network() for _ in range(2)]
    optimizers = [make(name, model, **options_of(name, fisher)) for model in models]
    train(models[0], optimizers[0], data)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    for x, y in data:
        optimizers[1].zero_grad()
        scaler.scale(functional.cross_entropy(models[1](x), y)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    assert scaler.get_scale() == 2.0**19
    torch.testing.assert_close(flat(models[1]), flat(models[0]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "fisher"), with_fisher(("kfac", "exact", "fngd"), ["mc", "empirical"])
)
@pytest.mark.parametrize("unscale", [False, True])
def test_overflows_are_skipped_by_the_scaler(name, fisher, unscale):
    """The scaler never calls ``step`` then; what the backward pass left must not be counted."""
    data = batches(6)
    models = [network(dtype=torch.float32) for _ in range(2)]
    optimizers = [make(name, model, **options_of(name, fisher)) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)

    def step(model, optimizer, x, y, overflow=False):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, (x, y) in enumerate((a.float(), b) for a, b in data):
            if index == 3:
                before = copy.deepcopy(optimizers[1].state_dict()), flat(models[1])
                step(models[1], optimizers[1], x, y, overflow=True)
                optimizers[1].zero_grad()
                assert same(optimizers[1].state_dict(), before[0])
                assert torch.equal(flat(models[1]), before[1])
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
            for model, optimizer in zip(models, optimizers, strict=True):
                step(model, optimizer, x, y)
            assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("name", NAMES)
def test_models_in_bfloat16(name):
    model = network(dtype=torch.bfloat16)
    x, y = images(32, dtype=torch.bfloat16)
    optimizer = make(name, model, **rate_of(name))
    losses = train(model, optimizer, [(x, y)] * 32)
    assert losses[-1] < 0.7 * losses[0]
    assert_curvature_everywhere(optimizer)
    assert_float32(name, optimizer)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
