"""Fisher matrices as values: sums, multiples, and inverses that are factorised once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from natgrad import Capture, fisher_matrix, linalg
from natgrad.operators import FisherMatrix, GradientSource
from natgrad.solvers import ConjugateGradient, TruncatedEigh
from tests import dense
from tests.cases import generator, normal
from tests.methods import curvature_of

STRUCTURES = [
    "full", "block_diagonal", "unit_wise", "diagonal", "kfac", "ekfac", "tkfac", "tekfac", "kpsvd",
    "kfoc", "two_level",
]  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


def matrices(
    structure: str, samples: int = 20, **options: str
) -> tuple[FisherMatrix, FisherMatrix]:
    """Return the matrices of one network on two batches."""
    model, found = network(), []
    for seed in range(2):
        y = torch.randint(0, 3, (samples,), generator=generator(seed))
        data = (normal(samples, 4, seed=seed), y)
        found.append(fisher_matrix(model, data, structure=structure, **options))
    return found[0], found[1]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_inverses_are_factorised_once(structure, monkeypatch):
    options = {"coarse_space": "nicolaides"} if structure == "two_level" else {}
    first, _ = matrices(structure, **options)
    calls: Counter[str] = Counter()
    for name in ("cholesky", "eigh", "inverse"):
        real = getattr(linalg, name)

        def counted(*args, name=name, real=real):
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(linalg, name, counted)
    inverse = first.inverse(0.1)
    columns = normal(first.shape[0], 2, seed=3)
    results = [inverse @ columns]  # A coarse level follows on its first use.
    after = dict(calls)
    assert structure in ("diagonal", "ekfac", "tekfac") or after  # These have their basis.
    results += [inverse @ columns for _ in range(2)]
    assert calls == after
    if structure != "two_level":  # Whose corrected inverse is that of no matrix.
        dense.assert_same(first.to_dense() @ results[0] + 0.1 * results[0], columns, 1e-8)
    assert torch.equal(results[0], results[2])


def test_layers_of_one_shape_are_factorised_together(monkeypatch):
    """K-FAC's factors: (5, 5) and (4, 4) twice, (5, 5) and (3, 3) once."""
    with Capture(network()) as capture:
        curvature = curvature_of("kfac", capture, training=True)
        x = normal(20, 4)
        rows = capture.pull_back(capture.model(x), normal(3, 20, 3, seed=1))
        curvature.update(rows, 20.0)
    shapes = []
    real = linalg.inverse
    monkeypatch.setattr(linalg, "inverse", lambda x: shapes.append(tuple(x.shape)) or real(x))
    curvature.refresh(0.1)
    assert sorted(shapes) == [(1, 3, 3), (2, 1, 4, 4), (3, 1, 5, 5)]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.left(x) + self.right(x) if both else self.left(x)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "diagonal", "unit_wise", "kpsvd"])
def test_a_layer_that_a_batch_leaves_out_keeps_its_average(structure):
    torch.manual_seed(0)
    model = Branches()
    with Capture(model) as capture:
        curvature = curvature_of(structure, capture)
        for both in (True, False):
            capture.clear()
            output = model(normal(6, 3, seed=int(both)), both)
            rows = capture.pull_back(output, normal(2, 6, 2, seed=2))
            curvature.observe(rows, 6.0)
            curvature.join(0.5)
            if both:
                before = curvature.matrix()
        after = curvature.matrix()
    assert torch.equal(before.parts["right"].to_dense(), after.parts["right"].to_dense())
    assert not torch.equal(before.parts["left"].to_dense(), after.parts["left"].to_dense())


@pytest.mark.parametrize("structure", ["block_diagonal", "kfac", "ekfac", "tkfac", "diagonal"])
def test_batches_without_rows_count_in_matrix_and_inverse_alike(structure):
    """A sum over batches is a mean over all of them, whichever layers some leave out."""
    torch.manual_seed(0)
    model = Branches()
    with Capture(model) as capture:
        curvature = curvature_of(structure, capture)
        for both in (True, False):
            capture.clear()
            output = model(normal(6, 3, seed=int(both)), both)
            curvature.update(capture.pull_back(output, normal(2, 6, 2, seed=2)), 6.0)
    curvature.refresh(0.1)
    gradients = {name: normal(*p.shape) for name, p in model.named_parameters()}
    found = curvature.natural_gradient(GradientSource(gradients))
    for name, value in curvature.matrix().solve(gradients, 0.1).items():
        dense.assert_same(found[name], value)


@pytest.mark.parametrize("solver", ["eigh", TruncatedEigh(1e-10), ConjugateGradient(1e-12, 200)])
@pytest.mark.parametrize("structure", ["full", "kfac", "diagonal"])
def test_any_structure_takes_any_solver(structure, solver):
    first, _ = matrices(structure)
    columns = first @ normal(first.shape[0], 2, seed=3)
    expected = first.inverse(0.1) @ columns
    dense.assert_same(first.inverse(0.1, solver) @ columns, expected, 1e-7)


def test_natural_gradients_come_from_inverses():
    model = network()
    x, y = normal(6, 4), torch.randint(0, 3, (6,), generator=generator())
    matrix = fisher_matrix(model, (x, y))
    functional.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, part in matrix.inverse(0.1).parts.items():
        own = {n: gradients[n] for n in part.layout.names}
        found = part.natural_gradient(GradientSource(own))
        expected = matrix.solve(gradients, 0.1)
        for parameter, value in found.items():
            dense.assert_same(value, expected[parameter])
        assert {n.rpartition(".")[0] for n in found} == {name}
