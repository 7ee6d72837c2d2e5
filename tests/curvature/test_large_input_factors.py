"""Factors of many inputs, which are kept as their diagonals about the mean, against dense ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import KFAC, Refresh, fisher_matrix
from natgrad.curvature import KroneckerFactors
from natgrad.operators import KroneckerOperator
from tests.cases import labels, normal

SHARINGS = ["expand", "reduce", "split"]


class Pooled(nn.Module):
    """A layer at every position, and the mean of what follows."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 4, bias=bias), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.last(torch.tanh(self.first(x)).mean(1))
        return pooled


def factors(limit: int | None, sharing: str = "expand") -> KroneckerFactors:
    return KroneckerFactors(
        factored_damping=True, max_factor_size=limit, weight_sharing=sharing, rows_per_unit=None
    )


def about_mean(moment: Tensor, mean: Tensor) -> Tensor:
    """Return ``μμᵀ + diag(E[a²] − μ²)``."""
    outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
    rest = (moment - outer).diagonal(dim1=-2, dim2=-1)
    return outer + torch.diag_embed(rest)


def operators(model: nn.Module, x: Tensor, sharing: str) -> list[KroneckerOperator]:
    """Return those of the first layer with a limit of 6 and without."""
    y = labels(len(x), 3, 0)
    found = [
        fisher_matrix(model, (x, y), "categorical", factors(limit, sharing)) for limit in (6, None)
    ]
    both = [next(iter(matrix.parts.values())) for matrix in found]
    assert all(isinstance(one, KroneckerOperator) for one in both)
    return both


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_factor_is_its_diagonal_about_the_mean(sharing, bias, positions):
    torch.manual_seed(0)
    model, x = Pooled(bias).double(), normal(6, positions, 7) + 0.7
    found, whole = operators(model, x, sharing)
    a = x if sharing == "expand" else x.mean(1, keepdim=True)
    a = functional.pad(a, (0, 1), value=1.0) if bias else a
    rows = a.flatten(0, 1)
    expected = about_mean(rows.T @ rows / len(rows), rows.mean(0))
    torch.testing.assert_close(found.factors[0][0], expected)
    torch.testing.assert_close(found.factors[1], whole.factors[1])
    torch.testing.assert_close(found.trace(), whole.trace())
    torch.testing.assert_close(found.diagonal(), whole.diagonal())
    dense = torch.kron(whole.factors[1][0], expected)
    product = found.multiply(normal(dense.shape[0], 3, seed=4))
    order = found.layout.flat(torch.arange(len(dense)).view(1, 1, 4, -1)).flatten()
    torch.testing.assert_close(product, dense[order][:, order] @ normal(len(dense), 3, seed=4))


@pytest.mark.parametrize("damping", [1e-3, 0.3])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_its_inverse_is_that_of_the_damped_factors(sharing, damping):
    torch.manual_seed(1)
    found, _ = operators(Pooled(True).double(), normal(5, 4, 7) + 0.4, sharing)
    a, b = (factor[0] for factor in found.factors)
    pi = math.sqrt((a.diagonal().mean() / b.diagonal().mean()).item())
    root = math.sqrt(damping)
    inverse = found.direct_inverse(damping)
    assert isinstance(inverse, KroneckerOperator)
    expected = [
        torch.linalg.inv(a + root * pi * torch.eye(len(a)).double()),
        torch.linalg.inv(b + root / pi * torch.eye(len(b)).double()),
    ]
    for one, other in zip(inverse.factors, expected, strict=True):
        torch.testing.assert_close(one[0], other)
    column = normal(len(a) * len(b), 2)
    back = inverse.layout.matrix(inverse.multiply(column).T)[:, 0]
    matrices = inverse.layout.matrix(column.T)[:, 0]
    torch.testing.assert_close(back, expected[1] @ matrices @ expected[0])
    torch.testing.assert_close(inverse.diagonal(), inverse.to_dense().diagonal())


