"""Saliencies, adjustments and rounding errors against brute force in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.tools import prune, quantization_error
from tests import dense
from tests.curvature.structures_table import TABLE, problem
from tests.dense import assert_same

STRUCTURES = ["full", "block_diagonal", "unit_wise", "diagonal", "kfac", "ekfac", "kpsvd[1]"]
DAMPING = 0.03


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in dense.parameters(model).values()])


def surgeon(hessian: Tensor, theta: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least ``½ δᵀHδ`` with ``θ + δ`` zero at some entries, and δ (Lagrange)."""
    size, number = len(theta), len(removed)
    system = torch.zeros(size + number, size + number).double()
    system[:size, :size] = hessian
    rows = torch.arange(number)
    system[size + rows, removed] = system[removed, size + rows] = 1.0
    right = torch.cat([torch.zeros(size).double(), -theta[removed]])
    change = torch.linalg.solve(system, right)[:size]
    return 0.5 * change @ hessian @ change, change


def setting(structure: str, name: str = "mlp") -> tuple:
    entry, given = TABLE[structure], problem(name)
    matrix, model = entry.of_user(given), copy.deepcopy(given.case.model)
    dense_matrix = entry.definition(given, matrix)
    hessian = dense_matrix + DAMPING * torch.eye(given.size).double()
    return given, matrix, model, dense_matrix, hessian


@pytest.mark.parametrize("structure", STRUCTURES)
def test_removing_weights_is_brute_force(structure):
    given, matrix, model, fisher, hessian = setting(structure)
    theta = flat(model)
    where = {n: i for n, i in dense.indices(model).items() if n.endswith("weight")}
    expected = torch.cat([
        torch.stack([surgeon(hessian, theta, i.reshape(1))[0] for i in index.flatten()])
        for index in where.values()
    ])  # fmt: skip
    pruning = prune(model, matrix, 0.4, damping=DAMPING, tolerance=1e-13, max_iterations=9999)
    found = torch.cat([s.flatten() for s in pruning.saliencies.values()])
    assert_same(found, expected, 1e-8)
    number = round(0.4 * len(expected))
    removed = torch.cat([i.flatten() for i in where.values()])[expected.argsort()[:number]]
    _, change = surgeon(hessian, theta, removed)
    assert_same(flat(model), theta + change, 1e-8)
    assert set((flat(model) == 0).nonzero().flatten().tolist()) == set(removed.tolist())
    assert pruning.loss_increase == pytest.approx(float(0.5 * change @ fisher @ change), rel=1e-7)
    assert sum(int((~mask).sum()) for mask in pruning.kept.values()) == number


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "conv2d"])
def test_removing_units_is_brute_force(structure, name):
    given, matrix, model, fisher, hessian = setting(structure, name)
    theta = flat(model)
    specs = [s for s in given.case.blocks if s.names[0].endswith("weight")][:-1]
    units = [dense.augmented_indices(model, spec).flatten(0, 1) for spec in specs]
    expected = [torch.stack([surgeon(hessian, theta, i)[0] for i in one]) for one in units]
    pruning = prune(
        model, matrix, 0.5, units=True, layers=[s.layer for s in specs], damping=DAMPING,
        tolerance=1e-13, max_iterations=9999,
    )  # fmt: skip
    for spec, values in zip(specs, expected, strict=True):
        assert_same(pruning.saliencies[spec.layer].flatten(), values, 1e-8)
    order = torch.cat(expected).argsort()[: round(0.5 * sum(map(len, expected)))]
    every = [index for one in units for index in one]
    removed = torch.cat([every[i] for i in order])
    _, change = surgeon(hessian, theta, removed)
    assert_same(flat(model), theta + change, 1e-8)


