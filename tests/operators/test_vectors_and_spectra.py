"""Vectors of any floating type, singular matrices, parameters without entries: every structure."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import Capture, fisher_matrix
from natgrad.capture.evaluation import output_rows
from natgrad.curvature import STRUCTURES
from natgrad.operators import FisherMatrix
from natgrad.solvers import TruncatedEigh
from tests import dense
from tests.cases import generator, normal

NAMES = sorted(set(STRUCTURES) - {"singd"})
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SOLVERS = ("direct", "eigh", "conjugate_gradient", "thermodynamic", TruncatedEigh(1e-3))


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def applied(matrix: FisherMatrix, vector: Tensor) -> list[Tensor]:
    """Return the products with a vector, as one, as columns and as a dict, as float64 vectors."""
    columns = matrix @ torch.stack([vector, -vector], 1)
    by_name = matrix @ dict(matrix.layout.to_dict(vector))
    found = [matrix @ vector, columns[:, 0], -columns[:, 1], matrix.layout.to_flat(by_name)]
    assert {one.dtype for one in found} == {vector.dtype}
    return [one.double() for one in found]


@pytest.mark.parametrize("structure", NAMES)
@pytest.mark.parametrize("dtype", TYPES)
def test_vectors_come_back_in_their_own_type(structure, dtype):
    model, x = network(dtype), normal(8, 5).to(dtype)
    matrix = fisher_matrix(model, (x, None), structure=structure)
    expected = matrix.to_dense().double()
    shifted = expected + 0.1 * torch.eye(len(expected)).double()
    for other in TYPES:
        vector = torch.randn(len(expected), generator=generator(1)).to(other)
        precision = max(torch.finfo(other).eps, torch.finfo(matrix.dtype).eps)
        for found in applied(matrix, vector):
            dense.assert_same(found, expected @ vector.double(), 4 * precision)
        found = matrix.solve(vector, 0.1)
        assert found.dtype == other
        if structure != "two_level":  # Its inverse has a coarse correction.
            solution = torch.linalg.solve(shifted, vector.double())
            dense.assert_same(found.double(), solution, 50 * precision)


@pytest.mark.parametrize("structure", NAMES)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_inverses_by_every_solver_take_vectors_of_any_type(structure, solver):
    matrix = fisher_matrix(network(), (normal(8, 5), None), structure=structure)
    inverse = matrix.inverse(0.1, solver)
    vector = torch.randn(matrix.shape[0], generator=generator(1), dtype=torch.float64)
    expected = inverse @ vector.bfloat16().double()
    for found in applied(inverse, vector.bfloat16()):
        dense.assert_same(found, expected, 0.01)
    assert (inverse @ vector.float()).dtype == torch.float32


@pytest.mark.parametrize("structure", NAMES)
def test_a_default_of_double_precision_changes_nothing(structure):
    model, x = network(torch.float32), normal(8, 5).float()
    expected = fisher_matrix(model, (x, None), structure=structure)
    vector = torch.randn(expected.shape[0], generator=generator(1))
    torch.set_default_dtype(torch.float64)
    try:
        matrix = fisher_matrix(model, (x, None), structure=structure)
        found = [matrix.to_dense(), matrix.solve(vector, 0.1), matrix.logdet(0.1)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {one.dtype for one in found} == {torch.float32}
    wanted = [expected.to_dense(), expected.solve(vector, 0.1), expected.logdet(0.1)]
    for one, other in zip(found, wanted, strict=True):
        dense.assert_same(one.double(), other.double(), 1e-6)


def few_samples() -> tuple[nn.Module, Tensor]:
    return network(), normal(2, 5)


def deep_linear() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)  # Gradients at the first layer's outputs have rank 3 of 4.
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double(), normal(40, 5)


def dead_unit() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0.0, -1.0
    return model, normal(60, 3)


def zero_input() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = normal(60, 3)
    x[:, 0] = 0.0
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), x


def regular() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(60, 3)


@pytest.mark.parametrize("structure", NAMES)
def test_determinants_and_norms_are_those_of_the_dense_matrix(structure):
    model, x = regular()
    matrix = fisher_matrix(model, (x, None), "gaussian", structure)
    for one in (matrix, -2.0 * matrix, matrix + 0.5 * matrix, matrix.inverse(0.1)):
        expected = one.to_dense()
        assert float(one.frobenius_norm()) == pytest.approx(float(expected.norm()), rel=1e-9)
        for damping in (0.0, 0.3):
            damped = expected + damping * torch.eye(len(expected)).double()
            assert float(one.det(damping)) == pytest.approx(float(damped.det()), rel=1e-8)


@pytest.mark.parametrize("structure", NAMES)
@pytest.mark.parametrize("problem", [few_samples, deep_linear, dead_unit, zero_input, regular])
def test_the_determinant_of_a_singular_matrix_is_zero(structure, problem):
    model, x = problem()
    matrix = fisher_matrix(model, (x, None), "gaussian", structure)
    expected = matrix.to_dense()
    singular = int(torch.linalg.matrix_rank(expected, hermitian=True)) < len(expected)
    if problem is regular:
        assert not singular
    elif structure not in ("diagonal", "unit_wise"):
        # Inputs have full rank where gradients have not.
        assert singular is not (structure == "foof" and problem is deep_linear)
    for factor in (1.0, 1e-3):
        found = float((factor * matrix).logdet())
        if singular:
            assert found == -math.inf
        else:
            assert found == pytest.approx(float(torch.logdet(factor * expected)), rel=1e-8)
    damped = expected + 0.1 * torch.eye(len(expected)).double()
    dense.assert_same(matrix.logdet(0.1), torch.logdet(damped), 1e-9)


class Hollow(nn.Module):
    """A network some of whose parameters have no entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.shift = nn.Linear(0, 4)
        self.nothing = nn.Linear(4, 0)
        self.unused = nn.Parameter(torch.zeros(0, 5))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) + self.shift(x[:, :0]))
        return self.last(h) + self.nothing(h).sum(1, keepdim=True)


