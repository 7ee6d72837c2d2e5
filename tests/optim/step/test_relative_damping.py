"""Damping as a share of the mean eigenvalue, against dense matrices."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad import (
    EKFAC,
    KFAC,
    SINGD,
    TKFAC,
    MeasuredLength,
    NaturalGradient,
    Refresh,
    RelativeDamping,
    StepRule,
)
from natgrad.curvature import KroneckerFactors
from natgrad.optim.step.lengths import Deviance
from tests.cases import labels, normal
from tests.dense_kronecker import damped_inputs

KRONECKER = ["kfac", "ekfac", "tkfac", "tekfac", "kpsvd", "kfoc", "two_level"]
ROWS = ["full", "block_diagonal", "diagonal", "unit_wise"]
SMALL_FACTORS = KroneckerFactors(max_factor_size=6)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed: int, size: int = 12) -> tuple[Tensor, Tensor]:
    return normal(size, 5, seed=seed), labels(size, 3, seed)


def make(model: nn.Module, structure="kfac", share: float = 0.2, **options) -> NaturalGradient:
    return NaturalGradient(
        model, structure=structure, fisher="exact", damping=RelativeDamping(share), lr=1.0,
        step_rule=StepRule(length=MeasuredLength()), **options,
    )  # fmt: skip


def take(optimizer, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def mean_eigenvalue(optimizer) -> float:
    """Return tr F/P of the matrix written out."""
    matrix = optimizer.preconditioner.curvature.matrix().to_dense()
    return float(matrix.diagonal().mean())


def used(optimizer) -> dict[str, float]:
    estimates = optimizer.preconditioner.curvature.estimates
    return {name: one.damping for name, one in estimates.items() if one.inverse is not None}


@pytest.mark.parametrize(
    "structure", [*KRONECKER, *ROWS, pytest.param(SMALL_FACTORS, id="kfac of diagonal factors")]
)
@pytest.mark.parametrize("share", [0.2, 3.0])
def test_first_damping_is_a_share_of_the_first_mean_eigenvalue(structure, share):
    model = network()
    optimizer = make(model, structure, share)
    take(optimizer, model, *batch(0))
    expected = share * mean_eigenvalue(optimizer)
    found = used(optimizer)
    assert found
    for value in found.values():
        assert math.isclose(value, expected, rel_tol=1e-9)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "tekfac", "diagonal"])
def test_later_dampings_are_of_the_factorisation_before(structure):
    model = network()
    optimizer = make(model, structure, refresh=Refresh(factors=1, inverses=3, decay=0.7))
    known, renewals = None, 0
    for step in range(14):
        taken_back = optimizer._lengths.state.taken_back
        due = optimizer.preconditioner.inverts
        take(optimizer, model, *batch(step))
        if due and optimizer._lengths.state.taken_back == taken_back:
            expected = mean_eigenvalue(optimizer) if known is None else known
            for value in used(optimizer).values():
                assert math.isclose(value, 0.2 * expected, rel_tol=1e-9)
            known, renewals = mean_eigenvalue(optimizer), renewals + 1
        elif known is not None:
            assert optimizer._mean_eigenvalue == pytest.approx(known, rel=1e-12)
    assert renewals >= 4


@pytest.mark.parametrize("structure", [*KRONECKER, *ROWS])
@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_confident_errors_count_as_curvature(structure, factor):
    """tr F counts as at least a hundredth of ``‖∇L‖²/R``, with R twice the loss of hard labels."""
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e4)
    optimizer = make(model, structure)
    x, _ = batch(0)
    y = model(x).argmin(1)
    loss = functional.cross_entropy(model(x), y)
    (factor * loss).backward()
    square = sum(float(p.grad.square().sum()) for p in model.parameters()) / factor**2
    size = sum(p.numel() for p in model.parameters())
    expected = 0.2 * 0.01 * square / (2 * loss.item()) / size
    optimizer.step()
    assert mean_eigenvalue(optimizer) < 0.01 * expected
    found = used(optimizer)
    assert found
    for value in found.values():
        assert math.isclose(value, expected, rel_tol=1e-9)


@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC, TKFAC, SINGD])
def test_confident_errors_are_unlearnt(optimizer_type):
    """Tied tables as torch draws them repeat their input, of which sampled labels see no doubt."""
    torch.manual_seed(0)
    table = nn.Embedding(30, 64)
    model = nn.Sequential(table, nn.Linear(64, 30, bias=False))
    model[1].weight = table.weight
    optimizer = optimizer_type(model)
    tokens = torch.arange(30)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 50
    assert losses[-1] < 5


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "unit_wise"])
def test_damped_matrix_is_inverted(structure):
    """The natural gradient is that of ``F + ε tr F/P I``."""
    model = network()
    structure = KroneckerFactors(factored_damping=False) if structure == "kfac" else structure
    optimizer = make(model, structure, momentum=0.0)
    x, y = batch(0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    take(optimizer, model, x, y)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    matrix = optimizer.preconditioner.curvature.matrix().to_dense()
    damped = matrix + 0.2 * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
    if not isinstance(structure, str) or structure == "ekfac":  # The data's factor is damped, too.
        damped[:48, :48] = damped_inputs(matrix[:48, :48], 8, 6 / len(x)) + (
            damped[:48, :48] - matrix[:48, :48]
        )
    natural = torch.linalg.solve(damped, gradient)
    ratio = (before - after) / natural
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-8, atol=1e-12)


def test_groups_have_shares_of_their_own():
    model = network()
    optimizer = make(model, params=[{"modules": [model[0]], "damping": 0.9}])
    take(optimizer, model, *batch(0))
    unit = mean_eigenvalue(optimizer)
    found = used(optimizer)
    assert len(found) == 2
    for name, share in zip(found, (0.9, 0.2), strict=True):
        assert math.isclose(found[name], share * unit, rel_tol=1e-9)
    optimizer.param_groups[0]["damping"] = 0.5  # Of a user, or a schedule.
    take(optimizer, model, *batch(1))
    assert math.isclose(next(iter(used(optimizer).values())), 0.5 * unit, rel_tol=1e-9)


def test_no_damping_is_none():
    model = network()
    optimizer = make(model, KroneckerFactors(factored_damping=False), share=0.0)
    take(optimizer, model, *batch(0, size=100))
    assert set(used(optimizer).values()) == {0.0}


def test_checkpoint_keeps_the_unit():
    model = network()
    optimizer = KFAC(model, refresh=Refresh(factors=1, inverses=4, decay=0.9))
    for step in range(6):
        take(optimizer, model, *batch(step))
    other = copy.deepcopy(model)
    again = KFAC(other, refresh=Refresh(factors=1, inverses=4, decay=0.9))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again._mean_eigenvalue == optimizer._mean_eigenvalue is not None
    assert again.param_groups[0]["damping"] == 0.2
    for step in range(6, 12):
        take(optimizer, model, *batch(step))
        take(again, other, *batch(step))
    assert used(again) == used(optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def regression(floor: float, noise: float, steps: int = 80) -> NaturalGradient:
    """Return what has fitted a linear map, which leaves a part of the targets that is noise."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    optimizer = KFAC(model, nn.MSELoss(), damping=RelativeDamping(0.2, floor), fisher="exact")
    for step in range(steps):
        x = normal(60, 5, seed=step)
        y = x[:, :3] + noise * normal(60, 3, seed=1000 + step)
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("noise", "floor", "low", "high"), [
    (0.0, 0.01, 0.01, 0.01), (0.0, 1e-4, 1e-4, 1e-4), (0.0, 1.0, 1.0, 1.0),
    (0.3, 0.01, 0.05, 0.12), (2.0, 0.01, 1.0, 1.0),
])  # fmt: skip
def test_damping_is_of_the_noise_that_squared_errors_leave(noise, floor, low, high):
    """What is left of 0.3² + 1 + 1/3 by 0.3², the weights' own outputs counted."""
    optimizer = regression(floor, noise)
    ratio = optimizer._damping_unit / optimizer._mean_eigenvalue
    assert low <= ratio <= high


