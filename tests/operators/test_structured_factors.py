"""Structured matrices against masks of dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natgrad.operators.structured_factors import identity_matrix
from natgrad.operators.structured_matrix import StructuredMatrix
from tests import dense

STRUCTURES = [
    "dense",
    "diagonal",
    "block_diagonal",
    "lower_triangular",
    "upper_triangular",
    "lower_toeplitz",
    "upper_toeplitz",
    "hierarchical",
]
#: Those that never form a d × d matrix.
SMALL = ["diagonal", "block_diagonal", "hierarchical"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def block_of(size: int, block_size: int) -> list[int]:
    """Return the block every coordinate is in."""
    return [i // block_size for i in range(size)]


def part_of(size: int, corners: tuple[int, int]) -> list[int]:
    first = min(corners[0], size)
    last = min(corners[1], size - first)
    return [0 if i < first else 2 if i >= size - last else 1 for i in range(size)]


def factor_of(
    structure: str, size: int, block_size: int = 32, corners: tuple[int, int] = (16, 16)
) -> Callable[[int, int], int]:
    """Return how often Π counts entry (i, j) of a symmetric matrix."""
    blocks, parts = block_of(size, block_size), part_of(size, corners)

    def hierarchical(i: int, j: int) -> int:
        if parts[i] == parts[j]:
            return int(parts[i] != 1 or i == j)
        return 2 * int(parts[i] == 0 or (parts[i] == 2 and parts[j] == 1))

    return {
        "dense": lambda i, j: 1,
        "diagonal": lambda i, j: int(i == j),
        "block_diagonal": lambda i, j: int(blocks[i] == blocks[j]),
        "lower_triangular": lambda i, j: 1 if i == j else 2 * int(i > j),
        "upper_triangular": lambda i, j: 1 if i == j else 2 * int(i < j),
        "lower_toeplitz": lambda i, j: 1 if i == j else 2 * int(i > j),
        "upper_toeplitz": lambda i, j: 1 if i == j else 2 * int(i < j),
        "hierarchical": hierarchical,
    }[structure]


def projection(structure: str, symmetric: Tensor, **sizes: Any) -> Tensor:
    """Return Π(S) of a symmetric matrix (d, d), entry by entry."""
    size = len(symmetric)
    factor = factor_of(structure, size, **sizes)
    counts = torch.tensor([[factor(i, j) for j in range(size)] for i in range(size)])
    values = symmetric
    if "toeplitz" in structure:
        values = torch.empty_like(symmetric)
        for i in range(size):
            for j in range(size):
                values[i, j] = symmetric.diagonal(j - i).mean()
    return values * counts


def projections(structure: str, symmetric: Tensor, **sizes: Any) -> Tensor:
    return torch.stack([projection(structure, group, **sizes) for group in symmetric])


def symmetric_matrix(groups: int, size: int, seed: int) -> Tensor:
    matrix = normal(groups, size, size, seed=seed)
    return matrix + matrix.mT


def make(
    structure: str, groups: int, size: int, block_size: int, corners: tuple[int, int]
) -> StructuredMatrix:
    return identity_matrix(
        structure, groups, size, block_size=block_size, hierarchical_sizes=corners,
        dtype=torch.float64,
    )  # fmt: skip


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


shapes = {
    "groups": st.integers(1, 3),
    "size": st.integers(1, 11),
    "block_size": st.integers(1, 6),
    "corners": st.tuples(st.integers(0, 4), st.integers(0, 4)),
    "rows": st.integers(0, 30),
    "seed": st.integers(0, 1000),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@given(**shapes)
def test_operations_are_those_of_dense_matrices(
    structure, groups, size, block_size, corners, rows, seed
):
    sizes = {"block_size": block_size, "corners": corners}
    one = make(structure, groups, size, **sizes)
    eye = torch.eye(size, dtype=torch.float64).expand(groups, size, size)
    same(one.to_dense(), eye)
    assert one.structure == structure and (one.groups, one.size) == (groups, size)

    k = one.project(symmetric_matrix(groups, size, seed))
    m = one.project(symmetric_matrix(groups, size, seed + 1))
    full, other = k.to_dense(), m.to_dense()
    same(full, projections(structure, symmetric_matrix(groups, size, seed), **sizes))
    same(k.identity().to_dense(), eye)

    # Closed: products are those of the dense matrices, and the entries hold all of them.
    same((k @ m).to_dense(), full @ other)
    same((k @ m @ k).to_dense(), full @ other @ full)
    same(k.scaled(-0.3).plus(m, 2.5).to_dense(), -0.3 * full + 2.5 * other)
    factors = normal(groups, seed=seed)
    same(k.scaled(factors).to_dense(), full * factors[:, None, None])
    same(k.plus(m, factors).to_dense(), full + other * factors[:, None, None])

    x, weights = normal(groups, rows, size, seed=seed + 2), normal(groups, size, seed=seed + 3)
    same(k.multiply_rows(x), x @ full)
    same(k.multiply_rows_transposed(x), x @ full.mT)
    same(k.multiply_metric(x), x @ full @ full.mT)
    same(k.trace(), full.diagonal(dim1=1, dim2=2).sum(1))

    def projected(matrix: Tensor) -> Tensor:
        return projections(structure, matrix, **sizes)

    same(k.project_rows(x).to_dense(), projected(x.mT @ x))
    same(k.gram().to_dense(), projected(full.mT @ full))
    same(k.gram(weights).to_dense(), projected(full.mT @ torch.diag_embed(weights) @ full))
    same(k.congruence(x).to_dense(), projected(full.mT @ x.mT @ x @ full))

    bound, norm = k.norm_bound(), torch.linalg.matrix_norm(full, 2)
    assert (bound >= norm * (1 - 1e-12)).all()
    frobenius = torch.linalg.matrix_norm(full)
    assert (bound <= frobenius * (1 + 1e-12)).all()
    sums = (full.abs().sum(1).amax(1) * full.abs().sum(2).amax(1)).sqrt()
    same(bound, torch.minimum(frobenius, sums))
    same(one.scaled(-3.0).norm_bound(), torch.full((groups,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_chains_of_products_stay_in_the_structure(structure):
    """Fifty products and sums, against dense matrices whose other entries must stay zero."""
    factor = factor_of(structure, 9, block_size=4, corners=(2, 3))
    outside = torch.tensor([[factor(i, j) == 0 for j in range(9)] for i in range(9)])
    k = make(structure, 2, 9, 4, (2, 3))
    full = k.to_dense().clone()
    for seed in range(50):
        symmetric = symmetric_matrix(2, 9, seed)
        step = projections(structure, symmetric, block_size=4, corners=(2, 3))
        k = k.plus(k @ k.project(symmetric), -0.02)
        full = full - 0.02 * full @ step
    torch.testing.assert_close(k.to_dense(), full, rtol=1e-10, atol=1e-10)
    assert (full[:, outside] == 0).all() and (k.to_dense()[:, outside] == 0).all()


@pytest.mark.parametrize("structure", ["lower_triangular", "upper_triangular"])
def test_doubling_keeps_the_first_order_change(structure):
    """The change of ``K Kᵀ`` by a small step is that of the symmetric step."""
    symmetric = symmetric_matrix(1, 7, 3)
    step = make(structure, 1, 7, 1, (0, 0)).project(symmetric).to_dense()
    same(step + step.mT, 2 * symmetric)


STORED = {
    "dense": lambda d: d * d,
    "diagonal": lambda d: d,
    "block_diagonal": lambda d: 32 * 32 * (d // 32) + (d % 32) ** 2,
    "lower_triangular": lambda d: d * (d + 1) // 2,
    "upper_triangular": lambda d: d * (d + 1) // 2,
    "lower_toeplitz": lambda d: d,
    "upper_toeplitz": lambda d: d,
    "hierarchical": lambda d: 2 * 16 * (d - 32) + (d - 32) + 3 * 16 * 16,
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("size", [64, 320, 321])
def test_stored_numbers(structure, size):
    """What is stored, after operations too, and no storage larger than that is kept alive."""
    expected = STORED[structure](size)
    one = identity_matrix(structure, 2, size)
    x = torch.randn(2, 5, size)
    symmetric = torch.randn(2, size, size)
    for k in (one, one @ one, one.gram(), one.congruence(x), one.project(symmetric + symmetric.mT)):
        assert k.numel == 2 * expected
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in k.entries}
        assert sum(held.values()) == 4 * 2 * expected


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("structure", SMALL)
def test_no_matrix_is_formed(structure):
    size, rows = 4000, 8
    with Largest() as largest:
        k = identity_matrix(structure, 1, size)
        x, weights = torch.randn(1, rows, size), torch.rand(1, size)
        moved = k.plus(k @ k.congruence(x), -0.1)
        moved.gram(), moved.gram(weights), moved.norm_bound(), moved.trace()
        moved.multiply_metric(x)
    assert largest.numel <= 33 * size < size * size / 100


@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision(structure):
    """In bfloat16 everything is bfloat16 and right to its rounding."""
    exact = identity_matrix(structure, 2, 40, dtype=torch.float64)
    rough = identity_matrix(structure, 2, 40, dtype=torch.bfloat16)
    x = normal(2, 100, 40).to(torch.bfloat16)
    for matrix in (rough.congruence(x), rough.gram(), rough @ rough):
        assert all(t.dtype == torch.bfloat16 for t in matrix.entries)
    expected = exact.congruence(x.double()).to_dense()
    dense.assert_same(rough.congruence(x).to_dense().double(), expected, 2**-7)
    moved = rough.plus(rough @ rough.congruence(x), -1e-3)
    reference = exact.plus(exact @ exact.congruence(x.double()), -1e-3)
    actual = moved.multiply_metric(x)
    assert actual.dtype == torch.bfloat16
    dense.assert_same(actual.double(), reference.multiply_metric(x.double()), 2**-6)


def test_ill_conditioned_rows_in_half_precision():
    """Whitened rows keep the direction that is small before; rounding ``XᵀX`` would lose it."""
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / 2**0.5
    scale = torch.diag(torch.tensor([50.0, 1.0], dtype=torch.float64))
    x = (normal(1, 1000, 2) @ scale @ turn).to(torch.bfloat16)
    whitening = (turn.mT @ scale.inverse() @ turn).to(torch.bfloat16)
    k = identity_matrix("dense", 1, 2, dtype=torch.bfloat16).map(lambda _: whitening.unsqueeze(0))
    rounded = (x.mT @ x).double()
    lost = torch.linalg.eigvalsh(whitening.double() @ rounded @ whitening.double())
    values = torch.linalg.eigvalsh(k.congruence(x).to_dense().double())
    assert (values > 800).all() and (values < 1250).all()
    assert not ((lost > 800).all() and (lost < 1250).all())


def test_non_finite_entries_are_seen():
    for structure in STRUCTURES:
        k = identity_matrix(structure, 2, 5)
        assert bool(k.is_finite())
        rows = torch.ones(2, 3, 5)
        rows[1, 2, 3] = float("nan")
        assert not bool(k.project_rows(rows).is_finite())
        assert not bool(k.congruence(rows).is_finite())


def test_errors_are_clear():
    for arguments, options, message in [
        (("sparse", 1, 3), {}, "must be one of dense, diagonal, .* got 'sparse'"),
        (("dense", 1, 0), {}, "size of at least 1, got 0"),
        (("block_diagonal", 1, 3), {"block_size": 0}, "block_size must be at least 1, got 0"),
        (("hierarchical", 1, 3), {"hierarchical_sizes": (1, -1)}, "two sizes >= 0"),
        (("hierarchical", 1, 3), {"hierarchical_sizes": (1,)}, "two sizes >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            identity_matrix(*arguments, **options)
