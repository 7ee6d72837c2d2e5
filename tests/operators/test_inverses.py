"""Inverses are operators like others: every quantity is that of the inverse of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
    values = torch.linalg.eigvalsh(expected)
    dense.assert_same(inverse.eigenvalues().sort().values, values, 1e-9)
    dense.assert_same(inverse.logdet(), torch.logdet(expected), 1e-9)
    if structure not in FACTORED:
        shifted = torch.linalg.inv(expected + 0.5 * torch.eye(len(expected)).double())
        dense.assert_same(inverse.inverse(0.5).to_dense(), shifted, 1e-8)
        dense.assert_same(inverse.inverse(0.0).to_dense(), damped, 1e-8)
