"""Functions of torch that have no second derivatives, against loops over bags and pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from natgrad import gauss_newton_matrix, hessian_matrix, jacobian_matrix, update_quality
from tests import dense
from tests.cases import normal

TOKENS = torch.tensor([[1, 4, 4], [0, 2, 6], [5, 1, 0], [3, 3, 3], [6, 0, 2]])
#: Where bags of the same tokens in a row begin; the second one is empty.
STARTS = torch.tensor([0, 4, 4, 9, 13])


class Bags(nn.Module):
    """A layer on bags of embeddings, by torch or by a loop over bags."""

    def __init__(self, in_a_row: bool, weighted: bool, by_loop: bool, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, **options)
        self.head, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7))
        self.in_a_row, self.weighted, self.by_loop = in_a_row, weighted, by_loop

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.scale * torch.linspace(0.5, 2.0, 15).double() if self.weighted else None
        last = self.bag.include_last_offset
        starts = torch.cat([STARTS, torch.tensor([15])]) if last else STARTS
        given, offsets = (tokens.flatten(), starts) if self.in_a_row else (tokens, None)
        if not self.by_loop:
            per_sample = weights if weights is None else weights.view_as(given)
            return self.head(self.bag(given, offsets, per_sample).tanh())
        bounds = [*STARTS.tolist(), 15] if self.in_a_row else list(range(0, 16, 3))
        return self.head(torch.stack([
            self.of(tokens.flatten(), weights, range(*pair)) for pair in itertools.pairwise(bounds)
        ]).tanh())  # fmt: skip

    def of(self, tokens: Tensor, weights: Tensor | None, places: range) -> Tensor:
        places = [k for k in places if int(tokens[k]) != self.bag.padding_idx]
        if not places:
            return torch.zeros(4).double()
        rows = torch.stack([
            self.bag.weight[int(tokens[k])] * (1.0 if weights is None else weights[k])
            for k in places
        ])  # fmt: skip
        return {"sum": rows.sum, "mean": rows.mean, "max": rows.amax}[self.bag.mode](0)


class Embedded(nn.Module):
    """Embeddings whose gradients are sparse, or scaled by frequency."""

    def __init__(self, by_loop: bool, **options: Any) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4, **options), nn.Linear(4, 3)
        self.by_loop = by_loop

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.table.weight[tokens] if self.by_loop else self.table(tokens)
        return self.head(rows.mean(1).tanh())


class Apart(nn.Module):
    """A layer on distances, of which some are zero."""

    def __init__(self, by_loop: bool, p: float, pairs: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(5, 3)
        self.by_loop, self.p, self.pairs = by_loop, p, pairs

    def forward(self, tokens: Tensor) -> Tensor:
        points = self.body(tokens.double())
        if self.pairs:
            first, second = torch.triu_indices(5, 5, 1)
            if self.by_loop:
                found = torch.stack([
                    self.between(points[i], points[j]) for i, j in zip(first, second, strict=True)
                ])  # fmt: skip
            else:
                found = functional.pdist(points, self.p)
            square = points.new_zeros(5, 5).index_put((first, second), found)
            return self.head(square + square.T)
        if not self.by_loop:
            return self.head(torch.cdist(points, points, self.p))
        return self.head(torch.stack([
            torch.stack([self.between(one, other) for other in points]) for one in points
        ]))  # fmt: skip

    def between(self, one: Tensor, other: Tensor) -> Tensor:
        if bool((one == other).all()):
            return torch.zeros(()).double()
        return ((one - other).abs() ** self.p).sum() ** (1 / self.p)


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    **{
        f"{mode} of bags {kind}": lambda by_loop, mode=mode, kind=kind: Bags(
            kind != "of a matrix", mode == "sum" and kind != "of a matrix", by_loop, mode=mode,
            padding_idx=2 if kind == "with padding" else None,
            include_last_offset=kind == "with a last one",
        )
        for mode in ("sum", "mean", "max")
        for kind in ("of a matrix", "in a row", "with padding", "with a last one")
    },
    "sparse bags": lambda by_loop: Bags(False, False, by_loop, mode="mean", sparse=True),
    "sparse embeddings": lambda by_loop: Embedded(by_loop, sparse=True),
    "embeddings by frequency": lambda by_loop: Embedded(by_loop, scale_grad_by_freq=True),
    "distances": lambda by_loop: Apart(by_loop, 2.0, False),
    "other distances": lambda by_loop: Apart(by_loop, 3.0, False),
    "distances of pairs": lambda by_loop: Apart(by_loop, 2.0, True),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_matrices_of_functions_without_second_derivatives(name):
    torch.manual_seed(0)
    model = MODELS[name](by_loop=False).double()
    twin = MODELS[name](by_loop=True).double()
    twin.load_state_dict(model.state_dict())
    target, shapes = torch.tensor([0, 2, 1, 1, 0]), {n: p.shape for n, p in twin.named_parameters()}
    flat = nn.utils.parameters_to_vector(twin.parameters()).detach()

    def outputs(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        values = {n: v.view(s) for (n, s), v in zip(shapes.items(), pieces, strict=True)}
        return functional_call(twin, values, (TOKENS,))

    def loss(vector: Tensor) -> Tensor:
        return functional.cross_entropy(outputs(vector), target)

    jacobian = torch.autograd.functional.jacobian(outputs, flat).flatten(0, 1)
    hessian = torch.autograd.functional.hessian(loss, flat)
    (slope,) = torch.autograd.functional.jacobian(loss, (flat,))
    shares = outputs(flat).softmax(1)
    blocks = torch.diag_embed(shares) - shares.unsqueeze(2) * shares.unsqueeze(1)
    expected = jacobian.T @ torch.block_diag(*blocks) @ jacobian / 5
    data, v = (TOKENS, target), normal(len(flat))
    dense.assert_same(hessian_matrix(model, data).to_dense(), hessian)
    dense.assert_same(gauss_newton_matrix(model, data).to_dense(), expected)
    matrix = jacobian_matrix(model, (TOKENS, None))
    dense.assert_same(matrix @ v, jacobian @ v)
    dense.assert_same(matrix.T @ v[:15], jacobian.T @ v[:15])
    update = gauss_newton_matrix(model, data).layout.to_dict(v)
    quality = update_quality(model, data, update)
    assert quality.slope == pytest.approx(float(v @ slope))
    assert quality.curvature == pytest.approx(float(v @ expected @ v))


class Square(torch.autograd.Function):
    """A square whose derivative may be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * ctx.saved_tensors[0] * gradient


