"""How each structure's step moves the outputs, against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natgrad import Capture
from natgrad.jacobians import Jacobians
from natgrad.likelihoods import Gaussian
from natgrad.operators import FisherMatrix
from tests import dense
from tests.cases import CASES, Case, normal
from tests.methods import curvature_of

STRUCTURES = ["full", "block_diagonal", "block_tridiagonal", "unit_wise", "diagonal", "kfac"]


def unit_vectors(output: Tensor) -> Tensor:
    return Gaussian().root_vectors(output.detach())


def pulled_back(case: Case, x=None) -> tuple[Capture, Jacobians]:
    capture = Capture(case.model, case.output)
    dense.call(case.model, case.x if x is None else x, case.output)
    output = capture.passes[-1].output
    return capture, capture.pull_back(output, unit_vectors(output))


def built(structure: str, capture: Capture, rows: Jacobians, **options) -> FisherMatrix:
    curvature = curvature_of(structure, capture, **options)
    curvature.update(rows, rows.samples)
    return curvature.matrix()


def expected(matrix: FisherMatrix, rows: Jacobians, other: Jacobians, inverse: Tensor) -> dict:
    left, right = other.to_dense(), rows.to_dense()
    moved = inverse @ right.T
    result = {}
    for name in rows:
        keep = torch.zeros(matrix.shape[0], 1, dtype=torch.float64)
        for segment in matrix.layout.slices(rows[name].layout):
            keep[segment] = 1.0
        result[name] = left @ (keep * moved)
    return result


def assert_map(matrix, rows, other, damping, inverse, tolerance=1e-8):
    found = matrix.function_space_map(rows, other, damping)
    wanted = expected(matrix, rows, rows if other is None else other, inverse)
    assert set(found) == set(wanted)
    scale = sum(wanted.values()).abs().max()
    for name, value in wanted.items():
        error = (found[name] - value).abs().max() / scale
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "unit_wise", "kfac"])
@pytest.mark.parametrize("name", ["mlp", "mlp_without_bias", "tokens", "conv2d", "layer_norm"])
def test_map_without_damping_is_that_of_the_pseudo_inverse(name, structure):
    case = CASES[name]()
    capture, rows = pulled_back(case)
    with capture:
        matrix = built(structure, capture, rows)
        inverse = torch.linalg.pinv(matrix.to_dense(), rtol=1e-11, hermitian=True)
        assert_map(matrix, rows, None, 0.0, inverse, 1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_map_to_other_inputs_of_a_wide_network(structure, damping):
    """Fewer rows than inputs of every layer, so that unit-wise and exact work in sample space."""
    torch.manual_seed(1)
    layers = [torch.nn.Linear(9, 20), torch.nn.ReLU(), torch.nn.Linear(20, 20), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(20, 2)).double()
    case = Case(model, normal(4, 9), ())
    capture, rows = pulled_back(case)
    capture.clear()
    model(normal(3, 9, seed=5))
    output = capture.passes[-1].output
    other = capture.pull_back(output, unit_vectors(output))
    options = {"factored_damping": True} if structure == "kfac" else {}
    with capture:
        matrix = built(structure, capture, rows, **options)
        found = matrix.function_space_map(rows, other, damping)
        columns = rows.to_dense().T
        moved = matrix.solve(columns, damping)
        dense.assert_same(sum(found.values()), other.to_dense() @ moved, 1e-6)


def test_unit_wise_with_silent_samples_and_low_rank_inputs():
    """Dead units, duplicate samples (a singular Gram) and no damping: still the pseudo-inverse."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 5, bias=False), torch.nn.ReLU(), torch.nn.Linear(5, 1, bias=False)
    ).double()
    with torch.no_grad():
        model[0].weight[0] = -10.0
    x = normal(4, 6).abs()
    x[3] = x[0]
    capture, rows = pulled_back(Case(model, x, ()))
    with capture:
        matrix = built("unit_wise", capture, rows)
        inverse = torch.linalg.pinv(matrix.to_dense(), rtol=1e-11, hermitian=True)
        assert_map(matrix, rows, None, 0.0, inverse, 1e-6)
        assert float(rows["0"].output_gradients.abs().sum((0, 1, 2, 3))[0]) == 0.0


def test_bad_damping_and_memory_are_refused(monkeypatch):
    case = CASES["mlp"]()
    capture, rows = pulled_back(case)
    with capture:
        matrix = built("full", capture, rows)
        with pytest.raises(ValueError, match="damping"):
            matrix.function_space_map(rows, None, -1.0)
        monkeypatch.setattr("os.sysconf", lambda name: 1)
        monkeypatch.setattr(type(rows), "rows", 2**20)
        with pytest.raises(ValueError, match="GiB"):
            matrix.function_space_map(rows)