def test_saliencies_tell_the_loss_of_a_regression():
    """A quadratic loss at its optimum: the increase is exact, for any number of weights."""
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    model = nn.Linear(4, 2).double()
    a = torch.cat([x, torch.ones(30, 1).double()], 1)
    theta = torch.linalg.lstsq(a, y).solution
    with torch.no_grad():
        model.weight.copy_(theta[:4].T)
        model.bias.copy_(theta[4])
    matrix = natgrad.fisher_matrix(model, (x, y), "gaussian", "full")
    before = (model(x) - y).detach().square().sum() / 60
    pruning = prune(model, matrix, 0.5, damping=0.0, tolerance=1e-13)
    after = (model(x) - y).detach().square().sum() / 60
    assert float(after - before) == pytest.approx(pruning.loss_increase, rel=1e-9)


def test_nothing_else_moves_unless_it_is_wanted():
    given, matrix, model, *_ = setting("kfac")
    theta = flat(model)
    untouched = copy.deepcopy(model)
    prune(untouched, matrix, 0.0)
    assert torch.equal(flat(untouched), theta)
    pruning = prune(model, matrix, 0.5, adjust=False, layers=["2"])
    kept = torch.cat([mask.flatten() for mask in pruning.kept.values()])
    assert torch.equal(flat(model), theta * kept) and not kept.all()
    assert pruning.kept["0.weight"].all() and pruning.kept["2.bias"].all()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    pruning.apply(model)
    assert torch.equal(flat(model) != 0, kept)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("per_unit", [True, False])
def test_rounding_errors_are_the_quadratic_form(structure, per_unit):
    given, matrix, model, fisher, _ = setting(structure, "conv2d")
    found = quantization_error(model, matrix, 3, per_unit=per_unit)
    values, where, whole = dense.parameters(model), dense.indices(model), 0.0
    specs = [s for s in given.case.blocks if s.names[0].endswith("weight")]
    for spec in specs:
        name = spec.names[0]
        weight = values[name].detach()
        change = torch.zeros(given.size).double()
        rows = weight.flatten(1) if per_unit else weight.reshape(1, -1)
        grid = torch.arange(-3, 4).double()  # 2³ − 1 levels.
        for row, index in zip(rows, where[name].reshape(rows.shape), strict=True):
            levels = grid * row.abs().max() / 3
            nearest = levels[(row.unsqueeze(1) - levels).abs().argmin(1)]
            change[index] = nearest - row
        assert found.layers[spec.layer] == pytest.approx(
            float(change @ fisher @ change) / 2, rel=1e-8
        )
        assert_same(found.rounded[name].flatten(), weight.flatten() + change[where[name]].flatten())
        whole = whole + change
    assert found.total == pytest.approx(float(whole @ fisher @ whole) / 2, rel=1e-8)
    assert set(found.rounded) == {s.names[0] for s in specs}
    assert set(found.layers) == {s.layer for s in specs}


