"""Submatrices of every structure, by names and by indices, against dense indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from natgrad import fisher_matrix
from natgrad.curvature import STRUCTURES
from natgrad.operators import Submatrix, SubmatrixOperator
from tests import dense
from tests.cases import normal

NAMES = sorted(set(STRUCTURES) - {"singd"})


def matrix_of(structure: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return fisher_matrix(model, (normal(12, 3), None), "gaussian", structure)


@pytest.mark.parametrize("structure", NAMES)
def test_names_and_indices(structure):
    matrix = matrix_of(structure)
    whole = matrix.to_dense()
    places = {"0.weight": range(12), "0.bias": range(12, 16), "2.weight": range(16, 24),
              "2.bias": range(24, 26)}  # fmt: skip
    for chosen, names in ((["2"], ("2.weight", "2.bias")), (["2.bias", "0.weight"],
                          ("0.weight", "2.bias")), ([9, 3, 20], ("entries",))):  # fmt: skip
        index = torch.tensor(
            chosen if names == ("entries",) else [i for name in names for i in places[name]]
        )
        expected, found = whole[index][:, index], matrix.submatrix(chosen)
        assert isinstance(found, SubmatrixOperator) and found.layout.names == names
        dense.assert_same(found.to_dense(), expected)
        dense.assert_same(found.diagonal(), expected.diagonal())
        dense.assert_same(found.trace(), expected.trace())
        columns, eye = normal(len(index), 2), torch.eye(len(index)).double()
        dense.assert_same(
            found.solve(columns, 0.3), torch.linalg.solve(expected + 0.3 * eye, columns)
        )
        dense.assert_same(found.logdet(0.3), torch.logdet(expected + 0.3 * eye))
        root = found.inverse_root(0.3).to_dense()
        dense.assert_same(root @ root, torch.linalg.inv(expected + 0.3 * eye), 1e-8)
        named = found.layout.to_dict(columns[:, 0])
        dense.assert_same(found.layout.to_flat(found @ named), expected @ columns[:, 0])
        again = found.submatrix(torch.tensor([1, 0]))
        dense.assert_same(again.to_dense(), expected[[1, 0]][:, [1, 0]])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_and_columns_of_any_choice(data):
    matrix = matrix_of("kfac")
    choice = st.lists(st.integers(0, 25), min_size=1, max_size=26, unique=True)
    rows, columns = data.draw(choice), data.draw(choice)
    expected = matrix.to_dense()[rows][:, columns]
    found = matrix.submatrix(rows, columns)
    assert isinstance(found, Submatrix) and found.shape == expected.shape
    dense.assert_same(found.to_dense(), expected)
    dense.assert_same(found.T.to_dense(), expected.T)
    vector = normal(len(columns))
    dense.assert_same(found @ {"entries": vector}, expected @ vector)


def test_wrong_choices_are_named():
    matrix = matrix_of("diagonal")
    with pytest.raises(ValueError, match="'1'"):
        matrix.submatrix(["1"])
    wrong_ones = ([26], [-1], [3, 3], [], torch.ones(2, 2, dtype=torch.long), [1.5], [True, False],
                  slice(0, 3), None, 3, ["0", 1])  # fmt: skip
    for wrong in wrong_ones:
        with pytest.raises(ValueError, match="indices from 0 to 25"):
            matrix.submatrix(wrong)


def test_masks_are_the_entries_where_they_are_true():
    matrix, mask = matrix_of("kfac"), torch.arange(26) % 3 == 1
    expected = matrix.to_dense()[mask]
    dense.assert_same(matrix.submatrix(mask).to_dense(), expected[:, mask])
    dense.assert_same(matrix.submatrix(mask.tolist(), ["0.bias"]).to_dense(), expected[:, 12:16])


@pytest.mark.parametrize("structure", ["kfac", "block_diagonal", "diagonal", "unit_wise"])
def test_parts_that_no_entry_is_in_take_no_part(structure, monkeypatch):
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)
    model = nn.Sequential(*layers).double()
    matrix = fisher_matrix(model, (normal(9, 3), None), "gaussian", structure)
    whole, size = matrix.to_dense(), matrix.shape[0]
    inverse = matrix.inverse(0.1)
    dense_inverse = inverse.to_dense()
    first = matrix.parts["0"]
    monkeypatch.setattr(type(first), "multiply", counting(type(first).multiply, seen := []))
    for index in (torch.arange(16, size), torch.tensor([size - 1, 20, 33])):
        dense.assert_same(matrix.submatrix(index).to_dense(), whole[index][:, index])
        dense.assert_same(inverse.submatrix(index).to_dense(), dense_inverse[index][:, index])
    dense.assert_same(matrix.submatrix(["4", "2"]).to_dense(), whole[16:, 16:])
    assert all(one is not first for one in seen)


def counting(function, seen):
    def counted(self, columns):
        seen.append(self)
        return function(self, columns)

    return counted
