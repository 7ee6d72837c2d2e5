"""Large symmetric sums are kept as their lower triangles, and are the same sums."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.statistics import KroneckerStatistics
from natgrad.statistics import kronecker as kronecker_statistics
from natgrad.statistics import triangles as module
from natgrad.statistics.triangles import LEAST_SIZE, LowerTriangles, kept_entries
from tests.cases import normal
from tests.methods import make_optimizer

KINDS = ["KFAC", "TKFAC", "EKFAC"]


@pytest.fixture
def everywhere(monkeypatch):
    """Keep the triangles of matrices of all sizes."""
    for one in (module, kronecker_statistics):
        monkeypatch.setattr(one, "LEAST_SIZE", 1)


@given(st.integers(1, 70), st.integers(1, 3), st.integers(0, 1000))
def test_triangles_are_those_of_the_matrices(size, groups, seed):
    x = normal(groups, size, size, seed=seed)
    y = normal(groups, size, size, seed=seed + 1)
    kept = LowerTriangles.of(x)
    assert torch.equal(kept.matrices().tril(), x.tril())
    assert torch.equal(kept.diagonal(), x.diagonal(dim1=-2, dim2=-1))
    both = kept.followed_by(LowerTriangles.of(y), 0.7).matrices().tril()
    torch.testing.assert_close(both, (0.7 * x + y).tril(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(kept.scaled(3.0).matrices().tril(), 3 * x.tril())
    assert bool(kept.matrices().isfinite().all())


@pytest.mark.parametrize("size", [LEAST_SIZE - 1, LEAST_SIZE, 1000, 1025])
def test_what_is_kept_of_large_sums(size):
    a, count = normal(20, size), torch.tensor(20.0, dtype=torch.float64)
    sums = KroneckerStatistics(count, (a.T @ a).tril()[None], count, torch.ones(1, 1).double())
    held = sum(tensor.numel() for tensor in sums.tensors()) - 3
    assert held == kept_entries(size)
    if size >= LEAST_SIZE:
        assert held < 0.57 * size**2
    found, _ = sums.followed_by(sums, 0.5).mean_factors()
    torch.testing.assert_close(found[0].tril(), (a.T @ a / 20).tril(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.trace(), a.square().sum() / 20 / 20, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("where", [0, 3, 8])
def test_diagonals_show_what_is_not_finite(where):
    x = torch.eye(9, dtype=torch.float64)[None]
    one = torch.ones((), dtype=torch.float64)
    assert bool(KroneckerStatistics(one, x, one, x).is_finite())
    y = x.clone()
    y[0, where, where] = torch.inf
    assert not bool(KroneckerStatistics(one, x, one, y).is_finite())


def trained(kind: str, factory, **options) -> tuple[Tensor, natgrad.NaturalGradient]:
    torch.manual_seed(0)
    model = factory().double()
    optimizer = make_optimizer(getattr(natgrad, kind), model, **options)
    for seed in range(5):
        optimizer.zero_grad()
        output = model(normal(12, 2, 6, 6, seed=seed))
        functional.cross_entropy(output, torch.arange(12) % output.shape[1]).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer


def convolutional() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_do_not_depend_on_how_sums_are_kept(kind, request):
    whole, _ = trained(kind, convolutional)
    request.getfixturevalue("everywhere")
    triangles, optimizer = trained(kind, convolutional)
    kept = [
        value
        for one in optimizer.preconditioner.curvature.estimates.values()
        for value in vars(getattr(one.average, "factors", one.average)).values()
    ]
    assert sum(isinstance(value, LowerTriangles) for value in kept) >= 8
    torch.testing.assert_close(triangles, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_triangles(kind):
    _, optimizer = trained(kind, convolutional)
    state = copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(1)
    other = make_optimizer(getattr(natgrad, kind), convolutional().double())
    other.load_state_dict(state)
    for name, one in optimizer.preconditioner.curvature.estimates.items():
        loaded = other.preconditioner.curvature.estimates[name].average
        for left, right in zip(one.average.tensors(), loaded.tensors(), strict=True):
            assert torch.equal(left, right)


def test_checkpoints_of_whole_sums_can_be_loaded(request):
    _, optimizer = trained("KFAC", convolutional)
    state = copy.deepcopy(optimizer.state_dict())
    request.getfixturevalue("everywhere")
    other = make_optimizer(natgrad.KFAC, convolutional().double())
    other.load_state_dict(state)
    for name, one in optimizer.preconditioner.curvature.estimates.items():
        loaded = other.preconditioner.curvature.estimates[name].average
        assert isinstance(loaded.inputs, LowerTriangles)
        for left, right in zip(one.average.mean_factors(), loaded.mean_factors(), strict=True):
            assert torch.equal(left.tril(), right.tril())