def test_more_bits_cost_less_and_each_layer_may_have_its_own():
    _, matrix, model, *_ = setting("ekfac")
    errors = [quantization_error(model, matrix, bits).total for bits in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 * errors[0]
    mixed = quantization_error(model, matrix, {"2": 4})
    assert mixed.layers == pytest.approx({"2": quantization_error(model, matrix, 4).layers["2"]})
    assert mixed.total == pytest.approx(mixed.layers["2"])
    other = copy.deepcopy(model)
    other.load_state_dict(mixed.rounded, strict=False)
    assert len(other[2].weight[0].unique()) <= 15


def test_what_does_not_fit_memory_is_refused(monkeypatch):
    _, matrix, model, *_ = setting("block_tridiagonal")  # The diagonal of its inverse is dense.
    monkeypatch.setattr(natgrad.linalg, "check_memory", refuse)
    with pytest.raises(ValueError, match="too large"):
        prune(model, matrix, 0.5)


def refuse(side: int, count: int, dtype: torch.dtype, device: torch.device) -> None:
    raise ValueError(f"{count} matrices of size {side} are too large")


def test_wrong_arguments_are_refused():
    _, matrix, model, *_ = setting("kfac")
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        prune(model, matrix, 1.5)
    with pytest.raises(ValueError, match="no weight matrices in layers"):
        prune(model, matrix, 0.5, layers=["nowhere"])
    with pytest.raises(ValueError, match="bits of '0' must be an integer of at least 2, got 1"):
        quantization_error(model, matrix, 1)
    with pytest.raises(ValueError, match="no weight matrices"):
        quantization_error(model, matrix, {"1": 4})


class Adapter(nn.Module):
    """Weights of its own without a formula, a bias, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 5))
        self.second = nn.Parameter(torch.randn(4, 2))
        self.bias = nn.Parameter(torch.randn(4))
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.sinh(x @ self.first.T) @ self.second.T + self.bias


def adapted() -> tuple[nn.Module, natgrad.FisherMatrix]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), Adapter()).double()
    x = torch.randn(9, 3).double()
    return model, natgrad.fisher_matrix(model, (x, None), "gaussian", "full")


def test_every_weight_without_a_formula_is_rounded_and_nothing_else_is():
    model, matrix = adapted()
    found = quantization_error(model, matrix, 3)
    assert set(found.rounded) == {"0.weight", "2.first", "2.second"}
    values = dense.parameters(model)
    moved = [found.rounded.get(name, value) - value for name, value in values.items()]
    change = torch.cat([one.detach().flatten() for one in moved])
    fisher = matrix.to_dense()
    assert found.total == pytest.approx(float(0.5 * change @ fisher @ change), rel=1e-10)
    for name in ("2.first", "2.second"):
        rows = values[name].detach()
        levels = rows.abs().amax(1, keepdim=True) / 3
        assert_same(found.rounded[name], (rows / levels).round() * levels)


def test_biases_and_numbers_beside_weights_without_a_formula_are_not_removed():
    model, matrix = adapted()
    pruning = prune(model, matrix, 1.0)
    kept = {name for name, mask in pruning.kept.items() if mask.all()}
    assert kept == {"0.bias", "2.bias", "2.gain"}
    assert pruning.saliencies["2"].shape == (1, 1, 18)
    model, matrix = adapted()
    pruning = prune(model, matrix, 0.4, units=True)
    assert set(pruning.saliencies) == {"0"}
    with pytest.raises(ValueError, match="no output units in"):
        prune(model, matrix, 0.4, units=True, layers=["2"])
    alone = Adapter().double()
    x = torch.randn(9, 5).double()
    with pytest.raises(ValueError, match="no output units, so there is nothing"):
        matrix = natgrad.fisher_matrix(alone, (x, None), "gaussian", "full")
        prune(alone, matrix, 0.4, units=True)
    norm = nn.LayerNorm(5).double()
    with pytest.raises(ValueError, match="no weight matrices, so there is nothing"):
        prune(norm, natgrad.fisher_matrix(norm, (x, None), "gaussian", "full"), 0.4)


@pytest.mark.parametrize("structure", ["full", "kfac", "diagonal", "unit_wise"])
@pytest.mark.parametrize("units", [True, False])
def test_what_no_data_reach_is_removed_first(structure, units):
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).double()
    model.forward = lambda x: model["used"](x)
    torch.nn.init.ones_(model["used"].weight)
    x = torch.eye(3).double()
    matrix = natgrad.fisher_matrix(model, (x, None), "gaussian", structure)
    pruning = prune(model, matrix, 0.5, units=units)
    assert not model["unused"].weight.any() and model["used"].weight.all()
    assert pruning.loss_increase == pytest.approx(0.0, abs=1e-12)


def test_hessians_and_fractions_that_are_no_numbers_are_refused():
    given = problem("mlp")
    model, matrix = given.case.model, TABLE["kfac"].of_user(given)
    hessian = natgrad.hessian_matrix(model, (given.case.x, given.target))
    with pytest.raises(TypeError, match="natgrad.FisherMatrix"):
        prune(copy.deepcopy(model), hessian, 0.5)
    for wrong in ("0.5", None):
        with pytest.raises(ValueError, match="fraction must be in"):
            prune(copy.deepcopy(model), matrix, wrong)
    nothing = quantization_error(model, matrix, {})
    assert (nothing.layers, nothing.total, nothing.rounded) == ({}, 0.0, {})
