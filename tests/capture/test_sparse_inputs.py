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


class Outside(torch.autograd.Function):
    """A square whose derivative is made outside of torch, one vector at a time."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.x = x.detach().numpy()
        return torch.from_numpy(ctx.x**2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.from_numpy(2.0 * ctx.x * gradient.detach().numpy())


class Between(nn.Module):
    """A function that several vectors cannot go through together, between layers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.body, self.head, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x).tanh()).tanh())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:natgrad. the samples of a batch are coupled")
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "outside"])
def test_functions_that_take_one_vector_at_a_time_lie_anywhere(kind):
    """The graph of a pass that nobody needs any more was gone after the layers above them."""
    x, target = normal(8, 4, seed=0), torch.arange(8) % 3
    neighbours = (normal(8, 8, seed=1).abs() < 0.4).double() + torch.eye(8).double()
    given = neighbours.to_sparse(layout=getattr(torch, kind, torch.sparse_coo))
    torch.manual_seed(0)
    own = Outside.apply if kind == "outside" else lambda h: given @ h
    model = Between(own).double()
    plain = Between(torch.square if kind == "outside" else lambda h: neighbours @ h).double()
    plain.load_state_dict(model.state_dict())
    for structure in ("full", "kfac"):
        found, expected = (
            natgrad.fisher_matrix(one, (x, target), structure=structure) for one in (model, plain)
        )
        torch.testing.assert_close(found.to_dense(), expected.to_dense())
    kernels = [natgrad.ntk.empirical_kernel(one, x) for one in (model, plain)]
    torch.testing.assert_close(*kernels)
    variances = [natgrad.Laplace(one, (x, target)).functional_variance(x) for one in (model, plain)]
    torch.testing.assert_close(*variances)
    assert natgrad.tools.influence(model, (x, target), (x, target)).shape == (8, 8)
