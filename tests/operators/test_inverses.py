"""Inverses are operators like others: every quantity is that of the inverse of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import natgrad
from natgrad import fisher_matrix
from natgrad.curvature import STRUCTURES
from tests import dense
from tests.cases import normal

DAMPING = 0.1
NAMES = sorted(set(STRUCTURES) - {"singd"})
#: Those that put damping on factors invert another matrix than F + λI.
FACTORED = {"kfac", "tkfac", "kpsvd", "kfoc", "two_level"}


@pytest.mark.parametrize("structure", NAMES)
def test_an_inverse_has_all_quantities_of_a_matrix(structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    matrix = fisher_matrix(model, (normal(60, 3), None), "gaussian", structure)
    inverse = matrix.inverse(DAMPING)
    expected = inverse.to_dense()
    if structure not in FACTORED:
        damped = matrix.to_dense() + DAMPING * torch.eye(len(expected)).double()
        dense.assert_same(expected, torch.linalg.inv(damped), 1e-9)
    dense.assert_same(inverse.diagonal(), expected.diagonal(), 1e-9)
    dense.assert_same(inverse.trace(), expected.trace(), 1e-9)
    if structure == "two_level":  # Corrected between layers, which leaves it without symmetry.
        with pytest.raises(NotImplementedError, match="not symmetric"):
            inverse.eigenvalues()
    else:
        values = torch.linalg.eigvalsh(expected)
        dense.assert_same(inverse.eigenvalues().sort().values, values, 1e-9)
    dense.assert_same(inverse.logdet(), torch.logdet(expected), 1e-9)
    if structure not in FACTORED:
        shifted = torch.linalg.inv(expected + 0.5 * torch.eye(len(expected)).double())
        dense.assert_same(inverse.inverse(0.5).to_dense(), shifted, 1e-8)
        dense.assert_same(inverse.inverse(0.0).to_dense(), damped, 1e-8)


@pytest.mark.parametrize("structure", sorted(set(NAMES) - {"two_level"}))
@pytest.mark.parametrize("samples", [6, 60])
@pytest.mark.parametrize("made", ["pseudo_inverse", "root"])
def test_pseudo_inverses_and_roots_have_them_too(structure: str, samples: int, made: str) -> None:
    """Of few samples the matrix is singular."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2)]
    model = nn.Sequential(*layers).double()
    matrix = fisher_matrix(model, (normal(samples, 3), None), "gaussian", structure)
    indefinite = structure == "block_tridiagonal"
    if made == "root" and indefinite:
        with pytest.raises(natgrad.linalg.FactorizationError, match="not positive definite"):
            matrix.inverse_root(DAMPING)
        return
    found = matrix.inverse(0.0) if made == "pseudo_inverse" else matrix.inverse_root(DAMPING)
    expected = found.to_dense()
    dense.assert_same(found.diagonal(), expected.diagonal(), 1e-9)
    dense.assert_same(found.trace(), expected.trace(), 1e-9)
    values = torch.linalg.eigvalsh(expected)
    dense.assert_same(found.eigenvalues().sort().values, values, 1e-9)
    columns = normal(len(expected), 2, seed=2)
    dense.assert_same(found @ columns, expected @ columns, 1e-9)
    if structure in FACTORED:
        return
    shifted = torch.linalg.inv(expected + 0.5 * torch.eye(len(expected)).double())
    dense.assert_same(found.inverse(0.5).to_dense(), shifted, 1e-8)
    if indefinite:
        with pytest.raises(natgrad.linalg.FactorizationError, match="not positive definite"):
            found.inverse_root(1e-9)
    else:
        root = found.inverse_root(0.5).to_dense()
        dense.assert_same(root @ root, shifted, 1e-8)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "diagonal", "ekfac"])
def test_roots_of_multiples(structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    matrix = fisher_matrix(model, (normal(60, 3), None), "gaussian", structure)
    eye = torch.eye(matrix.shape[0]).double()
    for factor, damping in ((3.0, 0.1), (1e-3, 1e-4), (-0.5, 10.0)):
        found = (factor * matrix).inverse_root(damping).to_dense()
        expected = torch.linalg.inv(factor * matrix.to_dense() + damping * eye)
        dense.assert_same(found @ found, expected, 1e-9)
    with pytest.raises(natgrad.linalg.FactorizationError, match="not positive definite"):
        (-1.0 * matrix).inverse_root(1e-3)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block_diagonal"])
def test_roots_of_differences(structure: str) -> None:
    """Of matrices whose structured forms do not add, so that their sum is kept as one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = normal(60, 3)
    first, second = (
        fisher_matrix(model, (part, None), "gaussian", structure) for part in x.split(30)
    )
    difference = first + -1.0 * second
    eye = torch.eye(difference.shape[0]).double()
    found = difference.inverse_root(10.0).to_dense()
    dense.assert_same(found @ found, torch.linalg.inv(difference.to_dense() + 10.0 * eye), 1e-9)
