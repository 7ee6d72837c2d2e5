"""Layer Jacobians of every layer kind against the dense reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.jacobians import LinearJacobian, StackedJacobian
from natgrad.jacobians import layer as layer_module
from natgrad.jacobians import linear as linear_module
from natgrad.layouts import BlockLayout
from tests import dense
from tests.cases import CASES, Case, normal


def pulled_back(case: Case, directions: int = 3, seed: int = 5):
    """Return a case's Jacobians for random vectors, and the dense rows (N, K, P)."""
    z, jac = case.jacobian
    vectors = normal(directions, *z.shape, seed=seed)
    with Capture(case.model, case.output) as capture:
        out = dense.call(case.model, case.x, case.output)
        result = capture.pull_back(out, vectors)
        assert not capture.uncovered
        blocks = dict(capture.blocks)
    return result, dense.rows(jac, vectors), blocks


@pytest.fixture(params=list(CASES))
def case(request) -> Case:
    return CASES[request.param]()


def test_blocks_partition_the_parameters_as_expected(case):
    result, _, blocks = pulled_back(case)
    found = {name: block.layout.names for name, block in blocks.items()}
    assert sorted(found.values()) == sorted(spec.names for spec in case.blocks)
    reached = [spec.names for spec in case.blocks if spec.names in {found[n] for n in result}]
    assert [found[name] for name in result] == reached, "blocks must come in order of first call"
    unreached = {spec.names for spec in case.blocks} - {found[n] for n in result}
    where = dense.indices(case.model)
    for names in unreached:
        for name in names:
            assert not case.jacobian[1][..., where[name].flatten()].any()


def test_rows_are_exact(case):
    result, expected, _ = pulled_back(case)
    n, k, p = expected.shape
    assert (result.samples, result.directions, result.rows) == (n, k, n * k)
    dense.assert_same(result.to_dense(), expected.reshape(n * k, p))


def test_products_with_vectors(case):
    result, expected, _ = pulled_back(case)
    n, k, p = expected.shape
    vector, weights = normal(p, seed=1), normal(n, k, seed=2)
    dense.assert_same(result.matvec(vector), expected @ vector)
    dense.assert_same(result.rmatvec(weights), torch.einsum("nkp,nk->p", expected, weights))
    where = dense.indices(case.model)
    for block in result.values():
        index = torch.cat([where[name].flatten() for name in block.layout.names])
        rows = expected.reshape(n * k, p)[:, index]
        columns, row_weights = normal(len(index), 2, seed=3), normal(n * k, 2, seed=4)
        close(block.matvec(columns), rows @ columns)
        close(block.rmatvec(row_weights), rows.T @ row_weights)


