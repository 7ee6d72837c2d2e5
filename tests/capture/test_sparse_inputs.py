"""Layers and products with sparse inputs, as of graphs, have the rows of the dense ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests.cases import normal

PRODUCTS = {
    "@": lambda x, w: x @ w,
    "mm": torch.mm,
    "spmm": torch.spmm,
    "sparse.mm": torch.sparse.mm,
}


class Product(nn.Module):
    def __init__(self, product) -> None:
        super().__init__()
        self.product, self.kernel = product, nn.Parameter(normal(6, 3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.kernel)


class Twice(nn.Module):
    """A layer with two inputs of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(normal(*p.shape, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - self.layer(x * 0.5)


def curvature(model: nn.Module, x: Tensor) -> Tensor:
    optimizer = natgrad.KFAC(model, fisher="exact")
    functional.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()
    return optimizer.preconditioner.curvature.matrix().to_dense()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("case", [*PRODUCTS, "layer"])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_rows_are_those_of_dense_inputs(case, layout):
    x = normal(20, 6, seed=0)
    x[x.abs() < 0.6] = 0.0

    def model() -> nn.Module:
        return Twice() if case == "layer" else Product(PRODUCTS[case])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="natgrad")
        found = curvature(model(), x.to_sparse(layout=layout))
    plain = Twice() if case == "layer" else Product(PRODUCTS["@"])
    torch.testing.assert_close(found, curvature(plain, x))


def test_a_graph_convolution_is_a_product():
    """Its features are sparse, and its nodes coupled."""
    x, links = normal(12, 6, seed=0), (normal(12, 12, seed=3) > 1).double() + torch.eye(12)

    class Convolution(Product):
        def forward(self, x: Tensor) -> Tensor:
            return torch.spmm(links.to_sparse(), super().forward(x))

    with pytest.warns(UserWarning, match="coupled"):
        found = curvature(Convolution(torch.mm), x.relu().to_sparse())
    with pytest.warns(UserWarning, match="coupled"):
        expected = curvature(Convolution(torch.mm), x.relu())
    torch.testing.assert_close(found, expected)
