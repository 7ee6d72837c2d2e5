"""Spectra and estimators against all eigenvalues, and against their definitions step by step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import natgrad
from natgrad.layouts import ParameterLayout
from natgrad.operators import DenseOperator
from natgrad.tools import (
    effective_dimension,
    estimate_diagonal,
    estimate_trace,
    spectral_density,
    top_eigenpairs,
)
from tests.curvature.structures_table import TABLE, problem
from tests.dense import assert_same

STRUCTURES = [name for name, entry in TABLE.items() if not entry.stepped]
SYMMETRIC = [n for n in STRUCTURES if not n.startswith("two_level")]


def operator(values: Tensor, seed: int = 0) -> DenseOperator:
    """Return a matrix with some eigenvalues."""
    size = len(values)
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]
    layout = ParameterLayout({"w": (size,)}, torch.float64)
    return DenseOperator(layout, q @ values.double().diag() @ q.T)


def starts(size: int, vectors: int, seed: int) -> Tensor:
    """Return the unit vectors that the density begins with, as rows."""
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, generator=g, dtype=torch.float64) for _ in range(vectors)]
    return torch.stack([v / v.norm() for v in drawn])


# -- Lanczos ---------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(2, 25), st.integers(1, 25), st.integers(0, 100), st.integers(1, 25))
def test_quadrature_is_exact_for_polynomials(size, steps, seed, rank):
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    values[rank:] = 0.0
    matrix = operator(values, seed)
    density = spectral_density(matrix, steps, 2, seed=seed)
    assert_same(density.weights.sum(1), torch.ones(2).double())
    dense, powers = matrix.matrix, torch.eye(size).double()
    own = starts(size, 2, seed)
    for degree in range(2 * min(steps, size)):
        expected = ((own @ powers) * own).sum(1)
        found = (density.weights * density.nodes**degree).sum(1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        powers = powers @ dense


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_steps_give_functions_of_every_structure(structure):
    entry, problem_ = TABLE[structure], problem("mlp")
    matrix = entry.of_user(problem_)
    dense = entry.definition(problem_, matrix)
    density = spectral_density(matrix, 10_000, 3)
    values, vectors = torch.linalg.eigh(dense)
    shares = (starts(problem_.size, 3, 0) @ vectors).square()
    expected = problem_.size * (shares * torch.exp(-values)).sum(1)
    mean, error = density.sum_of(lambda t: torch.exp(-t))
    assert mean == pytest.approx(float(expected.mean()), rel=1e-8)
    assert error == pytest.approx(float(expected.std()) / 3**0.5, rel=1e-5)


def test_sums_are_right_on_average():
    values = torch.logspace(-4, 1, 60).double()
    density = spectral_density(operator(values), 60, 50)
    for function in (torch.sqrt, lambda t: t / (t + 0.01), lambda t: torch.log(t + 0.1)):
        mean, error = density.sum_of(function)
        assert abs(mean - float(function(values).sum())) < 4 * error
    assert math.isnan(spectral_density(operator(values), 5, 1).sum_of(torch.sqrt)[1])


def test_shares_per_decade_integrate_to_the_positive_share():
    values = torch.cat([torch.logspace(-3, 1, 20), torch.zeros(20)]).double()
    density = spectral_density(operator(values), 40, 20)
    decades = torch.linspace(-6, 4, 2001).double()
    found = density.per_decade(10**decades, 0.2)
    positive = (density.weights * (density.nodes > 1e-10)).sum(1).mean()
    assert float(torch.trapezoid(found, decades)) == pytest.approx(float(positive), rel=1e-6)
    assert abs(float(positive) - 0.5) < 0.08
    single = spectral_density(operator(torch.full((5,), 100.0)), 5, 1)
    at = torch.tensor([100.0, 1000.0])
    assert_same(single.per_decade(at, 1.0) * math.sqrt(2 * math.pi),
                torch.tensor([1.0, math.exp(-0.5)], dtype=torch.float64))  # fmt: skip


@pytest.mark.parametrize("structure", SYMMETRIC)
def test_top_eigenpairs_of_every_structure(structure):
    entry, problem_ = TABLE[structure], problem("mlp")
    matrix = entry.of_user(problem_)
    dense = entry.definition(problem_, matrix)
    values, vectors = top_eigenpairs(matrix, 4)
    assert_same(values, torch.linalg.eigvalsh(dense).flip(0)[:4], 1e-8)
    assert_same(dense @ vectors, vectors * values, 1e-7)
    assert_same(vectors.T @ vectors, torch.eye(4).double(), 1e-8)


# -- effective dimension ---------------------------------------------------------------------------


def test_eigenpairs_of_a_matrix_that_is_zero():
    values, vectors = top_eigenpairs(operator(torch.zeros(5)), 2)
    assert not values.any()
    assert_same(vectors.T @ vectors, torch.eye(2).double())


@pytest.mark.parametrize("structure", [n for n in SYMMETRIC if TABLE[n].positive])
def test_effective_dimension_of_every_structure(structure):
    entry, problem_ = TABLE[structure], problem("mlp")
    matrix = entry.of_user(problem_)
    dense = entry.definition(problem_, matrix)
    eye = torch.eye(problem_.size).double()
    dampings = torch.tensor([[1e-3, 0.1], [1.0, 50.0]])
    expected = [[torch.linalg.solve(dense + d * eye, dense).trace() for d in row]
                for row in dampings.double()]  # fmt: skip
    assert_same(effective_dimension(matrix, dampings), torch.tensor(expected).double(), 1e-8)
    assert effective_dimension(matrix, 0.1).shape == ()


def test_effective_dimension_of_a_density():
    values = torch.logspace(-4, 1, 60).double()
    matrix = operator(values)
    density = spectral_density(matrix, 60, 30)
    mean, error = density.sum_of(lambda t: t / (t + 0.01))
    assert float(effective_dimension(density, 0.01)) == pytest.approx(mean, rel=1e-12)
    assert abs(mean - float(effective_dimension(matrix, 0.01))) < 4 * error


def test_in_regression_it_is_the_sum_of_leverages():
    x, y = torch.randn(30, 4).double(), torch.randn(30, 1).double()
    model = torch.nn.Linear(4, 1).double()
    matrix = natgrad.fisher_matrix(model, (x, y), "gaussian", "full")
    a = torch.cat([x, torch.ones(30, 1).double()], 1)
    hat = a @ torch.linalg.inv(a.T @ a + 30 * 0.2 * torch.eye(5).double()) @ a.T
    assert_same(effective_dimension(matrix, 0.2), hat.trace())


# -- estimators ------------------------------------------------------------------------------------


def by_definition(matrix: Tensor, omega: Tensor) -> Tensor:
    """Return XTrace's estimates with a basis of its own for every column left out."""
    size, number = omega.shape
    result = []
    for i in range(number):
        rest = [j for j in range(number) if j != i]
        q = torch.linalg.qr(matrix @ omega[:, rest])[0]
        outside = omega[:, i] - q @ (q.T @ omega[:, i])
        form = (size - number + 1) * (outside @ matrix @ outside) / (outside @ outside)
        result.append((q.T @ matrix @ q).trace() + form)
    return torch.stack(result)