def close(actual: Tensor, expected: Tensor) -> None:
    """As ``assert_same``, but two tensors of zeros agree too."""
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [None, 1, 40], ids=["whole", "one sample", "chunks"])
def test_grams_are_exact_in_any_chunks(case, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(layer_module, "CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr(linear_module, "SPLIT_OPERATIONS", 0)
    result, expected, _ = pulled_back(case)
    flat = expected.flatten(0, 1)
    dense.assert_same(result.gram(), flat @ flat.T)
    other, other_rows, _ = pulled_back(case, directions=2, seed=9)
    dense.assert_same(result.gram(other), flat @ other_rows.flatten(0, 1).T)
    where = dense.indices(case.model)
    for name, block in result.items():
        index = torch.cat([where[n].flatten() for n in block.layout.names])
        mine, theirs = flat[:, index], other_rows.flatten(0, 1)[:, index]
        close(block.gram(), mine @ mine.T)
        close(block.gram(other[name]), mine @ theirs.T)
        if isinstance(block, LinearJacobian):
            for symmetric, right, columns in ((True, block, mine), (False, other[name], theirs)):
                close(block._gram_by_positions(right, symmetric), mine @ columns.T)
                by_gradients = layer_module.gram_by_gradients(block, right, symmetric)
                close(by_gradients, mine @ columns.T)


@pytest.mark.parametrize("chunk", [None, 1, 40], ids=["whole", "one sample", "chunks"])
def test_diagonals_units_and_gradients(case, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(layer_module, "CHUNK_ELEMENTS", chunk)
    result, expected, _ = pulled_back(case)
    n, k, p = expected.shape
    flat = expected.reshape(n * k, p)
    where = dense.indices(case.model)
    specs = {spec.names: spec for spec in case.blocks}
    for block in result.values():
        spec, layout = specs[block.layout.names], block.layout
        index = torch.cat([where[name].flatten() for name in layout.names])
        close(block.to_dense(), flat[:, index])
        close(block.diagonal(), flat[:, index].square().sum(0))
        gradients = block.per_sample_gradients()
        assert gradients.shape == (n, k, layout.groups, layout.d_out, layout.d_augmented)
        close(layout.flat(gradients), expected[..., index])
        close(layout.matrix(expected[..., index]), gradients)
        close(layout.flat(block.per_sample_gradients(n - 1, n)), expected[n - 1 :][..., index])
        units = dense.unit_indices(case.model, [spec])
        blocks = block.unit_blocks()
        assert len(blocks) == len(units)
        for unit, moment in zip(units, blocks, strict=True):
            close(moment, flat[:, unit].T @ flat[:, unit])
        factors = block.unit_factors()
        if factors is not None:
            a, s = factors
            moments = torch.einsum("ngo,ngi,ngj->goij", s, a, a).flatten(0, 1)
            close(moments, blocks)


def test_one_layer_jacobians_do_not_form_dense_rows():
    """A Gram of many rows over a wide layer holds nothing of size N·K × P."""
    layer = torch.nn.Linear(2000, 1000)
    x = torch.randn(20, 2000)
    with Capture(layer) as capture:
        out = layer(x)
        result = capture.pull_back(out, torch.randn(2, *out.shape))
    largest = Largest()
    with largest:
        gram = result.gram()
    assert gram.shape == (40, 40)
    assert largest.elements <= 20 * 2000 * 2


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


# -- means and deviations --------------------------------------------------------------------------


def shared_rows(silent: bool = False) -> LinearJacobian:
    """Rows of 3 samples, 2 directions and 4 positions, of which one sample may use 2 and one 1.

    A position of the third counts though no vector reaches it, as all of its events do.
    """
    layout = BlockLayout(("w", "b"), ((4, 5), (4,)), 1, 4, 5, True, True)
    a, delta = normal(3, 4, 1, 5) + 1, normal(3, 2, 4, 1, 4, seed=1)
    if silent:
        delta[0, :, 2:] = delta[1, :, 1:] = delta[2, :, 3:] = 0
    partial = torch.tensor([True, True, False]) if silent else None
    return LinearJacobian(layout, a, delta, partial=partial)


@pytest.mark.parametrize("silent", [False, True])
def test_means_and_deviations_sum_to_the_rows(silent):
    rows = shared_rows(silent)
    means, deviations = rows.split()
    numbers = torch.tensor([2.0, 1.0, 4.0] if silent else [4.0] * 3).double()
    unbiased = (numbers / (numbers - 1).clamp(min=1)).sqrt().view(3, 1, 1, 1, 1)
    found = means.per_sample_gradients() + deviations.per_sample_gradients() / unbiased
    torch.testing.assert_close(found, rows.per_sample_gradients(), rtol=1e-12, atol=1e-12)
    assert means.positions == 1
    assert deviations.augmented_inputs()[..., -1].abs().max() == 0


@pytest.mark.parametrize("silent", [False, True])
def test_deviations_at_some_positions_are_right_on_average(silent):
    """The mean of their sums over all pairs of four positions is the sum over all."""
    rows = shared_rows(silent)
    whole = rows.split()[1].kronecker_factors()
    pairs = [torch.tensor(chosen) for chosen in itertools.combinations(range(4), 2)]
    parts = [rows.split(chosen)[1].kronecker_factors() for chosen in pairs]
    outputs = sum(part.outputs for part in parts) / len(parts)
    torch.testing.assert_close(outputs, whole.outputs, rtol=1e-12, atol=1e-12)
    inputs = sum(part.inputs for part in parts) / sum(part.positions for part in parts)
    torch.testing.assert_close(inputs, whole.inputs / whole.positions, rtol=1e-12, atol=1e-12)


def test_samples_bring_what_is_left_out_of_them():
    rows = shared_rows(silent=True)
    whole = rows.kronecker_factors()
    each = [rows.of_samples(torch.tensor([n])).kronecker_factors() for n in range(3)]
    assert [int(one.positions) for one in (*each, whole)] == [2, 1, 4, 7]
    total = sum(one.inputs for one in each)
    torch.testing.assert_close(total, whole.inputs, rtol=1e-12, atol=1e-12)


def test_combinations_leave_out_the_padding_of_their_rows():
    rows = shared_rows()
    rows.active_positions = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).double()
    found = rows.combined(normal(3, 2, 5, seed=3)).kronecker_factors()
    expected = rows.kronecker_factors()
    assert int(found.positions) == int(expected.positions) == 7
    torch.testing.assert_close(found.inputs, expected.inputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("partial", [None, torch.tensor([True, False, True])])
def test_every_map_of_a_stack_is_split_by_itself(partial):
    lengths = (4, 2)
    pieces = {
        group: [(normal(3, t, 5, seed=group) + 1, normal(3, 2, t, 4, seed=2 + group))]
        for group, t in enumerate(lengths)
    }
    for ((_, delta),) in pieces.values():
        delta[:, :, 1] = 0
    layout = BlockLayout(("w",), ((2, 4, 5),), 2, 4, 5, True, False)
    stack = StackedJacobian.of_matrices(layout, pieces, partial=partial)
    found = [rows.kronecker_factors() for rows in (*stack.split(), stack)]
    alone = BlockLayout(("w",), ((4, 5),), 1, 4, 5, True, False)
    for group in range(2):
        ((a, delta),) = pieces[group]
        rows = LinearJacobian(alone, a.unsqueeze(2), delta.unsqueeze(3), partial=partial)
        for one, wanted in zip(found, (*rows.split(), rows), strict=True):
            sums = wanted.kronecker_factors()
            mean = one.inputs[group] / one.positions[group]
            torch.testing.assert_close(mean.tril(), (sums.inputs[0] / sums.positions).tril())
            torch.testing.assert_close(one.outputs[group].tril(), sums.outputs[0].tril())