def test_means_and_deviations_are_merged_as_dense_ones_are():
    """``A = Σ v_i A_i``, each about its own mean."""
    torch.manual_seed(2)
    model, x = Pooled(True).double(), normal(6, 5, 7) + 0.5
    found, whole = operators(model, x, "split")
    torch.testing.assert_close(found.factors[1], whole.factors[1])
    torch.testing.assert_close(found.trace(), whole.trace())
    torch.testing.assert_close(found.inputs[0], whole.factors[0][0].diagonal())
    # Deviations have no mean; that of means is the last column, where the bias sees 1.
    mean = functional.pad(x.mean((0, 1)), (0, 1), value=1.0)
    weight = whole.factors[0][0, -1, -1]
    expected = whole.factors[0][0].diagonal().diag_embed()
    off = 1.0 - torch.eye(8).double()
    torch.testing.assert_close(
        found.factors[0][0], expected + off * weight * torch.outer(mean, mean)
    )


def test_groups_have_means_of_their_own():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)).double()
    found, whole = operators(model, normal(5, 6, 6) + 1.0, "expand")
    dense = whole.factors[0]
    torch.testing.assert_close(found.factors[0], about_mean(dense, dense[..., -1]))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_batches_add_up_and_average(sharing):
    """After two updates A is about the mean of both batches."""
    torch.manual_seed(4)
    model, data = Pooled(True).double(), [normal(6, 5, 7, seed=s) + s for s in (1, 2)]
    optimizer = KFAC(
        model, structure=factors(6, sharing), fisher="exact", lr=0.0, momentum=0.0,
        refresh=Refresh(factors=1, inverses=1, decay=0.6),
    )  # fmt: skip
    for x in data:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels(len(x), 3, 0)).backward()
        optimizer.step()
    curvature = optimizer.preconditioner.curvature
    found = curvature.matrix().parts["first"]
    mean = sum(w * x.mean((0, 1)) for w, x in zip((0.6, 1.0), data, strict=True)) / 1.6
    mean = functional.pad(mean, (0, 1), value=1.0)
    a = found.factors[0][0]
    off = 1.0 - torch.eye(8).double()
    torch.testing.assert_close(off * a, off * a[-1, -1] * torch.outer(mean, mean))
    saved = copy.deepcopy(optimizer.state_dict())
    again = KFAC(
        copy.deepcopy(model), structure=factors(6, sharing), fisher="exact", lr=0.0, momentum=0.0,
        refresh=Refresh(factors=1, inverses=1, decay=0.6),
    )  # fmt: skip
    again.load_state_dict(saved)
    restored = again.preconditioner.curvature.matrix().parts["first"]
    assert all(torch.equal(x, y) for x, y in zip(restored.factors, found.factors, strict=True))


def test_two_uses_of_a_layer_have_one_mean():
    """That of the inputs of both."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(7, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.tanh(self.first(torch.sigmoid(self.first(x)))))
            return out

    torch.manual_seed(6)
    model, x = Twice().double(), normal(6, 7) + 0.5
    found, _ = operators(model, x, "expand")
    with torch.no_grad():
        rows = torch.cat([x, torch.sigmoid(model.first(x))])
    rows = functional.pad(rows, (0, 1), value=1.0)
    expected = about_mean(rows.T @ rows / len(rows), rows.mean(0))
    torch.testing.assert_close(found.factors[0][0], expected)


def test_matrices_as_objects_keep_the_diagonal_alone():
    """Their inverse is exact, by eigenvectors."""
    torch.manual_seed(5)
    model, x = Pooled(True).double(), normal(6, 5, 7) + 0.5
    structure = KroneckerFactors(factored_damping=False, max_factor_size=6)
    matrix = fisher_matrix(model, (x, labels(6, 3, 0)), "categorical", structure)
    a = next(iter(matrix.parts.values())).factors[0]
    assert a.shape == (1, 8)


@pytest.mark.parametrize("method", [natgrad.KFAC, natgrad.EKFAC, natgrad.TKFAC, natgrad.SINGD])
def test_layers_of_many_inputs_that_share_their_mean_train(method):
    """Units that are never negative, which a diagonal takes for independent."""
    torch.manual_seed(0)
    x = normal(256, 60).abs()
    y = (x[:, :5] - x[:, 5:10]).argmax(1)
    model = nn.Sequential(nn.Linear(60, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    structure = natgrad.curvature.as_structure(method.method.structure)
    optimizer = method(model, structure=type(structure)(max_factor_size=40))
    losses = []
    for step in range(40):
        some = slice(64 * (step % 4), 64 * (step % 4) + 64)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[some]), y[some])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