@settings(max_examples=30)
@given(st.integers(6, 30), st.integers(0, 100), st.data())
def test_xtrace_is_its_definition(size, seed, data):
    number = data.draw(st.integers(2, size - 1))
    values = torch.logspace(0, -3, size)
    matrix = operator(values, seed)
    g = torch.Generator().manual_seed(seed)
    omega = torch.randn(size, number, generator=g, dtype=torch.float64)
    expected = by_definition(matrix.matrix, omega)
    mean, error = estimate_trace(matrix, 2 * number, seed=seed)
    assert mean == pytest.approx(float(expected.mean()), rel=1e-8)
    assert error == pytest.approx(float(expected.std()) / number**0.5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("method", ["xtrace", "hutch++", "hutchinson"])
def test_traces_are_right_on_average_and_exact_with_enough_products(method):
    values = torch.linspace(1, 2, 40).double()
    matrix = operator(values)
    found = torch.tensor([estimate_trace(matrix, 12, method, seed=s)[0] for s in range(300)])
    spread = float(found.std()) / 300**0.5
    assert spread > 0 and abs(float(found.mean()) - float(values.sum())) < 4 * spread
    assert estimate_trace(matrix, 80, method) == (pytest.approx(float(values.sum())), 0.0)


@pytest.mark.parametrize("method", ["xtrace", "hutch++"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_traces_of_low_rank_are_exact(method, scale):
    values = torch.zeros(50)
    values[:5] = torch.arange(1.0, 6.0) * scale
    mean, error = estimate_trace(operator(values), 24, method)
    assert mean == pytest.approx(15.0 * scale, rel=1e-10) and error < 1e-8 * scale
    assert estimate_trace(operator(torch.zeros(50)), 24, method) == (0.0, 0.0)


def test_what_decays_is_known_best_by_xtrace():
    values = torch.logspace(0, -20, 200).double()
    matrix, trace = operator(values), float(values.sum())
    errors = {
        method: torch.tensor(
            [estimate_trace(matrix, 60, method, seed=s)[0] - trace for s in range(20)]
        ).square().mean().sqrt()
        for method in ("hutchinson", "hutch++", "xtrace")
    }  # fmt: skip
    assert errors["hutch++"] < errors["hutchinson"] / 10
    assert errors["xtrace"] < errors["hutch++"] / 3


@pytest.mark.parametrize("method", ["diag++", "hutchinson"])
def test_diagonals_are_right_on_average(method):
    values = torch.linspace(1, 2, 20).double()
    matrix = operator(values)
    found = torch.stack([estimate_diagonal(matrix, 9, method, seed=s) for s in range(400)])
    spread = found.std(0) / 400**0.5
    assert bool(((found.mean(0) - matrix.matrix.diagonal()).abs() < 5 * spread).all())


def test_diagonals_of_low_rank_are_exact():
    values = torch.zeros(50)
    values[:5] = torch.arange(1.0, 6.0)
    matrix = operator(values)
    assert_same(estimate_diagonal(matrix, 20), matrix.matrix.diagonal())
    rough = estimate_diagonal(matrix, 20, "hutchinson") - matrix.matrix.diagonal()
    assert rough.norm() > 0.1


def test_inverses_by_products_alone():
    problem_ = problem("mlp")
    matrix = TABLE["full"].of_user(problem_)
    solver = natgrad.solvers.ConjugateGradient(1e-12, 1000)
    inverse = matrix.inverse(0.1, solver)
    exact = torch.linalg.inv(problem_.fisher + 0.1 * torch.eye(problem_.size).double())
    assert_same(
        torch.tensor(estimate_trace(inverse, 1000)[0], dtype=torch.float64), exact.trace(), 1e-8
    )
    mean, error = estimate_trace(inverse, 40)
    assert abs(mean - float(exact.trace())) < 4 * error + 1e-6 * float(exact.trace())


def test_numbers_out_of_range_are_refused():
    matrix = TABLE["kfac"].of_user(problem("mlp"))
    with pytest.raises(ValueError, match="damping must be positive"):
        effective_dimension(matrix, 0.0)
    with pytest.raises(ValueError, match="between 1 and P - 1"):
        top_eigenpairs(matrix, matrix.shape[0])
    with pytest.raises(ValueError, match="steps must be an integer"):
        spectral_density(matrix, 0)
    with pytest.raises(ValueError, match="products must be an integer of at least 4"):
        estimate_trace(matrix, 3)
    with pytest.raises(ValueError, match="method must be 'diag\\+\\+' or 'hutchinson'"):
        estimate_diagonal(matrix, 30, "xtrace")


@pytest.mark.parametrize("function", [torch.log, torch.reciprocal])
def test_nodes_that_are_not_there_have_no_part_in_sums(function):
    """The iteration ends where all eigenvalues are found, after two of twenty steps."""
    values = torch.tensor([5.0] * 3 + [1.0] * 30).double()
    found, _ = spectral_density(operator(values), 20, 400).sum_of(function)
    assert found == pytest.approx(float(function(values).sum()), rel=0.1)
    same, error = spectral_density(operator(torch.full((6,), 2.0)), 20).sum_of(function)
    assert same == pytest.approx(float(6 * function(torch.tensor(2.0).double())))
    assert error < 1e-12


def test_eigenpairs_of_what_has_none_and_of_numbers_that_are_none():
    given = problem("mlp")
    jacobian = natgrad.jacobian_matrix(given.case.model, (given.case.x, None))
    with pytest.raises(ValueError, match="has no eigenvalues"):
        top_eigenpairs(jacobian, 1)
    for wrong in (2.0, None, "2"):
        with pytest.raises(ValueError, match="eigenpairs must be an integer of at least 1"):
            top_eigenpairs(operator(torch.ones(4)), wrong)