class Filled(nn.Module):
    """The same network without them."""

    def __init__(self, hollow: Hollow) -> None:
        super().__init__()
        self.first, self.last = hollow.first, hollow.last
        self.shift = nn.Parameter(hollow.shift.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.shift))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("structure", NAMES)
def test_parameters_without_entries_harm_nothing(structure):
    torch.manual_seed(0)
    model = Hollow().double()
    matrix = fisher_matrix(model, (normal(6, 3), None), "gaussian", structure)
    named = {n: p.detach() for n, p in model.named_parameters()}
    dense.assert_same(matrix @ matrix.layout.to_flat(named), matrix.to_dense() @ torch.cat(
        [p.flatten() for p in named.values()]
    ))  # fmt: skip
    assert {n: v.shape for n, v in matrix.solve(named, 0.1).items()} == {
        n: p.shape for n, p in named.items()
    }
    dense.assert_same(matrix.diagonal(), matrix.to_dense().diagonal())
    if structure in ("full", "block_diagonal", "diagonal"):
        filled = Filled(model)
        other = fisher_matrix(filled, (normal(6, 3), None), "gaussian", structure).to_dense()
        places, start = {}, 0
        for name, parameter in filled.named_parameters():
            places[name] = torch.arange(start, start + parameter.numel())
            start += parameter.numel()
        own = [n.replace("shift.bias", "shift") for n, p in named.items() if p.numel()]
        index = torch.cat([places[name] for name in own])
        dense.assert_same(matrix.to_dense(), other[index][:, index])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", ["KFAC", "ExactNGD", "TwoLevelKFAC", "EKFAC", "SINGD"])