class Once(Square):
    """The same, once."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * ctx.saved_tensors[0] * gradient


class Outside(Square):
    """The same with a derivative made outside of torch."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found = 2.0 * ctx.saved_tensors[0].detach().numpy() * gradient.detach().numpy()
        return torch.from_numpy(found)


class Compiled(Square):
    """The same with a derivative that says that it has none."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("this does not currently support double backward")
        return 2.0 * ctx.saved_tensors[0] * gradient


class Squares(nn.Module):
    """A network with a function of the user's own."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.body, self.head, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function.apply(self.body(x)))


@pytest.mark.parametrize("function", [Once, Outside, Compiled])
def test_functions_of_ones_own_that_have_one_derivative_are_refused(function):
    model, data = Squares(function).double(), (normal(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    size = 26
    for matrix in (hessian_matrix(model, data), gauss_newton_matrix(model, data)):
        with pytest.raises(ValueError, match=r"cannot be differentiated (again|twice)"):
            matrix @ torch.ones(size)
    jacobian = jacobian_matrix(model, data)
    with pytest.raises(ValueError, match=r"cannot be differentiated (again|twice)"):
        jacobian @ torch.ones(size)
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"cannot be differentiated (again|twice)"):
        update_quality(model, data, update)
    twin = Squares(Square).double()
    twin.load_state_dict(model.state_dict())
    expected = jacobian_matrix(twin, data)
    pulled = jacobian.T @ torch.ones(10).double()
    dense.assert_same(pulled, expected.T @ torch.ones(10).double())
    pushed = expected @ normal(size)
    dense.assert_same(pushed, expected.to_dense() @ normal(size))
