"""``J_n F J_nᵀ`` of single samples, as predictive covariances need it: without what is between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from natgrad import Capture, Laplace, fisher_matrix
from natgrad.capture.evaluation import output_rows
from natgrad.curvature import STRUCTURES, TwoLevelKronecker
from natgrad.operators import operator
from tests import dense
from tests.cases import CASES, normal

NAMES = sorted(set(STRUCTURES) - {"singd"})
MODELS = ("mlp", "conv2d", "embedding", "layer_norm", "tied_linear", "bilinear")


@pytest.mark.parametrize("structure", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_forms_are_the_dense_ones(name, structure, monkeypatch):
    """Of all columns at once, of some, or one by one."""
    case = CASES[name]()
    data = (case.x, case.target("gaussian"))
    inverse = fisher_matrix(case.model, data, "gaussian", structure, output=case.output).inverse(
        0.3
    )
    with Capture(case.model, case.output) as capture:
        _, rows = output_rows(capture, case.x)
    _, jacobian = dense.jacobian(case.model, case.x, case.output)
    jacobian = jacobian.flatten(1, -2)
    columns = jacobian.flatten(0, 1).T.contiguous()
    products = (inverse @ columns).T.reshape(jacobian.shape)
    expected = jacobian @ products.mT
    for chunk in (2**25, 40, 1):
        monkeypatch.setattr(operator, "CHUNK_ELEMENTS", chunk)
        dense.assert_same(inverse.sample_forms(rows), expected, 1e-9)
        variances = inverse.sample_forms(rows, diagonal=True)
        dense.assert_same(variances, expected.diagonal(dim1=1, dim2=2), 1e-9)


@pytest.mark.parametrize("structure", ["kfac", "diagonal", TwoLevelKronecker()])
@pytest.mark.parametrize("factor", [None, 2.0])
def test_forms_of_the_matrix_itself_and_of_multiples(structure, factor):
    case = CASES["mlp"]()
    matrix = fisher_matrix(case.model, (case.x, None), "gaussian", structure)
    matrix = matrix if factor is None else factor * matrix
    with Capture(case.model) as capture:
        _, rows = output_rows(capture, case.x)
    jacobian = rows.to_dense().unflatten(0, (rows.samples, -1))
    expected = jacobian @ matrix.to_dense() @ jacobian.mT
    dense.assert_same(matrix.sample_forms(rows), expected, 1e-12)


class Largest(TorchDispatchMode):
    """Sees the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [one.untyped_storage().nbytes() // one.element_size()
                 for one in tree_leaves(result) if isinstance(one, Tensor)]  # fmt: skip
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_many_classes_take_the_memory_of_their_covariances(structure):
    torch.manual_seed(0)
    samples, classes = 20, 50
    model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, classes)).double()
    x, y = normal(samples, 8), torch.arange(samples)
    posterior = Laplace(
        model, (x, y), "categorical", structure, parameters="last_layer", fisher="mc"
    )
    with Largest() as seen:
        posterior.functional_variance(x)
    assert seen.numel == samples * classes**2
    with Largest() as seen:
        posterior.predict(x)
    assert seen.numel < samples * classes**2
