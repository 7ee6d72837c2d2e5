"""The penalty and the merged model against dense algebra, and against training on all data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.tools import ewc_penalty, merge
from tests import dense
from tests.curvature.structures_table import TABLE, problem
from tests.dense import assert_same

STRUCTURES = [name for name, entry in TABLE.items() if not entry.stepped]


def moved(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """Return a copy with other parameters."""
    result, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in result.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return result


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in dense.parameters(model).values()])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_penalty_and_gradient_of_every_structure(structure):
    entry, given = TABLE[structure], problem("mlp")
    matrix, model = entry.of_user(given), given.case.model
    penalty, other = ewc_penalty(matrix, model), moved(model, 1)
    change = flat(other) - flat(model)
    product = entry.definition(given, matrix) @ change
    value = penalty(other)
    (3.0 * value).backward()
    gradient = torch.cat([p.grad.flatten() for p in other.parameters()])
    assert_same(value.detach(), 0.5 * change @ product, 1e-8)
    assert_same(gradient, 3.0 * product, 1e-8)
    assert penalty(model) == 0.0


def test_penalty_takes_names_and_stays_where_the_anchor_was():
    given = problem("frozen")
    model, before = given.case.model, given.case.model
    matrix = TABLE["kfac"].of_user(given)
    penalty = ewc_penalty(matrix, dict(model.named_parameters()))
    other = moved(model, 2)
    assert penalty(dict(other.named_parameters())) == penalty(other) > 0
    assert set(penalty.anchor) == set(dense.parameters(before))


def test_the_hessian_of_the_penalty_is_the_matrix():
    given = problem("mlp")
    matrix, names = TABLE["kfac"].of_user(given), dense.parameters(given.case.model)
    penalty, layout = ewc_penalty(matrix, given.case.model), matrix.layout
    at = flat(moved(given.case.model, 1))
    hessian = torch.autograd.functional.hessian(lambda v: penalty(layout.to_dict(v)), at)
    assert set(layout.names) == set(names)
    assert_same(hessian, matrix.to_dense())


def test_other_parameters_are_refused_by_name():
    matrix = TABLE["diagonal"].of_user(problem("mlp"))
    with pytest.raises(ValueError, match=r"'0.weight' of shape .* has one of shape \(9, 9\)"):
        ewc_penalty(matrix, nn.Sequential(nn.Linear(9, 9)))
    with pytest.raises(ValueError, match="the model has none"):
        ewc_penalty(matrix, nn.Linear(2, 2))


# -- linear regression: two tasks one after the other, or merged, are both at once -----------------


def task(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randn(samples, n, generator=g, dtype=torch.float64) for n in (3, 2)]
    return draw[0], draw[1]


def fitted(x: Tensor, y: Tensor) -> Tensor:
    """Return θ (2, 4), weight and bias, of least squares."""
    a = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    return torch.linalg.solve(a.T @ a, a.T @ y).T


def linear(theta: Tensor) -> nn.Module:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(theta[:, :3])
        model.bias.copy_(theta[:, 3])
    return model


def both(first: tuple, second: tuple) -> Tensor:
    return fitted(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))


def test_a_second_task_with_the_penalty_is_both_tasks_at_once():
    first, second = task(0, 30), task(1, 20)
    model = linear(fitted(*first))
    matrix = natgrad.fisher_matrix(model, first, "gaussian", "full")
    penalty, model = ewc_penalty(matrix, model), linear(fitted(*second))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-13, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (model(second[0]) - second[1]).square().sum() / 2 + 30 * penalty(model)
        value.backward()
        return value

    optimizer.step(loss)
    theta = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach()
    assert_same(theta, both(first, second), 1e-8)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "kfac"])
def test_merged_regressions_are_the_regression_on_all_data(structure):
    """One layer: the block is B ⊗ A with B the identity, so K-FAC is exact, too."""
    first, second = task(0, 30), task(1, 20)
    models = [linear(fitted(*one)) for one in (first, second)]
    matrices = [
        natgrad.fisher_matrix(m, one, "gaussian", structure)
        for m, one in zip(models, (first, second), strict=True)
    ]
    found = merge(models, matrices, [30, 20], damping=0.0, tolerance=1e-12)
    theta = torch.cat([found.weight, found.bias.unsqueeze(1)], 1).detach()
    assert_same(theta, both(first, second))


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [n for n in STRUCTURES if TABLE[n].positive])
def test_merged_parameters_solve_the_dense_system(structure):
    entry, given = TABLE[structure], problem("mlp")
    model = given.case.model
    models = [moved(model, seed) for seed in (1, 2, 3)]
    weights, damping = [2.0, 1.0, 3.0], 0.01
    matrices = [entry.matrix(m, (given.case.x, given.target)) for m in models]
    found = merge(models, matrices, weights, damping=damping, tolerance=1e-13, max_iterations=9999)
    eye = torch.eye(given.size).double()
    precise = [w * (f.to_dense() + damping * eye) for w, f in zip(weights, matrices, strict=True)]
    right = sum(a @ flat(m) for a, m in zip(precise, models, strict=True))
    assert_same(flat(found), torch.linalg.solve(sum(precise), right), 1e-8)


def test_diagonals_average_entry_by_entry_in_one_iteration():
    given = problem("mlp")
    models = [moved(given.case.model, seed) for seed in (1, 2)]
    a, b = (natgrad.fisher_matrix(m, (given.case.x, None), structure="diagonal") for m in models)
    found = merge(models, [a, b], damping=0.0, max_iterations=1)
    f, g = a.diagonal(), b.diagonal()
    assert_same(flat(found), (f * flat(models[0]) + g * flat(models[1])) / (f + g))


def test_mixed_structures_merge_and_heavy_damping_averages():
    given = problem("mlp")
    models = [moved(given.case.model, seed) for seed in (1, 2)]
    matrices = [
        natgrad.fisher_matrix(m, (given.case.x, None), structure=s)
        for m, s in zip(models, ("kfac", "full"), strict=True)
    ]
    mean = (flat(models[0]) + flat(models[1])) / 2
    assert_same(flat(merge(models, matrices, damping=1e12)), mean)
    default = merge(models, matrices, tolerance=1e-12)
    share = 0.1 * float(sum(f.trace() for f in matrices)) / 2 / given.size
    assert_same(flat(default), flat(merge(models, matrices, damping=share, tolerance=1e-12)))
    with pytest.warns(UserWarning, match="raise max_iterations"):
        merge(models, matrices, tolerance=1e-12, max_iterations=2)


def test_running_statistics_are_averaged_and_frozen_parameters_must_agree():
    case = problem("batch_norm_eval").case
    models = [copy.deepcopy(case.model), moved(case.model, 1)]
    name = next(n for n, b in models[0].named_buffers() if n.endswith("running_mean"))
    models[1].get_buffer(name).add_(4.0)
    f = [natgrad.fisher_matrix(m, (case.x, None), structure="diagonal") for m in models]
    merged = merge(models, f, [1.0, 3.0])
    assert_same(merged.get_buffer(name), models[0].get_buffer(name) + 3.0)
    assert merged is not models[0] and not merged.training
    for model in models:
        next(model.parameters()).requires_grad_(False)
    f = [natgrad.fisher_matrix(m, (case.x, None), structure="diagonal") for m in models]
    with pytest.raises(ValueError, match="is in no Fisher matrix and differs"):
        merge(models, f)


def test_numbers_that_do_not_fit_are_refused():
    model = problem("mlp").case.model
    f = TABLE["diagonal"].of_user(problem("mlp"))
    with pytest.raises(ValueError, match="got 2 models, 1 matrices and 2 weights"):
        merge([model, model], [f])
    with pytest.raises(ValueError, match="weights must be at least 0"):
        merge([model, model], [f, f], [1.0, -1.0])
    with pytest.raises(ValueError, match="about the same parameters"):
        merge([model, model], [f, TABLE["diagonal"].of_user(problem("tokens"))])


class Masked(nn.Linear):
    """A layer with buffers: a mask with infinite entries, statistics, a count."""

    def __init__(self, value: float) -> None:
        super().__init__(4, 3)
        self.register_buffer("mask", torch.tensor([0.0, -float("inf"), 0.1]))
        self.register_buffer("mean", torch.full((2,), value))


def test_buffers_alike_stay_and_those_of_weight_zero_do_not_count():
    models = [Masked(1.0), Masked(4.0), Masked(float("nan"))]
    data = (torch.randn(8, 4), torch.arange(8) % 3)
    matrices = [natgrad.fisher_matrix(model, data) for model in models]
    merged = merge(models, matrices, [2.0, 1.0, 0.0])
    assert torch.equal(merged.mask, models[0].mask)
    assert_same(merged.mean.double(), torch.full((2,), 2.0).double())
    merged = merge([m.bfloat16() for m in models[:2]], matrices[:2], [1.0, 2.0])
    assert merged.mean.tolist() == [3.0, 3.0]  # A third is none of this type.


def test_other_buffers_and_infinite_weights_are_refused():
    models = [Masked(1.0), Masked(4.0)]
    matrices = [natgrad.fisher_matrix(m, (torch.randn(8, 4), torch.arange(8) % 3)) for m in models]
    for wrong in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weights must be at least 0, finite"):
            merge(models, matrices, [1.0, wrong])
    models[1].register_buffer("other", torch.zeros(2))
    with pytest.raises(ValueError, match=r"\['other'\] are not of the same shape"):
        merge(models, matrices)


@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_functional_transforms_take_the_penalty(structure):
    given = problem("mlp")
    matrix = TABLE[structure].of_user(given)
    penalty, layout, f = ewc_penalty(matrix, given.case.model), matrix.layout, matrix.to_dense()
    start, at = flat(given.case.model), flat(moved(given.case.model, 1))
    change, direction = at - start, torch.linspace(-1, 1, len(at), dtype=torch.float64)

    def of(vector: Tensor) -> Tensor:
        return penalty(layout.to_dict(vector))

    transforms = torch.func
    assert_same(transforms.grad(of)(at), f @ change, 1e-9)
    assert_same(transforms.hessian(of)(at), f, 1e-9)
    assert_same(transforms.jacrev(transforms.jacrev(of))(at), f, 1e-9)
    assert_same(transforms.jvp(of, (at,), (direction,))[1], direction @ f @ change, 1e-9)
    several = torch.stack([at, start + 1, start])
    values = 0.5 * ((several - start) @ f * (several - start)).sum(1)
    assert_same(transforms.vmap(of)(several), values, 1e-9)
    assert_same(transforms.vmap(of, in_dims=1)(several.T), values, 1e-9)
    gradients = transforms.vmap(transforms.grad(of))(several)
    assert_same(gradients, (several - start) @ f, 1e-9)