def test_models_with_parameters_without_entries_train(kind):
    torch.manual_seed(0)
    model, x, y = Hollow().double(), normal(8, 3), normal(8, 2, seed=1)
    optimizer = getattr(natgrad, kind)(model, likelihood="gaussian", lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[2] < losses[0]


def test_what_only_training_fills_is_named_as_such():
    with pytest.warns(UserWarning, match="recursion"):
        matrix = fisher_matrix(network(), (normal(8, 5), None), structure="singd")
    vector = torch.randn(matrix.shape[0], generator=generator(1)).bfloat16()
    for found in (*applied(matrix, vector), *applied(matrix.inverse(), vector)):
        dense.assert_same(found, vector.double())
    assert float(matrix.logdet()) == 0.0


@pytest.mark.parametrize("structure", NAMES)
def test_whole_numbers_are_not_rounded_to_and_complex_ones_refused(structure):
    matrix = fisher_matrix(network(), (normal(8, 5), None), structure=structure)
    expected, inverse = matrix.to_dense(), matrix.inverse(0.1)
    ones = torch.ones(len(expected), dtype=torch.long)
    for one in (matrix, inverse, matrix + matrix, 0.5 * matrix):
        wanted = one @ ones.double()
        dense.assert_same(one @ ones, wanted)
        dense.assert_same(one @ (ones > 0), wanted)
        by_name = one @ dict(matrix.layout.to_dict(ones))
        dense.assert_same(matrix.layout.to_flat(by_name), wanted)
        assert (one @ wanted.new_zeros(len(wanted), 0)).shape == (len(wanted), 0)
        with pytest.raises(TypeError, match="real numbers, got torch.complex128"):
            one @ (ones * 1j).to(torch.complex128)
        with pytest.raises(TypeError, match="got float"):
            one @ dict.fromkeys(matrix.layout.names, 1.0)


@pytest.mark.parametrize("structure", NAMES)
def test_matrices_of_two_types_add_in_the_wider_one(structure):
    narrow, wide = (
        fisher_matrix(network(t), (normal(8, 5).to(t), None), structure=structure)
        for t in (torch.float32, torch.float64)
    )
    vector = torch.randn(wide.shape[0], generator=generator(1), dtype=torch.float64)
    expected = narrow.to_dense().double() + wide.to_dense()
    for total in (narrow + wide, wide + narrow):
        assert total.dtype == torch.float64
        dense.assert_same(total @ vector, expected @ vector, 1e-6)
        dense.assert_same(total.to_dense(), expected, 1e-6)
        shifted = expected + 0.5 * torch.eye(len(expected)).double()
        dense.assert_same(total.solve(vector, 0.5), torch.linalg.solve(shifted, vector), 1e-5)


def test_what_does_not_add_is_named():
    matrix = fisher_matrix(network(), (normal(8, 5), None))
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    larger = fisher_matrix(other, (normal(8, 5), None))
    with pytest.raises(ValueError, match="same parameters.*39 x 39.*57 x 57"):
        matrix + larger
    with pytest.raises(ValueError, match=r"0.weight \(20\).*0.weight \(30\)"):
        matrix.parts["0"] + larger.parts["0"]
    with pytest.raises(TypeError, match="unsupported operand"):
        matrix + 1


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_every_part_has_a_damping(structure):
    matrix = fisher_matrix(network(), (normal(8, 5), None), structure=structure)
    for wrong in ({"nothing": 0.1}, {}):
        with pytest.raises(ValueError, match="one for each part of"):
            matrix.inverse(wrong)
    for wrong in ({"0": 0.1, "2": -1.0}, {"0": None, "2": 0.1}, "0.1", None):
        with pytest.raises(ValueError, match="damping must be a finite number"):
            matrix.inverse(wrong)
    if structure == "kfac":
        with pytest.raises(ValueError, match="one for each part of"):
            matrix.inverse_root({"0": 0.1})
    assert matrix.inverse({"0": 0.1, "2": 0.1}).shape == matrix.shape


@pytest.mark.parametrize("coarse_space", ["nicolaides", "spectral"])
def test_entries_of_a_corrected_inverse_are_those_of_its_products(coarse_space):
    structure = natgrad.curvature.TwoLevelKronecker(coarse_space=coarse_space)
    data = (normal(40, 5), None)
    matrix = fisher_matrix(network(), data, structure=structure)
    inverse = matrix.inverse(0.1)
    eye = torch.eye(matrix.shape[0]).double()
    expected = inverse @ eye
    plain = fisher_matrix(network(), data, structure=natgrad.curvature.KroneckerFactors())
    assert not torch.allclose(expected, plain.inverse(0.1).to_dense())
    dense.assert_same(inverse.to_dense(), expected)
    dense.assert_same(inverse.diagonal(), expected.diagonal())
    dense.assert_same(inverse.trace(), expected.trace())
    dense.assert_same(inverse.frobenius_norm(), expected.norm())
    dense.assert_same(inverse.logdet(0.3), torch.logdet(expected + 0.3 * eye))
    dense.assert_same(inverse.det(0.3), torch.det(expected + 0.3 * eye))
    dense.assert_same((0.5 * inverse) @ eye, 0.5 * expected)
    for total in (inverse + matrix, matrix + inverse, plain + inverse, inverse + plain):
        dense.assert_same(total @ eye, expected + matrix.to_dense(), 1e-8)
    dense.assert_same(inverse.submatrix(["0"]).to_dense(), expected[:24, :24])
    with Capture(network()) as capture:
        _, rows = output_rows(capture, data[0])
    for refused in (
        inverse.eigenvalues, inverse.inverse, lambda: inverse.inverse_root(0.1),
        lambda: inverse.function_space_map(rows),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match="not symmetric"):
            refused()