def test_checkpoint_keeps_what_is_known_of_residuals():
    optimizer = regression(0.01, 0.3)
    again = KFAC(nn.Linear(5, 3).double(), nn.MSELoss())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again._lengths.deviance == optimizer._lengths.deviance
    assert 0.01 < again._lengths.deviance.noise_to_signal < 1


def test_residuals_that_are_not_known_change_nothing():
    known = Deviance().measured(4.0, 0.5).measured(1.0, 0.5)
    assert math.isclose(known.noise_to_signal, 1.0)  # √4 is half of 4.
    for residual in (0.0, -1.0, math.nan, math.inf, 1e300):
        assert known.measured(residual, 0.5) == known


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unit_is_never_one_of_a_broken_batch(at, value):
    model = network()
    optimizer = KFAC(model, refresh=Refresh(factors=1, inverses=1, decay=0.9))
    for step in range(8):
        x, y = batch(step)
        if step == at:
            x = x.clone()
            x[0, 0] = value
        before = optimizer._mean_eigenvalue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            take(optimizer, model, x, y)
        if step == at:
            assert optimizer._mean_eigenvalue == before
        else:
            assert math.isfinite(optimizer._mean_eigenvalue)
        assert all(math.isfinite(one) for one in used(optimizer).values())
        assert all(p.isfinite().all() for p in model.parameters())


def test_first_batch_in_which_nothing_counts_gives_no_unit():
    model = network()
    optimizer = KFAC(model)
    x, y = batch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.full_like(y, -100), reduction="sum").backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    for step in range(1, 4):
        take(optimizer, model, *batch(step))
    assert optimizer._mean_eigenvalue > 0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("share", [-0.1, math.nan, math.inf])
def test_share_out_of_range_is_named(share):
    with pytest.raises(ValueError, match="share must be a finite number >= 0"):
        RelativeDamping(share)


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.1, math.nan, "low"])
def test_floor_out_of_range_is_named(floor):
    with pytest.raises(ValueError, match=r"floor must be in \(0, 1\], got"):
        RelativeDamping(0.2, floor)
